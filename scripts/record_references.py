"""Records what transformers computes for tiny random models, for the tests that run without torch.

  pip install torch transformers peft
  python scripts/record_references.py            # rewrites the three folders below
  python scripts/record_references.py gemma2     # one case of data

In tests/interop:

fixtures: two directories as `save_pretrained` writes them, and what the models in them say:
  tiny_llama        LlamaForCausalLM, untied, grouped heads, bfloat16 weights in several files
  tiny_llama_score  LlamaForSequenceClassification with one label
  tiny_llama.npz    tokens [2, 9], mask [2, 9], logits [2, 9, 61] and scores [2] (at the last
                    token), float32
data: a directory for each of CASES, bfloat16 weights, and in it `logits.npz`: float32 logits
  [3, 12, 64] of the same three texts padded on the right and on the left.
adapters: a directory for each of ADAPTERS, as PEFT saves it, on the model of that name in data,
  and in it `logits.npz`: the same of the texts padded on the right.
"""

from pathlib import Path
import sys
from typing import Any

import numpy as np
import peft
import torch
import transformers

TESTS = Path(__file__).resolve().parents[1] / 'tests' / 'interop'
FIXTURES = TESTS / 'fixtures'
DATA = TESTS / 'data'
ADAPTED = TESTS / 'adapters'

TOKENS = np.array(
  [
    [5, 9, 60, 7, 33, 2, 18, 41, 4, 11, 50, 22],
    [3, 50, 1, 27, 6, 12, 44, 19, 8, 0, 0, 0],
    [63, 10, 31, 2, 5, 0, 0, 0, 0, 0, 0, 0],
  ]
)
LENGTHS = (12, 9, 5)
SIZES = dict(
  vocab_size=64,
  hidden_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  intermediate_size=48,
  max_position_embeddings=64,
  pad_token_id=0,
  bos_token_id=None,
  eos_token_id=None,
)
THETA = {'rope_type': 'default', 'rope_theta': 500.0}
LOCAL_GLOBAL = ['sliding_attention', 'full_attention']
LONGROPE = {
  'rope_type': 'longrope',
  'rope_theta': 500.0,
  'short_factor': [1.0, 1.5, 2.0],
  'long_factor': [1.0, 3.0, 6.0],
  'partial_rotary_factor': 0.75,
}
EXPERTS = dict(num_experts_per_tok=2, intermediate_size=24)
CASES = {
  'gpt2': (
    'GPT2',
    dict(
      vocab_size=64,
      n_embd=32,
      n_layer=2,
      n_head=4,
      n_positions=16,
      pad_token_id=0,
      bos_token_id=None,
      eos_token_id=None,
    ),
  ),
  'llama': ('Llama', dict(rope_parameters=THETA)),
  'llama3': (
    'Llama',
    dict(
      attention_bias=True,
      mlp_bias=True,
      tie_word_embeddings=True,
      head_dim=16,
      rope_parameters={
        'rope_type': 'llama3',
        'rope_theta': 500.0,
        'factor': 8.0,
        'low_freq_factor': 1.0,
        'high_freq_factor': 4.0,
        'original_max_position_embeddings': 32,
      },
    ),
  ),
  'smollm3': (
    'SmolLM3',
    dict(no_rope_layers=[1, 0], use_sliding_window=True, sliding_window=5, rope_parameters=THETA),
  ),
  'mistral': ('Mistral', dict(sliding_window=4, rope_parameters=THETA)),
  'qwen2': (
    'Qwen2',
    dict(use_sliding_window=True, sliding_window=4, max_window_layers=1, rope_parameters=THETA),
  ),
  'qwen3': ('Qwen3', dict(head_dim=16, rope_parameters=THETA)),
  'gemma2': (
    'Gemma2',
    dict(
      head_dim=16,
      query_pre_attn_scalar=24,
      sliding_window=4,
      layer_types=LOCAL_GLOBAL,
      attn_logit_softcapping=2.0,
      final_logit_softcapping=3.0,
      rope_parameters=THETA,
    ),
  ),
  'gemma3': (
    'Gemma3Text',
    dict(
      head_dim=16,
      query_pre_attn_scalar=24,
      sliding_window=4,
      layer_types=LOCAL_GLOBAL,
      rope_parameters={
        'sliding_attention': THETA,
        'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 90000.0},
      },
    ),
  ),
  'olmo2': ('Olmo2', dict(rope_parameters=THETA)),
  'phi3': ('Phi3', dict(sliding_window=4, rope_parameters=THETA)),
  'phi3_short': ('Phi3', dict(original_max_position_embeddings=16, rope_parameters=LONGROPE)),
  'phi3_long': ('Phi3', dict(original_max_position_embeddings=8, rope_parameters=LONGROPE)),
  'mixtral': ('Mixtral', dict(EXPERTS, num_local_experts=4, rope_parameters=THETA)),
  'qwen3_moe': (
    'Qwen3Moe',
    dict(
      EXPERTS,
      moe_intermediate_size=24,
      num_experts=4,
      norm_topk_prob=True,
      head_dim=16,
      rope_parameters=THETA,
    ),
  ),
  'olmoe': ('Olmoe', dict(EXPERTS, num_experts=4, rope_parameters=THETA)),
}

ADAPTERS = {
  'llama': dict(
    r=4,
    lora_alpha=8,
    target_modules=['q_proj', 'v_proj', 'o_proj', 'down_proj'],
    rank_pattern={'down_proj': 2},
    alpha_pattern={'o_proj': 3},
  ),
  'gpt2': dict(r=3, lora_alpha=6, target_modules=['c_attn', 'c_proj', 'c_fc'], fan_in_fan_out=True),
  'phi3': dict(r=2, lora_alpha=4, target_modules=['qkv_proj', 'gate_up_proj'], use_rslora=True),
}


def build(case: str, **changes: Any) -> transformers.PreTrainedModel:
  """Builds the random model of a case.

  Its weights are numbers that a bfloat16 file can hold; it computes in float32.
  """
  name, settings = CASES[case]
  sizes = {} if name == 'GPT2' else SIZES  # GPT-2 calls them otherwise
  config_class = getattr(transformers, f'{name}Config')
  config = config_class(**{**sizes, **settings, **changes})
  config._attn_implementation = 'eager'  # the one that caps logits
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  random = np.random.default_rng(len(case))
  usual_scale = 0.0 if name.startswith('Gemma') else 1.0  # Gemma's norms multiply by 1 + weight
  with torch.no_grad():
    for key, weight in model.named_parameters():
      is_norm = key.endswith('weight') and ('norm' in key or '.ln_' in key)
      if is_norm:  # all ones would hide a swap
        values = random.uniform(usual_scale - 0.5, usual_scale + 0.5, weight.shape)
      else:
        values = random.normal(0, 0.3, weight.shape)
      weight.copy_(torch.tensor(values, dtype=torch.bfloat16))
  return model


def logits(model: transformers.PreTrainedModel, left: bool) -> np.ndarray:
  """Computes the logits of the texts, padded on the left or the right.

  Returns:
    [3, 12, 64] float32.
  """
  rows = []
  masks = []
  for row, length in zip(TOKENS, LENGTHS):
    shift = 12 - length if left else 0
    rows.append(np.roll(row, shift))
    masks.append(np.roll(np.arange(12) < length, shift))
  tokens = torch.tensor(np.stack(rows))
  mask = torch.tensor(np.stack(masks)).long()
  positions = (mask.cumsum(1) - 1).clamp(min=0)
  with torch.no_grad():
    output = model(tokens, attention_mask=mask, position_ids=positions)
  return output.logits.float().numpy()


def record_case(case: str) -> None:
  """Writes the model of a case and its logits."""
  model = build(case)
  right = logits(model, left=False)
  left = logits(model, left=True)
  model.bfloat16().save_pretrained(DATA / case)
  (DATA / case / 'generation_config.json').unlink()
  np.savez_compressed(DATA / case / 'logits.npz', right=right, left=left)


def record_adapters(case: str) -> None:
  """Writes random adapters on the model of a case, and the logits with them."""
  config = peft.LoraConfig(task_type='CAUSAL_LM', **ADAPTERS[case])
  model = peft.get_peft_model(build(case), config).eval()
  random = np.random.default_rng(len(case))
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if 'lora_' in name:
        weight.copy_(torch.tensor(random.normal(0, 0.3, weight.shape)))
  model.peft_config['default'].base_model_name_or_path = f'../../data/{case}'
  model.save_pretrained(ADAPTED / case)
  (ADAPTED / case / 'README.md').unlink()
  np.savez_compressed(ADAPTED / case / 'logits.npz', right=logits(model, left=False))


def record_fixtures() -> None:
  """Writes a language model and a reward model of Llama, and what they compute."""
  shape = dict(
    vocab_size=61,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=40,
    max_position_embeddings=64,
    rms_norm_eps=1e-4,
    pad_token_id=0,
    initializer_range=0.3,
    rope_parameters={'rope_type': 'default', 'rope_theta': 500.0},
  )
  tokens = torch.tensor([[5, 9, 60, 7, 33, 2, 18, 41, 4], [3, 50, 1, 27, 6, 12, 0, 0, 0]])
  mask = (tokens != 0).long()
  torch.manual_seed(0)
  language_config = transformers.LlamaConfig(**shape, tie_word_embeddings=False)
  language = transformers.LlamaForCausalLM(language_config).eval()
  score_config = transformers.LlamaConfig(**shape, num_labels=1)
  score = transformers.LlamaForSequenceClassification(score_config).eval()
  with torch.no_grad():
    for model in (language, score):
      for name, weight in model.named_parameters():
        if 'norm' in name:
          weight.uniform_(0.5, 1.5)  # all ones would hide a swap
        if model is language:
          # The numbers that its file will hold; it computes in float32.
          weight.copy_(weight.bfloat16())
    language_logits = language(tokens, attention_mask=mask).logits
    scores = score(tokens, attention_mask=mask).logits[:, 0]
  language.bfloat16().save_pretrained(FIXTURES / 'tiny_llama', max_shard_size='12kB')
  score.save_pretrained(FIXTURES / 'tiny_llama_score')
  np.savez_compressed(
    FIXTURES / 'tiny_llama.npz',
    tokens=tokens.numpy().astype(np.int32),
    mask=mask.numpy(),
    logits=language_logits.numpy(),
    scores=scores.numpy(),
  )


def main() -> None:
  """Records the cases of the command line, or everything."""
  chosen = sys.argv[1:]
  for case in chosen or CASES:
    record_case(case)
  for case in chosen or ADAPTERS:
    if case in ADAPTERS:
      record_adapters(case)
  if not chosen:
    record_fixtures()


if __name__ == '__main__':
  main()
