"""One run on several hosts: its processes find each other here, before the first device is touched.

What says that there are several, the first that holds:
  1. --coordinator=HOST:PORT --processes=N --process=I, or RLHF_JAX_COORDINATOR, RLHF_JAX_PROCESSES, RLHF_JAX_PROCESS
  2. what started the process: xpk on GPUs, Open MPI, Slurm, a TPU pod, an indexed job of Kubernetes
--processes=1 says that there is one, whatever started it. One process joins nothing.
"""

import contextlib
import glob
import importlib.util
import os
import re
import sys

import jax
from jax.experimental import multihost_utils

from rlhf_jax.errors import UserError

HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead and the others end
CONNECT = 300  # seconds in which all must have started
SHUTDOWN = 20  # seconds in which all must have ended, once one of them has
LOST = 3  # exit code where another process died

_NAMES = 'coordinator', 'processes', 'process'
_PEER = re.compile('gloo|nccl|coordination|heartbeat|connection (closed|reset|refused)|shutting down', re.IGNORECASE)


def initialize(coordinator: str | None = None, processes: str | None = None, process: str | None = None) -> bool:
  """Connects this process with the others, if there are any; call it once, before anything touches a device.

  Args:
    coordinator, processes, process: of the flags of these names, as texts; None: not given.

  Returns:
    Whether there are others.

  Raises:
    UserError: wrong or missing values, or the others cannot be reached.
  """
  said = {name: value or os.environ.get(f'RLHF_JAX_{name.upper()}')
          for name, value in zip(_NAMES, (coordinator, processes, process))}
  if said['processes'] and _number('processes', said['processes'], 1) == 1:
    return False
  found = _explicit(**said) if any(said.values()) else _detected()
  if found is None:
    return False
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.config.update('jax_enable_preemption_service', False)  # it would take SIGTERM away from runtime/loop.py
  try:
    jax.distributed.initialize(**found, initialization_timeout=CONNECT, heartbeat_timeout_seconds=HEARTBEAT,
                               shutdown_timeout_seconds=SHUTDOWN)
  except Exception as error:  # of every kind, from jax and from what it asks
    raise UserError(f'the processes of this run did not find each other: {_line(error)}; say them with '
                    '--coordinator=HOST:PORT --processes=N --process=I, or --processes=1 for one') from error
  return True


@contextlib.contextmanager
def exit_with_peers():
  """Around the work: what fails because another process died ends this one at once, with a line and exit code 3. It
  does not return, as the usual way out (closing checkpoints, leaving jax) waits for all. A process that only waits is
  ended by jax, with exit code 134, once that other has been silent for HEARTBEAT seconds."""
  try:
    yield
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    cause = error.__cause__ if isinstance(error, UserError) else error
    if not (isinstance(cause, (RuntimeError, ValueError)) and _PEER.search(str(cause)) and jax.process_count() > 1):
      raise
    print(f'rlhf_jax: error: another process of this run ended, its own output says why; repeat the command to go on '
          f'from the last checkpoint ({_line(cause)})', file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(LOST)


def barrier(place: str) -> None:
  """Returns when all processes are here: what the first one wrote before can be read by all."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(place)


def _explicit(coordinator, processes, process) -> dict:
  """Arguments of jax.distributed.initialize."""
  if not (coordinator and processes and process):
    raise UserError('several processes: expected --coordinator=HOST:PORT, --processes=N and --process=I (or '
                    'RLHF_JAX_COORDINATOR, RLHF_JAX_PROCESSES and RLHF_JAX_PROCESS), all three')
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise UserError(f'--coordinator: expected HOST:PORT, got {coordinator!r}')
  count, index = _number('processes', processes, 1), _number('process', process, 0)
  if index >= count:
    raise UserError(f'--process: expected 0 to {count - 1}, as there are {count} processes, got {index}')
  return dict(coordinator_address=coordinator, num_processes=count, process_id=index,
              cluster_detection_method='deactivate')


def _detected() -> dict | None:
  """Arguments of jax.distributed.initialize, which finds out the rest by itself; None where there is one process."""
  env = os.environ
  several = lambda name: _number(name, env.get(name) or 1, 0) > 1
  if 'JAX_COORDINATOR_ADDRESS' in env and 'NODE_RANK' in env and several('NNODES'):  # xpk on GPUs
    address = env['JAX_COORDINATOR_ADDRESS']
    address += '' if ':' in address else f':{env.get("JAX_COORDINATOR_PORT", 6002)}'
    return _explicit(address, env['NNODES'], env['NODE_RANK'])
  if several('OMPI_COMM_WORLD_SIZE'):
    return _devices(alone=env.get('OMPI_COMM_WORLD_LOCAL_SIZE') == '1')
  tasks = 'SLURM_STEP_NUM_TASKS' if 'SLURM_STEP_NUM_TASKS' in env else 'SLURM_NTASKS'
  if 'SLURM_STEP_NODELIST' in env and several(tasks):
    return dict(_devices(alone=env[tasks] == env.get('SLURM_STEP_NUM_NODES')), num_processes=int(env[tasks]))
  hosts = env.get('TPU_PROCESS_ADDRESSES') or env.get('TPU_WORKER_HOSTNAMES')
  if hosts:
    return {} if ',' in hosts or several('MEGASCALE_NUM_SLICES') else None
  chips = glob.glob('/dev/accel*') + glob.glob('/dev/vfio/[0-9]*')
  if chips and importlib.util.find_spec('libtpu') and 'TPU_SKIP_MDS_QUERY' not in env:
    return {}  # only the cloud's metadata knows how many hosts there are; a group of one does no harm
  indexed = 'KUBERNETES_SERVICE_HOST' in env and 'JOB_COMPLETION_INDEX' in env
  return {} if indexed and importlib.util.find_spec('kubernetes') else None


def _devices(alone: bool) -> dict:
  """jax gives each process of Slurm and Open MPI one GPU; one that has its host to itself takes all."""
  visible = os.environ.get('CUDA_VISIBLE_DEVICES')
  gpus = visible.split(',') if visible else glob.glob('/proc/driver/nvidia/gpus/*')
  return {'local_device_ids': list(range(len(gpus)))} if alone and gpus else {}


def _number(name, text, least) -> int:
  if not str(text).isdecimal() or int(text) < least:
    raise UserError(f'{"--" if name in _NAMES else ""}{name}: expected a number from {least}, got {text!r}')
  return int(text)


def _line(error) -> str:
  text = ' '.join(str(error).split())
  return f'{type(error).__name__}: {text if len(text) <= 300 else text[:300] + " …"}'


def is_first_process() -> bool:
  """Tells whether this is the process that writes the files of a run."""
  return jax.process_index() == 0


def to_host(tree):
  """Gathers a tree of global arrays as numpy arrays on every process.

  All processes must call this together where there are several.
  """
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)
