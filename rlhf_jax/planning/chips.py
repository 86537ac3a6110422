"""Hardware that is not here: what each chip can do, by its makers' data sheets, and topologies of it as JAX devices.

  v5p:4x4x8      a slice of 128 TPU v5p       2*v5e:16x16   two slices
  gpu:8xh100     a host with eight H100       gpu:4x8xh100  four of them
  cpu:8          eight devices on this CPU, to try a plan

Nothing is computed on such devices: XLA compiles for them, by libtpu (`pip install 'rlhf_jax[tpu]'`) or CUDA's plug-in
(`pip install 'rlhf_jax[cuda-plan]'`).
"""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from rlhf_jax.errors import UserError
from rlhf_jax.runtime import mesh


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one device can do.

  Attributes:
    memory: bytes of HBM that programs can have.
    flops: bfloat16 products, FLOP/s, dense.
    bandwidth: of HBM, bytes/s.
    link: bytes/s that leave it in a collective within a slice or host; on a TPU in both directions of one axis of the
      torus.
    network: bytes/s that leave it between slices or hosts.
  """
  memory: float
  flops: float
  bandwidth: float
  link: float
  network: float


CHIPS = {
    'v5e': Chip(15.75 * 2**30, 197e12, 819e9, 90e9, 3.1e9),
    'v5p': Chip(95 * 2**30, 459e12, 2765e9, 180e9, 6.2e9),
    'v6e': Chip(31.25 * 2**30, 918e12, 1640e9, 180e9, 12.5e9),
    'a100': Chip(85.1e9, 312e12, 2039e9, 300e9, 25e9),
    'h100': Chip(84.9e9, 989e12, 3350e9, 450e9, 50e9),
    'h200': Chip(150.1e9, 989e12, 4800e9, 450e9, 50e9),
    'cpu': Chip(0.0, 1e11, 1e10, 1e10, 1e9),  # memory: a share of the machine's
}
GPUS = {  # what XLA asks of a GPU: name, compute capability, processors, clock in GHz, KiB of shared memory, MiB of cache
    'a100': ('NVIDIA A100-SXM4-80GB', 8, 108, 1.41, 164, 40),
    'h100': ('NVIDIA H100 80GB HBM3', 9, 132, 1.98, 228, 50),
    'h200': ('NVIDIA H200', 9, 132, 1.98, 228, 50),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """A topology by name.

  Attributes:
    name: as it was said.
    chip: what each device can do.
    devices: of JAX; where XLA cannot compile for them, devices of this CPU in their place.
    platform: 'tpu', 'gpu' or 'cpu'.
    missing: what to install so that XLA can; '' where it can.
  """
  name: str
  chip: Chip
  devices: list
  platform: str
  missing: str = ''


def parse(name: str) -> tuple[str, tuple[int, ...], int]:
  """(chip, sizes, slices) of a topology's name.

  Raises:
    UserError: it has another form, or there is no such chip.
  """
  tpu = re.fullmatch(r'(?:(\d+)\*)?(v\w+):(\d+(?:x\d+)*)', name)
  gpu = re.fullmatch(r'gpu:(?:(\d+)x)?(\d+)x([a-z]\w*)', name)
  cpu = re.fullmatch(r'cpu:(\d+)', name)
  if tpu:
    chip, sizes, slices = tpu[2], tuple(map(int, tpu[3].split('x'))), int(tpu[1] or 1)
  elif gpu:
    chip, sizes, slices = gpu[3], (int(gpu[1] or 1), int(gpu[2])), 1
  elif cpu:
    chip, sizes, slices = 'cpu', (int(cpu[1]),), 1
  if not (tpu or gpu or cpu) or (chip not in CHIPS) or bool(gpu) != (chip in GPUS) or math.prod(sizes) * slices < 1:
    raise UserError(f'--topology={name}: expected TPU:SHAPE as v5p:4x4x8 (2*v5p:4x4x8: two slices), gpu:[HOSTSx]NxGPU as '
                    f'gpu:8xh100, or cpu:N; known are {", ".join(chip for chip in CHIPS if chip != "cpu")}')
  return chip, sizes, slices


def topology(name: str, compiles: bool = True) -> Topology:
  """A topology by name. Call it before anything else of JAX, as it sets how many devices this CPU has.

  Args:
    compiles: XLA shall compile for it.

  Raises:
    UserError: as parse; a shape that this TPU does not come in, or more devices than this process has.
  """
  chip, sizes, slices = parse(name)
  platform = 'gpu' if chip in GPUS else 'cpu' if chip == 'cpu' else 'tpu'
  missing = '' if platform == 'cpu' or not compiles else _missing(platform)
  if not missing and platform != 'cpu' and compiles:
    return Topology(name, CHIPS[chip], _described(chip, sizes, slices, platform, name), platform)
  count = math.prod(sizes) * slices
  try:
    jax.config.update('jax_num_cpu_devices', count)
  except RuntimeError:  # JAX has begun with as many as it was told then
    pass
  if len(jax.devices('cpu')) < count:
    raise UserError(f'--topology={name}: this process has {len(jax.devices("cpu"))} devices; unset XLA_FLAGS')
  devices, said = jax.devices('cpu')[:count], CHIPS[chip]
  if chip == 'cpu':
    said = dataclasses.replace(said, memory=mesh.device_memory(devices[0]))
  return Topology(name, said, devices, platform, missing)


def _missing(platform):
  module, extra = ('libtpu', 'tpu') if platform == 'tpu' else ('jax_plugins.xla_cuda12', 'cuda-plan')
  try:
    found = importlib.util.find_spec(module)
  except ModuleNotFoundError:
    found = None
  return '' if found else f"pip install 'rlhf_jax[{extra}]'"


def _described(chip, sizes, slices, platform, name):
  if platform == 'gpu':
    title, major, processors, clock, shared, cache = GPUS[chip]
    said = CHIPS[chip]
    target = f'''gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
        shared_memory_per_core: {shared * 1024} shared_memory_per_block_optin: {(shared - 1) * 1024}
        threads_per_core_limit: 2048 core_count: {processors} fpus_per_core: {64 if major == 8 else 128}
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        memory_bandwidth: {int(said.bandwidth)} l2_cache_size: {cache * 2**20} clock_rate_ghz: {clock}
        device_memory_size: {int(said.memory)} cuda_compute_capability {{ major: {major} minor: 0 }}
        registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 patch: 0 }} device_description_str: "{title}"'''
    shape = 'x'.join(map(str, (1, *sizes)))
    return topologies.get_topology_desc(chip, 'cuda', target_config=target, topology=shape).devices
  alone = dict(TPU_SKIP_MDS_QUERY=1, TPU_ACCELERATOR_TYPE=f'{chip}-1', TPU_WORKER_HOSTNAMES='localhost',
               TPU_STDERR_LOG_LEVEL=3, TPU_MIN_LOG_LEVEL=3, ALLOW_MULTIPLE_LIBTPU_LOAD=1)  # there is no machine to ask
  for key, value in alone.items():
    os.environ.setdefault(key, str(value))
  few = dict(chips_per_host_bounds=[1, 1, 1]) if math.prod(sizes) == 1 else {}
  many = dict(num_slices=slices) if slices > 1 else {}
  shape = 'x'.join(map(str, sizes))
  try:
    return topologies.get_topology_desc(f'{chip}:{shape}', 'tpu', **few, **many).devices
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f'--topology={name}: {str(error).splitlines()[0]}') from None
