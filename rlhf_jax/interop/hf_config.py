"""Conversion between config.json of a Hugging Face directory and the shape of a model.

Nothing is guessed: every key is implemented, known not to change what the model
computes, or refused with an error that names it. Files of transformers 4
(rope_theta, rope_scaling) and of transformers 5 (rope_parameters) are read as
transformers 5 reads them. Files that are written here can be read by both.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.interop import config_keys
from rlhf_jax.interop.config_keys import GLOBAL, LOCAL
from rlhf_jax.interop.families import FAMILIES, Family
from rlhf_jax.interop.known_keys import check_keys, KnownKeys, or_null, show, TABLE
from rlhf_jax.models.model_config import (
  check_model_config,
  ModelConfig,
  OPTIONAL_ROPE_NUMBERS,
  ROPE_SCALINGS,
)

ACTIVATIONS = {  # Hugging Face's name → ours
  'silu': 'silu',
  'swish': 'silu',
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
}
REQUIRED_FIELDS = ('vocab_size', 'embed', 'layers', 'heads')
# Fields that config.json does not have: they say how to compute, or belong to the tokenizer.
COMPUTE_FIELDS = ('dtype', 'remat', 'attention', 'numerics', 'empty_ids')
OLD_LONGROPE_NAMES = ('su', 'yarn')  # the names of longrope in early files of Phi-3
LENGTH = 'original_max_position_embeddings'  # context length of training before the scaling

Values = Mapping[str, Any]  # a parsed config.json


def from_hf(values: Values, where: str = 'config.json') -> ModelConfig:
  """Reads the shape of a model from its `config.json`.

  The architecture `…ForSequenceClassification` gives `head=True`, and also
  `tied=True`, because it has no output matrix.

  Args:
    values: the parsed file.
    where: the name of the file in error messages.

  Raises:
    UserError: the architecture is unknown, our decoder lacks a feature of the model, or a key is
      missing, unknown or has an invalid value.
  """
  family = _find_family(values, where)
  head = _is_reward_model(values, family, where)
  _check_required(values, family, where)
  check_keys(values, family.known_keys, where)
  values = _add_defaults(values, family)
  fields = _read_fields(values, family, where)
  fields |= _read_rope(values, family, fields['head_dim'], where)
  if 'rope_layers' in family.config_keys:
    rope_layers = _read_rope_layers(values, where)
    values['no_rope_layers'] = rope_layers  # the family's `layer_types` needs them
    fields['rope_layers'] = _shortest_pattern(rope_layers[: fields['layers']], usual=1)
  fields['windows'] = _read_windows(values, family, fields['layers'], where)
  config = ModelConfig(**fields, family=values['model_type'], head=head)
  config = dataclasses.replace(config, tied=bool(config.tied or head))
  try:
    check_model_config(config)
  except UserError as error:
    raise UserError(f'{where}: {error}') from None
  return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
  """Returns the values of `config.json` for a shape.

  They describe the language model of the family or, for a shape with a head, its reward model.

  Raises:
    UserError: the family has no model of this shape.
  """
  family = FAMILIES[config.family]
  values: dict[str, Any] = {
    'model_type': config.family,
    'architectures': [family.class_name(config.head)],
  }
  for field, key in family.config_keys.items():
    values[key] = _hf_value(config, field, key)
  if not config.learned_positions:
    values |= _write_rope(config, family)
  values |= _write_windows(config, family, values)
  if 'moe_intermediate_size' in values:
    # The size of layers without experts. There are none, but transformers
    # requires a number.
    values['intermediate_size'] = config.mlp
  if config.head:
    values['num_labels'] = 1
  _check_round_trip(config, values)
  return values


def _find_family(values: Values, where: str) -> Family:
  """Returns the family that config.json names."""
  name = values.get('model_type')
  family = FAMILIES.get(name) if isinstance(name, str) else None
  if family is None:
    known = ', '.join(FAMILIES)
    raise UserError(f'{where}: model_type is {show(name)}, expected one of {known}')
  return family


def _is_reward_model(values: Values, family: Family, where: str) -> bool:
  """Tells by `architectures` whether this is the family's reward model; False without the key."""
  stated = values.get('architectures')
  if not stated:
    return False
  classes = [family.causal_lm, family.classifier]
  architecture = stated[0] if isinstance(stated, list) and len(stated) == 1 else stated
  if architecture not in classes:
    raise UserError(
      f'{where}: architecture is {show(architecture)}, expected one of {", ".join(classes)}'
    )
  return architecture == family.classifier


def _check_required(values: Values, family: Family, where: str) -> None:
  """Refuses a file in which a size without a default is missing."""
  keys = [family.config_keys[field] for field in REQUIRED_FIELDS]
  mlp = family.config_keys['mlp']
  if values['model_type'] != 'gpt2' and mlp not in family.defaults:  # only GPT-2 derives it
    keys.append(mlp)
  missing = [key for key in keys if values.get(key) is None]
  if missing:
    raise UserError(f'{where}: no {", ".join(missing)}')
  if 'num_experts' in values and 'num_local_experts' in values:  # two names of one number
    if values['num_experts'] != values['num_local_experts']:
      raise UserError(
        f'{where}: num_experts is {values["num_experts"]}, expected num_local_experts, '
        f'{values["num_local_experts"]}'
      )


def _add_defaults(values: Values, family: Family) -> dict[str, Any]:
  """Returns a copy of config.json with the family's defaults for keys that the file lacks."""
  aliases = {}
  if 'num_local_experts' in values and 'num_experts' in family.defaults:
    aliases['num_experts'] = values['num_local_experts']  # the name in transformers 5
  return {**family.defaults, **aliases, **values}


def _read_fields(values: Values, family: Family, where: str) -> dict[str, Any]:
  """Reads the fields of ModelConfig that are keys of config.json or fixed in the family."""
  keys = family.config_keys
  stated: dict[str, Any] = {field: values.get(key) for field, key in keys.items()}
  if stated['activation'] not in ACTIVATIONS:
    raise UserError(
      f'{where}: {keys["activation"]} is {stated["activation"]!r}, '
      f'expected one of {", ".join(ACTIVATIONS)}'
    )
  stated['activation'] = ACTIVATIONS[stated['activation']]
  derived = {  # values for keys that are absent or null
    'kv_heads': stated['heads'],
    'head_dim': stated['embed'] // stated['heads'],
    'mlp': 4 * stated['embed'],
  }
  known = {field: value for field, value in stated.items() if value is not None}
  if known.get('experts_per_token', 0) > known.get('experts', 0):
    raise UserError(
      f'{where}: {keys["experts_per_token"]} is {known["experts_per_token"]}, expected at most '
      f'the number of experts, {known["experts"]}'
    )
  return {**derived, **known, **family.fixed_fields}


# Rotary positions.


def _read_rope(values: Values, family: Family, head_dim: int, where: str) -> dict[str, Any]:
  """Reads the fields of ModelConfig about rotary positions."""
  if family.fixed_fields.get('learned_positions'):
    return {}
  fields: dict[str, Any] = {}
  if family.rope_by_layer:
    name, table, local = _split_rope_tables(values, where)
    _scaling_kind(local, family, (), where, f'rope_parameters.{LOCAL}')
    default = values['rope_local_base_freq']
    fields['rope_local_theta'] = local.get('rope_theta', default)
  else:
    name, table = _find_rope_table(values)
  kind = _scaling_kind(table, family, family.rope_scalings, where, name)
  fields['rope_theta'] = table.get('rope_theta', values['rope_theta'])
  fraction = table.get('partial_rotary_factor', values.get('partial_rotary_factor') or 1.0)
  if 'rope_fraction' in family.config_keys:
    fields['rope_fraction'] = fraction
  elif fraction != 1.0:
    raise UserError(f'{where}: {name}.partial_rotary_factor is {fraction!r}, expected 1.0')
  turning = int(head_dim * fraction)
  if turning < 2 or turning % 2:
    raise UserError(
      f'{where}: partial_rotary_factor is {fraction!r}, expected a fraction of the {head_dim} '
      'dimensions of a head that is an even number'
    )
  if kind != 'default':
    fields['rope_scaling'] = _read_rope_scaling(kind, table, values, turning, f'{where}: {name}')
  return fields


def _find_rope_table(values: Values) -> tuple[str, Values]:
  """Finds the table about rotary positions.

  If a file has both keys, only `rope_scaling` is used, as in transformers 5.

  Returns:
    (the key of the table, the table); the table is {} where there is none.
  """
  for key in ('rope_scaling', 'rope_parameters'):
    if values.get(key):
      return key, values[key]
  return 'rope_parameters', {}


def _split_rope_tables(values: Values, where: str) -> tuple[str, Values, Values]:
  """Finds the tables of a family that has one table for each kind of layer (Gemma 3).

  The keys of `rope_scaling`, which transformers 4 writes, are added to the global layers' table.

  Returns:
    (the key of the global layers' table, that table, the table of local layers).
  """
  tables = values.get('rope_parameters') or {}
  each = or_null(TABLE)
  known = KnownKeys(
    read={GLOBAL: each, LOCAL: each}, advice='; there is one for each kind of layer'
  )
  check_keys(tables, known, where, prefix='rope_parameters.')
  local = tables.get(LOCAL) or {}
  table = dict(tables.get(GLOBAL) or {})
  scaling = values.get('rope_scaling')
  if not scaling:
    return f'rope_parameters.{GLOBAL}', table, local
  return 'rope_scaling', {**table, **scaling}, local


def _scaling_kind(
  table: Values,
  family: Family,
  kinds: Sequence[str],
  where: str,
  name: str,
) -> str:
  """Checks the keys of a table about rotary positions, and returns its `rope_type`.

  Args:
    table: the table.
    family: the family of the model.
    kinds: the rope types that are supported, in addition to 'default'.
    where: the name of the file in error messages.
    name: the name of the table in error messages.

  Returns:
    The rope type; 'default' where the table has none.
  """
  kind = table.get('rope_type', table.get('type', 'default'))
  if 'rope_fraction' in family.config_keys and kind in OLD_LONGROPE_NAMES:
    kind = 'longrope'
  if kind not in ('default', *kinds):
    known = ', '.join(('none', *kinds))
    raise UserError(f'{where}: {name}: rotary scaling {show(kind)}, expected {known}')
  numbers = ROPE_SCALINGS.get(kind, ()) + OPTIONAL_ROPE_NUMBERS.get(kind, ())
  read = {key: config_keys.ROPE_NUMBERS[key] for key in numbers}
  advice = f'; the rope_type {kind!r} does not use it'
  known_keys = KnownKeys(read=config_keys.ROPE_TABLE_KEYS | read, advice=advice)
  check_keys(table, known_keys, where, prefix=f'{name}.')
  return kind


def _read_rope_scaling(
  kind: str,
  table: Values,
  values: Values,
  turning: int,
  place: str,
) -> dict[str, Any]:
  """Reads the numbers that a scaling needs, in the form of `ModelConfig.rope_scaling`.

  Args:
    kind: the rope type.
    table: the table about rotary positions.
    values: the parsed file, with defaults.
    turning: R, the number of dimensions of a head that are rotated.
    place: the name of the table in error messages.
  """
  keys = (*ROPE_SCALINGS[kind], *OPTIONAL_ROPE_NUMBERS.get(kind, ()))
  numbers = {key: table[key] for key in keys if table.get(key) is not None}
  if LENGTH in keys:
    # The key of the file itself, as in Phi-3's files, takes precedence over that of the table.
    numbers[LENGTH] = (
      values.get(LENGTH) or numbers.get(LENGTH) or values.get('max_position_embeddings')
    )
  for key in ('short_factor', 'long_factor'):
    if len(numbers.get(key, ())) not in (0, turning // 2):
      raise UserError(
        f'{place}.{key} has {len(numbers[key])} numbers, expected {turning // 2}, '
        'one for each pair of dimensions that is rotated'
      )
  if numbers.get('high_freq_factor', 2) <= numbers.get('low_freq_factor', 1):
    raise UserError(
      f'{place}.high_freq_factor is {numbers["high_freq_factor"]}, expected more than '
      f'low_freq_factor, {numbers["low_freq_factor"]}'
    )
  return {'rope_type': kind, **numbers}


# Layers that differ from each other.


def _read_rope_layers(values: Values, where: str) -> list[int]:
  """Reads for each layer whether it has rotary positions (1) or none (0)."""
  layers = values['num_hidden_layers']
  listed = values.get('no_rope_layers')
  if listed is None:
    interval = values['no_rope_layer_interval']
    return [int((i + 1) % interval != 0) for i in range(layers)]
  if len(listed) < layers:
    raise UserError(f'{where}: no_rope_layers has {len(listed)} entries, expected {layers}')
  return listed


def _read_windows(values: Values, family: Family, layers: int, where: str) -> tuple[int, ...]:
  """Reads the pattern of sliding windows over the layers, 0 for a layer without a window."""
  size: Any = None
  usual = [GLOBAL] * layers
  if family.layer_types is not None:
    size = values.get('sliding_window')
    if family.needs_use_sliding_window and not values['use_sliding_window']:
      size = None
    usual = family.layer_types({**values, 'sliding_window': size})
  kinds = values.get('layer_types')
  if kinds is None:
    kinds = usual
  if len(kinds) != layers:
    raise UserError(f'{where}: layer_types has {len(kinds)} entries, expected {layers}')
  if kinds != usual and not family.reads_layer_types:
    raise UserError(
      f'{where}: layer_types is {show(kinds)}, expected {usual[0]!r} for each layer of a '
      f'{family.title}'
    )
  if LOCAL in kinds and size is None:
    raise UserError(
      f'{where}: layer_types has {LOCAL!r}, expected also a sliding_window that is not turned off'
    )
  windows: list[int] = [size if kind == LOCAL else 0 for kind in kinds]
  return _shortest_pattern(windows, usual=0)


def _shortest_pattern(values: Sequence[int], usual: int) -> tuple[int, ...]:
  """Returns the shortest tuple whose repetition gives the values; () where all are `usual`."""
  if all(value == usual for value in values):
    return ()
  for length in range(1, len(values)):
    if all(value == values[i % length] for i, value in enumerate(values)):
      return tuple(values[:length])
  return tuple(values)


def _hf_value(config: ModelConfig, field: str, key: str) -> Any:
  """Returns the value in config.json of a key that corresponds to a field of ModelConfig."""
  value = getattr(config, field)
  if field == 'activation' and value == 'gelu_tanh':  # two names for the same function
    return 'gelu_new' if config.family == 'gpt2' else 'gelu_pytorch_tanh'
  if field in ('attention_cap', 'logit_cap'):
    return value or None  # the field is 0 where there is no cap
  if field == 'attention_scalar':
    return value or config.head_dim  # the field is 0 for the usual value
  if field == 'rope_layers':
    return config.rotary_layers  # one number for each layer
  return value


def _write_rope(config: ModelConfig, family: Family) -> dict[str, Any]:
  """Returns the keys about rotary positions, in the form of transformers 4."""
  values: dict[str, Any] = {
    'rope_theta': config.rope_theta,
    'rope_scaling': dict(config.rope_scaling) or None,
  }
  if LENGTH in family.defaults:
    values[LENGTH] = config.rope_scaling.get(LENGTH) or config.max_length
  return values


def _write_windows(config: ModelConfig, family: Family, written: Values) -> dict[str, Any]:
  """Returns the keys about sliding windows.

  Args:
    config: the shape of the model.
    family: the family of the model.
    written: the other keys and values of the file.
  """
  if family.layer_types is None:
    return {}
  windows = config.layer_windows
  largest = max(windows)
  size = largest or None
  without_window = {**family.defaults, **written, 'sliding_window': None}
  if size is None and LOCAL in family.layer_types(without_window):
    size = family.defaults['sliding_window']  # transformers requires one, though no layer uses it
  values: dict[str, Any] = {'sliding_window': size}
  if 'use_sliding_window' in family.defaults:
    values['use_sliding_window'] = bool(largest)
  if 'max_window_layers' in family.defaults:
    with_window = [i for i, window in enumerate(windows) if window]
    values['max_window_layers'] = with_window[0] if with_window else config.layers
  kinds = [LOCAL if window else GLOBAL for window in windows]
  # The key is written only if it is needed: with it transformers opens a Mistral as a Ministral.
  usual = family.layer_types({**family.defaults, **written, **values})
  if family.reads_layer_types and kinds != usual:
    values['layer_types'] = kinds
  return values


def _check_round_trip(config: ModelConfig, values: Values) -> None:
  """Refuses a shape if reading its config.json would give a different shape."""
  expected = dataclasses.replace(config, tied=config.tied or config.head)
  if 'attention_scalar' in FAMILIES[config.family].config_keys:
    scalar = config.attention_scalar or config.head_dim
    expected = dataclasses.replace(expected, attention_scalar=scalar)
  again = from_hf(values, f'family {config.family}')
  for field, value in dataclasses.asdict(expected).items():
    if field in COMPUTE_FIELDS:
      continue
    if value != getattr(again, field):
      raise UserError(f'model: the family {config.family!r} has no model with {field} {value!r}')
