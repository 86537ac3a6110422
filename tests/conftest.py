"""Every test runs on CPU with 8 forced devices; a mesh of one device takes the first.

Compiled programs are kept between runs, in JAX_COMPILATION_CACHE_DIR where it is set and else in
the user's cache directory, as most of the time of the tests is compilation.
"""

import gc
from importlib import metadata
import os
from pathlib import Path

import pytest

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    '--xla_cpu_collective_call_terminate_timeout_seconds=300',  # on a busy machine one may be late
    '--xla_backend_optimization_level=0',  # with the next, programs compile in half the time
    '--xla_llvm_disable_expensive_passes=true',
  ]
)

if metadata.version('jaxlib').startswith('0.10.'):
  # The older emitters, which later versions lack, compile twice as fast.
  os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false'

_CACHES = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHES / 'rlhf_jax' / 'tests'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')


@pytest.fixture(scope='module', autouse=True)
def forget_programs():
  """Each compiled program holds memory maps, of which a process may have some 65,000."""
  yield
  import jax

  jax.clear_caches()
  gc.collect()
