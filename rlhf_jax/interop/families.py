"""Families of decoders: what config.json calls things, and where the tensors are.

A family is a section below: Hugging Face's names of our fields, what an absent key means, the features that are the
same in the whole family, and a table of tensors (see tensors.py) over Llama's. hf_config.py reads and writes
config.json by it. No file is opened here.
"""

import dataclasses
import functools
from typing import Any, Callable

from rlhf_jax.interop.tensors import Tensor
from rlhf_jax.models import transformer


@dataclasses.dataclass(frozen=True)
class Family:
  """What is particular to a family.

  Attributes:
    title: what people call its models.
    causal, scorer: Hugging Face's classes of the language model and of the reward model.
    table: Tensors of all leaves that a model of this family can have.
    keys: our fields by Hugging Face's key of config.json.
    defaults: what an absent key of config.json means.
    always: fields of ours that are the same in the whole family.
    only: keys of config.json and the one value of each that is computed here; absent counts as that value.
    layer_types: (values of config.json) → the kind of each layer, where the file has no list; None: no windows.
    listed: layer_types can stand in config.json.
    switched: a window counts only with `use_sliding_window`.
    prefix: of all names but the output matrix and the score; some files leave it out.
    ignored: endings of tensor names that carry nothing to learn.
    scorer_exists: whether transformers has the scorer.
  """
  title: str
  causal: str
  scorer: str
  table: tuple[Tensor, ...]
  keys: dict[str, str]
  defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
  always: dict[str, Any] = dataclasses.field(default_factory=dict)
  only: dict[str, Any] = dataclasses.field(default_factory=dict)
  layer_types: Callable[[dict], list[str]] | None = None
  listed: bool = False
  switched: bool = False
  prefix: str = 'model.'
  ignored: tuple[str, ...] = ('rotary_emb.inv_freq',)
  scorer_exists: bool = True


LOCAL, GLOBAL = 'sliding_attention', 'full_attention'


def _layer(leaf, axes, name, matrix, **more):
  return Tensor(f'layers.{leaf}', 'l' + axes, f'model.layers.{{}}.{name}', matrix, **more)


def _replaced(table, *lines):
  """A table with the lines of these leaves in place of its own, and those that are new to it."""
  return tuple({**{line.path: line for line in table}, **{line.path: line for line in lines}}.values())


def _norms(attention='', attention_post='', mlp='', mlp_post=''):
  names = {'attention_norm': attention, 'attention_post_norm': attention_post, 'mlp_norm': mlp,
           'mlp_post_norm': mlp_post}
  return tuple(_layer(leaf, 'd', f'{name}.weight', 'd') for leaf, name in names.items() if name)


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
    _layer('mlp_norm', 'd', 'post_attention_layernorm.weight', 'd'),
    _layer('gate', 'df', 'mlp.gate_proj.weight', 'f,d'),
    _layer('up', 'df', 'mlp.up_proj.weight', 'f,d'),
    _layer('down', 'fd', 'mlp.down_proj.weight', 'd,f'),
    _layer('gate_bias', 'f', 'mlp.gate_proj.bias', 'f'),
    _layer('up_bias', 'f', 'mlp.up_proj.bias', 'f'),
    _layer('down_bias', 'd', 'mlp.down_proj.bias', 'd'),
    Tensor('norm', 'd', 'model.norm.weight', 'd'),
    Tensor('unembedding', 'dv', 'lm_head.weight', 'v,d'),
    Tensor('score.kernel', 'd', 'score.weight', ',d'),
)
HEAD_NORMS = (_layer('query_norm', 'c', 'self_attn.q_norm.weight', 'c'),
              _layer('key_norm', 'c', 'self_attn.k_norm.weight', 'c'))
ALL_NORMS = (_layer('query_norm', 'hc', 'self_attn.q_norm.weight', 'hc'),
             _layer('key_norm', 'nc', 'self_attn.k_norm.weight', 'nc'))
FOUR_NORMS = _norms('input_layernorm', 'post_attention_layernorm', 'pre_feedforward_layernorm',
                    'post_feedforward_layernorm')
PHI3 = tuple(_layer(leaf, axes, name, matrix, part=part) for leaf, axes, name, matrix, part in (
    ('query', 'dhc', 'self_attn.qkv_proj.weight', 'hc|nc|nc,d', 0),
    ('key', 'dnc', 'self_attn.qkv_proj.weight', 'hc|nc|nc,d', 1),
    ('value', 'dnc', 'self_attn.qkv_proj.weight', 'hc|nc|nc,d', 2),
    ('gate', 'df', 'mlp.gate_up_proj.weight', 'f|f,d', 0),
    ('up', 'df', 'mlp.gate_up_proj.weight', 'f|f,d', 1)))


def _gpt2(leaf, axes, name, matrix, **more):
  return Tensor(f'layers.{leaf}', 'l' + axes, f'transformer.h.{{}}.{name}', matrix, **more)


GPT2 = (
    Tensor('embedding', 'vd', 'transformer.wte.weight', 'v,d'),
    Tensor('positions', 'pd', 'transformer.wpe.weight', 'p,d'),
    _gpt2('attention_norm', 'd', 'ln_1.weight', 'd'),
    _gpt2('attention_norm_bias', 'd', 'ln_1.bias', 'd'),
    *(_gpt2(leaf, axes, 'attn.c_attn.weight', 'd,hc|nc|nc', part=part)
      for part, (leaf, axes) in enumerate((('query', 'dhc'), ('key', 'dnc'), ('value', 'dnc')))),
    *(_gpt2(leaf, axes, 'attn.c_attn.bias', 'hc|nc|nc', part=part)
      for part, (leaf, axes) in enumerate((('query_bias', 'hc'), ('key_bias', 'nc'), ('value_bias', 'nc')))),
    _gpt2('output', 'hcd', 'attn.c_proj.weight', 'hc,d'),
    _gpt2('output_bias', 'd', 'attn.c_proj.bias', 'd'),
    _gpt2('mlp_norm', 'd', 'ln_2.weight', 'd'),
    _gpt2('mlp_norm_bias', 'd', 'ln_2.bias', 'd'),
    _gpt2('up', 'df', 'mlp.c_fc.weight', 'd,f'),
    _gpt2('up_bias', 'f', 'mlp.c_fc.bias', 'f'),
    _gpt2('down', 'fd', 'mlp.c_proj.weight', 'f,d'),
    _gpt2('down_bias', 'd', 'mlp.c_proj.bias', 'd'),
    Tensor('norm', 'd', 'transformer.ln_f.weight', 'd'),
    Tensor('norm_bias', 'd', 'transformer.ln_f.bias', 'd'),
    Tensor('unembedding', 'dv', 'lm_head.weight', 'v,d'),
    Tensor('score.kernel', 'd', 'score.weight', ',d'),
)


def _experts(block, router, gate, up, down):
  """Lines of a mixture of experts, each expert's matrices in tensors of their own."""
  expert = lambda leaf, axes, name, matrix: Tensor(
      f'layers.{leaf}', 'le' + axes, f'model.layers.{{}}.{block}.experts.{{}}.{name}.weight', matrix)
  return (_layer('router', 'de', f'{block}.{router}.weight', 'e,d'), expert('gate', 'df', gate, 'f,d'),
          expert('up', 'df', up, 'f,d'), expert('down', 'fd', down, 'd,f'))


MIXTRAL = _replaced(LLAMA, *_experts('block_sparse_moe', 'gate', 'w1', 'w3', 'w2'))
EXPERTS = _experts('mlp', 'gate', 'gate_proj', 'up_proj', 'down_proj')

KEYS = {  # ours: Hugging Face's
    'vocab_size': 'vocab_size', 'embed': 'hidden_size', 'layers': 'num_hidden_layers', 'heads': 'num_attention_heads',
    'kv_heads': 'num_key_value_heads', 'head_dim': 'head_dim', 'mlp': 'intermediate_size', 'norm_eps': 'rms_norm_eps',
    'tied': 'tie_word_embeddings', 'max_length': 'max_position_embeddings', 'activation': 'hidden_act',
}
ATTENTION_BIAS = {'qkv_bias': 'attention_bias', 'output_bias': 'attention_bias'}
GEMMA = {**KEYS, **ATTENTION_BIAS, 'activation': 'hidden_activation', 'attention_scalar': 'query_pre_attn_scalar',
         'attention_cap': 'attn_logit_softcapping', 'logit_cap': 'final_logit_softcapping'}
ROUTING = {'experts': 'num_experts', 'experts_per_token': 'num_experts_per_tok', 'renormalise': 'norm_topk_prob'}
ABSENT = {'rms_norm_eps': 1e-6, 'rope_theta': 10000.0, 'tie_word_embeddings': False, 'hidden_act': 'silu',
          'attention_bias': False, 'mlp_bias': False}
WHOLE = {'partial_rotary_factor': 1.0}  # all of a head turns


def _everywhere(values):
  return [LOCAL] * values['num_hidden_layers']


def _late(values):
  return [LOCAL if i >= values['max_window_layers'] else GLOBAL for i in range(values['num_hidden_layers'])]


def _every(pattern, values):
  return [LOCAL if (i + 1) % pattern else GLOBAL for i in range(values['num_hidden_layers'])]


def _without_rope(values):
  return [GLOBAL if rotary else LOCAL for rotary in values['no_rope_layers']]


FAMILIES = {
    'llama': Family(
        'Llama 2, Llama 3.x, SmolLM2', 'LlamaForCausalLM', 'LlamaForSequenceClassification', LLAMA,
        {**KEYS, **ATTENTION_BIAS, 'mlp_bias': 'mlp_bias'},
        {**ABSENT, 'max_position_embeddings': 2048}, only=WHOLE),
    'smollm3': Family(
        'SmolLM3', 'SmolLM3ForCausalLM', 'SmolLM3ForSequenceClassification', LLAMA,
        {**KEYS, **ATTENTION_BIAS, 'mlp_bias': 'mlp_bias', 'rope_layers': 'no_rope_layers'},
        {**ABSENT, 'rope_theta': 2e6, 'tie_word_embeddings': True, 'max_position_embeddings': 32768,
         'num_key_value_heads': 4, 'use_sliding_window': False, 'no_rope_layer_interval': 4},
        only=WHOLE, layer_types=_without_rope, listed=True, switched=True),
    'mistral': Family(
        'Mistral', 'MistralForCausalLM', 'MistralForSequenceClassification', LLAMA, KEYS,
        {**ABSENT, 'sliding_window': 4096, 'num_key_value_heads': 8, 'max_position_embeddings': 131072},
        only=WHOLE, layer_types=_everywhere),
    'qwen2': Family(
        'Qwen2, Qwen2.5', 'Qwen2ForCausalLM', 'Qwen2ForSequenceClassification', LLAMA, KEYS,
        {**ABSENT, 'max_position_embeddings': 32768, 'num_key_value_heads': 32, 'sliding_window': 4096,
         'use_sliding_window': False, 'max_window_layers': 28}, always={'qkv_bias': True},
        only=WHOLE, layer_types=_late, listed=True, switched=True),
    'qwen3': Family(
        'Qwen3', 'Qwen3ForCausalLM', 'Qwen3ForSequenceClassification', _replaced(LLAMA, *HEAD_NORMS),
        {**KEYS, **ATTENTION_BIAS},
        {**ABSENT, 'head_dim': 128, 'max_position_embeddings': 32768, 'num_key_value_heads': 32,
         'sliding_window': 4096, 'use_sliding_window': False, 'max_window_layers': 28}, always={'qk_norm': 'head'},
        only=WHOLE, layer_types=_late, listed=True, switched=True),
    'gemma2': Family(
        'Gemma 2', 'Gemma2ForCausalLM', 'Gemma2ForSequenceClassification', _replaced(LLAMA, *FOUR_NORMS), GEMMA,
        {**ABSENT, 'tie_word_embeddings': True, 'head_dim': 256, 'num_key_value_heads': 4, 'sliding_window': 4096,
         'hidden_activation': 'gelu_pytorch_tanh', 'query_pre_attn_scalar': 256, 'max_position_embeddings': 8192,
         'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0},
        always={'norm': 'rms_offset', 'post_norm': True, 'embed_scale': True},
        only={**WHOLE, 'use_bidirectional_attention': False},
        layer_types=functools.partial(_every, 2), listed=True),
    'gemma3_text': Family(
        'Gemma 3 (text)', 'Gemma3ForCausalLM', 'Gemma3TextForSequenceClassification',
        _replaced(LLAMA, *FOUR_NORMS, *HEAD_NORMS), {**GEMMA, 'rope_local_theta': 'rope_local_base_freq'},
        {**ABSENT, 'tie_word_embeddings': True, 'head_dim': 256, 'num_key_value_heads': 4, 'sliding_window': 4096,
         'hidden_activation': 'gelu_pytorch_tanh', 'query_pre_attn_scalar': 256, 'max_position_embeddings': 131072,
         'rope_theta': 1e6, 'rope_local_base_freq': 10000.0, 'sliding_window_pattern': 6},
        always={'norm': 'rms_offset', 'post_norm': True, 'embed_scale': True, 'qk_norm': 'head'},
        only={**WHOLE, 'use_bidirectional_attention': False},
        layer_types=lambda values: _every(values['sliding_window_pattern'], values), listed=True),
    'olmo2': Family(
        'OLMo 2', 'Olmo2ForCausalLM', 'Olmo2ForSequenceClassification',
        _replaced(LLAMA, *_norms(attention_post='post_attention_layernorm', mlp_post='post_feedforward_layernorm'),
                  *ALL_NORMS), {**KEYS, **ATTENTION_BIAS},
        {**ABSENT, 'rms_norm_eps': 1e-5, 'max_position_embeddings': 2048},
        always={'pre_norm': False, 'post_norm': True, 'qk_norm': 'all'}, only=WHOLE),
    'phi3': Family(
        'Phi-3, Phi-3.5-mini, Phi-4-mini', 'Phi3ForCausalLM', 'Phi3ForSequenceClassification',
        _replaced(LLAMA, *PHI3), {**KEYS, 'rope_fraction': 'partial_rotary_factor'},
        {**ABSENT, 'rms_norm_eps': 1e-5, 'max_position_embeddings': 4096, 'partial_rotary_factor': 1.0,
         'original_max_position_embeddings': 4096}, layer_types=_everywhere),
    'gpt2': Family(
        'GPT-2', 'GPT2LMHeadModel', 'GPT2ForSequenceClassification', GPT2,
        {'vocab_size': 'vocab_size', 'embed': 'n_embd', 'layers': 'n_layer', 'heads': 'n_head', 'mlp': 'n_inner',
         'norm_eps': 'layer_norm_epsilon', 'max_length': 'n_positions', 'activation': 'activation_function',
         'tied': 'tie_word_embeddings'},
        {'layer_norm_epsilon': 1e-5, 'n_positions': 1024, 'activation_function': 'gelu_new',
         'tie_word_embeddings': True},
        always={'norm': 'layer', 'qkv_bias': True, 'output_bias': True, 'mlp_bias': True, 'gated': False,
                'learned_positions': True},
        only={'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False, 'add_cross_attention': False},
        prefix='transformer.', ignored=('.attn.bias', '.attn.masked_bias')),
    'mixtral': Family(
        'Mixtral', 'MixtralForCausalLM', 'MixtralForSequenceClassification', MIXTRAL,
        {**KEYS, 'experts': 'num_local_experts', 'experts_per_token': 'num_experts_per_tok'},
        {**ABSENT, 'rms_norm_eps': 1e-5, 'rope_theta': 1e6, 'max_position_embeddings': 131072,
         'num_key_value_heads': 8, 'num_local_experts': 8, 'num_experts_per_tok': 2},
        only=WHOLE, layer_types=_everywhere),
    'qwen3_moe': Family(
        'Qwen3-MoE', 'Qwen3MoeForCausalLM', 'Qwen3MoeForSequenceClassification',
        _replaced(LLAMA, *HEAD_NORMS, *EXPERTS),
        {**KEYS, **ATTENTION_BIAS, **ROUTING, 'mlp': 'moe_intermediate_size'},
        {**ABSENT, 'num_key_value_heads': 4, 'max_position_embeddings': 32768, 'sliding_window': 4096,
         'use_sliding_window': False, 'moe_intermediate_size': 768, 'num_experts': 128, 'num_experts_per_tok': 8,
         'norm_topk_prob': False},
        always={'qk_norm': 'head'}, only={**WHOLE, 'decoder_sparse_step': 1, 'mlp_only_layers': []},
        layer_types=_everywhere, switched=True),
    'olmoe': Family(
        'OLMoE', 'OlmoeForCausalLM', 'OlmoeForSequenceClassification', _replaced(LLAMA, *ALL_NORMS, *EXPERTS),
        {**KEYS, **ATTENTION_BIAS, **ROUTING},
        {**ABSENT, 'rms_norm_eps': 1e-5, 'max_position_embeddings': 4096, 'num_experts': 64,
         'num_experts_per_tok': 8, 'norm_topk_prob': False},
        always={'qk_norm': 'all'}, only={**WHOLE, 'clip_qkv': None}, scorer_exists=False),
}


def tensors(config) -> list[Tensor]:
  """The lines of its family's table for the leaves that a model of this shape has, but the bias of a scalar head,
  for which Hugging Face has no place."""
  leaves = {'.'.join(keys) for keys in _paths(transformer.build_model(config).axes)}
  return [tensor for tensor in FAMILIES[config.family].table if tensor.path in leaves]


def _paths(tree):
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from ((key, *rest) for rest in _paths(value))
    else:
      yield (key,)


def ignorable(config, name: str) -> bool:
  """Whether a tensor of a file may be passed over: constants, and the output matrix that a reward model lacks."""
  return name.endswith(FAMILIES[config.family].ignored) or (config.head and name == 'lm_head.weight')
