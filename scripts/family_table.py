"""Writes the table of docs/families.md from the code and from what the tests check.

python scripts/family_table.py
"""

import json
from pathlib import Path
import re

from rlhf_jax.interop.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r'(<!-- families -->\n).*?(<!-- /families -->)', re.DOTALL)
REAL = {
  'llama': 'SmolLM2-135M-Instruct from its GGUF file, against logprobs recorded from transformers'
}


def table() -> str:
  """The table, in Markdown."""
  cases, from_gguf, version = {}, {'mistral': ['as `llama`, without windows']}, set()
  for path in sorted((ROOT / 'tests/interop/data').glob('*/config.json')):
    said = json.loads(path.read_text())
    cases.setdefault(said['model_type'], []).append(path.parent.name)
    version.add(said['transformers_version'])
    if (ROOT / f'tests/interop/gguf/{path.parent.name}.gguf').is_file():
      from_gguf.setdefault(said['model_type'], []).append(path.parent.name)
  lines = [
    f'Checked against transformers {", ".join(sorted(version))}, float32, tiny random models, in safetensors '
    'and in GGUF as llama.cpp converts them:',
    '',
    '| `model_type` | models | logits within 1e-4 | from GGUF | export opens as | real weights |',
    '| --- | --- | --- | --- | --- | --- |',
  ]
  for name, family in FAMILIES.items():
    scorer = (
      f', `{family.scorer}`'
      if family.scorer_exists
      else '; transformers has no class for its reward model'
    )
    lines.append(
      f'| `{name}` | {family.title} | {", ".join(cases.get(name, ["not checked"]))} | '
      f'{", ".join(from_gguf.get(name, ["not read"]))} | `{family.causal}`{scorer} | '
      f'{REAL.get(name, "not tried")} |'
    )
  return '\n'.join(lines) + '\n'


if __name__ == '__main__':
  page = ROOT / 'docs/families.md'
  page.write_text(BLOCK.sub(lambda found: found[1] + table() + found[2], page.read_text()))
