"""Checkpoints of a train state: saved in the background, verified and restored on any mesh.

An orbax CheckpointManager keeps the last few steps. A step holds four items:

  params  the trained parameters
  rest    all other fields of the state
  data    the position in the data, one for each process
  meta    the caller's dict, versions, and shape, dtype and fingerprint of every array

The fingerprints are needed because Orbax restores flipped bits without an error.
If a step is damaged, a warning names it and the step before it is restored.

Where the processes of a run share no disk, each writes the parts of the arrays that
its devices hold to a directory of its own, as files that no other process writes. All
directories together are a checkpoint; whoever restores one needs all of its files.
"""

import asyncio
from collections.abc import Coroutine, Iterator, Mapping, Sequence
import contextlib
import functools
import json
import logging
import os
from typing import Any, NamedTuple
import urllib.parse

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint._src import asyncio_utils
from orbax.checkpoint._src.metadata import array_metadata_store
import tensorstore

from rlhf_jax import fingerprints, plain_text
from rlhf_jax.errors import UserError
from rlhf_jax.runtime import hosts, replicas
from rlhf_jax.types import Params


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
  return '/orbax/' not in record.pathname


# Orbax logs pages of tracebacks; this module reports each failure to the user in one line.
logging.getLogger('absl').addFilter(_is_not_from_orbax)


def _run_to_the_end(work: Coroutine[Any, Any, Any]) -> Any:
  """Runs what orbax writes or reads; if it fails, waits for what it has begun besides.

  Orbax would close the event loop at the first failure, as of a full disk. The threads of
  tensorstore that are still writing then find it closed, and each prints a traceback.
  """

  async def run() -> Any:
    try:
      return await work
    except Exception:
      with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_SECONDS_TO_END):
          # Again and again, as what has begun may begin more before it fails too.
          while begun := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(begun)
      raise

  return _run(run())


_SECONDS_TO_END = 60  # for writes beside one that failed
_run = asyncio_utils.run_sync  # not public; `run_sync` is looked up at each call
asyncio_utils.run_sync = _run_to_the_end


class Checkpoints:
  """The checkpoints of one run in one directory, which keeps the newest `keep` steps.

  Every leaf of a state must be a global `jax.Array` (typed and raw random keys both
  work). With several processes all of them make every call. A checkpoint that
  cannot be written raises UserError at the next `save`, `wait` or `close`.
  """

  def __init__(self, directory: str | os.PathLike, keep: int = 2, own_directories: bool = False):
    """Opens the directory, or creates it if it is missing.

    Args:
      directory: where the steps are.
      keep: how many of them are kept.
      own_directories: whether each process has a directory of its own.

    Raises:
      UserError: `keep` is below 1, or the directory cannot be opened.
    """
    if keep < 1:
      raise UserError(f'keep: expected at least 1 checkpoint, got {keep}')
    self._directory = epath.Path(directory).absolute()
    self._unwritten: int | None = None  # the step that is being written
    self._own_directories = own_directories and jax.process_count() > 1
    self._save_arrays: Any = ocp.args.StandardSave
    options = ocp.CheckpointManagerOptions(
      preservation_policy=checkpoint_managers.LatestN(keep),
      cleanup_tmp_directories=True,
    )
    handlers: dict[str, Any] | None = None  # orbax's own, for a shared directory
    if self._own_directories:
      self._save_arrays = ocp.args.PyTreeSave
      options.multiprocessing_options = _ALL_ARE_FIRST
      options.enable_async_checkpointing = False  # the caller waits anyway
      handlers = _make_handlers_of_parts()
    with self._user_errors():
      self._manager = ocp.CheckpointManager(
        self._directory, options=options, item_handlers=handlers
      )

  def latest_step(self) -> int | None:
    """Returns the newest step that has been or is being written, damaged or not."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, data_state: Any, meta: Any) -> None:
    """Starts writing a checkpoint; the arrays may be donated as soon as this returns.

    Args:
      step: a step that is not on disk yet.
      state: a flax.struct dataclass with `trained`, which is saved as the item
        `params`, and `frozen`, which is not saved.
      data_state: the position in the data, the same on every process; a JSON
        object.
      meta: a JSON object that `restore` returns.

    Raises:
      UserError: devices that hold copies of the same values differ.
    """
    self.wait()  # one save at a time; a failure of the last one is reported here
    rest = state.replace(trained=None, frozen={})
    items = {'params': _leaves_by_name(state.trained), 'rest': _leaves_by_name(rest)}
    data = _as_json(data_state)
    body = {
      'meta': _as_json(meta),
      'data': fingerprints.of_value(data),
      'arrays': {item: _describe_arrays(arrays) for item, arrays in items.items()},
      # not checked, but useful if a checkpoint cannot be read
      'versions': {'jax': jax.__version__, 'orbax': ocp.__version__},
    }
    for arrays in items.values():
      replicas.check_replicas(arrays, str(self._directory))
    to_write = {item: self._save_arrays(arrays) for item, arrays in items.items()}
    to_write['data'] = ocp.args.JsonSave(data)
    to_write['meta'] = ocp.args.JsonSave({'body': body, 'digest': fingerprints.of_value(body)})
    self._unwritten = step  # until `wait` has found it on disk
    with self._user_errors():
      # Without `force`, orbax would decide by itself which steps to skip.
      self._manager.save(step, force=True, args=ocp.args.Composite(**to_write))

  def restore(self, abstract_state: Any) -> tuple[Any, Any, Any] | None:
    """Restores the newest good step.

    Damaged steps that are newer are renamed to `damaged-STEP`, so that the run can
    write those steps again.

    Args:
      abstract_state: the state with a `jax.ShapeDtypeStruct` with sharding for
        every array, and nothing frozen.

    Returns:
      (state, data_state, meta), or None if nothing was ever saved.

    Raises:
      UserError: the arrays of the checkpoint have other shapes, or all are damaged.
    """
    targets = {
      'params': abstract_state.trained,
      'rest': abstract_state.replace(trained=None),
    }
    self.wait()  # who only reads does not know of a step that is still being written
    with _open_to_read(self._directory) as manager:
      good = _restore_newest(manager, self._directory, targets)
    if good is None:
      return None
    if good.damaged:
      self._rename_damaged(good.damaged)
    state = good.trees['rest'].replace(trained=good.trees['params'])
    return state, good.data, good.meta

  def wait(self) -> None:
    """Waits until the last step is safely written."""
    with self._user_errors():
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
      if self._unwritten is not None and not self._path(self._unwritten).exists():
        raise OSError('nothing was written')
    self._unwritten = None

  def close(self) -> None:
    """Waits for the last step and stops the background threads."""
    with self._user_errors():
      self._manager.close()

  def _path(self, step: int) -> epath.Path:
    return self._directory / str(step)

  def _rename_damaged(self, steps: Sequence[int]) -> None:
    """Renames damaged steps to `damaged-STEP`."""
    if self._own_directories or hosts.is_first_process():
      for step in steps:
        target = self._directory / f'damaged-{step}'
        if target.exists():  # the step was damaged, written again and damaged again
          target.rmtree()
        self._path(step).rename(target)
    _is_true_everywhere(True)  # a barrier: all processes see the steps renamed
    self._manager.reload()

  @contextlib.contextmanager
  def _user_errors(self) -> Iterator[None]:
    """Converts errors of orbax to a UserError of one line."""
    try:
      yield
    except Exception as error:  # of any kind: orbax has no errors of its own
      what = 'opening'
      if self._unwritten is not None:
        what = f'saving the checkpoint of step {self._unwritten}'
      raise UserError(f'{self._directory}: {what} failed: {_describe(error)}') from error


def newest(directory: str | os.PathLike) -> dict[str, Any] | None:
  """Returns which checkpoint is the newest: {step, fingerprint}, or None where there is none.

  The fingerprint covers every array of the checkpoint, and all else in it.

  Raises:
    UserError: it cannot be read.
  """
  path = epath.Path(directory).absolute()
  if not path.is_dir():
    return None
  with _open_to_read(path) as manager:
    step = manager.latest_step()
    if step is None:
      return None
    try:
      meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
      return {'step': step, 'fingerprint': meta['digest']}
    except Exception as error:  # of any kind: orbax has no errors of its own
      raise UserError(f'{path}/{step}: damaged checkpoint ({_describe(error)})') from error


def restore_params(
  directory: str | os.PathLike,
  abstract_params: Params,
  expected: Mapping[str, Any] | None = None,
) -> Params:
  """Restores only the parameters of a checkpoint, and changes no file.

  Args:
    directory: as given to `Checkpoints`.
    abstract_params: a tree of `jax.ShapeDtypeStruct` with sharding.
    expected: which checkpoint, from `newest`, or its `step` alone; None for the newest good
      one.

  Raises:
    UserError: there is no checkpoint, all are damaged, the expected one is gone, damaged or
      another, or its arrays have other shapes.
  """
  path = epath.Path(directory).absolute()
  if not path.is_dir():
    raise UserError(f'{path}: no such directory, expected checkpoints')
  with _open_to_read(path) as manager:
    if expected:
      return _restore_expected(manager, path, abstract_params, expected)
    good = _restore_newest(manager, path, {'params': abstract_params})
  if good is None:
    raise UserError(f'{path}: holds no finished checkpoint')
  return good.trees['params']


def _open_to_read(directory: epath.Path) -> ocp.CheckpointManager:
  """Opens a directory of checkpoints to read them only."""
  options = ocp.CheckpointManagerOptions(read_only=True, create=False)
  return ocp.CheckpointManager(directory, options=options)


# Every process does what the first one does for all in a directory that they share.
_ALL_ARE_FIRST = ocp.options.MultiprocessingOptions(primary_host=None)


def _make_handlers_of_parts() -> dict[str, Any]:
  """Makes the handlers of the items for directories that the processes do not share."""
  # Objects of its own, as orbax's are changed by whoever opens a checkpoint. The store
  # keeps what random keys are made with; it is not public.
  array_handler = ocp.type_handlers.ArrayHandler(
    primary_host=None, array_metadata_store=array_metadata_store.Store(primary_host=None)
  )
  registry = ocp.type_handlers.create_type_handler_registry((jax.Array, array_handler))

  def arrays() -> Any:
    return ocp.PyTreeCheckpointHandler(
      use_ocdbt=False,  # one file for each part of an array, not one for all
      multiprocessing_options=_ALL_ARE_FIRST,
      type_handler_registry=registry,
    )

  def values() -> Any:
    return ocp.JsonCheckpointHandler(multiprocessing_options=_ALL_ARE_FIRST)

  return {'params': arrays(), 'rest': arrays(), 'data': values(), 'meta': values()}


def _restore_expected(
  manager: ocp.CheckpointManager,
  directory: epath.Path,
  abstract_params: Params,
  expected: Mapping[str, Any],
) -> Params:
  """Restores the parameters of one checkpoint, which must be the one that is expected."""
  step = expected['step']
  path = f'{directory}/{step}'
  remedy = 'the stage finished with it, so that no other one may stand for it: restore it'
  if step not in manager.all_steps():
    raise UserError(f'{path}: this checkpoint is gone; {remedy}')
  try:
    restored = _read(manager, step, path, {'params': abstract_params})
  except UserError:  # other shapes
    raise
  except Exception as error:  # of any kind: orbax has no errors of its own
    raise UserError(f'{path}: damaged checkpoint ({_describe(error)}); {remedy}') from error
  if expected.get('fingerprint', restored.fingerprint) != restored.fingerprint:
    raise UserError(f'{path}: another checkpoint than the one expected; {remedy}')
  return restored.trees['params']


def fingerprint(tree: Any) -> str:
  """Returns 64 hexadecimal digits that identify the values of a tree of global arrays.

  They do not depend on the shardings of the arrays.
  """
  return fingerprints.of_value(_describe_arrays(_leaves_by_name(tree)))


class _Restored(NamedTuple):
  """A step that was read.

  Attributes:
    trees: a tree of arrays for each item.
    data: the position in the data.
    meta: the caller's dict.
    fingerprint: of the whole checkpoint.
    damaged: newer steps that could not be read.
  """

  trees: dict[str, Any]
  data: Any
  meta: Any
  fingerprint: str
  damaged: tuple[int, ...] = ()


def _restore_newest(
  manager: ocp.CheckpointManager,
  directory: epath.Path,
  targets: dict[str, Any],
) -> _Restored | None:
  """Reads the newest step that is good on all processes; None if there is no step."""
  steps = sorted(manager.all_steps(), reverse=True)
  damaged: list[int] = []
  for step in steps:
    problem = None
    try:
      restored = _read(manager, step, f'{directory}/{step}', targets)
    except UserError:  # other shapes, which are no damage
      raise
    except Exception as error:  # of any kind: orbax has no errors of its own
      problem = _describe(error)
    # A process may find damage that others do not; all must restore the same step.
    if _is_true_everywhere(problem is None):
      return restored._replace(damaged=tuple(damaged))
    damaged.append(step)
    reason = problem or 'as another process found'
    message = f'{directory}/{step}: damaged checkpoint ({reason})'
    if step == steps[-1]:
      raise UserError(f'{message}; no good one is left: move the directory away to start anew')
    logging.warning('%s; falling back to step %d', message, steps[len(damaged)])
  return None


def _read(
  manager: ocp.CheckpointManager,
  step: int,
  path: str,
  targets: dict[str, Any],
) -> _Restored:
  """Reads one step and verifies it.

  Args:
    manager: of the directory.
    step: the step to read.
    path: its folder.
    targets: item → a tree of abstract arrays.

  Raises:
    UserError: the arrays of the step have other shapes.
    Exception: any other error means that the step is damaged.
  """
  json_items = manager.restore(
    step,
    args=ocp.args.Composite(data=ocp.args.JsonRestore(), meta=ocp.args.JsonRestore()),
  )
  body = json_items.meta['body']
  if json_items.meta['digest'] != fingerprints.of_value(body):
    raise ValueError('item meta differs from its checksum')
  if body['data'] != fingerprints.of_value(json_items.data):
    raise ValueError('item data differs from its checksum')

  wanted = {item: _leaves_by_name(tree) for item, tree in targets.items()}
  for item, leaves in wanted.items():
    # Before reading, so that a checkpoint of another model is not taken for a damaged one.
    _check_shapes(path, item, leaves, body['arrays'][item])
    _check_readable(f'{path}/{item}')
  to_read = {item: ocp.args.StandardRestore(leaves) for item, leaves in wanted.items()}
  arrays = manager.restore(step, args=ocp.args.Composite(**to_read))

  trees = {}
  for item, tree in targets.items():
    _check_fingerprints(item, arrays[item], body['arrays'][item], list(wanted[item]))
    in_order = [arrays[item][name] for name in wanted[item]]
    trees[item] = jax.tree.unflatten(jax.tree.structure(tree), in_order)
  return _Restored(trees, json_items.data, body['meta'], json_items.meta['digest'])


def _check_shapes(
  path: str,
  item: str,
  wanted: dict[str, Any],
  saved: dict[str, dict],
) -> None:
  """Raises UserError if names, shapes or dtypes of arrays differ from those of the state."""
  expected = {name: _shape(leaf) for name, leaf in wanted.items()}
  present = {name: entry['shape'] for name, entry in saved.items()}
  wrong = []
  for name in sorted({*expected, *present}):
    here = expected.get(name, 'nothing')
    there = present.get(name, 'nothing')
    if here != there:
      wrong.append(f'{name} expected {here}, found {there}')
  if wrong:
    raise UserError(f'{path}: {item} of another shape: {_list_some(wrong)}')


def _check_readable(path: str) -> None:
  """Reads the arrays of one item one by one, so that a damaged chunk raises one error.

  Orbax's many readers would all fail at once, and write pages to stderr.
  """
  if not hosts.is_first_process():
    return
  url = path if '://' in path else f'file://{urllib.parse.quote(path)}'
  store = f'{url}/'
  if (epath.Path(path) / 'manifest.ocdbt').exists():
    store += '|ocdbt:'
  for key in tensorstore.KvStore.open(store).result().list().result():
    if not key.endswith(b'/.zarray'):
      continue
    name = key.decode().removesuffix('.zarray')
    spec = {
      'driver': 'zarr',
      'kvstore': store + urllib.parse.quote(name),
      'fill_missing_data_reads': False,
    }
    try:
      tensorstore.open(spec).result().read().result()
    except ValueError as error:
      raise ValueError(f'{name[:-1]}: {error}') from error


def _check_fingerprints(
  item: str,
  arrays: dict[str, jax.Array],
  saved: dict[str, dict],
  names: list[str],
) -> None:
  """Raises ValueError if an array is not the one that was saved."""
  actual = _describe_arrays(arrays)
  changed = [name for name in names if actual[name] != saved[name]]
  if changed:
    raise ValueError(f'{item}: fingerprint differs for {_list_some(changed)}')


def _describe_arrays(arrays: dict[str, jax.Array]) -> dict[str, dict]:
  """Returns shape, dtype and fingerprint of every array, in JSON.

  Raises:
    TypeError: a leaf is not a global array.
  """
  for name, leaf in arrays.items():
    local = jax.process_count() > 1 and leaf.is_fully_addressable
    if not isinstance(leaf, jax.Array) or local:
      raise TypeError(f'{name}: expected a global jax.Array, got {type(leaf).__name__}')
  # All arrays are on one mesh, or on one device.
  replicated = next(iter(arrays.values())).sharding
  if isinstance(replicated, jax.sharding.NamedSharding):
    replicated = jax.sharding.NamedSharding(replicated.mesh, jax.sharding.PartitionSpec())
  rows = jax.device_get(_fingerprints(list(arrays.values()), replicated))
  description = {}
  for (name, leaf), row in zip(arrays.items(), rows):
    description[name] = {
      'shape': _shape(leaf),
      'fingerprint': [int(number) for number in row],
    }
  return description


@functools.partial(jax.jit, static_argnums=1)
def _fingerprints(
  leaves: list[jax.Array],
  replicated: jax.sharding.Sharding,
) -> jax.Array:
  """Computes two sums modulo 2^32 over the bits of each array, whatever its sharding.

  Any change of one element changes both sums. Each sum misses other changes about
  once in 2^32. The first also misses some common ones, such as two flipped sign
  bits; the second does not, as it mixes the bits first (with the finalizer of
  MurmurHash3).

  Args:
    leaves: arrays of any shape and dtype.
    replicated: the sharding of the result.

  Returns:
    [len(leaves), 2] uint32.
  """
  rows = []
  for leaf in leaves:
    bits = _bits(leaf)
    index = _linear_index(bits.shape)
    mixed = bits ^ (index * jnp.uint32(0x9E3779B9))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    mixed = mixed ^ (mixed >> 16)
    weighted_sum = jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)
    mixed_sum = jnp.sum(mixed, dtype=jnp.uint32)
    rows.append([weighted_sum, mixed_sum])
  return jax.lax.with_sharding_constraint(jnp.array(rows), replicated)


def _linear_index(shape: tuple[int, ...]) -> jax.Array:
  """Returns the row-major index of every element modulo 2^32, uint32 of this shape.

  It is computed from an iota along each axis, as reshaping a single iota would
  gather sharded arrays.
  """
  index = jnp.zeros(shape, jnp.uint32)
  stride = 1
  for axis in reversed(range(len(shape))):
    iota = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    index += iota * jnp.uint32(stride % 2**32)
    stride *= shape[axis]
  return index


def _bits(x: jax.Array) -> jax.Array:
  """Returns the bits of an array as uint32; 8-byte elements become pairs along a new axis."""
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  words = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
  return jax.lax.bitcast_convert_type(x, words).astype(jnp.uint32)


def _leaves_by_name(tree: Any) -> dict[str, Any]:
  """Returns the leaves of a tree by names such as layers.query."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  named = {}
  for path, leaf in leaves:
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    named[name] = leaf
  return named


def _shape(leaf: Any) -> str:
  """Returns dtype and shape in text, such as float32[2,3]."""
  return f'{leaf.dtype}[{",".join(map(str, leaf.shape))}]'


def _as_json(value: Any) -> Any:
  """Returns a value as it would be read back from JSON."""
  return json.loads(json.dumps(value))


def _is_true_everywhere(value: bool) -> bool:
  """Returns whether a value is true on all processes, for all of which it waits."""
  return bool(np.all(hosts.gather_from_processes(value)))


def _list_some(names: list[str], limit: int = 3) -> str:
  """Returns the first names and the number of the others."""
  more = f' and {len(names) - limit} more' if len(names) > limit else ''
  return '; '.join(names[:limit]) + more


def _describe(error: Exception) -> str:
  """Returns the kind and text of an error in one line, without tensorstore's long description."""
  text = str(error).partition(' [tensorstore_spec')[0]
  return f'{type(error).__name__}: {plain_text.one_line(text, 300)}'
