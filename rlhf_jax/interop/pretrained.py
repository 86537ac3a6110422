"""Models that others trained, in; models that we trained, out.

In: a Hugging Face directory (safetensors) or a GGUF file. Out: a Hugging Face directory. Parameters are float32
whatever the file holds. Nothing is downloaded, and no pickle (`.bin`) is opened. What the families call things:
families.py and hf_config.py; files: safetensors_io.py, gguf_io.py; placing on devices: assemble.py.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path
import re
import shutil
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.interop import families, hf_config
from rlhf_jax.interop.assemble import assemble_parameters
from rlhf_jax.interop.gguf_io import find_smollm2, open_gguf
from rlhf_jax.interop.safetensors_io import Entry, open_weights, read_json, write_weights
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.runtime.hosts import to_host
from rlhf_jax.models.transformer import ModelConfig

SMOLLM2 = 'smollm2'
EXPORTED = re.compile(r'README\.md|(config|generation_config|tokenizer|tokenizer_config)\.json|chat_template\.jinja|'
                      r'model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json')
SHARD_BYTES = 5 * 10**9  # as in transformers


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A model at rest.

  Attributes:
    config: its shape.
    tokenizer: its tokenizer; None where a GGUF file has one of another kind than we read.
    load: (shardings=None) → params, as `load`.
  """
  config: ModelConfig
  tokenizer: Tokenizer | None
  load: Callable[..., Any]


def open_pretrained(name) -> Pretrained:
  """A model by name: 'smollm2', a `.gguf` file, or a Hugging Face directory. Parameters are read by `.load()`.

  Raises:
    UserError: nothing there, or nothing that can be read.
  """
  path = find_smollm2() if name == SMOLLM2 else Path(name)
  if path.suffix == '.gguf':
    return Pretrained(*open_gguf(path))
  if not path.is_dir():
    raise UserError(f'{path}: not found; expected {SMOLLM2!r}, a .gguf file or a Hugging Face directory')
  config, tokenizer = read_config(path), Tokenizer.load(path)
  if tokenizer.vocab_size > config.vocab_size:
    raise UserError(f'{path}: the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}')
  return Pretrained(config, tokenizer, functools.partial(load_parameters, path, config))


def open_tokenizer(name) -> Tokenizer:
  """The tokenizer of a model, by its name.

  Raises:
    UserError: as open_pretrained; and where there is none that we read.
  """
  found = open_pretrained(name).tokenizer
  if found is None:
    raise UserError(f'{name}: its tokenizer is of a kind not read from GGUF; use the Hugging Face directory')
  return found


def read_config(directory) -> ModelConfig:
  """The shape of the model in a Hugging Face directory."""
  path = Path(directory) / 'config.json'
  return hf_config.from_hf(read_json(path), str(path))


def load_parameters(directory, config: ModelConfig, shardings=None):
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
  directory = Path(directory)
  shapes, fetch = open_weights(directory)
  bias = read_json(directory / 'config.json').get('reward_bias', 0.0) if config.head else 0.0
  return assemble_parameters(config, shapes, fetch, shardings, directory, bias)


def load_gguf_parameters(path, shardings=None):
  """(config, params, tokenizer) of a GGUF file; errors as `open_pretrained`."""
  config, tokenizer, read = open_gguf(Path(path))
  return config, read(shardings), tokenizer


def export_model(directory, config: ModelConfig, params, tokenizer: Tokenizer, dtype='float32', shard_bytes=SHARD_BYTES,
           card=''):
  """Writes a Hugging Face directory that transformers opens: config, weights, tokenizer, chat template.

  A model with a head becomes its family's class of sequence classification with one label. Hugging Face's score has
  no bias: ours stands in config.json as `reward_bias`, and the output matrix, which no reward needs, is left out. All
  else comes back from `load` bit for bit, in float32. Every process of a run calls this; the first one writes. No more
  than a shard of the weights is in the host's memory at a time.

  Args:
    directory: made anew, whole or not at all; an earlier export there is replaced.
    config: the shape.
    params: stacked layers, on any mesh.
    tokenizer: the model's.
    dtype: of the file: float32, bfloat16 or float16.
    shard_bytes: weights of more bytes go into several files.
    card: README.md, where it is not empty.

  Raises:
    UserError: the directory holds something other than an export, or the family has no such model.
  """
  directory = Path(directory)
  if directory.exists() and not (directory.is_dir() and all(EXPORTED.fullmatch(path.name)
                                                            for path in directory.iterdir())):
    raise UserError(f'{directory}: holds other files; expected a new directory or an earlier export')
  config = dataclasses.replace(config, tied=config.tied or config.head)
  ids = {'bos_token_id': tokenizer.bos_id, 'eos_token_id': tokenizer.eos_id, 'pad_token_id': tokenizer.pad_id}
  values = {**hf_config.to_hf(config), **ids, 'dtype': str(dtype), 'torch_dtype': str(dtype)}
  if config.head:
    values['reward_bias'] = float(to_host(params['score']['bias']))
  writes, temporary = jax.process_index() == 0, directory.with_name(directory.name + '.tmp')
  if writes:
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save(temporary)
    for name, content in (('config.json', values), ('generation_config.json', ids)):
      (temporary / name).write_text(json.dumps(content, indent=2) + '\n', 'utf-8')
    if card:
      (temporary / 'README.md').write_text(card, 'utf-8')
  write_weights(temporary, _entries(config, params, jnp.dtype(dtype)), shard_bytes, writes)
  if writes:
    if directory.exists():
      shutil.rmtree(directory)
    os.replace(temporary, directory)


def _entries(config, params, dtype):
  """What the weight files hold, layer by layer."""
  parts = {}  # name → where its parts are, which are more than one where the family fuses matrices
  for tensor in families.list_tensors(config):
    for name, place in zip(tensor.names(config), tensor.places(config)):
      parts.setdefault(name, []).append((tensor, place))

  def make(held):
    written = [tensor.write(config, to_host(_take(
        functools.reduce(lambda tree, key: tree[key], tensor.keys, params), place, dtype))) for tensor, place in held]
    return written[0] if len(written) == 1 else np.concatenate(written, axis=held[0][0].fused_axis)

  layer = lambda item: item[1][0][1][:1] or (-1,)
  return [Entry(name, int(np.prod(held[0][0].file_shape(config))) * dtype.itemsize, functools.partial(make, held))
          for name, held in sorted(parts.items(), key=layer)]


@functools.partial(jax.jit, static_argnums=2)
def _take(leaf, place, dtype):
  """One place of a stacked leaf; the index is an argument, so that one program serves all layers."""
  return leaf[tuple(place)].astype(dtype)
