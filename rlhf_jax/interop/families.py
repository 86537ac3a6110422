"""Families of decoders: their keys in config.json, and the names of their tensors.

Each entry of `FAMILIES` describes a family: Hugging Face's names of the fields of
`ModelConfig`, the defaults of absent keys, the features that all models of the
family share, and its table of tensors (see tensors.py). hf_config.py reads and
writes config.json by these tables. This module opens no file.

Sources: the configuration and modelling files of transformers, with which the tests compare.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
from typing import Any

from rlhf_jax.interop import config_keys
from rlhf_jax.interop.config_keys import GLOBAL, LOCAL
from rlhf_jax.interop.known_keys import Allowed, KnownKeys, or_null
from rlhf_jax.interop.tensors import Tensor
from rlhf_jax.models import transformer
from rlhf_jax.models.model_config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """The properties by which a family of models differs from others."""

  title: str  # the usual name of its models
  causal_lm: str  # Hugging Face's class of the language model
  classifier: str  # Hugging Face's class of the reward model
  has_classifier: bool = True  # whether transformers has that class

  # Tensors of all leaves that a model of this family can have; `list_tensors` picks from them.
  tensors: tuple[Tensor, ...]
  # beginning of all names except the output matrix and the score; absent in some files
  prefix: str = 'model.'
  # endings of the names of tensors that are constants, not parameters
  ignored_tensors: tuple[str, ...] = ('rotary_emb.inv_freq',)

  config_keys: Mapping[str, str]  # field of ModelConfig → key of config.json
  defaults: Mapping[str, Any]  # key of config.json → its value where the file has no such key
  # field of ModelConfig → its value in all models of the family
  fixed_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  # Key of config.json → the values that our decoder implements. Other values are
  # refused; an absent key is accepted. config_keys.GENERAL_ONLY has the keys that
  # apply to every family.
  only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
  ignored_keys: tuple[str, ...] = ()  # keys of config.json that transformers ignores too

  # (values of config.json) → the kind of each layer, for files without the key
  # `layer_types`. None: the family has no sliding windows.
  layer_types: Callable[[Mapping[str, Any]], list[str]] | None = None
  # Whether the key `layer_types` of a file may differ from the result of this function.
  reads_layer_types: bool = False
  # Whether `use_sliding_window: false` turns off the windows even if the file has `layer_types`.
  needs_use_sliding_window: bool = False
  rope_scalings: tuple[str, ...] = ('linear', 'llama3', 'longrope')  # supported rope types
  rope_by_layer: bool = False  # whether rope_parameters has a table for each kind of layer

  def class_name(self, head: bool) -> str:
    """Returns Hugging Face's class for the language model or, with `head`, the reward model."""
    return self.classifier if head else self.causal_lm

  @property
  def known_keys(self) -> KnownKeys:
    """The keys of config.json that are read, checked or ignored for this family."""
    read = {**config_keys.GENERAL_KEYS, 'layer_types': config_keys.LAYER_TYPES}
    if not self.fixed_fields.get('learned_positions'):
      read |= config_keys.ROPE_KEYS
    if self.layer_types is not None:
      read['sliding_window'] = config_keys.WINDOW_KEYS['sliding_window']
    for key in self.defaults:
      if key in config_keys.WINDOW_KEYS:
        read[key] = config_keys.WINDOW_KEYS[key]
    read |= {key: self._values_of(field, key) for field, key in self.config_keys.items()}
    if 'num_experts' in read:
      read['num_local_experts'] = read['num_experts']  # the name of num_experts in transformers 5
    general = config_keys.GENERAL_ONLY.items()
    only = {key: values for key, values in general if key not in read}
    return KnownKeys(
      read=read,
      only={**only, **self.only},
      ignored=config_keys.IGNORED_KEYS | set(self.ignored_keys),
      advice=f' in a {self.title}; remove it if it does not change what the model computes',
    )

  def _values_of(self, field: str, key: str) -> Allowed:
    """Returns the values that a key may have: also null where its default is derived."""
    allowed = config_keys.FIELD_VALUES[field]
    derived = field in ('head_dim', 'mlp') and key not in self.defaults
    return or_null(allowed) if derived else allowed


# Tables of tensors, with one row for each leaf. The table of most families is
# Llama's with some rows replaced.


def _layer(leaf: str, axes: str, name: str, matrix: str, part: int = 0) -> Tensor:
  """Returns the row of a leaf that every layer has, named as in Llama and most later families."""
  return Tensor(f'layers.{leaf}', 'l' + axes, f'model.layers.{{}}.{name}', matrix, part)


def _gpt2_layer(leaf: str, axes: str, name: str, matrix: str, part: int = 0) -> Tensor:
  """Returns the row of a leaf that every layer has, named as in GPT-2."""
  return Tensor(f'layers.{leaf}', 'l' + axes, f'transformer.h.{{}}.{name}', matrix, part)


def _expert(leaf: str, axes: str, name: str, matrix: str) -> Tensor:
  """Returns the row of a matrix that every expert of every layer has as a separate tensor."""
  return Tensor(f'layers.{leaf}', 'le' + axes, f'model.layers.{{}}.{name}', matrix)


def _replace_rows(table: tuple[Tensor, ...], *rows: Tensor) -> tuple[Tensor, ...]:
  """Returns a copy of a table in which rows of the same leaves are replaced; new ones go last."""
  by_path = {row.path: row for row in table}
  by_path.update({row.path: row for row in rows})
  return tuple(by_path.values())


LLAMA = (
  Tensor('embedding', 'vd', 'model.embed_tokens.weight', 'v,d'),
  _layer('attention_norm', 'd', 'input_layernorm.weight', 'd'),
  _layer('query', 'dhc', 'self_attn.q_proj.weight', 'hc,d'),
  _layer('key', 'dnc', 'self_attn.k_proj.weight', 'nc,d'),
  _layer('value', 'dnc', 'self_attn.v_proj.weight', 'nc,d'),
  _layer('output', 'hcd', 'self_attn.o_proj.weight', 'd,hc'),
  _layer('query_bias', 'hc', 'self_attn.q_proj.bias', 'hc'),
  _layer('key_bias', 'nc', 'self_attn.k_proj.bias', 'nc'),
  _layer('value_bias', 'nc', 'self_attn.v_proj.bias', 'nc'),
  _layer('output_bias', 'd', 'self_attn.o_proj.bias', 'd'),
  # The norm before the MLP, which Llama names after the attention that precedes it.
  _layer('mlp_norm', 'd', 'post_attention_layernorm.weight', 'd'),
  _layer('gate', 'df', 'mlp.gate_proj.weight', 'f,d'),
  _layer('up', 'df', 'mlp.up_proj.weight', 'f,d'),
  _layer('down', 'fd', 'mlp.down_proj.weight', 'd,f'),
  _layer('gate_bias', 'f', 'mlp.gate_proj.bias', 'f'),
  _layer('up_bias', 'f', 'mlp.up_proj.bias', 'f'),
  _layer('down_bias', 'd', 'mlp.down_proj.bias', 'd'),
  Tensor('norm', 'd', 'model.norm.weight', 'd'),
  Tensor('unembedding', 'dv', 'lm_head.weight', 'v,d'),
  Tensor('score.kernel', 'd', 'score.weight', ',d'),  # a classifier with one label: [1, D]
)

# Norms of queries and keys: over each head by itself, or over all heads together.
QK_NORM_OF_HEAD = (
  _layer('query_norm', 'c', 'self_attn.q_norm.weight', 'c'),
  _layer('key_norm', 'c', 'self_attn.k_norm.weight', 'c'),
)
QK_NORM_OF_ALL = (
  _layer('query_norm', 'hc', 'self_attn.q_norm.weight', 'hc'),
  _layer('key_norm', 'nc', 'self_attn.k_norm.weight', 'nc'),
)

# Gemma has norms before and after both blocks; its `post_attention_layernorm` is
# the norm of the attention's output, not the norm before the MLP as in Llama.
GEMMA_NORMS = (
  _layer('attention_norm', 'd', 'input_layernorm.weight', 'd'),
  _layer('attention_post_norm', 'd', 'post_attention_layernorm.weight', 'd'),
  _layer('mlp_norm', 'd', 'pre_feedforward_layernorm.weight', 'd'),
  _layer('mlp_post_norm', 'd', 'post_feedforward_layernorm.weight', 'd'),
)
OLMO2_NORMS = (  # norms after the blocks only
  _layer('attention_post_norm', 'd', 'post_attention_layernorm.weight', 'd'),
  _layer('mlp_post_norm', 'd', 'post_feedforward_layernorm.weight', 'd'),
)

PHI3_FUSED = (  # queries, keys and values are stacked in one tensor; so are gate and up
  _layer('query', 'dhc', 'self_attn.qkv_proj.weight', 'hc|nc|nc,d', part=0),
  _layer('key', 'dnc', 'self_attn.qkv_proj.weight', 'hc|nc|nc,d', part=1),
  _layer('value', 'dnc', 'self_attn.qkv_proj.weight', 'hc|nc|nc,d', part=2),
  _layer('gate', 'df', 'mlp.gate_up_proj.weight', 'f|f,d', part=0),
  _layer('up', 'df', 'mlp.gate_up_proj.weight', 'f|f,d', part=1),
)

MIXTRAL_EXPERTS = (
  _layer('router', 'de', 'block_sparse_moe.gate.weight', 'e,d'),
  _expert('gate', 'df', 'block_sparse_moe.experts.{}.w1.weight', 'f,d'),
  _expert('up', 'df', 'block_sparse_moe.experts.{}.w3.weight', 'f,d'),
  _expert('down', 'fd', 'block_sparse_moe.experts.{}.w2.weight', 'd,f'),
)
EXPERTS = (  # Qwen3-MoE and OLMoE
  _layer('router', 'de', 'mlp.gate.weight', 'e,d'),
  _expert('gate', 'df', 'mlp.experts.{}.gate_proj.weight', 'f,d'),
  _expert('up', 'df', 'mlp.experts.{}.up_proj.weight', 'f,d'),
  _expert('down', 'fd', 'mlp.experts.{}.down_proj.weight', 'd,f'),
)

GPT2 = (  # its Conv1D stores matrices as [inputs, outputs]; the Linear of others, transposed
  Tensor('embedding', 'vd', 'transformer.wte.weight', 'v,d'),
  Tensor('positions', 'pd', 'transformer.wpe.weight', 'p,d'),
  _gpt2_layer('attention_norm', 'd', 'ln_1.weight', 'd'),
  _gpt2_layer('attention_norm_bias', 'd', 'ln_1.bias', 'd'),
  _gpt2_layer('query', 'dhc', 'attn.c_attn.weight', 'd,hc|nc|nc', part=0),
  _gpt2_layer('key', 'dnc', 'attn.c_attn.weight', 'd,hc|nc|nc', part=1),
  _gpt2_layer('value', 'dnc', 'attn.c_attn.weight', 'd,hc|nc|nc', part=2),
  _gpt2_layer('query_bias', 'hc', 'attn.c_attn.bias', 'hc|nc|nc', part=0),
  _gpt2_layer('key_bias', 'nc', 'attn.c_attn.bias', 'hc|nc|nc', part=1),
  _gpt2_layer('value_bias', 'nc', 'attn.c_attn.bias', 'hc|nc|nc', part=2),
  _gpt2_layer('output', 'hcd', 'attn.c_proj.weight', 'hc,d'),
  _gpt2_layer('output_bias', 'd', 'attn.c_proj.bias', 'd'),
  _gpt2_layer('mlp_norm', 'd', 'ln_2.weight', 'd'),
  _gpt2_layer('mlp_norm_bias', 'd', 'ln_2.bias', 'd'),
  _gpt2_layer('up', 'df', 'mlp.c_fc.weight', 'd,f'),
  _gpt2_layer('up_bias', 'f', 'mlp.c_fc.bias', 'f'),
  _gpt2_layer('down', 'fd', 'mlp.c_proj.weight', 'f,d'),
  _gpt2_layer('down_bias', 'd', 'mlp.c_proj.bias', 'd'),
  Tensor('norm', 'd', 'transformer.ln_f.weight', 'd'),
  Tensor('norm_bias', 'd', 'transformer.ln_f.bias', 'd'),
  Tensor('unembedding', 'dv', 'lm_head.weight', 'v,d'),
  Tensor('score.kernel', 'd', 'score.weight', ',d'),
)


# Keys of config.json: field of ModelConfig → Hugging Face's name.

KEYS = {
  'vocab_size': 'vocab_size',
  'embed': 'hidden_size',
  'layers': 'num_hidden_layers',
  'heads': 'num_attention_heads',
  'kv_heads': 'num_key_value_heads',
  'head_dim': 'head_dim',
  'mlp': 'intermediate_size',
  'norm_eps': 'rms_norm_eps',
  'tied': 'tie_word_embeddings',
  'max_length': 'max_position_embeddings',
  'activation': 'hidden_act',
}
ATTENTION_BIAS = {  # Hugging Face has one key for both
  'qkv_bias': 'attention_bias',
  'output_bias': 'attention_bias',
}
MLP_BIAS = {'mlp_bias': 'mlp_bias'}
GEMMA_KEYS = {
  **KEYS,
  **ATTENTION_BIAS,
  'activation': 'hidden_activation',
  'attention_scalar': 'query_pre_attn_scalar',
  'attention_cap': 'attn_logit_softcapping',
  'logit_cap': 'final_logit_softcapping',
}
GEMMA3_KEYS = {field: key for field, key in GEMMA_KEYS.items() if field != 'attention_cap'}
ROUTING = {
  'experts': 'num_experts',
  'experts_per_token': 'num_experts_per_tok',
  'renormalise': 'norm_topk_prob',
}
GPT2_KEYS = {
  'vocab_size': 'vocab_size',
  'embed': 'n_embd',
  'layers': 'n_layer',
  'heads': 'n_head',
  'mlp': 'n_inner',
  'norm_eps': 'layer_norm_epsilon',
  'max_length': 'n_positions',
  'activation': 'activation_function',
  'tied': 'tie_word_embeddings',
}

GPT2_IGNORED = (
  'n_ctx',  # transformers uses n_positions
  'reorder_and_upcast_attn',  # computes the same numbers in another order
  'summary_activation',  # this and the following describe a head that is not read
  'summary_first_dropout',
  'summary_proj_to_labels',
  'summary_type',
  'summary_use_proj',
)

DEFAULTS = {  # defaults of most families; FAMILIES adds and replaces some
  'rms_norm_eps': 1e-6,
  'rope_theta': 10000.0,
  'tie_word_embeddings': False,
  'hidden_act': 'silu',
  'attention_bias': False,
  'mlp_bias': False,
}
# Gemma has its own key for the activation; published files also have the usual key.
GEMMA_ONLY = {'hidden_act': ('gelu_pytorch_tanh', None)}
GEMMA_DEFAULTS = {key: value for key, value in DEFAULTS.items() if key not in GEMMA_ONLY}


# The kind of each layer where config.json does not list them.


def _all_local(values: Mapping[str, Any]) -> list[str]:
  """Gives every layer a window, if the file has one."""
  return [_local_with_window(values)] * values['num_hidden_layers']


def _late_layers_local(values: Mapping[str, Any]) -> list[str]:
  """Gives a window to the layers from `max_window_layers` on (Qwen)."""
  first = values['max_window_layers']
  kind = _local_with_window(values)
  return [kind if i >= first else GLOBAL for i in range(values['num_hidden_layers'])]


def _every_second_global(values: Mapping[str, Any]) -> list[str]:
  """Alternates local and global layers (Gemma 2)."""
  return _every_nth_global(values['num_hidden_layers'], 2)


def _pattern_global(values: Mapping[str, Any]) -> list[str]:
  """Makes one layer in `sliding_window_pattern` global, the others local (Gemma 3)."""
  return _every_nth_global(values['num_hidden_layers'], values['sliding_window_pattern'])


def _every_nth_global(layers: int, n: int) -> list[str]:
  """Makes layers n, 2n, … global and the others local, counting from 1."""
  return [LOCAL if (i + 1) % n else GLOBAL for i in range(layers)]


def _local_without_rope(values: Mapping[str, Any]) -> list[str]:
  """Gives a window to the layers without rotary positions (SmolLM3).

  In `no_rope_layers` 1 stands for a layer with rotary positions, in spite of the name.
  """
  kind = _local_with_window(values) if values['use_sliding_window'] else GLOBAL
  rope_layers = values['no_rope_layers'][: values['num_hidden_layers']]
  return [GLOBAL if has_rope else kind for has_rope in rope_layers]


def _local_with_window(values: Mapping[str, Any]) -> str:
  """Returns LOCAL where the file has a window, else GLOBAL."""
  return GLOBAL if values.get('sliding_window') is None else LOCAL


FAMILIES = {  # `model_type` in config.json → family
  'llama': Family(
    title='Llama 2, Llama 3.x, SmolLM2',
    causal_lm='LlamaForCausalLM',
    classifier='LlamaForSequenceClassification',
    tensors=LLAMA,
    config_keys={**KEYS, **ATTENTION_BIAS, **MLP_BIAS},
    defaults={
      **DEFAULTS,
      'max_position_embeddings': 2048,
    },
  ),
  'smollm3': Family(
    title='SmolLM3',
    causal_lm='SmolLM3ForCausalLM',
    classifier='SmolLM3ForSequenceClassification',
    tensors=LLAMA,
    config_keys={
      **KEYS,
      **ATTENTION_BIAS,
      **MLP_BIAS,
      'rope_layers': 'no_rope_layers',  # in spite of its name, 1 = rotary positions
    },
    defaults={
      **DEFAULTS,
      'rope_theta': 2e6,
      'tie_word_embeddings': True,
      'max_position_embeddings': 32768,
      'num_key_value_heads': 4,
      'use_sliding_window': False,
      'no_rope_layer_interval': 4,
    },
    ignored_keys=('max_window_layers',),
    layer_types=_local_without_rope,
    reads_layer_types=True,
  ),
  'mistral': Family(
    title='Mistral',
    causal_lm='MistralForCausalLM',
    classifier='MistralForSequenceClassification',
    tensors=LLAMA,
    config_keys=KEYS,
    defaults={
      **DEFAULTS,
      'sliding_window': 4096,
      'num_key_value_heads': 8,
      'max_position_embeddings': 131072,
    },
    layer_types=_all_local,
    reads_layer_types=True,  # transformers opens a file with this key as a Ministral
  ),
  'qwen2': Family(
    title='Qwen2, Qwen2.5',
    causal_lm='Qwen2ForCausalLM',
    classifier='Qwen2ForSequenceClassification',
    tensors=LLAMA,
    config_keys=KEYS,
    defaults={
      **DEFAULTS,
      'max_position_embeddings': 32768,
      'num_key_value_heads': 32,
      'sliding_window': 4096,
      'use_sliding_window': False,
      'max_window_layers': 28,
    },
    fixed_fields={'qkv_bias': True},  # config.json has no key for it
    ignored_keys=('attention_bias',),
    layer_types=_late_layers_local,
    reads_layer_types=True,
    needs_use_sliding_window=True,
  ),
  'qwen3': Family(
    title='Qwen3',
    causal_lm='Qwen3ForCausalLM',
    classifier='Qwen3ForSequenceClassification',
    tensors=_replace_rows(LLAMA, *QK_NORM_OF_HEAD),
    config_keys={**KEYS, **ATTENTION_BIAS},
    defaults={
      **DEFAULTS,
      'head_dim': 128,
      'max_position_embeddings': 32768,
      'num_key_value_heads': 32,
      'sliding_window': 4096,
      'use_sliding_window': False,
      'max_window_layers': 28,
    },
    fixed_fields={'qk_norm': 'head'},
    layer_types=_late_layers_local,
    reads_layer_types=True,
    needs_use_sliding_window=True,
  ),
  'gemma2': Family(
    title='Gemma 2',
    causal_lm='Gemma2ForCausalLM',
    classifier='Gemma2ForSequenceClassification',
    tensors=_replace_rows(LLAMA, *GEMMA_NORMS),
    config_keys=GEMMA_KEYS,
    defaults={
      **GEMMA_DEFAULTS,
      'tie_word_embeddings': True,
      'head_dim': 256,
      'num_key_value_heads': 4,
      'sliding_window': 4096,
      'hidden_activation': 'gelu_pytorch_tanh',
      'query_pre_attn_scalar': 256,
      'max_position_embeddings': 8192,
      'attn_logit_softcapping': 50.0,
      'final_logit_softcapping': 30.0,
    },
    fixed_fields={
      'norm': 'rms_offset',  # the scale is 1 + the parameter
      'post_norm': True,
      'embed_scale': True,
    },
    only=GEMMA_ONLY,
    ignored_keys=('sliding_window_size',),
    layer_types=_every_second_global,
    reads_layer_types=True,
  ),
  'gemma3_text': Family(
    title='Gemma 3 (text)',
    causal_lm='Gemma3ForCausalLM',
    classifier='Gemma3TextForSequenceClassification',
    tensors=_replace_rows(LLAMA, *GEMMA_NORMS, *QK_NORM_OF_HEAD),
    config_keys={
      **GEMMA3_KEYS,
      'rope_local_theta': 'rope_local_base_freq',  # for layers with a window
    },
    defaults={
      **GEMMA_DEFAULTS,
      'tie_word_embeddings': True,
      'head_dim': 256,
      'num_key_value_heads': 4,
      'sliding_window': 4096,
      'hidden_activation': 'gelu_pytorch_tanh',
      'query_pre_attn_scalar': 256,
      'max_position_embeddings': 131072,
      'rope_theta': 1e6,
      'rope_local_base_freq': 10000.0,
      'sliding_window_pattern': 6,
    },
    fixed_fields={
      'norm': 'rms_offset',
      'post_norm': True,
      'embed_scale': True,
      'qk_norm': 'head',
    },
    only={**GEMMA_ONLY, 'attn_logit_softcapping': (None,)},  # transformers ignores it
    layer_types=_pattern_global,
    reads_layer_types=True,
    rope_scalings=('linear', 'llama3'),
    rope_by_layer=True,
  ),
  'olmo2': Family(
    title='OLMo 2',
    causal_lm='Olmo2ForCausalLM',
    classifier='Olmo2ForSequenceClassification',
    tensors=_replace_rows(LLAMA, *OLMO2_NORMS, *QK_NORM_OF_ALL),
    config_keys={**KEYS, **ATTENTION_BIAS},
    defaults={
      **DEFAULTS,
      'rms_norm_eps': 1e-5,
      'max_position_embeddings': 2048,
    },
    fixed_fields={
      'pre_norm': False,
      'post_norm': True,
      'qk_norm': 'all',
    },
  ),
  'phi3': Family(
    title='Phi-3, Phi-3.5-mini, Phi-4-mini',
    causal_lm='Phi3ForCausalLM',
    classifier='Phi3ForSequenceClassification',
    tensors=_replace_rows(LLAMA, *PHI3_FUSED),
    config_keys={
      **KEYS,
      'rope_fraction': 'partial_rotary_factor',  # Phi-4-mini rotates only a part of each head
    },
    defaults={
      **DEFAULTS,
      'rms_norm_eps': 1e-5,
      'max_position_embeddings': 4096,
      'partial_rotary_factor': 1.0,
      'original_max_position_embeddings': 4096,
    },
    only={  # keys in the files of Phi-4-mini
      'full_attn_mod': (1, None),
      'interpolate_factor': (1, None),
      'lm_head_bias': (False, None),
    },
    layer_types=_all_local,
    rope_scalings=('longrope',),
  ),
  'gpt2': Family(
    title='GPT-2',
    causal_lm='GPT2LMHeadModel',
    classifier='GPT2ForSequenceClassification',
    tensors=GPT2,
    prefix='transformer.',
    ignored_tensors=('.attn.bias', '.attn.masked_bias'),  # the causal mask, stored as a tensor
    config_keys=GPT2_KEYS,
    defaults={
      'layer_norm_epsilon': 1e-5,
      'n_positions': 1024,
      'activation_function': 'gelu_new',
      'tie_word_embeddings': True,
    },
    fixed_fields={
      'norm': 'layer',
      'qkv_bias': True,
      'output_bias': True,
      'mlp_bias': True,
      'gated': False,
      'learned_positions': True,
    },
    ignored_keys=GPT2_IGNORED,
    only={
      'scale_attn_weights': (True, None),
      'scale_attn_by_inverse_layer_idx': (False, None),
    },
  ),
  'mixtral': Family(
    title='Mixtral',
    causal_lm='MixtralForCausalLM',
    classifier='MixtralForSequenceClassification',
    tensors=_replace_rows(LLAMA, *MIXTRAL_EXPERTS),
    # without a key for `renormalise`: a token's expert weights always sum to 1,
    # which is the default of ModelConfig
    config_keys={
      **KEYS,
      'experts': 'num_local_experts',
      'experts_per_token': 'num_experts_per_tok',
    },
    defaults={
      **DEFAULTS,
      'rms_norm_eps': 1e-5,
      'rope_theta': 1e6,
      'max_position_embeddings': 131072,
      'num_key_value_heads': 8,
      'num_local_experts': 8,
      'num_experts_per_tok': 2,
    },
    layer_types=_all_local,
  ),
  'qwen3_moe': Family(
    title='Qwen3-MoE',
    causal_lm='Qwen3MoeForCausalLM',
    classifier='Qwen3MoeForSequenceClassification',
    tensors=_replace_rows(LLAMA, *QK_NORM_OF_HEAD, *EXPERTS),
    config_keys={
      **KEYS,
      **ATTENTION_BIAS,
      **ROUTING,
      'mlp': 'moe_intermediate_size',  # intermediate_size is for layers without experts
    },
    defaults={
      **DEFAULTS,
      'num_key_value_heads': 4,
      'max_position_embeddings': 32768,
      'sliding_window': 4096,
      'use_sliding_window': False,
      'moe_intermediate_size': 768,
      'num_experts': 128,
      'num_experts_per_tok': 8,
      'norm_topk_prob': False,
    },
    fixed_fields={'qk_norm': 'head'},
    only={
      # Only models with experts in every layer are supported.
      'decoder_sparse_step': (1, None),
      'mlp_only_layers': ([], None),
    },
    ignored_keys=('intermediate_size', 'max_window_layers'),
    layer_types=_all_local,
    needs_use_sliding_window=True,
  ),
  'olmoe': Family(
    title='OLMoE',
    causal_lm='OlmoeForCausalLM',
    classifier='OlmoeForSequenceClassification',
    has_classifier=False,
    tensors=_replace_rows(LLAMA, *QK_NORM_OF_ALL, *EXPERTS),
    config_keys={**KEYS, **ATTENTION_BIAS, **ROUTING},
    defaults={
      **DEFAULTS,
      'rms_norm_eps': 1e-5,
      'max_position_embeddings': 4096,
      'num_experts': 64,
      'num_experts_per_tok': 8,
      'norm_topk_prob': False,
    },
    fixed_fields={'qk_norm': 'all'},
    only={'clip_qkv': (None,)},
  ),
}


def list_tensors(config: ModelConfig) -> list[Tensor]:
  """Lists those rows of the family's table whose leaves a model of this shape has.

  The bias of a scalar head has no row, because Hugging Face's classifiers have no such bias.
  """
  leaves = set(_leaf_paths(transformer.build_model(config).axes))
  return [tensor for tensor in FAMILIES[config.family].tensors if tensor.path in leaves]


def _leaf_paths(tree: Mapping[str, Any]) -> Iterator[str]:
  """Yields the path of each leaf of a nested dict, as keys joined by dots."""
  for key, value in tree.items():
    if isinstance(value, dict):
      for rest in _leaf_paths(value):
        yield f'{key}.{rest}'
    else:
      yield key


def may_ignore(config: ModelConfig, name: str) -> bool:
  """Tells whether a tensor in a file holds no parameter of a model of this shape.

  This is so for constants, and for the output matrix of a language model that is
  opened as a reward model.
  """
  if name.endswith(FAMILIES[config.family].ignored_tensors):
    return True
  return config.head and name == 'lm_head.weight'
