"""config.json of a Hugging Face directory ↔ the shape of a model.

What is read here is not guessed: a key that changes the mathematics is computed, or refused by name. Files of
transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters) are read; what is written both can read.
"""

import dataclasses

from rlhf_jax.errors import UserError
from rlhf_jax.interop.families import FAMILIES, GLOBAL, LOCAL
from rlhf_jax.models import rope
from rlhf_jax.models.model_config import check_model_config, ModelConfig

ACTIVATIONS = {'silu': 'silu', 'swish': 'silu', 'gelu': 'gelu', 'gelu_new': 'gelu_tanh',
               'gelu_pytorch_tanh': 'gelu_tanh'}
NEEDED = ('vocab_size', 'embed', 'layers', 'heads')
COMPUTE = ('dtype', 'remat', 'attention')  # fields that no file carries


def from_hf(values: dict, where: str = 'config.json') -> ModelConfig:
  """The shape that a `config.json` describes.

  A `…ForSequenceClassification` gives `head=True` and `tied=True`: it has no output matrix.

  Args:
    values: the parsed file.
    where: what errors call it.

  Raises:
    UserError: for an unknown architecture, a feature our decoder lacks, or a missing key.
  """
  name = values.get('model_type')
  family = FAMILIES.get(name)
  if family is None:
    raise UserError(f'{where}: model_type is {name!r}, expected one of {", ".join(FAMILIES)}')
  kinds = [family.causal, family.scorer]
  kind = (values.get('architectures') or kinds)[0]
  if kind not in kinds:
    raise UserError(f'{where}: architecture is {kind!r}, expected one of {", ".join(kinds)}')
  for key, value in {'quantization_config': None, **family.only}.items():
    if values.get(key) not in (None, value):
      raise UserError(f'{where}: {key} is {values[key]!r}, expected {value!r}')
  aliases = {'num_experts': values['num_local_experts']} if 'num_local_experts' in values else {}  # transformers 5
  values = {**family.defaults, **aliases, **values}
  missing = [family.keys[ours] for ours in NEEDED if values.get(family.keys[ours]) is None]
  if missing:
    raise UserError(f'{where}: no {", ".join(missing)}')
  found = {ours: values.get(theirs) for ours, theirs in family.keys.items()}
  if found['activation'] not in ACTIVATIONS:
    raise UserError(f'{where}: {family.keys["activation"]} is {found["activation"]!r}, expected one of '
                    + ', '.join(ACTIVATIONS))
  found['activation'] = ACTIVATIONS[found['activation']]
  otherwise = {'kv_heads': found['heads'], 'head_dim': found['embed'] // found['heads'], 'mlp': 4 * found['embed']}
  if name != 'gpt2' and found['mlp'] is None:
    raise UserError(f'{where}: no {family.keys["mlp"]}')
  fields = {**otherwise, **{ours: value for ours, value in found.items() if value is not None}, **family.always}
  fields |= _rope(values, family, where)
  if 'rope_layers' in family.keys:
    every = values['no_rope_layer_interval']
    values['no_rope_layers'] = found['rope_layers'] or [int((i + 1) % every != 0) for i in range(fields['layers'])]
    fields['rope_layers'] = _pattern(values['no_rope_layers'][:fields['layers']], 1)
  fields['windows'] = _windows(values, family)
  config = ModelConfig(**fields, family=name, head=kind == family.scorer)
  config = dataclasses.replace(config, tied=bool(config.tied or config.head))
  try:
    check_model_config(config)
  except UserError as error:
    raise UserError(f'{where}: {error}') from None
  return config


def to_hf(config: ModelConfig) -> dict:
  """The `config.json` of a shape: of its family's language model, or with a head of its reward model.

  Raises:
    UserError: the family has no such model.
  """
  family = FAMILIES[config.family]
  values = {'model_type': config.family, 'architectures': [family.scorer if config.head else family.causal]}
  for ours, theirs in family.keys.items():
    values[theirs] = getattr(config, ours)
  if config.activation == 'gelu_tanh':
    values[family.keys['activation']] = 'gelu_new' if config.family == 'gpt2' else 'gelu_pytorch_tanh'
  for key in ('attn_logit_softcapping', 'final_logit_softcapping'):
    if key in values:
      values[key] = values[key] or None
  if 'query_pre_attn_scalar' in values:
    values['query_pre_attn_scalar'] = config.attention_scalar
  if 'no_rope_layers' in values:
    values['no_rope_layers'] = config.rotary_layers
  if not config.learned_positions:
    values |= {'rope_theta': config.rope_theta, 'rope_scaling': dict(config.rope_scaling) or None}
    first = config.rope_scaling.get('original_max_position_embeddings')
    if 'original_max_position_embeddings' in family.defaults:
      values['original_max_position_embeddings'] = first or config.max_length
  values |= _said_windows(config, family)
  if 'moe_intermediate_size' in values:
    values['intermediate_size'] = config.mlp  # of layers without experts, which there are none of
  if config.head:
    values['num_labels'] = 1
  again = dataclasses.asdict(from_hf(values, f'family {config.family}'))
  for field, value in dataclasses.asdict(dataclasses.replace(config, tied=config.tied or config.head)).items():
    if field not in COMPUTE and value != again[field]:
      raise UserError(f'model: the family {config.family!r} has no model with {field} {value!r}')
  return values


def _rope(values, family, where):
  """Fields about rotary positions."""
  if family.always.get('learned_positions'):
    return {}
  new = values.get('rope_parameters') or {}  # where transformers 5 writes it
  local = new.get(LOCAL) or {}
  new = (new.get(GLOBAL) or {}) if GLOBAL in new or LOCAL in new else new
  old = values.get('rope_scaling') or {}
  said = {**new, **old}
  kind = said.get('rope_type', said.get('type', 'default'))
  if values['model_type'] == 'phi3' and kind in ('su', 'yarn'):
    kind = 'longrope'  # its names before it had one
  if kind not in ('default', *rope.SCALINGS):
    raise UserError(f'{where}: rotary scaling {kind!r}, expected none, {", ".join(rope.SCALINGS)}')
  if local.get('rope_type', 'default') != 'default':
    raise UserError(f'{where}: rotary scaling {local["rope_type"]!r} of local layers, expected none')
  fields = {'rope_theta': new.get('rope_theta', values['rope_theta'])}
  if 'rope_local_theta' in family.keys:
    fields['rope_local_theta'] = local.get('rope_theta', values['rope_local_base_freq'])
  if 'rope_fraction' in family.keys:
    fields['rope_fraction'] = new.get('partial_rotary_factor', values['partial_rotary_factor'])
  elif new.get('partial_rotary_factor', 1.0) != 1.0:
    raise UserError(f'{where}: partial_rotary_factor is {new["partial_rotary_factor"]!r}, expected 1.0')
  if kind != 'default':
    keys = (*rope.SCALINGS[kind], 'attention_factor')
    scaling = {key: said[key] for key in keys if said.get(key) is not None}
    if 'original_max_position_embeddings' in keys:
      first = values.get('original_max_position_embeddings') or values.get('max_position_embeddings')
      if 'original_max_position_embeddings' in family.defaults:
        scaling['original_max_position_embeddings'] = first
      scaling.setdefault('original_max_position_embeddings', first)
    fields['rope_scaling'] = {'rope_type': kind, **scaling}
  return fields


def _windows(values, family):
  if family.layer_types is None:
    return ()
  size = values.get('sliding_window') or 0
  if family.switched and not values['use_sliding_window']:
    size = 0
  kinds = (values.get('layer_types') if family.listed else None) or family.layer_types(values)
  return _pattern([size if kind == LOCAL else 0 for kind in kinds], 0)


def _said_windows(config, family):
  """Keys about windows."""
  if family.layer_types is None:
    return {}
  windows = config.layer_windows
  said = {'sliding_window': max(windows) or None}
  if family.listed:
    said['layer_types'] = [LOCAL if window else GLOBAL for window in windows]
  if family.switched:
    said['use_sliding_window'] = bool(max(windows))
  if 'max_window_layers' in family.defaults:
    said['max_window_layers'] = next((i for i, window in enumerate(windows) if window), config.layers)
  return said


def _pattern(values, usual):
  """The shortest tuple that repeats to a list; () where all are the usual."""
  if all(value == usual for value in values):
    return ()
  length = next(n for n in range(1, len(values) + 1) if all(x == values[i % n] for i, x in enumerate(values)))
  return tuple(values[:length])
