"""Records what transformers computes for tiny random models, for tests that run without torch.

  pip install torch transformers peft
  python scripts/record_references.py            # rewrites everything listed below
  python scripts/record_references.py gemma2     # rewrites one case in data, and its adapter

These folders of tests/interop are written:

fixtures: two models as `save_pretrained` writes them, and what they compute:
  tiny_llama        LlamaForCausalLM, untied, grouped heads, bfloat16 weights in several files
  tiny_llama_score  LlamaForSequenceClassification with one label
  tiny_llama.npz    tokens [2, 9] int32, mask [2, 9] int64, logits [2, 9, 61] float32, and scores
                    [2] float32 at the last token
data: for each of CASES a directory with bfloat16 weights and `logits.npz`: float32 logits
  [3, 12, 64] of three texts, padded on the right and on the left.
adapters: for each of ADAPTERS a directory as PEFT saves it, for the model of that name in data,
  with `logits.npz`: the logits of the texts padded on the right.
"""

import argparse
from pathlib import Path
from typing import Any

PARSER = argparse.ArgumentParser(
  description=__doc__,
  formatter_class=argparse.RawDescriptionHelpFormatter,
)
PARSER.add_argument('cases', nargs='*', metavar='CASE', help='default: everything')
if __name__ == '__main__':
  PARSER.parse_args()  # here, so that --help needs none of the packages below

import numpy as np
import peft
import torch
import transformers

INTEROP = Path(__file__).resolve().parents[1] / 'tests/interop'
FIXTURES = INTEROP / 'fixtures'
DATA = INTEROP / 'data'
ADAPTED = INTEROP / 'adapters'

# The texts of data and adapters: rows of token ids, padded with 0.
TOKENS = np.array(
  [
    [5, 9, 60, 7, 33, 2, 18, 41, 4, 11, 50, 22],
    [3, 50, 1, 27, 6, 12, 44, 19, 8, 0, 0, 0],
    [63, 10, 31, 2, 5, 0, 0, 0, 0, 0, 0, 0],
  ]
)
LENGTHS = (12, 9, 5)  # ids of each text

# Settings of all models except GPT-2, whose settings have other names.
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

CASES = {  # name of a case → (transformers' name of the family, settings)
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

ADAPTERS = {  # name of a case → settings of peft.LoraConfig
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

FIXTURE = dict(  # settings of both models of fixtures
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
  rope_parameters=THETA,
)
FIXTURE_TOKENS = (
  (5, 9, 60, 7, 33, 2, 18, 41, 4),
  (3, 50, 1, 27, 6, 12, 0, 0, 0),
)


def main() -> None:
  """Records everything, or the cases that are named."""
  cases = PARSER.parse_args().cases
  for case in cases:
    if case not in CASES:
      PARSER.error(f'no case {case!r}; known: {", ".join(CASES)}')

  for case in cases or CASES:
    record_case(case)
    if case in ADAPTERS:
      record_adapter(case)
  if not cases:
    record_fixtures()


def record_case(case: str) -> None:
  """Writes the directory of a case in data."""
  model = build_model(case)
  right = compute_logits(model, left=False)
  left = compute_logits(model, left=True)
  directory = DATA / case
  model.bfloat16().save_pretrained(directory)
  (directory / 'generation_config.json').unlink()
  np.savez_compressed(directory / 'logits.npz', right=right, left=left)


def record_adapter(case: str) -> None:
  """Writes the directory of a case in adapters."""
  settings = peft.LoraConfig(task_type='CAUSAL_LM', **ADAPTERS[case])
  model = peft.get_peft_model(build_model(case), settings).eval()
  rng = np.random.default_rng(len(case))
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if 'lora_' in name:  # PEFT's initial adapters have no effect, as B is zero
        weight.copy_(torch.tensor(rng.normal(0, 0.3, weight.shape)))
  directory = ADAPTED / case
  model.peft_config['default'].base_model_name_or_path = f'../../data/{case}'
  model.save_pretrained(directory)
  (directory / 'README.md').unlink()
  np.savez_compressed(directory / 'logits.npz', right=compute_logits(model, left=False))


def build_model(case: str, **changes: Any) -> transformers.PreTrainedModel:
  """Builds the random model of a case.

  Args:
    case: a key of CASES.
    **changes: settings that differ from those of the case.

  Returns:
    The model. Its weights are exact in bfloat16, but it computes in float32.
  """
  family, settings = CASES[case]
  sizes = {} if family == 'GPT2' else SIZES
  config_class = getattr(transformers, f'{family}Config')
  config = config_class(**{**sizes, **settings, **changes})
  config._attn_implementation = 'eager'  # the only one that soft-caps attention logits
  model = transformers.AutoModelForCausalLM.from_config(config).eval()
  norm_mean = 0.0 if family.startswith('Gemma') else 1.0  # Gemma scales by 1 + the weight
  draw_weights(model, seed=len(case), norm_mean=norm_mean)
  return model


def draw_weights(model: torch.nn.Module, seed: int, norm_mean: float) -> None:
  """Draws all weights at random, also those of norms, so that swapped norms are noticed."""
  rng = np.random.default_rng(seed)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      is_norm = name.endswith('weight') and ('norm' in name or '.ln_' in name)
      if is_norm:
        values = rng.uniform(norm_mean - 0.5, norm_mean + 0.5, weight.shape)
      else:
        values = rng.normal(0, 0.3, weight.shape)
      weight.copy_(torch.tensor(values, dtype=torch.bfloat16))


def compute_logits(model: torch.nn.Module, left: bool) -> np.ndarray:
  """Computes the logits of the texts, each in a batch of its own.

  transformers decides by the longest text of a batch which factors of longrope count.

  Args:
    model: a causal language model of transformers, or PEFT's wrapper of one.
    left: whether the texts are padded on the left; else on the right.

  Returns:
    [3, 12, 64] float32.
  """
  tokens, mask = (torch.tensor(array) for array in pad_texts(left))
  positions = (mask.cumsum(1) - 1).clamp(min=0)
  rows = []
  for row in range(len(tokens)):
    one = slice(row, row + 1)
    with torch.no_grad():
      output = model(tokens[one], attention_mask=mask[one], position_ids=positions[one])
    rows.append(output.logits.float().numpy())
  return np.concatenate(rows)


def pad_texts(left: bool) -> tuple[np.ndarray, np.ndarray]:
  """Returns the padded texts: (tokens [3, 12] int64, mask [3, 12] int64, 1 = a token)."""
  width = TOKENS.shape[1]
  mask = (np.arange(width) < np.array(LENGTHS)[:, None]).astype(np.int64)
  if not left:
    return TOKENS, mask
  shifts = [width - length for length in LENGTHS]
  return roll_rows(TOKENS, shifts), roll_rows(mask, shifts)


def roll_rows(array: np.ndarray, shifts: list[int]) -> np.ndarray:
  """Rolls each row to the right by its own shift."""
  return np.stack([np.roll(row, shift) for row, shift in zip(array, shifts)])


def record_fixtures() -> None:
  """Writes fixtures: a language model, a reward model, and the outputs of both."""
  torch.manual_seed(0)
  language_config = transformers.LlamaConfig(**FIXTURE, tie_word_embeddings=False)
  language = transformers.LlamaForCausalLM(language_config).eval()
  score_config = transformers.LlamaConfig(**FIXTURE, num_labels=1)
  score = transformers.LlamaForSequenceClassification(score_config).eval()
  draw_norms(language)
  draw_norms(score)
  round_to_bfloat16(language)  # as its file will be bfloat16; it computes in float32

  tokens = torch.tensor(FIXTURE_TOKENS)
  mask = (tokens != 0).long()
  with torch.no_grad():
    logits = language(tokens, attention_mask=mask).logits
    scores = score(tokens, attention_mask=mask).logits[:, 0]
  language.bfloat16().save_pretrained(FIXTURES / 'tiny_llama', max_shard_size='12kB')
  score.save_pretrained(FIXTURES / 'tiny_llama_score')
  np.savez_compressed(
    FIXTURES / 'tiny_llama.npz',
    tokens=tokens.numpy().astype(np.int32),
    mask=mask.numpy(),
    logits=logits.numpy(),
    scores=scores.numpy(),
  )


def draw_norms(model: torch.nn.Module) -> None:
  """Draws the weights of norms at random, so that swapped norms are noticed."""
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if 'norm' in name:
        weight.uniform_(0.5, 1.5)


def round_to_bfloat16(model: torch.nn.Module) -> None:
  """Rounds all weights to bfloat16 precision; their dtype stays float32."""
  with torch.no_grad():
    for weight in model.parameters():
      weight.copy_(weight.bfloat16())


if __name__ == '__main__':
  main()
