"""Records tiny GGUF files as llama.cpp's own converter writes them, and what transformers computes for their models.

  pip install torch transformers peft sentencepiece
  python scripts/record_gguf.py LLAMA_CPP      # a checkout of llama.cpp; rewrites tests/interop/gguf

One `NAME.gguf` and `NAME.npz` for each of CASES: a random model of scripts/record_references.py in bfloat16, what GGUF
cannot say left at what llama.cpp takes for it; float32 logits [3, 12, 64] of the texts padded on the right.
"""

import json
from pathlib import Path
import sys
import tempfile

import numpy as np
import record_references as references
import torch

FILES = references.MODELS / 'gguf'
FIRST = {'rope_type': 'default', 'rope_theta': 10000.0}
CASES = {
  'llama3': {},
  'smollm3': dict(
    num_hidden_layers=4, no_rope_layers=None, use_sliding_window=False, sliding_window=None
  ),
  'qwen2': dict(use_sliding_window=False),
  'qwen3': {},
  'gemma2': dict(query_pre_attn_scalar=16, rope_parameters=FIRST),
  'gemma3': dict(
    query_pre_attn_scalar=16,
    num_hidden_layers=6,
    layer_types=None,
    rope_parameters={
      'sliding_attention': FIRST,
      'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 90000.0},
    },
  ),
  'phi3': {},
  'phi3_long': {},
  'gpt2': dict(n_inner=None),
  'olmo2': {},
  'mixtral': {},
  'qwen3_moe': {},
  'olmoe': {},
}


def record(case):
  from conversion import get_model_class
  from conversion.base import get_model_architecture, ModelBase, ModelType
  import gguf

  model = references.build(case, **CASES[case])
  logits = references.logits(model, left=False)
  with tempfile.TemporaryDirectory() as place, torch.inference_mode():
    place = Path(place)
    model.bfloat16().save_pretrained(place)
    said = json.loads((place / 'config.json').read_text())
    (place / 'config.json').write_text(
      json.dumps({'n_ctx': said.get('n_positions'), **said})
    )  # of old, for GPT-2
    tokens = {f't{i}': i for i in range(64)}
    (place / 'tokenizer.json').write_text(
      json.dumps({'model': {'vocab': tokens}, 'added_tokens': []})
    )  # only counts
    own = get_model_class(
      get_model_architecture(ModelBase.load_hparams(place, False), ModelType.TEXT), mmproj=False
    )

    class Converter(own):
      model_arch = own.model_arch

      def set_vocab(self):
        self.gguf_writer.add_tokenizer_model('none')
        self.gguf_writer.add_token_list(list(tokens))

    Converter(
      place, gguf.LlamaFileType.MOSTLY_BF16, FILES / f'{case}.gguf', model_name=case
    ).write()
  np.savez_compressed(FILES / f'{case}.npz', right=logits)


if __name__ == '__main__':
  root = Path(sys.argv[1]).resolve()
  sys.path[:0] = [str(root), str(root / 'gguf-py')]
  FILES.mkdir(exist_ok=True)
  for chosen in sys.argv[2:] or CASES:
    record(chosen)
