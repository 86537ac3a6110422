"""Sharded parameters out of a file, whatever its kind: checked against the family's table, then read piece by piece.

A device's piece of a leaf is read, put on the device and forgotten before the next one is read.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.interop import families


def assemble(config, shapes, fetch, shardings, where, bias=0.0):
  """Params of a shape.

  Args:
    config: the shape; with `head` and no score in the file, `score` is left out.
    shapes: the file's shapes by Hugging Face name.
    fetch: (name, slices) → that part of a tensor, numpy.
    shardings: a tree like params (more leaves do no harm), or None: whole arrays on the first device.
    where: what errors call the file.
    bias: of the scalar head.

  Returns:
    params, float32.

  Raises:
    UserError: missing, unknown or misshapen tensors, or an output matrix that is not the embedding where config.json
      says it is; the first few names and what was expected.
  """
  names = _with_prefix(config, shapes)
  shapes, read = {name: shapes[theirs] for name, theirs in names.items()}, lambda name, index: fetch(names[name], index)
  table = [tensor for tensor in families.tensors(config) if tensor.path != 'score.kernel' or 'score.weight' in shapes]
  _check(config, table, shapes, read, where)
  params = {}
  for tensor in table:
    _set(params, tensor.keys, _place(tensor.shape(config), functools.partial(tensor.read, config, read), shardings,
                                     tensor.keys))
  if 'score' in params:
    _set(params, ['score', 'bias'], _place((), lambda index=(): np.float32(bias), shardings, ['score', 'bias']))
  return params


def _with_prefix(config, shapes):
  """The file's names by those of the table: some files leave the prefix out."""
  prefix = families.FAMILIES[config.family].prefix
  if any(name.startswith(prefix) for name in shapes):
    return {name: name for name in shapes}
  return {name if name in ('lm_head.weight', 'score.weight') else prefix + name: name for name in shapes}


def _check(config, table, shapes, read, where):
  expected = {name: tensor.file_shape(config) for tensor in table for name in tensor.names(config)}
  copy = config.tied and not config.head and 'lm_head.weight' in shapes  # some files hold a tied matrix twice
  untied = '' if config.tied else ' (config.json says that it is not tied to the embedding)'
  wrong = [f'missing {name}' + untied * (name == 'lm_head.weight') for name in expected if name not in shapes]
  wrong += [f'unknown {name}' for name in shapes if name not in expected and not families.ignorable(config, name)
            and not (copy and name == 'lm_head.weight')]
  wrong += [f'{name} is {list(shapes[name])}, expected {list(shape)}' for name, shape in expected.items()
            if shapes.get(name, shape) != shape]
  if copy and not wrong:
    name, rows = table[0].names(config)[0], config.vocab_size
    cuts = [(slice(start, min(start + 64, rows)), slice(None)) for start in (0, rows // 2, max(rows - 64, 0))]
    if shapes['lm_head.weight'] != shapes[name] or any(
        not np.array_equal(read(name, cut), read('lm_head.weight', cut)) for cut in cuts):
      wrong.append(f'lm_head.weight is not {name}, expected so because config.json ties the two '
                   '(tie_word_embeddings: set it to false)')
  if wrong:
    more = f'; and {len(wrong) - 3} more' if len(wrong) > 3 else ''
    raise UserError(f'{where}: tensors do not fit the config: {"; ".join(wrong[:3])}{more}')


def _place(shape, read, shardings, keys):
  """One array; `read` takes slices of it."""
  if shardings is None:
    return jnp.asarray(read(index=(slice(None),) * len(shape)))
  sharding, pieces, arrays = functools.reduce(lambda tree, key: tree[key], keys, shardings), {}, []
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    pieces.setdefault(tuple((cut.start, cut.stop) for cut in index), (index, []))[1].append(device)
  for index, devices in pieces.values():
    piece = read(index=index)
    arrays += jax.block_until_ready([jax.device_put(piece, device) for device in devices])
    del piece
    jax.device_put(np.zeros(()), devices[0])  # JAX lets go of the host's piece at the next transfer: make it this one
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _set(tree, keys, value):
  for key in keys[:-1]:
    tree = tree.setdefault(key, {})
  tree[keys[-1]] = value
