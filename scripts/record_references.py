"""Records what transformers computes for tiny random models, for the tests that run without torch.

  pip install torch transformers
  python scripts/record_references.py   # rewrites tests/models/fixtures

Two directories as `save_pretrained` writes them, and what the models in them say:
  tiny_llama        LlamaForCausalLM, untied, grouped heads, bfloat16 weights in several files
  tiny_llama_score  LlamaForSequenceClassification with one label
  tiny_llama.npz    tokens [2, 9], mask [2, 9], logits [2, 9, 61] and scores [2] (at the last token), float32
"""

from pathlib import Path

import numpy as np
import torch
import transformers

FIXTURES = Path(__file__).resolve().parents[1] / 'tests' / 'models' / 'fixtures'


def main():
  shape = dict(vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
               head_dim=8, intermediate_size=40, max_position_embeddings=64, rms_norm_eps=1e-4, pad_token_id=0,
               initializer_range=0.3, rope_parameters={'rope_type': 'default', 'rope_theta': 500.0})
  tokens = torch.tensor([[5, 9, 60, 7, 33, 2, 18, 41, 4], [3, 50, 1, 27, 6, 12, 0, 0, 0]])
  mask = (tokens != 0).long()
  torch.manual_seed(0)
  language = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, tie_word_embeddings=False)).eval()
  score = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**shape, num_labels=1)).eval()
  with torch.no_grad():
    for model in (language, score):
      for name, weight in model.named_parameters():
        if 'norm' in name:
          weight.uniform_(0.5, 1.5)  # all ones would hide a swap
        if model is language:
          weight.copy_(weight.bfloat16())  # the numbers that its file will hold; it computes in float32
    logits = language(tokens, attention_mask=mask).logits
    scores = score(tokens, attention_mask=mask).logits[:, 0]
  language.bfloat16().save_pretrained(FIXTURES / 'tiny_llama', max_shard_size='12kB')
  score.save_pretrained(FIXTURES / 'tiny_llama_score')
  np.savez_compressed(FIXTURES / 'tiny_llama.npz', tokens=tokens.numpy().astype(np.int32), mask=mask.numpy(),
                      logits=logits.numpy(), scores=scores.numpy())


if __name__ == '__main__':
  main()
