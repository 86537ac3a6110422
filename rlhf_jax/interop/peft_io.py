"""Reading and writing of adapters in PEFT's format.

The files are adapter_config.json and adapter_model.safetensors. For each matrix
PEFT stores a matrix A [r, inputs] and a matrix B [outputs, r]. Where a family
fuses k of our matrices into one (GPT-2, Phi-3), their adapters are written as one
adapter of rank k r with a block-diagonal B, which computes the same function.

Letters: r rank, L layers.
"""

from collections.abc import Mapping
import dataclasses
import math
from pathlib import Path
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import files, fingerprints
from rlhf_jax.errors import UserError
from rlhf_jax.interop import families, pretrained, safetensors_io
from rlhf_jax.interop.json_files import read_json, write_json
from rlhf_jax.interop.known_keys import (
  Allowed,
  check_keys,
  COUNT,
  KnownKeys,
  list_of,
  or_null,
  POSITIVE,
  show,
  SWITCH,
  TABLE,
  TEXT,
)
from rlhf_jax.interop.tensors import axis_size, Tensor
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.models import lora
from rlhf_jax.models.model_config import ModelConfig, TARGETS
from rlhf_jax.runtime import hosts
from rlhf_jax.types import Params

CONFIG = 'adapter_config.json'
WEIGHTS = 'adapter_model.safetensors'
PREFIX = 'base_model.model.'  # precedes Hugging Face's name of each module
SCORE = 'base_model.model.score.weight'
BIAS = 'reward_bias'  # a key in the metadata of the weights, because PEFT stores no score's bias


def _is_names(value: Any) -> bool:
  """Tells whether a value is a text (a pattern of names) or a list of names."""
  return TEXT.accepts(value) or list_of(TEXT).accepts(value)


NAMES = Allowed('a text or a list of texts', _is_names)

# The keys of adapter_config.json in PEFT 0.21 and in older versions.
KNOWN_KEYS = KnownKeys(
  read={
    'base_model_name_or_path': TEXT,
    'r': COUNT,
    'lora_alpha': POSITIVE,
    'rank_pattern': or_null(TABLE),
    'alpha_pattern': or_null(TABLE),
    'use_rslora': or_null(SWITCH),
    'target_modules': NAMES,
    'exclude_modules': or_null(NAMES),
  },
  only={  # the values for plain LoRA on every layer, which leaves the base model unchanged
    'peft_type': ('LORA',),
    'task_type': ('CAUSAL_LM', 'SEQ_CLS', None),
    'revision': (None, 'main'),
    'bias': ('none', None),
    'lora_bias': (False, None),
    'use_dora': (False, None),
    'layers_to_transform': (None, []),
    'layers_pattern': (None, []),
    'layer_replication': (None, []),
    'modules_to_save': (None, [], ['score'], ['classifier', 'score'], ['score', 'classifier']),
    'target_parameters': (None, []),
    'trainable_token_indices': (None, []),
    'ensure_weight_tying': (False, None),
    # How adapters are initialised. Other methods change the weights of the base model.
    'init_lora_weights': (True, False, 'gaussian', 'eva', 'orthogonal', None),
    'corda_config': (None,),
    'lora_ga_config': (None,),
    'loftq_config': ({}, None),
    'alora_invocation_tokens': (None, []),  # adapters that act only after these tokens
    'arrow_config': (None,),  # routing between several adapters
    'use_bdlora': (None, False),  # block-diagonal matrices
    'use_qalora': (False, None),  # inputs are pooled
    'kasa_config': (None,),
    'monteclora_config': (None,),
    'velora_config': (None,),
    'megatron_config': (None,),
    'merge_weights': (False, None),
    'enable_lora': (None,),
  },
  ignored=(
    'auto_mapping',
    'eva_config',  # for the initialisation only
    'fan_in_fan_out',  # PEFT determines it from the base model
    'inference_mode',
    'lora_dropout',
    'megatron_core',
    'peft_version',
    'qalora_group_size',
  ),
  advice='; remove it if it does not change what the adapters compute',
)


def base_model_of(directory: str | Path) -> str:
  """Finds the base model of the adapters in a directory.

  Returns:
    The path of the base model, which the file may give relative to the directory; or the name
    pretrained.SMOLLM2.

  Raises:
    UserError: the adapters are not plain LoRA, or their base model is not on this machine.
  """
  path = Path(directory) / CONFIG
  adapter_config = read_json(path)
  name = adapter_config.get('base_model_name_or_path')
  if not name:
    raise UserError(f'{path}: expected a base_model_name_or_path, got {name!r}')
  check_keys(adapter_config, KNOWN_KEYS, str(path))
  for key in ('r', 'lora_alpha', 'target_modules'):
    if adapter_config.get(key) is None:
      raise UserError(f'{path}: the key {key!r} is missing')
  for candidate in (Path(name), Path(directory) / name):
    if candidate.exists():
      return str(candidate)
  if name == pretrained.SMOLLM2:
    return name
  raise UserError(
    f'{path}: base_model_name_or_path {name!r} is not here; '
    'expected a directory, also one relative to this one'
  )


def adapter_model_config(directory: str | Path, base: ModelConfig) -> ModelConfig:
  """Returns the shape of a base model with the adapters of a directory.

  If the ranks of the adapters differ, the rank of the shape is the largest;
  `load_adapters` pads the other adapters with zeros.

  Raises:
    UserError: there are no weights, or the adapters do not fit the model.
  """
  with _open_weights(directory) as file:
    stored = _find_adapters(Path(directory), base, file)
    has_score = SCORE in file.keys()
  rank = max(max(adapter.ranks) for adapter in stored.values())
  scale = next(iter(stored.values())).scales[0]  # the others' B is rescaled to it
  return dataclasses.replace(
    base,
    lora_rank=rank,
    lora_alpha=scale * rank,
    lora_targets=tuple(target for target in TARGETS if target in stored),
    head=has_score or base.head,
  )


def load_adapters(directory: str | Path, config: ModelConfig, shardings: Any) -> Params:
  """Reads the adapters of a directory, and the score if the directory has one.

  Args:
    directory: a directory that PEFT or `save_adapters` has written.
    config: the shape of the model, from `adapter_model_config`.
    shardings: a tree like the parameters, possibly with more leaves.

  Returns:
    The leaves of the parameters that are adapters or the score, float32.
  """
  layers: dict[str, np.ndarray] = {}
  leaves: dict[str, Any] = {'layers': layers}
  with _open_weights(directory) as file:
    stored = _find_adapters(Path(directory), config, file)
    for target, adapter in stored.items():
      a, b = _read_adapter(file, adapter, config)
      layers[target + lora.A] = a
      layers[target + lora.B] = b
    if SCORE in file.keys():
      bias = (file.metadata() or {}).get(BIAS, 0.0)
      leaves['score'] = {
        'kernel': file.get_tensor(SCORE).astype(np.float32).reshape(-1),
        'bias': np.asarray(float(bias), np.float32),
      }
  return {
    name: {leaf: _place(value, shardings[name][leaf]) for leaf, value in part.items()}
    for name, part in leaves.items()
  }


def save_adapters(
  directory: str | Path,
  config: ModelConfig,
  params: Params,
  base: str,
  dtype: str = 'float32',
  card: str = '',
  tokenizer: Tokenizer | None = None,
) -> None:
  """Writes the adapters of a model in PEFT's format, completely or not at all.

  Every process of a run must call this function; only the first one writes. For a
  model with a head, the score is written too, with its bias as `reward_bias` in
  the metadata of the weights.

  Args:
    directory: the folder to write; an earlier export there is replaced.
    config: the shape of the model, with adapters.
    params: the parameters, of which only the adapters and the score are written.
    base: a name or path by which PEFT finds the base model.
    dtype: the type of the weights in the file.
    card: the text of README.md; '' for no such file.
    tokenizer: the tokenizer with the chat template of the adapters' training; None where it is
      that of the base model.
  """
  members = _gather_members(config, params, dtype)
  tensors = {}
  for module in members:
    tensors.update(_pack_module(config, members[module]))
  metadata = dict(safetensors_io.METADATA)
  if config.head:
    kernel = hosts.to_host(params['score']['kernel'])
    tensors[SCORE] = kernel.reshape(1, -1).astype(jnp.dtype(dtype))
    metadata[BIAS] = repr(float(hosts.to_host(params['score']['bias'])))
  if not hosts.is_first_process():
    return
  with files.replacing_folder(directory) as folder:
    write_json(folder / CONFIG, _adapter_config(config, members, base))
    if card:
      files.write_text(folder / 'README.md', card)
    if tokenizer:
      tokenizer.save(folder)
    safetensors_io.write_tensors(folder / WEIGHTS, tensors, metadata)
    fingerprints.record_files(folder)


# The place of a matrix's adapters in a file.


@dataclasses.dataclass(frozen=True)
class _Home:
  """The place in a file of the adapters of one of our matrices."""

  module: str  # Hugging Face's name of the matrix, with `{}` for the layer
  inputs: tuple[int, ...]  # sizes of our matrix's input axes
  outputs: tuple[int, ...]  # sizes of its output axes
  part: int  # number of our matrix among the fused matrices
  parts: int  # number of matrices that are fused; 1 where none are
  first_output: int  # index of our first output in the fused matrix
  all_outputs: int  # number of outputs of the fused matrix
  fan_in: bool  # whether the file's matrix is [inputs, outputs]

  def tensor_name(self, layer: int, letter: str) -> str:
    """Returns the name of the tensor A or B of a layer."""
    return f'{PREFIX}{self.module.format(layer)}.lora_{letter}.weight'

  @property
  def output_slice(self) -> slice:
    """The slice of our matrix's outputs in the outputs of the fused matrix."""
    return slice(self.first_output, self.first_output + math.prod(self.outputs))

  def rank_slice(self, rank: int) -> slice:
    """Returns the slice of our rows of A and columns of B in fused adapters of this rank each."""
    return slice(self.part * rank, (self.part + 1) * rank)


def _find_homes(config: ModelConfig) -> dict[str, _Home]:
  """Finds the place of each matrix that may have adapters: target → place."""
  homes = {}
  for tensor in families.list_tensors(config):
    target = tensor.path.removeprefix('layers.')
    if target in TARGETS and tensor.stacked == 'l':  # matrices of experts have no adapters
      homes[target] = _find_home(config, target, tensor)
  return homes


def _find_home(config: ModelConfig, target: str, tensor: Tensor) -> _Home:
  """Finds the place of one matrix."""
  input_axes = 2 if target == 'output' else 1  # heads and head_dim, or embed, or mlp
  inputs = tensor.matrix_axes[:input_axes]
  outputs = tensor.matrix_axes[input_axes:]
  fused = [outputs]
  if tensor.fused_axis is not None:
    fused = tensor.matrix.split(',')[tensor.fused_axis].split('|')
  output_counts = [axis_size(config, *letters) for letters in fused]
  return _Home(
    module=tensor.name.removesuffix('.weight'),
    inputs=tuple(axis_size(config, axis) for axis in inputs),
    outputs=tuple(axis_size(config, axis) for axis in outputs),
    part=tensor.part,
    parts=len(fused),
    first_output=sum(output_counts[: tensor.part]),
    all_outputs=sum(output_counts),
    fan_in=tensor.fan_in,
  )


def _module_suffix(module: str) -> str:
  """Returns the last two parts of a module's name, which PEFT's patterns and targets match."""
  return '.'.join(module.split('.')[-2:])


# Reading.


class _StoredAdapter(NamedTuple):
  """The adapters of one of our matrices in a file; the lists have an entry for each layer."""

  home: _Home
  rows: slice  # our rows of A and columns of B
  ranks: list[int]  # the number of these rows
  scales: list[float]  # the factor of B · A: alpha / r, or alpha / √r with rslora


def _find_adapters(directory: Path, config: ModelConfig, file: Any) -> dict[str, _StoredAdapter]:
  """Finds the adapters in a file: target → adapters.

  Raises:
    UserError: there are no adapters, the family has no such matrices, some layers have no
      adapters, a matrix has a wrong shape or type, or adapter_config.json does not target it.
  """
  adapter_config = read_json(directory / CONFIG)
  where = str(directory / WEIGHTS)
  names = set(file.keys()) - {SCORE}
  stored = {}
  for target, home in _find_homes(config).items():
    if home.tensor_name(0, 'A') in names:
      stored[target] = _describe_adapter(home, adapter_config, config.layers)
  known = {
    adapter.home.tensor_name(layer, letter)
    for adapter in stored.values()
    for layer in range(config.layers)
    for letter in 'AB'
  }
  problems = []
  if names - known:
    problems.append('unknown ' + _list_first(names - known))
  if known - names:
    problems.append('missing ' + _list_first(known - names))
  if not stored and not problems:
    problems.append('there are none')
  if problems:
    raise UserError(
      f'{where}: expected adapters on matrices of every layer of a '
      f'{config.family}; {"; ".join(problems)}'
    )
  _check_score(adapter_config, config, file, where)
  for adapter in stored.values():
    _check_adapter(adapter, adapter_config, file, where)
  return {target: adapter for target, adapter in stored.items() if not _is_empty(adapter, file)}


def _describe_adapter(
  home: _Home,
  adapter_config: Mapping[str, Any],
  layers: int,
) -> _StoredAdapter:
  """Returns the rows, ranks and scales of a matrix's adapters from adapter_config.json."""
  ranks = []
  scales = []
  for layer in range(layers):
    module = home.module.format(layer)
    rank = _of_pattern(adapter_config, 'rank_pattern', module, adapter_config['r'], COUNT)
    alpha = _of_pattern(
      adapter_config, 'alpha_pattern', module, adapter_config['lora_alpha'], POSITIVE
    )
    divisor = math.sqrt(rank) if adapter_config.get('use_rslora') else rank
    ranks.append(rank)
    scales.append(alpha / divisor)
  rows = slice(None)
  own_rank = adapter_config['r']
  # `save_adapters` writes a block for each fused matrix; in PEFT's own adapters all share one A.
  written_in_blocks = (
    home.parts > 1
    and set(ranks) == {home.parts * own_rank}
    and _module_suffix(home.module) in (adapter_config.get('rank_pattern') or {})
  )
  if written_in_blocks:
    ranks = [own_rank] * layers
    rows = home.rank_slice(own_rank)
  return _StoredAdapter(home, rows, ranks, scales)


def _of_pattern(
  adapter_config: Mapping[str, Any],
  key: str,
  module: str,
  usual: float,
  allowed: Allowed,
) -> Any:
  """Returns the number that `rank_pattern` or `alpha_pattern` has for a module.

  As in PEFT, the first pattern that matches the end of the module's name is used;
  where none matches, the result is the number `usual`.
  """
  for pattern, number in (adapter_config.get(key) or {}).items():
    try:
      matches = re.match(rf'(.*\.)?({pattern})$', module)
    except re.error as error:
      raise UserError(f'{CONFIG}: {key}: {pattern!r} is not a pattern ({error})') from None
    if matches:
      if not allowed.accepts(number):
        raise UserError(
          f'{CONFIG}: {key}.{pattern} is {show(number)}, expected {allowed.description}'
        )
      return number
  return usual


def _check_score(
  adapter_config: Mapping[str, Any],
  config: ModelConfig,
  file: Any,
  where: str,
) -> None:
  """Refuses a score that adapter_config.json does not mention, and a mentioned but absent one."""
  announced = 'score' in (adapter_config.get('modules_to_save') or ())
  has_score = SCORE in file.keys()
  if has_score and not announced and adapter_config.get('task_type') != 'SEQ_CLS':
    raise UserError(
      f'{where}: unknown {SCORE}; expected it with modules_to_save: ["score"] in {CONFIG}'
    )
  if announced and not has_score:
    raise UserError(f'{where}: missing {SCORE}, which modules_to_save in {CONFIG} lists')
  if has_score:
    _check_tensor(file, SCORE, (1, config.embed), where)


def _check_adapter(
  adapter: _StoredAdapter,
  adapter_config: Mapping[str, Any],
  file: Any,
  where: str,
) -> None:
  """Refuses matrices of a wrong shape or type, or of modules on which PEFT puts no adapters."""
  home = adapter.home
  parts = 1 if adapter.rows == slice(None) else home.parts
  for layer, rank in enumerate(adapter.ranks):
    module = home.module.format(layer)
    if not _is_targeted(adapter_config, module):
      raise UserError(
        f'{where}: {home.tensor_name(layer, "A")} is no adapter to PEFT: target_modules and '
        f'exclude_modules in {CONFIG} leave {module} out'
      )
    shape_a = (rank * parts, math.prod(home.inputs))
    shape_b = (home.all_outputs, rank * parts)
    _check_tensor(file, home.tensor_name(layer, 'A'), shape_a, where)
    _check_tensor(file, home.tensor_name(layer, 'B'), shape_b, where)


def _check_tensor(file: Any, name: str, shape: tuple[int, ...], where: str) -> None:
  """Refuses a tensor of a wrong shape or type, or with numbers that are not finite."""
  part = file.get_slice(name)
  if tuple(part.get_shape()) != shape:
    raise UserError(f'{where}: {name} is {part.get_shape()}, expected {list(shape)}')
  safetensors_io.check_dtype(part.get_dtype(), name, where)
  safetensors_io.check_finite(file.get_tensor(name), name, where)


def _is_targeted(adapter_config: Mapping[str, Any], module: str) -> bool:
  """Tells whether PEFT puts adapters on a module."""
  excluded = adapter_config.get('exclude_modules') or []
  targets = adapter_config['target_modules']
  return _names_module(targets, module) and not _names_module(excluded, module)


def _names_module(names: str | list[str], module: str) -> bool:
  """Tells whether a module matches a pattern, or a list of names or ends of names, as in PEFT."""
  if names == 'all-linear':
    return True
  if isinstance(names, str):
    try:
      return re.fullmatch(names, module) is not None
    except re.error as error:
      raise UserError(f'{CONFIG}: {names!r} is not a pattern of modules ({error})') from None
  return any(module == name or module.endswith('.' + name) for name in names)


def _is_empty(adapter: _StoredAdapter, file: Any) -> bool:
  """Tells whether a fused matrix has no adapters, for which `save_adapters` writes zeros."""
  if adapter.rows == slice(None):
    return False
  return not file.get_slice(adapter.home.tensor_name(0, 'A'))[adapter.rows].any()


def _read_adapter(
  file: Any,
  adapter: _StoredAdapter,
  config: ModelConfig,
) -> tuple[np.ndarray, np.ndarray]:
  """Reads the adapters of a matrix in all layers.

  Returns:
    A [L, *inputs, r] and B [L, r, *outputs], float32, padded with zeros to the config's rank. B is
    rescaled, so that with the config's scale the adapters compute the same as with the file's.
  """
  home = adapter.home
  layers = config.layers
  a = np.zeros((layers, math.prod(home.inputs), config.lora_rank), np.float32)
  b = np.zeros((layers, config.lora_rank, math.prod(home.outputs)), np.float32)
  common_scale = config.lora_alpha / config.lora_rank
  for layer, (rank, scale) in enumerate(zip(adapter.ranks, adapter.scales)):
    file_a = file.get_tensor(home.tensor_name(layer, 'A')).astype(np.float32)
    file_b = file.get_tensor(home.tensor_name(layer, 'B')).astype(np.float32)
    factor = np.float32(scale / common_scale)
    a[layer, :, :rank] = file_a[adapter.rows].T
    b[layer, :rank] = file_b[home.output_slice, adapter.rows].T * factor
  return a.reshape(layers, *home.inputs, -1), b.reshape(layers, -1, *home.outputs)


def _place(value: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
  """Makes a global array from an array that every process has."""
  return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _open_weights(directory: str | Path) -> Any:
  """Opens the weights of a directory as a context manager of the safetensors library."""
  path = Path(directory) / WEIGHTS
  if not path.is_file():
    advice = ''
    if path.with_suffix('.bin').is_file():
      advice = '; a pickled .bin is not read: load and save it with PEFT'
    raise UserError(f'{path}: not found{advice}')
  return safetensors_io.open_safetensors(path)


def _list_first(names: set[str]) -> str:
  """Formats the first three names, and the number of the others."""
  first = sorted(names)[:3]
  rest = len(names) - len(first)
  more = f' and {rest} more' if rest else ''
  return ', '.join(first) + more


# Writing.


class _Member(NamedTuple):
  """The adapters of one of our matrices, which are written to a file."""

  home: _Home
  a: np.ndarray  # [L, *inputs, r]
  b: np.ndarray  # [L, r, *outputs]


def _gather_members(config: ModelConfig, params: Params, dtype: str) -> dict[str, list[_Member]]:
  """Gathers the adapters on the host: module → the adapters of the matrices fused in it."""
  homes = _find_homes(config)
  members: dict[str, list[_Member]] = {}
  for target in config.lora_targets:
    a = params['layers'][target + lora.A].astype(jnp.dtype(dtype))
    b = params['layers'][target + lora.B].astype(jnp.dtype(dtype))
    home = homes[target]
    member = _Member(home, hosts.to_host(a), hosts.to_host(b))
    members.setdefault(home.module, []).append(member)
  return members


def _pack_module(config: ModelConfig, members: list[_Member]) -> dict[str, np.ndarray]:
  """Returns the tensors of a module, where each member has its own rows of A and block of B."""
  rank = config.lora_rank
  home = members[0].home
  dtype = members[0].a.dtype
  tensors = {}
  for layer in range(config.layers):
    a = np.zeros((home.parts * rank, math.prod(home.inputs)), dtype)
    b = np.zeros((home.all_outputs, home.parts * rank), dtype)
    for member in members:
      rows = member.home.rank_slice(rank)
      a[rows] = member.a[layer].reshape(-1, rank).T
      b[member.home.output_slice, rows] = member.b[layer].reshape(rank, -1).T
    tensors[home.tensor_name(layer, 'A')] = a
    tensors[home.tensor_name(layer, 'B')] = b
  return tensors


def _adapter_config(
  config: ModelConfig,
  members: Mapping[str, list[_Member]],
  base: str,
) -> dict[str, Any]:
  """Returns the values of adapter_config.json."""
  rank_pattern = {}
  alpha_pattern = {}
  for module, (first, *_) in members.items():
    parts = first.home.parts
    if parts > 1:  # rank and alpha are multiplied by the same number, so the scale is unchanged
      rank_pattern[_module_suffix(module)] = parts * config.lora_rank
      alpha_pattern[_module_suffix(module)] = parts * config.lora_alpha
  values = {
    'peft_type': 'LORA',
    'task_type': 'SEQ_CLS' if config.head else 'CAUSAL_LM',
    'base_model_name_or_path': base,
    'r': config.lora_rank,
    'lora_alpha': config.lora_alpha,
    'lora_dropout': 0.0,
    'bias': 'none',
    'inference_mode': True,
    'rank_pattern': rank_pattern,
    'alpha_pattern': alpha_pattern,
    'target_modules': sorted(_module_suffix(module) for module in members),
    # It is the same for all matrices of a family.
    'fan_in_fan_out': next(iter(members.values()))[0].home.fan_in,
  }
  if config.head:
    values['modules_to_save'] = ['score']
  return values
