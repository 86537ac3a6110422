"""Other people's names for our parameters: Hugging Face `config.json` and tensor names, GGUF metadata and names.

One table per family; now only Llama's (Llama, SmolLM2 and whatever else says `"model_type": "llama"`).
A line of the table names the axes of our leaf and of the file's matrix by letters:

  v vocab_size, d embed, h heads, n kv_heads, c head_dim, f mlp

so `'dhc', 'hc,d'` reads: our leaf [D, H, C] stands in the file as the matrix [H * C, D]. Leaves under `layers`
carry one more leading axis here and one tensor per layer there. No file is opened here: see pretrained.py.
"""

import dataclasses
import math

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.models.transformer import ModelConfig

SIZES = {'v': 'vocab_size', 'd': 'embed', 'h': 'heads', 'n': 'kv_heads', 'c': 'head_dim', 'f': 'mlp'}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One leaf of ours and its place in files.

  Attributes:
    path: keys of the leaf in params.
    axes: letters of our axes, without `layers`.
    name: Hugging Face's name, `{}` for the layer.
    matrix: letters of the file's axes, a comma between two; an axis without letters has size 1.
    gguf: GGUF's name.
    paired: GGUF keeps the rows in pairs (i, i + C/2), Hugging Face in halves.
  """
  path: tuple[str, ...]
  axes: str
  name: str
  matrix: str
  gguf: str = ''
  paired: bool = False

  def names(self, config, gguf=False):
    """Its names in a file: one, or one per layer."""
    name = self.gguf if gguf else self.name
    return [name.format(i) for i in range(config.layers)] if self.path[0] == 'layers' else [name]

  def shape(self, config):
    """Shape of our leaf (one layer of it)."""
    return tuple(getattr(config, SIZES[axis]) for axis in self.axes)

  def file_shape(self, config):
    """Shape of the file's matrix or vector."""
    return tuple(math.prod(getattr(config, SIZES[axis]) for axis in group) for group in self.matrix.split(','))

  def read(self, config, matrix, index=None):
    """Our leaf (one layer of it) out of the file's.

    Args:
      config: shape of the model.
      matrix: (slices) → the part of the file's matrix, numpy; called once, with the least part that is needed.
      index: slices of our axes; all of them by default.
    """
    sizes = dict(zip(self.axes, self.shape(config)))
    cuts = dict(zip(self.axes, index or [slice(None)] * len(self.axes)))
    slices, parts = [], []
    for group in self.matrix.split(','):  # an axis of the file is cut at its first letter, the others afterwards
      start, stop, _ = cuts[group[0]].indices(sizes[group[0]]) if group else (0, 1, 1)
      inner = math.prod(sizes[axis] for axis in group[1:])
      slices.append(slice(start * inner, stop * inner))
      parts += [stop - start] * bool(group) + [sizes[axis] for axis in group[1:]]
    letters = self.matrix.replace(',', '')
    first = {group[0] for group in self.matrix.split(',') if group}
    part = matrix(tuple(slices)).reshape(parts).transpose([letters.index(axis) for axis in self.axes])
    return part[tuple(slice(None) if axis in first else cuts[axis] for axis in self.axes)]

  def write(self, config, leaf):
    """The file's matrix out of our leaf (one layer of it), numpy."""
    letters = self.matrix.replace(',', '')
    order = [self.axes.index(axis) for axis in letters]
    return np.ascontiguousarray(leaf.transpose(order).reshape(self.file_shape(config)))

  def unpair(self, config, matrix):
    """GGUF's matrix in Hugging Face's order of rows."""
    if not self.paired:
      return matrix
    heads = self.shape(config)[self.axes.index(self.matrix[0])]
    return matrix.reshape(heads, -1, 2, matrix.shape[-1]).swapaxes(1, 2).reshape(matrix.shape)


@dataclasses.dataclass(frozen=True)
class Family:
  """What is particular to a family.

  Attributes:
    architecture: what stands before `ForCausalLM` in Hugging Face's class name.
    only: keys of config.json and the one value of each that our decoder computes; absent counts as that value.
    defaults: what an absent key of config.json means.
    tensors: the table.
    ignored: endings of tensor names that carry nothing to learn.
  """
  architecture: str
  only: dict
  defaults: dict
  tensors: tuple[Tensor, ...]
  ignored: tuple[str, ...] = ()


def _layer(leaf, axes, name, matrix, gguf, paired=False):
  return Tensor(('layers', leaf), axes, f'model.layers.{{}}.{name}.weight', matrix, f'blk.{{}}.{gguf}.weight',
                paired)


FAMILIES = {
    'llama': Family(
        architecture='Llama',
        only={'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False, 'rope_scaling': None,
              'partial_rotary_factor': 1.0, 'quantization_config': None},
        defaults={'rms_norm_eps': 1e-6, 'rope_theta': 10000.0, 'tie_word_embeddings': False,
                  'max_position_embeddings': 2048},
        tensors=(
            Tensor(('embedding',), 'vd', 'model.embed_tokens.weight', 'v,d', 'token_embd.weight'),
            _layer('attention_norm', 'd', 'input_layernorm', 'd', 'attn_norm'),
            _layer('query', 'dhc', 'self_attn.q_proj', 'hc,d', 'attn_q', paired=True),
            _layer('key', 'dnc', 'self_attn.k_proj', 'nc,d', 'attn_k', paired=True),
            _layer('value', 'dnc', 'self_attn.v_proj', 'nc,d', 'attn_v'),
            _layer('output', 'hcd', 'self_attn.o_proj', 'd,hc', 'attn_output'),
            _layer('mlp_norm', 'd', 'post_attention_layernorm', 'd', 'ffn_norm'),
            _layer('gate', 'df', 'mlp.gate_proj', 'f,d', 'ffn_gate'),
            _layer('up', 'df', 'mlp.up_proj', 'f,d', 'ffn_up'),
            _layer('down', 'fd', 'mlp.down_proj', 'd,f', 'ffn_down'),
            Tensor(('norm',), 'd', 'model.norm.weight', 'd', 'output_norm.weight'),
            Tensor(('unembedding',), 'dv', 'lm_head.weight', 'v,d', 'output.weight'),
            Tensor(('score', 'kernel'), 'd', 'score.weight', ',d'),
        ),
        ignored=('rotary_emb.inv_freq',),
    ),
}

_KEYS = {  # ours: Hugging Face's
    'vocab_size': 'vocab_size', 'embed': 'hidden_size', 'layers': 'num_hidden_layers',
    'heads': 'num_attention_heads', 'kv_heads': 'num_key_value_heads', 'head_dim': 'head_dim',
    'mlp': 'intermediate_size', 'norm_eps': 'rms_norm_eps',
    'rope_theta': 'rope_theta', 'tied': 'tie_word_embeddings', 'max_length': 'max_position_embeddings',
}
_GGUF_KEYS = {  # Hugging Face's: GGUF's, after the family's name
    'hidden_size': 'embedding_length', 'num_hidden_layers': 'block_count',
    'num_attention_heads': 'attention.head_count', 'num_key_value_heads': 'attention.head_count_kv',
    'head_dim': 'rope.dimension_count', 'intermediate_size': 'feed_forward_length',
    'rms_norm_eps': 'attention.layer_norm_rms_epsilon', 'rope_theta': 'rope.freq_base',
    'max_position_embeddings': 'context_length',
}


def tensors(config: ModelConfig) -> list[Tensor]:
  """The lines of the table that a model of this shape has."""
  absent = {'unembedding': config.tied, 'score': not config.head}
  return [tensor for tensor in FAMILIES['llama'].tensors if not absent.get(tensor.path[0])]


def ignorable(config: ModelConfig, name: str) -> bool:
  """Whether a tensor of a file may be passed over: constants, and the copy of a tied output matrix."""
  return name.endswith(FAMILIES['llama'].ignored) or (config.tied and name == 'lm_head.weight')


def from_hf(values: dict, where: str = 'config.json') -> ModelConfig:
  """The shape that a `config.json` describes.

  A `…ForSequenceClassification` gives `head=True` and `tied=True`: it has no output matrix.

  Args:
    values: the parsed file.
    where: what errors call it.

  Raises:
    UserError: for an unknown architecture, a feature our decoder lacks, or a missing key.
  """
  family = FAMILIES.get(values.get('model_type'))
  if family is None:
    raise UserError(f'{where}: model_type is {values.get("model_type")!r}, expected one of {", ".join(FAMILIES)}')
  kinds = [family.architecture + 'ForCausalLM', family.architecture + 'ForSequenceClassification']
  kind = (values.get('architectures') or kinds)[0]
  if kind not in kinds:
    raise UserError(f'{where}: architecture is {kind!r}, expected one of {", ".join(kinds)}')
  values = dict(values)
  rope = values.get('rope_parameters') or {}  # where transformers 5 writes it
  values.setdefault('rope_theta', rope.get('rope_theta', family.defaults['rope_theta']))
  for scaling in (rope, values.get('rope_scaling') or {}):
    if scaling.get('rope_type', scaling.get('type', 'default')) != 'default':
      raise UserError(f'{where}: rotary scaling {scaling.get("rope_type", scaling.get("type"))!r}, expected none')
  values['rope_scaling'] = None
  for key, value in family.only.items():
    if values.get(key, value) != value:
      raise UserError(f'{where}: {key} is {values[key]!r}, expected {value!r}')
  values = {**family.defaults, **{key: value for key, value in values.items() if value is not None}}
  missing = [key for key in ('vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads',
                             'intermediate_size') if key not in values]
  if missing:
    raise UserError(f'{where}: no {", ".join(missing)}')
  values.setdefault('num_key_value_heads', values['num_attention_heads'])
  values.setdefault('head_dim', values['hidden_size'] // values['num_attention_heads'])
  head = kind == kinds[1]
  config = ModelConfig(**{ours: values[theirs] for ours, theirs in _KEYS.items()}, head=head)
  return dataclasses.replace(config, tied=config.tied or head)


def to_hf(config: ModelConfig) -> dict:
  """The `config.json` of a shape: a `LlamaForCausalLM`, or with a head a `LlamaForSequenceClassification`."""
  family = FAMILIES['llama']
  kind = 'ForSequenceClassification' if config.head else 'ForCausalLM'
  values = {'model_type': 'llama', 'architectures': [family.architecture + kind],
            **{theirs: getattr(config, ours) for ours, theirs in _KEYS.items()},
            'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False}
  return {**values, 'num_labels': 1} if config.head else values


def from_gguf(fields: dict, names, where: str) -> ModelConfig:
  """The shape that the metadata of a GGUF file describe.

  Args:
    fields: metadata, plain values by key.
    names: the names of the file's tensors.
    where: what errors call it.

  Raises:
    UserError: as from_hf.
  """
  kind = fields.get('general.architecture')
  if fields.get(f'{kind}.rope.scaling.type', 'none') != 'none':
    raise UserError(f'{where}: rotary scaling {fields[f"{kind}.rope.scaling.type"]!r}, expected none')
  values = {theirs: fields.get(f'{kind}.{key}') for theirs, key in _GGUF_KEYS.items()}
  values = {key: float(str(np.float32(value))) if isinstance(value, float) else value  # 9.99999974e-06 is 1e-05
            for key, value in values.items()}
  return from_hf({**values, 'model_type': kind, 'tie_word_embeddings': 'output.weight' not in names,
                  'vocab_size': len(fields.get('tokenizer.ggml.tokens') or ()) or None}, where)
