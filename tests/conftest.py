"""Every test runs on CPU with 8 forced devices; a mesh of one device takes the first."""

import gc
import os

import pytest

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '')
  + (
    ' --xla_force_host_platform_device_count=8'
    ' --xla_cpu_collective_call_terminate_timeout_seconds=300'  # on a busy machine a device may be late
    ' --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
  )
)  # compiles in half the time


@pytest.fixture(scope='module', autouse=True)
def forget_programs():
  """Each compiled program holds memory maps, of which a process may have some 65,000."""
  yield
  import jax

  jax.clear_caches()
  gc.collect()
