"""Records tiny GGUF files, written by llama.cpp's converter, and the logits of their models.

  pip install torch transformers peft sentencepiece
  python scripts/record_gguf.py LLAMA_CPP            # rewrites tests/interop/gguf
  python scripts/record_gguf.py LLAMA_CPP gemma2     # rewrites one case

LLAMA_CPP is a checkout of llama.cpp. Each of CASES gets `NAME.gguf` and `NAME.npz`. Its model is
the random model of that name in record_references.py, in bfloat16; settings that GGUF cannot
express have the values that llama.cpp assumes. The array `right` in the .npz holds what
transformers computes before the conversion: float32 logits [3, 12, 64] of the texts padded on the
right.
"""

import argparse
from collections.abc import Sequence
import json
from pathlib import Path
import sys
import tempfile

PARSER = argparse.ArgumentParser(
  description=__doc__,
  formatter_class=argparse.RawDescriptionHelpFormatter,
)
PARSER.add_argument('llama_cpp', metavar='LLAMA_CPP', type=Path, help='a checkout of llama.cpp')
PARSER.add_argument('cases', nargs='*', metavar='CASE', help='default: all')
if __name__ == '__main__':
  PARSER.parse_args()  # here, so that --help needs none of the packages below

import numpy as np
import record_references as references
import torch

FILES = references.INTEROP / 'gguf'
DEFAULT_ROPE = {'rope_type': 'default', 'rope_theta': 10000.0}
CASES = {  # name of a case in record_references.py → changes of its settings
  'llama3': {},
  'smollm3': dict(
    num_hidden_layers=4, no_rope_layers=None, use_sliding_window=False, sliding_window=None
  ),
  'qwen2': dict(use_sliding_window=False),
  'qwen3': {},
  'gemma2': dict(query_pre_attn_scalar=16, rope_parameters=DEFAULT_ROPE),
  'gemma3': dict(
    query_pre_attn_scalar=16,
    num_hidden_layers=6,
    layer_types=None,
    rope_parameters={
      'sliding_attention': DEFAULT_ROPE,
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


def main() -> None:
  """Records all cases, or those that are named."""
  options = PARSER.parse_args()
  for case in options.cases:
    if case not in CASES:
      PARSER.error(f'no case {case!r}; known: {", ".join(CASES)}')

  root = options.llama_cpp.resolve()
  # First in the path, as the converter needs the gguf package of its own checkout.
  sys.path[:0] = [str(root), str(root / 'gguf-py')]
  FILES.mkdir(exist_ok=True)
  for case in options.cases or CASES:
    record_case(case)


def record_case(case: str) -> None:
  """Writes both files of a case."""
  model = references.build_model(case, **CASES[case])
  logits = references.compute_logits(model, left=False)
  # Only the number of tokens matters, not their texts.
  vocabulary = [f't{number}' for number in range(model.config.vocab_size)]
  with tempfile.TemporaryDirectory() as name:
    directory = Path(name)
    model.bfloat16().save_pretrained(directory)
    add_old_key(directory / 'config.json')
    write_tokenizer(directory / 'tokenizer.json', vocabulary)
    with torch.inference_mode():
      convert(directory, FILES / f'{case}.gguf', vocabulary, case)
  np.savez_compressed(FILES / f'{case}.npz', right=logits)


def add_old_key(path: Path) -> None:
  """Adds the key `n_ctx` of older files to a config.json, as the converter of GPT-2 reads it."""
  config = json.loads(path.read_text())
  path.write_text(json.dumps({'n_ctx': config.get('n_positions'), **config}))


def write_tokenizer(path: Path, vocabulary: Sequence[str]) -> None:
  """Writes the parts of a tokenizer.json that the converter reads."""
  ids = {token: number for number, token in enumerate(vocabulary)}
  path.write_text(json.dumps({'model': {'vocab': ids}, 'added_tokens': []}))


def convert(directory: Path, target: Path, vocabulary: Sequence[str], name: str) -> None:
  """Converts a Hugging Face directory to GGUF, in bfloat16.

  Args:
    directory: written by save_pretrained.
    target: the .gguf file to write.
    vocabulary: the tokens, which are written in place of a tokenizer.
    name: the name of the model in the file's metadata.
  """
  from conversion import get_model_class  # of llama.cpp; importable once main() has set sys.path
  from conversion.base import get_model_architecture, ModelBase, ModelType
  import gguf

  hparams = ModelBase.load_hparams(directory, False)
  architecture = get_model_architecture(hparams, ModelType.TEXT)
  base = get_model_class(architecture, mmproj=False)

  class Converter(base):
    """The architecture's own converter, without a tokenizer."""

    model_arch = base.model_arch  # ModelBase requires each subclass to define it

    def set_vocab(self) -> None:
      self.gguf_writer.add_tokenizer_model('none')
      self.gguf_writer.add_token_list(list(vocabulary))

  Converter(directory, gguf.LlamaFileType.MOSTLY_BF16, target, model_name=name).write()


if __name__ == '__main__':
  main()
