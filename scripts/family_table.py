"""Writes the README's table of model families from the code and from what the tests check.

python scripts/family_table.py
"""

from collections import defaultdict
import json
from pathlib import Path
import re

from rlhf_jax.interop.families import FAMILIES, Family

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / 'tests' / 'interop'
BLOCK = re.compile(r'(<!-- families -->\n).*?(<!-- /families -->)', re.DOTALL)
HEADER = (
  '| `model_type` | models | logits within 1e-4 | from GGUF | export opens as | real weights |',
  '| --- | --- | --- | --- | --- | --- |',
)
REAL = {  # what was tried with published weights
  'llama': 'SmolLM2-135M-Instruct from its GGUF file, against logprobs recorded from transformers',
}


def table() -> str:
  """Returns the table, in Markdown."""
  checked = defaultdict(list)  # model_type → the cases with recorded logits
  from_gguf = defaultdict(list)  # model_type → those of them that are in a GGUF file too
  from_gguf['mistral'] = ['as `llama`, without windows']  # GGUF calls its models llama
  versions = set()
  for path in sorted((TESTS / 'data').glob('*/config.json')):
    case = path.parent.name
    config = json.loads(path.read_text())
    versions.add(config['transformers_version'])
    checked[config['model_type']].append(case)
    if (TESTS / 'gguf' / f'{case}.gguf').is_file():
      from_gguf[config['model_type']].append(case)
  lines = [
    f'Checked against transformers {", ".join(sorted(versions))}, float32, '
    'tiny random models, in safetensors and in GGUF as llama.cpp converts them:',
    '',
    *HEADER,
  ]
  for name, family in FAMILIES.items():
    cells = (
      f'`{name}`',
      family.title,
      ', '.join(checked[name] or ['not checked']),
      ', '.join(from_gguf[name] or ['not read']),
      _classes(family),
      REAL.get(name, 'not tried'),
    )
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


def _classes(family: Family) -> str:
  """Names the classes of transformers that open an export."""
  if family.has_classifier:
    return f'`{family.causal_lm}`, `{family.classifier}`'
  return f'`{family.causal_lm}`; transformers has no class for its reward model'


def main() -> None:
  """Replaces the table in the README."""
  readme = ROOT / 'README.md'
  text = BLOCK.sub(lambda match: match[1] + table() + match[2], readme.read_text())
  readme.write_text(text)


if __name__ == '__main__':
  main()
