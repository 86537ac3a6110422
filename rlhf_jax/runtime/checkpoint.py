"""Checkpoints of a train state: saved in the background, verified when read, restored onto any mesh.

An orbax CheckpointManager keeps the last few steps. A step holds four items: `params`; `rest` (all other fields
of the state); `data` (the data iterator's state, one for each process); `meta` (the caller's dict, versions, and
shape, dtype and fingerprint of every array). Orbax gives back flipped bits without a word, hence fingerprints of
our own. A damaged step is named in a warning and the one before it is taken.
"""

import contextlib
import functools
import hashlib
import json
import logging
from typing import Any
import urllib.parse

from etils import epath
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers
import tensorstore

from rlhf_jax.errors import UserError

# Orbax logs pages of tracebacks; what fails reaches the user as one line from here.
logging.getLogger('absl').addFilter(lambda record: '/orbax/' not in record.pathname)


class Checkpoints:
  """The checkpoints of one run, in one directory; `keep` newest steps stay.

  Every leaf of a state must be a global `jax.Array` (typed and raw random keys both work). With several processes
  all of them make every call. What cannot be written raises UserError at the next `save`, `wait` or `close`.
  """

  def __init__(self, directory, keep: int = 2):
    if keep < 1:
      raise UserError(f'keep: expected at least 1 checkpoint, got {keep}')
    self._directory = epath.Path(directory).absolute()
    self._unwritten = None
    with self._writing():
      self._manager = ocp.CheckpointManager(self._directory, options=ocp.CheckpointManagerOptions(
          preservation_policy=checkpoint_managers.LatestN(keep), cleanup_tmp_directories=True))

  def latest_step(self) -> int | None:
    """The newest step written or being written, damaged or not."""
    return self._manager.latest_step()

  def save(self, step: int, state, data_state, meta) -> None:
    """Starts writing; the arrays may be donated as soon as this returns.

    Args:
      step: must not be on disk yet.
      state: a flax.struct dataclass with `trained`, saved as `params`, and `frozen`, which is not saved.
      data_state: of the data iterator, the same on every process; a JSON object, as is `meta`.
      meta: whatever the caller wants back.
    """
    self.wait()
    items = {'params': _flat(state.trained), 'rest': _flat(state.replace(trained=None, frozen={}))}
    data = json.loads(json.dumps(data_state))
    body = {'meta': json.loads(json.dumps(meta)), 'data': _digest(data),
            'arrays': {name: _describe(arrays) for name, arrays in items.items()},
            'versions': {'jax': jax.__version__, 'orbax': ocp.__version__}}
    self._unwritten = step
    with self._writing():
      self._manager.save(step, force=True, args=ocp.args.Composite(
          data=ocp.args.JsonSave(data),
          meta=ocp.args.JsonSave({'body': body, 'digest': _digest(body)}),
          **{name: ocp.args.StandardSave(arrays) for name, arrays in items.items()}))

  def restore(self, abstract_state) -> tuple[Any, Any, Any] | None:
    """(state, data_state, meta) of the newest good step, None where nothing was ever saved.

    Damaged steps newer than it are renamed to `damaged-STEP`, so that the run can write those steps again.

    Args:
      abstract_state: the state with a `jax.ShapeDtypeStruct` with sharding for every array, and nothing frozen.

    Raises:
      UserError: the checkpoint is of another shape, or all are damaged.
    """
    rest = abstract_state.replace(trained=None)
    found = _restore(self._manager, self._directory, {'params': abstract_state.trained, 'rest': rest})
    if found is None:
      return None
    step, trees, data, meta, damaged = found
    if damaged:
      for bad in damaged if jax.process_index() == 0 else ():
        target = self._directory / f'damaged-{bad}'
        if target.exists():
          target.rmtree()
        (self._directory / str(bad)).rename(target)
      _everywhere(True)
      self._manager.reload()
    return trees['rest'].replace(trained=trees['params']), data, meta

  def wait(self) -> None:
    """Returns when the last step is safely written."""
    with self._writing():
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
      if self._unwritten is not None and not (self._directory / str(self._unwritten)).exists():
        raise OSError('nothing was written')
    self._unwritten = None

  def close(self) -> None:
    """Waits and frees the threads."""
    with self._writing():
      self._manager.close()

  @contextlib.contextmanager
  def _writing(self):
    try:
      yield
    except Exception as error:  # orbax raises bare ones
      what = 'opening' if self._unwritten is None else f'saving the checkpoint of step {self._unwritten}'
      raise UserError(f'{self._directory}: {what} failed: {_line(error)}') from error


def restore_params(directory, abstract_params) -> Any:
  """The parameters alone, of the newest good step in `directory`, which is left as it is.

  Args:
    directory: as given to `Checkpoints`.
    abstract_params: tree of `jax.ShapeDtypeStruct` with sharding.

  Raises:
    UserError: no checkpoint there, all damaged, or of another shape.
  """
  path = epath.Path(directory).absolute()
  if not path.is_dir():
    raise UserError(f'{path}: no such directory, expected checkpoints')
  options = ocp.CheckpointManagerOptions(read_only=True, create=False)
  with ocp.CheckpointManager(path, options=options) as manager:
    found = _restore(manager, path, {'params': abstract_params})
  if found is None:
    raise UserError(f'{path}: holds no finished checkpoint')
  return found[1]['params']


def _restore(manager, directory, targets):
  """(step, {item: tree}, data, meta, damaged steps) of the newest good step, or None."""
  steps = sorted(manager.all_steps(), reverse=True)
  damaged = []
  for step, older in zip(steps, steps[1:] + [None]):
    try:
      trees, data, meta = _read(manager, step, f'{directory}/{step}', targets)
      problem = None
    except UserError:
      raise
    except Exception as error:  # orbax raises bare ones
      problem = _line(error)
    if _everywhere(problem is None):
      return step, trees, data, meta, damaged
    damaged.append(step)
    problem = f'{directory}/{step}: damaged checkpoint ({problem or "seen by another process"})'
    if older is None:
      raise UserError(f'{problem}; no good one is left: move the directory away to start anew')
    logging.warning('%s; falling back to step %d', problem, older)
  return None


def _read(manager, step, place, targets):
  """({item: tree}, data, meta) of one step; UserError if it is of another shape, any other exception = damaged."""
  text = manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore(), meta=ocp.args.JsonRestore()))
  body, data = text.meta['body'], text.data
  if text.meta['digest'] != _digest(body):
    raise ValueError('item meta differs from its checksum')
  if body['data'] != _digest(data):
    raise ValueError('item data differs from its checksum')
  wanted = {item: _flat(tree) for item, tree in targets.items()}
  for item, leaves in wanted.items():
    _check_shapes(place, item, leaves, body['arrays'][item])
    _check_readable(f'{place}/{item}')
  arrays = manager.restore(step, args=ocp.args.Composite(
      **{item: ocp.args.StandardRestore(leaves) for item, leaves in wanted.items()}))
  trees = {}
  for item, tree in targets.items():
    got, saved = _describe(arrays[item]), body['arrays'][item]
    changed = [name for name in wanted[item] if got[name] != saved[name]]
    if changed:
      raise ValueError(f'{item}: fingerprint differs for {_some(changed)}')
    trees[item] = jax.tree.unflatten(jax.tree.structure(tree), [arrays[item][name] for name in wanted[item]])
  return trees, data, body['meta']


def _check_shapes(place, item, wanted, saved):
  expected = {name: _shape(leaf) for name, leaf in wanted.items()}
  found = {name: entry['shape'] for name, entry in saved.items()}
  wrong = [f'{name} expected {expected.get(name, "nothing")}, found {found.get(name, "nothing")}'
           for name in sorted(expected | found) if expected.get(name) != found.get(name)]
  if wrong:
    raise UserError(f'{place}: {item} of another shape: {_some(wrong)}')


def _check_readable(path):
  """Reads the arrays of one item one by one: at a bad chunk orbax's many readers fail all at once, and noisily."""
  if jax.process_index() > 0:
    return
  url = path if '://' in path else f'file://{urllib.parse.quote(path)}'
  store = {'driver': 'ocdbt', 'base': f'{url}/'}
  for key in tensorstore.KvStore.open(store).result().list().result():
    if key.endswith(b'/.zarray'):
      name = key.decode().removesuffix('.zarray')
      spec = {'driver': 'zarr', 'kvstore': {**store, 'path': name}, 'fill_missing_data_reads': False}
      try:
        tensorstore.open(spec).result().read().result()
      except ValueError as error:
        raise ValueError(f'{name[:-1]}: {error}') from error


def _flat(tree) -> dict[str, Any]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in leaves}


def fingerprint(tree) -> str:
  """Names the values of a tree of global arrays, whatever their shardings: 64 hexadecimal digits."""
  return hashlib.sha256(json.dumps(_describe(_flat(tree)), sort_keys=True).encode()).hexdigest()


def _describe(arrays: dict[str, jax.Array]) -> dict[str, dict]:
  """Shape, dtype and fingerprint of every array, in JSON."""
  for name, leaf in arrays.items():
    if not isinstance(leaf, jax.Array) or (jax.process_count() > 1 and leaf.is_fully_addressable):
      raise TypeError(f'{name}: expected a global jax.Array, got {type(leaf).__name__}')
  sharding = next(iter(arrays.values())).sharding
  if isinstance(sharding, jax.sharding.NamedSharding):
    sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
  prints = jax.device_get(_fingerprints(list(arrays.values()), sharding))
  return {name: {'shape': _shape(leaf), 'fingerprint': [int(n) for n in row]}
          for (name, leaf), row in zip(arrays.items(), prints)}


@functools.partial(jax.jit, static_argnums=1)
def _fingerprints(leaves, replicated):
  """[len(leaves), 2] uint32: two sums modulo 2^32 over the bits of each array, whatever its sharding.

  Any change of one element changes both; each misses other changes about once in 2^32, but the first is blind to
  some swaps (two sign bits), so the second mixes (the finalizer of MurmurHash3).
  """
  rows = []
  for leaf in leaves:
    bits = _bits(leaf)
    index = jnp.zeros_like(bits)
    stride = 1
    for axis in reversed(range(bits.ndim)):
      index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2 ** 32)
      stride *= bits.shape[axis]
    mixed = bits ^ (index * jnp.uint32(0x9E3779B9))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    mixed = mixed ^ (mixed >> 16)
    rows.append([jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32), jnp.sum(mixed, dtype=jnp.uint32)])
  return jax.lax.with_sharding_constraint(jnp.array(rows), replicated)


def _bits(x):
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  words = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
  return jax.lax.bitcast_convert_type(x, words).astype(jnp.uint32)


def _shape(leaf) -> str:
  return f'{leaf.dtype}[{",".join(map(str, leaf.shape))}]'


def _digest(value) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _everywhere(good: bool) -> bool:
  return good if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(good)).all())


def _some(names, limit=3) -> str:
  more = f' and {len(names) - limit} more' if len(names) > limit else ''
  return '; '.join(names[:limit]) + more


def _line(error) -> str:
  text = ' '.join(str(error).partition(' [tensorstore_spec')[0].split())
  return f'{type(error).__name__}: ' + (text if len(text) <= 300 else f'{text[:150]} … {text[-150:]}')
