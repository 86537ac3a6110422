"""Records what transformers and PEFT make of odd configs and adapters.

  pip install torch transformers peft
  python scripts/record_odd_files.py     # rewrites tests/interop/odd

A case is a directory of tests/interop/data whose config.json has changed keys, or random adapters
on data/llama that PEFT wrote. Recorded are the logits of the last token of each of the three texts
of record_references.py, every text alone, float32 [3, 64], in logits.npz; where transformers or
PEFT refuses the case, the first words of their error, in cases.json. Whether rlhf_jax computes the
same or refuses by name is for tests/interop/test_odd_files.py to say.
"""

import argparse
import json
from pathlib import Path
import shutil
import tempfile
from typing import Any
import warnings

PARSER = argparse.ArgumentParser(
  description=__doc__,
  formatter_class=argparse.RawDescriptionHelpFormatter,
)
if __name__ == '__main__':
  PARSER.parse_args()  # here, so that --help needs none of the packages below

import numpy as np
import peft
import record_references as references
import torch
import transformers

OUTPUT = references.INTEROP / 'odd'

LONGROPE = {**references.LONGROPE, 'original_max_position_embeddings': 8}
LINEAR = {'rope_type': 'linear', 'factor': 4.0}
LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 32,
}
LOCAL, GLOBAL = 'sliding_attention', 'full_attention'
HALF = {key: LONGROPE[key] for key in ('short_factor', 'long_factor')}
FULL = {'short_factor': [1.0, 1.1, 1.2, 1.3], 'long_factor': [1.0, 2.0, 4.0, 8.0]}

# Configs: (directory of data, changed keys; None removes a key that is written as '-').
REMOVED = '-'
CONFIGS: list[tuple[str, dict[str, Any]]] = [
  # Attention that is not causal, in every family.
  *((case, {'is_causal': False}) for case in ('llama', 'gemma2', 'mistral', 'phi3', 'gpt2')),
  ('llama', {'is_causal': True}),
  ('gemma2', {'use_bidirectional_attention': True}),
  ('gemma3', {'use_bidirectional_attention': True}),
  ('gemma3', {'use_bidirectional_attention': None}),
  ('qwen3', {'use_bidirectional_attention': True}),
  # Kinds of layers and windows.
  ('mistral', {'layer_types': [LOCAL, GLOBAL]}),
  ('mistral', {'layer_types': [GLOBAL, LOCAL]}),
  ('mistral', {'layer_types': [GLOBAL, GLOBAL]}),
  ('mistral', {'layer_types': [LOCAL, LOCAL]}),
  ('mistral', {'layer_types': None}),
  ('mistral', {'sliding_window': None}),
  ('mistral', {'sliding_window': None, 'layer_types': [LOCAL, GLOBAL]}),
  ('mistral', {'sliding_window': REMOVED}),
  ('mistral', {'sliding_window': 1}),
  ('mistral', {'sliding_window': 0}),
  ('mistral', {'sliding_window': -1}),
  ('mistral', {'sliding_window': 4.0}),
  ('mistral', {'sliding_window': '4'}),
  ('mistral', {'use_sliding_window': False}),
  ('mistral', {'attention_bias': True}),
  ('mistral', {'max_window_layers': 1}),
  ('mixtral', {'sliding_window': 3}),
  ('mixtral', {'layer_types': [LOCAL, GLOBAL]}),
  ('llama', {'sliding_window': 3}),
  ('llama', {'layer_types': [LOCAL, GLOBAL]}),
  ('llama', {'layer_types': [GLOBAL, GLOBAL]}),
  ('llama', {'attention_chunk_size': 4}),
  ('llama', {'layer_types': ['chunked_attention', GLOBAL], 'attention_chunk_size': 4}),
  ('phi3', {'layer_types': [GLOBAL, LOCAL]}),
  ('phi3', {'sliding_window': None}),
  ('smollm3', {'use_sliding_window': False, 'layer_types': [GLOBAL, LOCAL]}),
  ('smollm3', {'use_sliding_window': False, 'layer_types': [LOCAL, LOCAL]}),
  ('smollm3', {'use_sliding_window': False, 'layer_types': REMOVED}),
  ('smollm3', {'use_sliding_window': False, 'layer_types': None}),
  ('smollm3', {'use_sliding_window': True, 'layer_types': [LOCAL, GLOBAL]}),
  ('smollm3', {'use_sliding_window': True, 'layer_types': None}),
  ('smollm3', {'sliding_window': None, 'layer_types': [LOCAL, GLOBAL]}),
  ('smollm3', {'no_rope_layers': [0, 1], 'layer_types': None}),
  ('smollm3', {'no_rope_layers': None, 'no_rope_layer_interval': 2, 'layer_types': None}),
  ('smollm3', {'no_rope_layers': [1, 1, 1, 0], 'layer_types': None}),
  ('smollm3', {'no_rope_layers': [1], 'layer_types': None}),
  ('smollm3', {'no_rope_layers': None, 'no_rope_layer_interval': 0}),
  ('smollm3', {'max_window_layers': 28}),
  ('qwen2', {'use_sliding_window': False, 'layer_types': [GLOBAL, LOCAL]}),
  ('qwen2', {'use_sliding_window': False, 'layer_types': REMOVED}),
  ('qwen2', {'use_sliding_window': False, 'layer_types': [GLOBAL, GLOBAL]}),
  ('qwen2', {'use_sliding_window': 'no'}),
  ('qwen2', {'layer_types': [LOCAL, GLOBAL]}),
  ('qwen2', {'layer_types': REMOVED, 'max_window_layers': 0}),
  ('qwen2', {'layer_types': REMOVED, 'max_window_layers': 2}),
  ('qwen2', {'layer_types': [LOCAL]}),
  ('qwen2', {'layer_types': [LOCAL, GLOBAL, GLOBAL]}),
  ('qwen2', {'layer_types': ['chunked_attention', GLOBAL]}),
  ('qwen3', {'layer_types': [LOCAL, GLOBAL]}),
  ('qwen3', {'layer_types': [LOCAL, GLOBAL], 'use_sliding_window': True, 'sliding_window': 3}),
  ('qwen3_moe', {'use_sliding_window': True, 'sliding_window': 3}),
  ('qwen3_moe', {'use_sliding_window': True, 'sliding_window': 3, 'max_window_layers': 2}),
  ('qwen3_moe', {'use_sliding_window': False, 'sliding_window': 3}),
  ('gemma2', {'layer_types': [GLOBAL, LOCAL]}),
  ('gemma2', {'layer_types': None}),
  ('gemma2', {'sliding_window': None}),
  ('gemma2', {'sliding_window': None, 'layer_types': [GLOBAL, GLOBAL]}),
  ('gemma2', {'layer_types': [GLOBAL]}),
  ('gemma2', {'sliding_window_pattern': 1}),
  ('gemma3', {'layer_types': None, 'sliding_window_pattern': 2}),
  ('gemma3', {'layer_types': None, 'sliding_window_pattern': 1}),
  (
    'gemma3',
    {'layer_types': None, '_sliding_window_pattern': 1, 'sliding_window_pattern': REMOVED},
  ),
  # Rotary positions.
  (
    'llama',
    {'rope_parameters': REMOVED, 'rope_scaling': {'rope_type': 'default', 'rope_theta': 70.0}},
  ),
  ('llama', {'rope_parameters': REMOVED, 'rope_scaling': {**LINEAR, 'rope_theta': 70.0}}),
  ('llama', {'rope_parameters': REMOVED, 'rope_scaling': LINEAR, 'rope_theta': 70.0}),
  ('llama', {'rope_parameters': REMOVED, 'rope_scaling': {'type': 'linear', 'factor': 4.0}}),
  ('llama', {'rope_parameters': REMOVED, 'rope_theta': 70.0}),
  ('llama', {'rope_parameters': REMOVED}),
  ('llama', {'rope_parameters': {}}),
  ('llama', {'rope_parameters': None, 'rope_scaling': None, 'rope_theta': 70.0}),
  ('llama', {'rope_theta': 70.0}),
  ('llama', {'rope_scaling': LINEAR}),
  ('llama', {'rope_scaling': {'rope_type': 'default', 'rope_theta': 70.0}}),
  ('llama', {'rope_scaling': LLAMA3, 'rope_theta': 70.0}),
  ('llama', {'rope_parameters': LINEAR}),
  ('llama', {'rope_parameters': {'rope_type': 'linear', 'type': 'llama3', 'factor': 4.0}}),
  ('llama', {'rope_parameters': {**LLAMA3, 'mscale': 1.0}}),
  ('llama', {'rope_parameters': {**LLAMA3, 'attention_factor': 2.0}}),
  ('llama', {'rope_parameters': LLAMA3, 'original_max_position_embeddings': 16}),
  ('llama', {'rope_parameters': {key: LLAMA3[key] for key in list(LLAMA3)[:-1]}}),
  ('llama', {'rope_parameters': {**LLAMA3, 'high_freq_factor': 1.0}}),
  ('llama', {'rope_parameters': {**LLAMA3, 'factor': '8'}}),
  ('llama', {'rope_parameters': {'rope_type': 'linear', 'factor': 0.5}}),
  ('llama', {'rope_parameters': {'rope_type': 'linear', 'factor': 0}}),
  ('llama', {'rope_parameters': {'rope_type': 'linear'}}),
  ('llama', {'rope_parameters': {'rope_type': 'dynamic', 'factor': 2.0}}),
  ('llama', {'rope_parameters': {'rope_type': 'yarn', 'factor': 2.0}}),
  ('llama', {'rope_parameters': {'rope_type': 'proportional', 'rope_theta': 500.0}}),
  ('llama', {'rope_parameters': {'rope_type': 'default', 'rope_theta': 500.0, 'factor': 8.0}}),
  ('llama', {'rope_parameters': {'rope_type': 'default', 'rope_theta': '500'}}),
  ('llama', {'rope_parameters': {'rope_type': 'default', 'rope_theta': 0}}),
  ('llama', {'rope_parameters': {GLOBAL: {'rope_type': 'default', 'rope_theta': 70.0}}}),
  ('llama', {'rope_parameters': REMOVED, 'rope_theta': '10000'}),
  ('llama', {'rope_parameters': REMOVED, 'rope_theta': 0}),
  ('llama', {'rope_parameters': REMOVED, 'rope_theta': -1.0}),
  ('llama', {'rope_parameters': REMOVED, 'rope_theta': 70}),
  ('llama', {'partial_rotary_factor': 0.5}),
  (
    'llama',
    {'rope_parameters': {'rope_type': 'linear', 'factor': 2.0, 'partial_rotary_factor': 0.5}},
  ),
  ('llama', {'rope_interleaved': True}),
  ('llama', {'rope_parameters': {'rope_type': 'longrope', **FULL, 'factor': 4.0}}),
  (
    'llama',
    {
      'rope_parameters': {
        'rope_type': 'longrope',
        **FULL,
        'original_max_position_embeddings': 8,
        'factor': 4.0,
      }
    },
  ),
  (
    'qwen3',
    {
      'rope_parameters': {
        'rope_type': 'longrope',
        'short_factor': [1.0] * 8,
        'long_factor': [2.0] * 8,
        'original_max_position_embeddings': 8,
      }
    },
  ),
  ('phi3', {'rope_parameters': {**LONGROPE, 'factor': 2.0}, 'original_max_position_embeddings': 8}),
  (
    'phi3',
    {'rope_parameters': {**LONGROPE, 'factor': 32.0}, 'original_max_position_embeddings': 8},
  ),
  ('phi3', {'rope_parameters': {**LONGROPE, 'factor': 0.5}, 'original_max_position_embeddings': 8}),
  (
    'phi3',
    {
      'rope_parameters': {**LONGROPE, 'attention_factor': 0.7},
      'original_max_position_embeddings': 8,
    },
  ),
  (
    'phi3',
    {
      'rope_parameters': {**LONGROPE, 'attention_factor': 0.7, 'factor': 2.0},
      'original_max_position_embeddings': 8,
    },
  ),
  ('phi3', {'rope_parameters': LONGROPE, 'original_max_position_embeddings': 16}),
  ('phi3', {'rope_parameters': LONGROPE, 'original_max_position_embeddings': REMOVED}),
  ('phi3', {'rope_parameters': {**LONGROPE, 'short_factor': [1.0, 1.5]}}),
  ('phi3', {'rope_parameters': {**LONGROPE, 'long_factor': 2.0}}),
  ('phi3', {'rope_parameters': {**LONGROPE, 'long_factor': [1.0, -3.0, 6.0]}}),
  ('phi3', {'rope_parameters': {**LONGROPE, 'long_mscale': 1.2}}),
  ('phi3', {'rope_parameters': LINEAR}),
  ('phi3', {'rope_parameters': LLAMA3}),
  (
    'phi3',
    {'rope_parameters': {**LONGROPE, 'rope_type': 'su'}, 'original_max_position_embeddings': 8},
  ),
  (
    'phi3',
    {
      'rope_parameters': REMOVED,
      'rope_scaling': {'type': 'yarn', **HALF},
      'partial_rotary_factor': 0.75,
      'original_max_position_embeddings': 8,
    },
  ),
  (
    'phi3',
    {
      'rope_parameters': REMOVED,
      'rope_theta': 70.0,
      'rope_scaling': {'type': 'longrope', **HALF},
      'partial_rotary_factor': 0.75,
      'original_max_position_embeddings': 8,
    },
  ),
  ('phi3', {'rope_parameters': REMOVED, 'partial_rotary_factor': 0.5}),
  ('phi3', {'rope_parameters': REMOVED, 'partial_rotary_factor': 0.0}),
  ('phi3', {'rope_parameters': REMOVED, 'partial_rotary_factor': 0.4}),
  ('phi3', {'full_attn_mod': 1, 'lm_head_bias': False, 'interpolate_factor': 1}),
  ('phi3', {'lm_head_bias': True}),
  ('gemma3', {'rope_parameters': {'rope_type': 'default', 'rope_theta': 70.0}}),
  ('gemma3', {'rope_parameters': REMOVED, 'rope_scaling': LINEAR}),
  ('gemma3', {'rope_parameters': REMOVED, 'rope_scaling': {**LINEAR, 'rope_theta': 70.0}}),
  ('gemma3', {'rope_parameters': REMOVED, 'rope_theta': 70.0, 'rope_local_base_freq': 30.0}),
  ('gemma3', {'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}}),
  ('gemma3', {'rope_theta': 70.0, 'rope_local_base_freq': 30.0}),
  ('gemma3', {'rope_parameters': {GLOBAL: {'rope_type': 'default', 'rope_theta': 70.0}}}),
  ('gemma3', {'rope_parameters': {LOCAL: {'rope_type': 'default', 'rope_theta': 70.0}}}),
  ('gemma3', {'rope_parameters': {LOCAL: LINEAR, GLOBAL: LINEAR}}),
  ('gemma2', {'rope_parameters': {LOCAL: LINEAR, GLOBAL: LINEAR}}),
  # Norms, activations, caps and scales.
  ('llama', {'rms_norm_eps': '1e-5'}),
  ('llama', {'rms_norm_eps': float('nan')}),
  ('llama', {'rms_norm_eps': -1}),
  ('llama', {'rms_norm_eps': 0}),
  ('llama', {'rms_norm_eps': None}),
  ('llama', {'rms_norm_eps': True}),
  ('llama', {'rms_norm_eps': 1}),
  ('llama', {'rms_norm_eps': 0.1}),
  ('gpt2', {'layer_norm_epsilon': 0.5}),
  ('gpt2', {'layer_norm_epsilon': '0.5'}),
  ('gpt2', {'activation_function': 'gelu'}),
  ('gpt2', {'activation_function': 'relu'}),
  ('gpt2', {'scale_attn_weights': False}),
  ('gpt2', {'scale_attn_by_inverse_layer_idx': True}),
  ('gpt2', {'reorder_and_upcast_attn': True}),
  ('gpt2', {'n_ctx': 8}),
  ('gpt2', {'hidden_size': 16}),
  ('gpt2', {'rope_theta': 500.0}),
  ('gpt2', {'n_positions': '16'}),
  ('llama', {'hidden_act': 'gelu'}),
  ('llama', {'hidden_act': 'swish'}),
  ('llama', {'hidden_act': 'gelu_fast'}),
  ('gemma2', {'hidden_act': 'gelu_pytorch_tanh'}),
  ('gemma2', {'hidden_act': 'silu'}),
  ('gemma2', {'hidden_activation': 'gelu'}),
  ('gemma2', {'attn_logit_softcapping': None}),
  ('gemma2', {'final_logit_softcapping': None}),
  ('gemma2', {'final_logit_softcapping': 0}),
  ('gemma2', {'attn_logit_softcapping': '50'}),
  ('gemma2', {'query_pre_attn_scalar': 7}),
  ('gemma2', {'query_pre_attn_scalar': 0}),
  ('gemma3', {'attn_logit_softcapping': 2.0, 'final_logit_softcapping': 3.0}),
  ('llama', {'attention_multiplier': 0.1}),
  ('llama', {'logits_scaling': 8.0}),
  ('llama', {'embedding_multiplier': 12.0}),
  # Sizes.
  ('llama', {'head_dim': None}),
  ('llama', {'head_dim': REMOVED}),
  ('llama', {'num_attention_heads': True}),
  ('llama', {'num_attention_heads': '4'}),
  ('llama', {'num_hidden_layers': 1}),
  ('llama', {'vocab_size': 64.0}),
  ('llama', {'tie_word_embeddings': None}),
  ('llama', {'tie_word_embeddings': 'false'}),
  ('llama', {'attention_bias': 'true'}),
  ('llama', {'attention_bias': None}),
  ('llama', {'pruned_heads': {'0': [1]}}),
  ('llama', {'per_layer_config': {'0': {'hidden_act': 'gelu'}}}),
  ('llama', {'quantization': {'bits': 4}}),
  ('llama', {'quantization_config': {'quant_method': 'awq', 'bits': 4}}),
  ('llama', {'architectures': ['LlamaForCausalLM', 'MistralForCausalLM']}),
  ('llama', {'architectures': 'LlamaForCausalLM'}),
  ('llama', {'use_cache': False, 'pretraining_tp': 4, 'attention_dropout': 0.3, 'foo': None}),
  ('llama', {'foo': 1}),
  # Experts.
  ('mixtral', {'num_experts_per_tok': 1}),
  ('mixtral', {'num_experts_per_tok': 5}),
  ('mixtral', {'num_experts_per_tok': '2'}),
  ('mixtral', {'num_experts': 4}),
  ('mixtral', {'norm_topk_prob': False}),
  ('mixtral', {'router_jitter_noise': 0.5, 'output_router_logits': True}),
  ('qwen3_moe', {'norm_topk_prob': False}),
  ('qwen3_moe', {'norm_topk_prob': None}),
  ('qwen3_moe', {'decoder_sparse_step': 2}),
  ('qwen3_moe', {'mlp_only_layers': [0]}),
  ('qwen3_moe', {'mlp_only_layers': None}),
  ('olmoe', {'clip_qkv': 0.5}),
  ('olmoe', {'norm_topk_prob': True}),
  ('olmoe', {'num_experts': 4, 'num_local_experts': 2}),
]

# Adapters on data/llama: changed keys of peft.LoraConfig; PEFT writes and computes them.
ADAPTERS: list[dict[str, Any]] = [
  {},
  {'use_rslora': True},
  {'init_lora_weights': False},
  {'init_lora_weights': 'gaussian'},
  {'init_lora_weights': 'orthogonal'},
  {'init_lora_weights': 'pissa'},
  {'init_lora_weights': 'olora'},
  {'init_lora_weights': 'mica'},
  {'rank_pattern': {'layers.0.self_attn.q_proj': 2, 'q_proj': 3}},
  {'alpha_pattern': {'layers.1.self_attn.v_proj': 1, 'v_proj': 5}},
  {'alpha_pattern': {r'layers\.[01]\.self_attn\.(q|v)_proj': 3}},
  {'rank_pattern': {r'.*\.q_proj': 1}, 'use_rslora': True},
  {'target_modules': 'all-linear'},
  {'target_modules': r'.*\.(q|o)_proj'},
  {'target_modules': ['model.layers.0.self_attn.q_proj', 'model.layers.1.self_attn.q_proj']},
  {'target_modules': ['self_attn.q_proj', 'k_proj']},
  {'target_modules': ['q_proj', 'k_proj'], 'exclude_modules': ['k_proj']},
  {'target_modules': ['q_proj', 'embed_tokens']},
  {'target_modules': ['q_proj', 'lm_head']},
  {'target_modules': ['q_proj'], 'layers_to_transform': [0]},
  {'target_modules': ['q_proj'], 'exclude_modules': r'.*layers\.1\..*'},
  {'use_dora': True},
  {'lora_bias': True, 'bias': 'none'},
  {'modules_to_save': ['lm_head']},
  {'trainable_token_indices': [3, 5]},
  {'lora_dropout': 0.5},
  {'fan_in_fan_out': True},
  {'layer_replication': [[0, 2], [1, 2]]},
  {'alora_invocation_tokens': [7]},
]


def main() -> None:
  warnings.simplefilter('ignore')
  transformers.logging.set_verbosity_error()
  records = []
  logits = {}
  with tempfile.TemporaryDirectory() as name:
    for number, (case, changes) in enumerate(CONFIGS):
      directory = Path(name) / f'config{number}'
      shutil.copytree(references.DATA / case, directory)
      change_config(directory / 'config.json', changes)
      record = {'name': f'config{number}', 'case': case, 'changes': changes}
      record_one(record, logits, directory)
      records.append(record)
    for number, changes in enumerate(ADAPTERS):
      directory = OUTPUT / f'adapter{number}'
      record = {'name': directory.name, 'adapter': changes}
      write_adapter(directory, changes, number)
      record_one(record, logits, directory)
      records.append(record)
  OUTPUT.mkdir(exist_ok=True)
  lines = ',\n'.join(json.dumps(record) for record in records)
  (OUTPUT / 'cases.json').write_text(f'[\n{lines}\n]\n')
  np.savez_compressed(OUTPUT / 'logits.npz', **logits)


def change_config(path: Path, changes: dict[str, Any]) -> None:
  """Writes a config.json with changes."""
  values = {**json.loads(path.read_text()), **changes}
  kept = {key: value for key, value in values.items() if value != REMOVED}
  path.write_text(json.dumps(kept))


def record_one(record: dict[str, Any], logits: dict[str, np.ndarray], directory: Path) -> None:
  """Adds what a directory computes: logits under the record's name, or `error` to the record."""
  try:
    model = open_model(directory)
    values = last_logits(model)
  except Exception as error:  # whatever theirs raise is the finding
    record['error'] = f'{type(error).__name__}: {error}'.splitlines()[0][:80]
    return
  if np.isfinite(values).all():
    logits[record['name']] = values
  else:
    record['error'] = 'logits that are not finite'


def open_model(directory: Path) -> torch.nn.Module:
  """Opens a directory as transformers or PEFT does."""
  base = directory
  is_adapter = (directory / 'adapter_config.json').is_file()
  if is_adapter:
    base = references.DATA / 'llama'
  model = transformers.AutoModelForCausalLM.from_pretrained(
    base,
    dtype=torch.float32,
    attn_implementation='eager',
  )
  if is_adapter:
    model = peft.PeftModel.from_pretrained(model, str(directory))
  return model.eval()


def last_logits(model: torch.nn.Module) -> np.ndarray:
  """Computes the logits of the last token of each text alone, [3, 64] float32."""
  rows = []
  for tokens, length in zip(references.TOKENS, references.LENGTHS):
    with torch.no_grad():
      output = model(torch.tensor(tokens[None, :length]))
    rows.append(output.logits[0, -1].float().numpy())
  return np.stack(rows)


def write_adapter(directory: Path, changes: dict[str, Any], seed: int) -> None:
  """Writes random adapters on data/llama as PEFT saves them."""
  base = transformers.AutoModelForCausalLM.from_pretrained(
    references.DATA / 'llama',
    dtype=torch.float32,
  )
  settings = dict(r=4, lora_alpha=8, target_modules=['q_proj', 'v_proj'], task_type='CAUSAL_LM')
  model = peft.get_peft_model(base, peft.LoraConfig(**{**settings, **changes}))
  rng = np.random.default_rng(seed)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if 'lora_' in name:
        weight.copy_(torch.tensor(rng.normal(0, 0.3, weight.shape)))
  shutil.rmtree(directory, ignore_errors=True)
  model.peft_config['default'].base_model_name_or_path = '../../data/llama'
  model.save_pretrained(directory)
  (directory / 'README.md').unlink(missing_ok=True)


if __name__ == '__main__':
  main()
