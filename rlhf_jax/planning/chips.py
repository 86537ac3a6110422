"""Devices to plan for, which this machine need not have: their limits, and their topologies.

The name of a topology says which devices there are and how they are connected:

  v5p:4x4x8      a slice of 128 TPU v5p       2*v5e:16x16   two slices of 256 TPU v5e
  gpu:8xh100     a host with eight H100       gpu:4x8xh100  four such hosts
  cpu:8          eight devices on this CPU, to try a plan

Nothing runs on these devices. XLA only compiles programs for them, with libtpu
(`pip install 'rlhf_jax[tpu]'`) or with the CUDA plug-in of JAX (`pip install
'rlhf_jax[cuda-plan]'`).
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from rlhf_jax.errors import UserError
from rlhf_jax.runtime import mesh


@dataclasses.dataclass(frozen=True)
class Chip:
  """The limits of one device, from its manufacturer's data sheet."""

  memory: float  # bytes of HBM available to programs
  flops: float  # dense bfloat16 FLOP/s
  bandwidth: float  # bytes/s between HBM and processor
  # bytes/s that a device sends in a collective within a slice or host; for a TPU,
  # both directions of one axis of its torus together
  link: float
  network: float  # bytes/s that a device sends to other slices or hosts


CHIPS = {
  # Sources: cloud.google.com/tpu/docs and NVIDIA's data sheets.
  'v5e': Chip(15.75 * 2**30, 197e12, 819e9, 90e9, 3.1e9),
  'v5p': Chip(95 * 2**30, 459e12, 2765e9, 180e9, 6.2e9),
  'v6e': Chip(31.25 * 2**30, 918e12, 1640e9, 180e9, 12.5e9),
  'a100': Chip(85.1e9, 312e12, 2039e9, 300e9, 25e9),
  'h100': Chip(84.9e9, 989e12, 3350e9, 450e9, 50e9),
  'h200': Chip(150.1e9, 989e12, 4800e9, 450e9, 50e9),
  'cpu': Chip(0.0, 1e11, 1e10, 1e10, 1e9),  # its memory is set by open_topology
}


@dataclasses.dataclass(frozen=True)
class GpuDetails:
  """The properties of a GPU that XLA needs in addition to those of `Chip`."""

  title: str  # the name that CUDA gives it
  capability: int  # the major number of its compute capability
  processors: int  # streaming multiprocessors
  clock: float  # GHz
  shared_memory: int  # KiB for each processor
  cache: int  # MiB of level-2 cache


GPUS = {
  'a100': GpuDetails('NVIDIA A100-SXM4-80GB', 8, 108, 1.41, 164, 40),
  'h100': GpuDetails('NVIDIA H100 80GB HBM3', 9, 132, 1.98, 228, 50),
  'h200': GpuDetails('NVIDIA H200', 9, 132, 1.98, 228, 50),
}


class TopologyName(NamedTuple):
  """The parts of a topology's name."""

  chip: str  # a key of CHIPS
  # the shape of a TPU slice; (hosts, GPUs per host); or (devices,) for a CPU
  sizes: tuple[int, ...]
  slices: int  # TPU slices; 1 for other devices


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices to plan for."""

  name: str  # the topology's name, as the user wrote it
  chip: Chip  # the limits of each device
  # device descriptions for which XLA can compile; CPU devices, if its compiler is not installed
  devices: Sequence[jax.Device]
  platform: str  # 'tpu', 'gpu' or 'cpu'
  # the command that installs the missing compiler; '' where it is not missing
  missing: str = ''


def parse_topology(name: str) -> TopologyName:
  """Parses the name of a topology; the docstring of this module shows its forms.

  Raises:
    UserError: the name has another form, or there is no such chip.
  """
  parsed = _match_topology(name)
  if parsed is None or parsed.chip not in CHIPS or math.prod(parsed.sizes) * parsed.slices < 1:
    chips = ', '.join(chip for chip in CHIPS if chip != 'cpu')
    raise UserError(
      f'--topology={name}: expected TPU:SHAPE as v5p:4x4x8 (2*v5p:4x4x8 for two slices), '
      f'gpu:[HOSTSx]NxGPU such as gpu:8xh100, or cpu:N; known chips are {chips}'
    )
  return parsed


def open_topology(name: str, compiles: bool = True) -> Topology:
  """Opens a topology by its name.

  Where it uses CPU devices it sets their number in JAX, so it must be called
  before JAX is first used.

  Args:
    name: the name, in one of the forms that the docstring of this module shows.
    compiles: whether XLA will compile for the devices; if not, CPU devices are used in their
      place.

  Raises:
    UserError: the name is invalid, this TPU does not exist in this shape, or JAX has
      started already, with fewer CPU devices.
  """
  parsed = parse_topology(name)
  chip = CHIPS[parsed.chip]
  platform = _find_platform(parsed.chip)
  if platform == 'cpu' or not compiles:
    missing = ''
  else:
    missing = _install_command(platform)
  if compiles and not missing and platform == 'tpu':
    return Topology(name, chip, _describe_tpu(parsed, name), platform)
  if compiles and not missing and platform == 'gpu':
    return Topology(name, chip, _describe_gpu(parsed), platform)

  devices = _cpu_devices(math.prod(parsed.sizes) * parsed.slices, name)
  if platform == 'cpu':
    chip = dataclasses.replace(chip, memory=mesh.device_memory(devices[0]))
  return Topology(name, chip, devices, platform, missing)


@contextlib.contextmanager
def assume_cudnn() -> Iterator[bool]:
  """Allows programs that call cuDNN's attention to be compiled on a machine without cuDNN.

  While it traces such a call, JAX asks for the installed version of cuDNN; this
  context answers with an assumed version. XLA compiles the call without cuDNN.
  The reported memory then lacks only the workspace of cuDNN's backward pass,
  about 1% of a step's memory.

  Yields:
    Whether the version could be replaced, which depends on the version of JAX.
  """
  try:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    ask = cudnn.check_cudnn_version
  except (ImportError, AttributeError):  # an internal module, which other versions of JAX may lack
    yield False
    return
  cudnn.check_cudnn_version = _assumed_cudnn_version
  try:
    yield True
  finally:
    cudnn.check_cudnn_version = ask


def _assumed_cudnn_version() -> int:
  """Returns the version of cuDNN that plans assume, 9.13, as a number in JAX's form."""
  return 91300


def _match_topology(name: str) -> TopologyName | None:
  """Returns the parts of a well-formed name; None for another form. A TPU may be unknown."""
  tpu = re.fullmatch(r'(?:(\d+)\*)?(v\w+):(\d+(?:x\d+)*)', name)
  if tpu:
    sizes = tuple(int(size) for size in tpu[3].split('x'))
    return TopologyName(tpu[2], sizes, int(tpu[1] or 1))
  gpu = re.fullmatch(r'gpu:(?:(\d+)x)?(\d+)x([a-z]\w*)', name)
  if gpu and gpu[3] in GPUS:
    return TopologyName(gpu[3], (int(gpu[1] or 1), int(gpu[2])), 1)
  cpu = re.fullmatch(r'cpu:(\d+)', name)
  if cpu:
    return TopologyName('cpu', (int(cpu[1]),), 1)
  return None


def _find_platform(chip: str) -> str:
  """Returns JAX's name for the platform of a chip."""
  if chip in GPUS:
    return 'gpu'
  return 'cpu' if chip == 'cpu' else 'tpu'


def _install_command(platform: str) -> str:
  """Returns the command that installs XLA's compiler; '' where it is installed."""
  if platform == 'tpu':
    modules = ['libtpu']
    extra = 'tpu'
  else:
    modules = ['jax_plugins.xla_cuda12', 'jax_plugins.xla_cuda13']  # either is enough
    extra = 'cuda-plan'
  if any(_is_installed(module) for module in modules):
    return ''
  return f"pip install 'rlhf_jax[{extra}]'"


def _is_installed(module: str) -> bool:
  """Tells whether a module can be imported, without importing it."""
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # its parent package is missing
    return False


def _cpu_devices(count: int, name: str) -> list[jax.Device]:
  """Returns `count` devices of this CPU; `name` is the topology's, for the error message."""
  try:
    jax.config.update('jax_num_cpu_devices', count)
  except RuntimeError:  # JAX has started already; its number of devices may still be enough
    pass
  devices = jax.devices('cpu')
  if len(devices) < count:
    raise UserError(
      f'--topology={name}: expected {count} devices in this process, got {len(devices)}; '
      'unset XLA_FLAGS'
    )
  return devices[:count]


def _describe_gpu(parsed: TopologyName) -> Sequence[jax.Device]:
  """Returns descriptions of GPUs for which XLA can compile."""
  chip = CHIPS[parsed.chip]
  gpu = GPUS[parsed.chip]
  # a GpuTargetConfigProto of XLA, as in the files of
  # --xla_gpu_target_config_filename
  target = f"""gpu_device_info {{
      threads_per_block_limit: 1024
      threads_per_warp: 32
      shared_memory_per_block: 49152
      shared_memory_per_core: {gpu.shared_memory * 1024}
      shared_memory_per_block_optin: {(gpu.shared_memory - 1) * 1024}
      threads_per_core_limit: 2048
      core_count: {gpu.processors}
      fpus_per_core: {64 if gpu.capability == 8 else 128}
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
      memory_bandwidth: {int(chip.bandwidth)}
      l2_cache_size: {gpu.cache * 2**20}
      clock_rate_ghz: {gpu.clock}
      device_memory_size: {int(chip.memory)}
      cuda_compute_capability {{ major: {gpu.capability} minor: 0 }}
      registers_per_core_limit: 65536
      registers_per_block_limit: 65536
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
    device_description_str: "{gpu.title}"
  """
  shape = _join_sizes((1, *parsed.sizes))  # slices, hosts, GPUs
  described = topologies.get_topology_desc(
    parsed.chip, 'cuda', target_config=target, topology=shape
  )
  return described.devices


def _describe_tpu(parsed: TopologyName, name: str) -> Sequence[jax.Device]:
  """Returns descriptions of TPUs for which XLA can compile."""
  environment = dict(  # keeps libtpu from asking the metadata server that only TPU hosts have
    TPU_SKIP_MDS_QUERY='1',
    TPU_ACCELERATOR_TYPE=f'{parsed.chip}-1',
    TPU_WORKER_HOSTNAMES='localhost',
    TPU_STDERR_LOG_LEVEL='3',
    TPU_MIN_LOG_LEVEL='3',
    ALLOW_MULTIPLE_LIBTPU_LOAD='1',
  )
  for key, value in environment.items():
    os.environ.setdefault(key, value)
  options: dict[str, Any] = {}
  if math.prod(parsed.sizes) == 1:  # by default libtpu expects four or eight chips per host
    options['chips_per_host_bounds'] = [1, 1, 1]
  if parsed.slices > 1:
    options['num_slices'] = parsed.slices
  shape = _join_sizes(parsed.sizes)
  try:
    return topologies.get_topology_desc(f'{parsed.chip}:{shape}', 'tpu', **options).devices
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f'--topology={name}: {str(error).splitlines()[0]}') from None


def _join_sizes(sizes: tuple[int, ...]) -> str:
  """Formats sizes as XLA writes a shape, such as 4x4x8."""
  return 'x'.join(str(size) for size in sizes)
