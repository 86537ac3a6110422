"""config.json of a Hugging Face directory ↔ the shape of a model.

Nothing is guessed: a key that changes the mathematics is either computed or refused by name. Files
of transformers 4 (rope_theta, rope_scaling) and of transformers 5 (rope_parameters) are read; what
is written can be read by both.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.interop.families import FAMILIES, Family, GLOBAL, LOCAL
from rlhf_jax.interop.known_keys import check_keys
from rlhf_jax.models import rope
from rlhf_jax.models.model_config import check_model_config, ModelConfig

ACTIVATIONS = {  # Hugging Face's name → ours
  'silu': 'silu',
  'swish': 'silu',
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
}
REQUIRED_FIELDS = ('vocab_size', 'embed', 'layers', 'heads')
COMPUTE_FIELDS = ('dtype', 'remat', 'attention')  # how to compute, which no file says
OLD_LONGROPE_NAMES = ('su', 'yarn')  # what early files of Phi-3 call it

Values = Mapping[str, Any]  # a parsed config.json


def from_hf(values: Values, where: str = 'config.json') -> ModelConfig:
  """Reads the shape that a `config.json` describes.

  A `…ForSequenceClassification` gives `head=True`, and `tied=True` as it has no output matrix.

  Args:
    values: the parsed file.
    where: what errors call it.

  Raises:
    UserError: the architecture is unknown, our decoder lacks a feature, or a key is missing.
  """
  family = _find_family(values, where)
  head = _is_reward_model(values, family, where)
  check_keys(values, family.known_keys, where)
  values = _add_defaults(values, family)
  fields = _read_fields(values, family, where)
  fields |= _read_rope(values, family, where)
  if 'rope_layers' in family.config_keys:
    rope_layers = _read_rope_layers(values, fields['layers'])
    values['no_rope_layers'] = rope_layers  # the family's `layer_types` needs them
    fields['rope_layers'] = _shortest_pattern(rope_layers[: fields['layers']], usual=1)
  fields['windows'] = _read_windows(values, family)
  config = ModelConfig(**fields, family=values['model_type'], head=head)
  config = dataclasses.replace(config, tied=bool(config.tied or head))
  try:
    check_model_config(config)
  except UserError as error:
    raise UserError(f'{where}: {error}') from None
  return config


def to_hf(config: ModelConfig) -> dict[str, Any]:
  """Writes a shape as `config.json`: of its family's language model, or reward model with a head.

  Raises:
    UserError: the family has no such model.
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
  values |= _write_windows(config, family)
  if 'moe_intermediate_size' in values:
    # Of layers without experts, of which there are none; transformers wants a number.
    values['intermediate_size'] = config.mlp
  if config.head:
    values['num_labels'] = 1
  _check_round_trip(config, values)
  return values


def _find_family(values: Values, where: str) -> Family:
  """Returns the family that config.json names."""
  name = values.get('model_type')
  family = FAMILIES.get(name)  # type: ignore[arg-type]
  if family is None:
    known = ', '.join(FAMILIES)
    raise UserError(f'{where}: model_type is {name!r}, expected one of {known}')
  return family


def _is_reward_model(values: Values, family: Family, where: str) -> bool:
  """Tells by the architecture whether this is the family's reward model; absent: it is not."""
  classes = [family.causal_lm, family.classifier]
  architecture = (values.get('architectures') or classes)[0]
  if architecture not in classes:
    raise UserError(
      f'{where}: architecture is {architecture!r}, expected one of {", ".join(classes)}'
    )
  return architecture == family.classifier


def _add_defaults(values: Values, family: Family) -> dict[str, Any]:
  """Returns a copy of config.json in which keys that the file leaves out have their meaning."""
  aliases = {}
  if 'num_local_experts' in values:
    aliases['num_experts'] = values['num_local_experts']  # its name in transformers 5
  return {**family.defaults, **aliases, **values}


def _read_fields(values: Values, family: Family, where: str) -> dict[str, Any]:
  """Reads the fields of ModelConfig that are keys of config.json or fixed in the family."""
  keys = family.config_keys
  missing = [keys[field] for field in REQUIRED_FIELDS if values.get(keys[field]) is None]
  if missing:
    raise UserError(f'{where}: no {", ".join(missing)}')
  stated: dict[str, Any] = {field: values.get(key) for field, key in keys.items()}
  if stated['activation'] not in ACTIVATIONS:
    raise UserError(
      f'{where}: {keys["activation"]} is {stated["activation"]!r}, '
      f'expected one of {", ".join(ACTIVATIONS)}'
    )
  stated['activation'] = ACTIVATIONS[stated['activation']]
  derived = {  # where config.json is silent or null
    'kv_heads': stated['heads'],
    'head_dim': stated['embed'] // stated['heads'],
    'mlp': 4 * stated['embed'],
  }
  if stated['mlp'] is None and values['model_type'] != 'gpt2':  # only GPT-2 derives it
    raise UserError(f'{where}: no {keys["mlp"]}')
  known = {field: value for field, value in stated.items() if value is not None}
  return {**derived, **known, **family.fixed_fields}


def _read_rope(values: Values, family: Family, where: str) -> dict[str, Any]:
  """Reads the fields about rotary positions."""
  if family.fixed_fields.get('learned_positions'):
    return {}
  parameters, local = _split_rope_parameters(values)
  scaling = {**parameters, **(values.get('rope_scaling') or {})}
  kind = _scaling_kind(values, scaling)
  _check_rope(kind, local, where)
  fields = {'rope_theta': parameters.get('rope_theta', values['rope_theta'])}
  if 'rope_local_theta' in family.config_keys:
    default = values['rope_local_base_freq']
    fields['rope_local_theta'] = local.get('rope_theta', default)
  if 'rope_fraction' in family.config_keys:
    default = values['partial_rotary_factor']
    fields['rope_fraction'] = parameters.get('partial_rotary_factor', default)
  elif parameters.get('partial_rotary_factor', 1.0) != 1.0:
    fraction = parameters['partial_rotary_factor']
    raise UserError(f'{where}: partial_rotary_factor is {fraction!r}, expected 1.0')
  if kind != 'default':
    fields['rope_scaling'] = _read_rope_scaling(kind, scaling, values, family)
  return fields


def _split_rope_parameters(values: Values) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns what transformers 5 says of global and of local layers; {} where it says nothing.

  `rope_parameters` is one table for all layers, or one for each kind of layer.
  """
  parameters = values.get('rope_parameters') or {}
  local = parameters.get(LOCAL) or {}
  if GLOBAL in parameters or LOCAL in parameters:
    parameters = parameters.get(GLOBAL) or {}
  return parameters, local


def _scaling_kind(values: Values, scaling: Values) -> str:
  """Returns the `rope_type` of the scaling, 'default' where there is none."""
  kind = scaling.get('rope_type', scaling.get('type', 'default'))
  if values['model_type'] == 'phi3' and kind in OLD_LONGROPE_NAMES:
    return 'longrope'
  return kind


def _check_rope(kind: str, local: Values, where: str) -> None:
  """Refuses scalings that rope.py does not compute."""
  if kind not in ('default', *rope.SCALINGS):
    known = ', '.join(rope.SCALINGS)
    raise UserError(f'{where}: rotary scaling {kind!r}, expected none, {known}')
  if local.get('rope_type', 'default') != 'default':
    raise UserError(
      f'{where}: rotary scaling {local["rope_type"]!r} of local layers, expected none'
    )


def _read_rope_scaling(
  kind: str,
  scaling: Values,
  values: Values,
  family: Family,
) -> dict[str, Any]:
  """Reads the numbers that a scaling needs, as `ModelConfig.rope_scaling` holds them."""
  keys = (*rope.SCALINGS[kind], 'attention_factor')
  numbers = {key: scaling[key] for key in keys if scaling.get(key) is not None}
  length_key = 'original_max_position_embeddings'
  if length_key in keys:
    length = values.get(length_key) or values.get('max_position_embeddings')
    if length_key in family.defaults:  # Phi-3 has it beside rope_scaling, which counts
      numbers[length_key] = length
    numbers.setdefault(length_key, length)
  return {'rope_type': kind, **numbers}


def _read_rope_layers(values: Values, layers: int) -> list[int]:
  """Reads for each layer whether it has rotary positions (1) or none (0)."""
  if values.get('no_rope_layers'):
    return values['no_rope_layers']
  interval = values['no_rope_layer_interval']
  return [int((i + 1) % interval != 0) for i in range(layers)]


def _read_windows(values: Values, family: Family) -> tuple[int, ...]:
  """Reads the pattern of windows over layers."""
  if family.layer_types is None:
    return ()
  size = values.get('sliding_window') or 0
  if family.needs_use_sliding_window and not values['use_sliding_window']:
    size = 0
  kinds = values.get('layer_types') if family.reads_layer_types else None
  if not kinds:
    kinds = family.layer_types(values)
  windows = [size if kind == LOCAL else 0 for kind in kinds]
  return _shortest_pattern(windows, usual=0)


def _shortest_pattern(values: Sequence[int], usual: int) -> tuple[int, ...]:
  """Returns the shortest tuple whose repetition gives the values, () where all are `usual`."""
  if all(value == usual for value in values):
    return ()
  for length in range(1, len(values)):
    if all(value == values[i % length] for i, value in enumerate(values)):
      return tuple(values[:length])
  return tuple(values)


def _hf_value(config: ModelConfig, field: str, key: str) -> Any:
  """Returns what config.json has under a key that stands for one of our fields."""
  value = getattr(config, field)
  if field == 'activation' and value == 'gelu_tanh':  # two names for the same function
    return 'gelu_new' if config.family == 'gpt2' else 'gelu_pytorch_tanh'
  if field in ('attention_cap', 'logit_cap'):
    return value or None  # ours is 0 where there is none
  if field == 'rope_layers':
    return config.rotary_layers  # one number for each layer
  return value


def _write_rope(config: ModelConfig, family: Family) -> dict[str, Any]:
  """Writes the keys about rotary positions, in the form of transformers 4."""
  values: dict[str, Any] = {
    'rope_theta': config.rope_theta,
    'rope_scaling': dict(config.rope_scaling) or None,
  }
  length_key = 'original_max_position_embeddings'
  if length_key in family.defaults:
    values[length_key] = config.rope_scaling.get(length_key) or config.max_length
  return values


def _write_windows(config: ModelConfig, family: Family) -> dict[str, Any]:
  """Writes the keys about windows."""
  if family.layer_types is None:
    return {}
  windows = config.layer_windows
  largest = max(windows)
  values: dict[str, Any] = {'sliding_window': largest or None}
  if family.reads_layer_types:
    values['layer_types'] = [LOCAL if window else GLOBAL for window in windows]
  if family.needs_use_sliding_window:
    values['use_sliding_window'] = bool(largest)
  if 'max_window_layers' in family.defaults:
    with_window = [i for i, window in enumerate(windows) if window]
    values['max_window_layers'] = with_window[0] if with_window else config.layers
  return values


def _check_round_trip(config: ModelConfig, values: Values) -> None:
  """Refuses a shape that would come back from its config.json as another one."""
  expected = dataclasses.replace(config, tied=config.tied or config.head)
  again = from_hf(values, f'family {config.family}')
  for field, value in dataclasses.asdict(expected).items():
    if field in COMPUTE_FIELDS:
      continue
    if value != getattr(again, field):
      raise UserError(f'model: the family {config.family!r} has no model with {field} {value!r}')
