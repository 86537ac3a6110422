"""Connects the processes of a run on several hosts, before the first device is used.

A run has several processes if one of these says so; the first that does is used:
  1. --coordinator=HOST:PORT --processes=N --process=I, or the environment variables
     RLHF_JAX_COORDINATOR, RLHF_JAX_PROCESSES and RLHF_JAX_PROCESS;
  2. the environment of what launched the process: xpk on GPUs, Open MPI, Slurm, a TPU
     pod, an indexed job of Kubernetes.
With --processes=1 a run has one process, whatever launched it.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import glob
import importlib.util
import os
import pickle
import re
import sys
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils
import numpy as np

from rlhf_jax import plain_text, text_table
from rlhf_jax.errors import UserError

HEARTBEAT = 30  # seconds of silence after which a process counts as dead and the others end
CONNECT = 300  # seconds within which all processes must have started
SHUTDOWN = 20  # seconds within which all must have ended once one of them has
LOST = 3  # the exit code of a process that ends because another one died

_SPREAD = 1024  # items that each process computes between two exchanges

_FLAGS = ('coordinator', 'processes', 'process')

# Matches the messages of errors that come from a lost connection to another process.
_LOST_CONNECTION = re.compile(
  'gloo|nccl|coordination|heartbeat|connection (closed|reset|refused)|shutting down',
  re.IGNORECASE,
)


def initialize(
  coordinator: str | None = None,
  processes: str | None = None,
  process: str | None = None,
) -> bool:
  """Connects this process with the others of the run, if there are any.

  Call it once, before anything uses a device.

  Args:
    coordinator: HOST:PORT of process 0, the text of the flag; None = not given, as for
      the others.
    processes: the number of processes.
    process: the number of this process, from 0.

  Returns:
    Whether there are other processes.

  Raises:
    UserError: values are wrong or missing, or the others cannot be reached.
  """
  flags = {'coordinator': coordinator, 'processes': processes, 'process': process}
  for name in _FLAGS:
    flags[name] = flags[name] or os.environ.get(f'RLHF_JAX_{name.upper()}')
  if flags['processes'] and _parse_number('processes', flags['processes'], least=1) == 1:
    return False
  arguments: dict[str, Any] | None
  if any(flags.values()):
    arguments = _arguments_from_flags(**flags)
  else:
    arguments = _arguments_from_environment()
  if arguments is None:
    return False

  # The library for collectives between the CPUs of several processes.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  # The preemption service would handle SIGTERM, which runtime/loop.py does.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
      **arguments,
      initialization_timeout=CONNECT,
      heartbeat_timeout_seconds=HEARTBEAT,
      shutdown_timeout_seconds=SHUTDOWN,
    )
  except Exception as error:  # of any kind: jax and the cluster's own interfaces raise many
    raise UserError(
      f'the processes of this run did not find each other: {plain_text.describe_error(error)}; '
      'name them with '
      '--coordinator=HOST:PORT --processes=N --process=I, or use --processes=1 for a single one'
    ) from error
  return True


@contextlib.contextmanager
def exit_with_peers() -> Iterator[None]:
  """Exits with code 3 when the work inside fails because another process died.

  It exits at once, with one line on stderr: a normal exit, which closes
  checkpoints and shuts down jax, would wait for all processes. A process that
  only waits for the dead one is ended by jax, with exit code 134, after HEARTBEAT
  seconds without a sign of it.
  """
  try:
    yield
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    cause: BaseException | None = error
    if isinstance(error, UserError):  # such as that of a checkpoint that was not saved
      cause = error.__cause__
    if not _is_lost_peer(cause):
      raise
    _exit_at_once(cause)


def barrier(place: str) -> None:
  """Waits for all processes, which can then read what the first one wrote before.

  Args:
    place: a name for this barrier, the same on every process.
  """
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(place)


def is_first_process() -> bool:
  """Returns whether this is process 0, which alone writes files and speaks to the user."""
  return jax.process_index() == 0


def say(text: str) -> None:
  """Prints lines for the user, from the first process; a terminal gets none wider than it."""
  if is_first_process():
    print(text_table.fit_terminal(text, sys.stdout), flush=True)


def to_host(tree: Any) -> Any:
  """Returns a tree of global arrays as NumPy arrays, on every process."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return jax.tree.map(_gather_leaf, tree)


def _gather_leaf(leaf: Any) -> np.ndarray:
  """Gathers one array; one that this process holds completely is only copied to the host."""
  if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
    # process_allgather would concatenate the copies of all processes.
    return np.asarray(leaf)
  return multihost_utils.process_allgather(leaf, tiled=True)


def gather_from_processes(value: int) -> np.ndarray:
  """Gathers the value of each process: [processes] int32, on every process."""
  mine = np.asarray(value, np.int32)
  if jax.process_count() == 1:
    return mine[np.newaxis]
  return multihost_utils.process_allgather(mine)  # stacked along a new first axis


def gather_texts(text: str) -> list[str]:
  """Gathers a text of each process, on every process."""
  if jax.process_count() == 1:
    return [text]
  return [part.decode() for part in _gather_bytes(text.encode('utf-8', 'backslashreplace'))]


def _gather_bytes(mine: bytes) -> list[bytes]:
  """Gathers the bytes of each process, on every process."""
  sizes = gather_from_processes(len(mine))
  padded = np.zeros(int(sizes.max()), np.uint8)  # collectives need equal shapes
  padded[: len(mine)] = np.frombuffer(mine, np.uint8)
  rows = multihost_utils.process_allgather(padded)  # [processes, longest]
  return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def spread(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
  """Computes a function of each item, which one of the processes does for all.

  All processes make this call, with the same items, and use all results.

  Args:
    function: item → what pickle can write.
    items: the items.

  Yields:
    The results, in order, as `map` would.

  Raises:
    UserError: the function raised it for an item; on every process.
  """
  count = jax.process_count()
  if count == 1:
    yield from map(function, items)
    return
  # In blocks, so that results which the caller puts on disk never fill the memory.
  for begin in range(0, len(items), _SPREAD * count):
    block = range(begin, min(begin + _SPREAD * count, len(items)))
    shares = [block[number::count] for number in range(count)]
    mine = _compute_share(function, items, shares[jax.process_index()])
    gathered = [pickle.loads(part) for part in _gather_bytes(pickle.dumps(mine))]
    for place in range(len(block)):
      results = gathered[place % count]
      result = results[min(place // count, len(results) - 1)]
      if isinstance(result, UserError):
        raise result
      yield result


def _compute_share(
  function: Callable[[Any], Any], items: Sequence[Any], numbers: Sequence[int]
) -> list[Any]:
  """Computes some of the items; the last result is the error where there was one."""
  results = []
  for number in numbers:
    try:
      results.append(function(items[number]))
    except UserError as error:
      return [*results, error]
  return results


def find_dissenters(texts: list[str]) -> list[int]:
  """Returns the processes whose text is not that of most; of two different ones the second.

  >>> find_dissenters(['a', 'b', 'b']), find_dissenters(['a', 'b']), find_dissenters(['a', 'a'])
  ([0], [1], [])
  """
  most = max(texts, key=texts.count)  # the first of equals
  return [number for number, text in enumerate(texts) if text != most]


def _is_lost_peer(cause: BaseException | None) -> bool:
  """Returns whether an error comes from the death of another process."""
  if jax.process_count() == 1 or not isinstance(cause, (RuntimeError, ValueError)):
    return False
  return _LOST_CONNECTION.search(str(cause)) is not None


def _exit_at_once(cause: BaseException | None) -> NoReturn:
  """Ends this process without any cleanup."""
  print(
    'rlhf_jax: error: another process of this run ended, its own output says why; repeat the '
    f'command to continue from the last checkpoint ({plain_text.describe_error(cause)})',
    file=sys.stderr,
  )
  sys.stdout.flush()  # os._exit does not
  sys.stderr.flush()
  os._exit(LOST)


def _arguments_from_flags(
  coordinator: str | None,
  processes: str | None,
  process: str | None,
) -> dict[str, Any]:
  """Returns arguments of jax.distributed.initialize from the three flags."""
  if not (coordinator and processes and process):
    raise UserError(
      'several processes: expected --coordinator=HOST:PORT, --processes=N and --process=I (or '
      'RLHF_JAX_COORDINATOR, RLHF_JAX_PROCESSES and RLHF_JAX_PROCESS), all three'
    )
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise UserError(f'--coordinator: expected HOST:PORT, got {coordinator!r}')
  count = _parse_number('processes', processes, least=1)
  index = _parse_number('process', process, least=0)
  if index >= count:
    raise UserError(
      f'--process: expected 0 to {count - 1}, as there are {count} processes, got {index}'
    )
  return {
    'coordinator_address': coordinator,
    'num_processes': count,
    'process_id': index,
    'cluster_detection_method': 'deactivate',  # nothing is left to detect
  }


def _arguments_from_environment() -> dict[str, Any] | None:
  """Returns the arguments of jax.distributed.initialize that jax cannot detect by itself.

  Returns:
    The arguments; None if there is a single process.
  """
  env = os.environ

  # xpk on GPUs
  if 'JAX_COORDINATOR_ADDRESS' in env and 'NODE_RANK' in env and _is_above_one('NNODES'):
    address = env['JAX_COORDINATOR_ADDRESS']
    if ':' not in address:
      address += f':{env.get("JAX_COORDINATOR_PORT", 6002)}'
    return _arguments_from_flags(address, env['NNODES'], env['NODE_RANK'])

  # Open MPI
  if _is_above_one('OMPI_COMM_WORLD_SIZE'):
    return _local_devices(alone_on_host=env.get('OMPI_COMM_WORLD_LOCAL_SIZE') == '1')

  # Slurm. A shell within a job has SLURM_NTASKS of the job, but
  # SLURM_STEP_NUM_TASKS of its own.
  tasks = 'SLURM_STEP_NUM_TASKS' if 'SLURM_STEP_NUM_TASKS' in env else 'SLURM_NTASKS'
  if 'SLURM_STEP_NODELIST' in env and _is_above_one(tasks):
    arguments = _local_devices(alone_on_host=env[tasks] == env.get('SLURM_STEP_NUM_NODES'))
    return {**arguments, 'num_processes': int(env[tasks])}

  # TPU pods, and slices of TPUs joined by MEGASCALE
  hosts = env.get('TPU_PROCESS_ADDRESSES') or env.get('TPU_WORKER_HOSTNAMES')
  if hosts:
    several = ',' in hosts or _is_above_one('MEGASCALE_NUM_SLICES')
    return {} if several else None
  if _has_tpu() and 'TPU_SKIP_MDS_QUERY' not in env:
    # Only the cloud's metadata tells how many hosts there are; if it is one,
    # connecting does no harm.
    return {}

  # Kubernetes; jax asks its API for the addresses, which needs the package
  indexed_job = 'KUBERNETES_SERVICE_HOST' in env and 'JOB_COMPLETION_INDEX' in env
  if indexed_job and importlib.util.find_spec('kubernetes'):
    return {}
  return None


def _is_above_one(name: str) -> bool:
  """Returns whether an environment variable holds a number above 1."""
  return _parse_number(name, os.environ.get(name) or '1', least=0) > 1


def _has_tpu() -> bool:
  """Returns whether this machine has TPU chips, and the library to use them."""
  chips = glob.glob('/dev/accel*') + glob.glob('/dev/vfio/[0-9]*')
  return bool(chips) and importlib.util.find_spec('libtpu') is not None


def _local_devices(alone_on_host: bool) -> dict[str, Any]:
  """Returns the argument that says which GPUs a process of Slurm or Open MPI uses.

  jax by itself gives each process one GPU; a process that is alone on its host
  uses all of them.
  """
  visible = os.environ.get('CUDA_VISIBLE_DEVICES')
  gpus = visible.split(',') if visible else glob.glob('/proc/driver/nvidia/gpus/*')
  if not (alone_on_host and gpus):
    return {}
  return {'local_device_ids': list(range(len(gpus)))}


def _parse_number(name: str, text: str, least: int) -> int:
  """Parses the number of a flag or environment variable."""
  if text.isdecimal() and int(text) >= least:
    return int(text)
  shown = f'--{name}' if name in _FLAGS else name
  raise UserError(f'{shown}: expected a number from {least}, got {text!r}')
