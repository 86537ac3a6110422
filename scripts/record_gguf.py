"""Records tiny GGUF files as llama.cpp's own converter writes them, and what transformers computes.

  pip install torch transformers peft sentencepiece
  python scripts/record_gguf.py LLAMA_CPP        # rewrites tests/interop/gguf
  python scripts/record_gguf.py LLAMA_CPP gpt2   # one case

LLAMA_CPP is a checkout of llama.cpp. There is a `NAME.gguf` and a `NAME.npz` for each of CASES: a
random model of scripts/record_references.py in bfloat16, in which what GGUF cannot say is left at
what llama.cpp takes for it; and its float32 logits [3, 12, 64] of the texts padded on the right.
"""

import json
from pathlib import Path
import sys
import tempfile

import numpy as np
import record_references as references
import torch
import transformers

FILES = references.TESTS / 'gguf'
FIRST = {'rope_type': 'default', 'rope_theta': 10000.0}
VOCABULARY = {f't{i}': i for i in range(64)}  # only their number counts
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


def record(case: str) -> None:
  """Writes the file of a case and the logits of its model."""
  model = references.build(case, **CASES[case])
  logits = references.logits(model, left=False)
  with tempfile.TemporaryDirectory() as place, torch.inference_mode():
    folder = Path(place)
    save_model(model, folder)
    convert(folder, FILES / f'{case}.gguf', case)
  np.savez_compressed(FILES / f'{case}.npz', right=logits)


def save_model(model: transformers.PreTrainedModel, folder: Path) -> None:
  """Writes a directory that llama.cpp's converter reads."""
  model.bfloat16().save_pretrained(folder)
  path = folder / 'config.json'
  config = json.loads(path.read_text())
  config = {'n_ctx': config.get('n_positions'), **config}  # the old name, which GPT-2 needs
  path.write_text(json.dumps(config))
  tokenizer = {'model': {'vocab': VOCABULARY}, 'added_tokens': []}
  (folder / 'tokenizer.json').write_text(json.dumps(tokenizer))


def convert(folder: Path, target: Path, name: str) -> None:
  """Converts a directory with llama.cpp, without a tokenizer."""
  # llama.cpp's modules, which main() puts on the path.
  from conversion import get_model_class
  from conversion.base import get_model_architecture, ModelBase, ModelType
  import gguf

  parameters = ModelBase.load_hparams(folder, False)
  architecture = get_model_architecture(parameters, ModelType.TEXT)
  own_class = get_model_class(architecture, mmproj=False)

  class Converter(own_class):
    model_arch = own_class.model_arch

    def set_vocab(self):
      self.gguf_writer.add_tokenizer_model('none')
      self.gguf_writer.add_token_list(list(VOCABULARY))

  file_type = gguf.LlamaFileType.MOSTLY_BF16
  Converter(folder, file_type, target, model_name=name).write()


def main() -> None:
  """Records the cases of the command line, or all."""
  root = Path(sys.argv[1]).resolve()
  sys.path[:0] = [str(root), str(root / 'gguf-py')]
  FILES.mkdir(exist_ok=True)
  for case in sys.argv[2:] or CASES:
    record(case)


if __name__ == '__main__':
  main()
