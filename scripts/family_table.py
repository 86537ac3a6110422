"""Writes the table in docs/families.md, from the table of families and the tests' recorded models.

python scripts/family_table.py
"""

import argparse
import json
from pathlib import Path
import re

from rlhf_jax.interop.families import FAMILIES, Family

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs/families.md'
TESTS = ROOT / 'tests/interop'  # data/CASE and gguf/CASE.gguf: see record_references, record_gguf
BLOCK = re.compile(r'(<!-- families -->\n).*?(<!-- /families -->)', re.DOTALL)

TITLES = (
  '`model_type`',
  'models',
  'logits within 1e-4',
  'from GGUF',
  'export opens as',
  'real weights',
)
# Facts that the recorded files do not show.
READ_AS_ANOTHER = {'mistral': 'as `llama`, without windows'}  # its GGUF files have type llama
REAL_WEIGHTS = {
  'llama': 'SmolLM2-135M-Instruct from its GGUF file, against logprobs recorded from transformers'
}


def parse_arguments() -> None:
  """Answers --help; there are no other arguments."""
  argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  ).parse_args()


def main() -> None:
  """Rewrites the page with the current table."""
  parse_arguments()
  page = PAGE.read_text(encoding='utf-8')
  PAGE.write_text(BLOCK.sub(fill_block, page), encoding='utf-8')


def fill_block(block: re.Match[str]) -> str:
  """Returns a match of BLOCK with the current table between its two markers."""
  before, after = block.groups()
  return before + table() + after


def table() -> str:
  """Returns the table in Markdown, with the sentence above it."""
  configs = recorded_configs()
  versions = sorted({config['transformers_version'] for config in configs.values()})
  lines = [
    f'Checked against transformers {", ".join(versions)}, float32, tiny random models, '
    'in safetensors and in GGUF as llama.cpp converts them:',
    '',
    format_row(TITLES),
    format_row(['---'] * len(TITLES)),
  ]
  for model_type, family in FAMILIES.items():
    cases = [case for case, config in configs.items() if config['model_type'] == model_type]
    lines.append(format_row(family_cells(model_type, family, cases)))
  return '\n'.join(lines) + '\n'


def recorded_configs() -> dict[str, dict]:
  """Reads the config.json of each model recorded for the tests; returns case → config."""
  paths = sorted(TESTS.glob('data/*/config.json'))
  return {path.parent.name: json.loads(path.read_text(encoding='utf-8')) for path in paths}


def family_cells(model_type: str, family: Family, cases: list[str]) -> list[str]:
  """Returns a family's cells, in the order of TITLES.

  Args:
    model_type: the family's name in config.json.
    family: its row in FAMILIES.
    cases: the recorded models of this family.
  """
  from_gguf = [case for case in cases if (TESTS / f'gguf/{case}.gguf').is_file()]
  if model_type in READ_AS_ANOTHER:
    from_gguf.insert(0, READ_AS_ANOTHER[model_type])
  return [
    f'`{model_type}`',
    family.title,
    ', '.join(cases) or 'not checked',
    ', '.join(from_gguf) or 'not read',
    exported_classes(family),
    REAL_WEIGHTS.get(model_type, 'not tried'),
  ]


def exported_classes(family: Family) -> str:
  """Names the classes of transformers that open an exported policy and reward model."""
  if not family.has_classifier:
    return f'`{family.causal_lm}`; transformers has no class for its reward model'
  return f'`{family.causal_lm}`, `{family.classifier}`'


def format_row(cells: list[str] | tuple[str, ...]) -> str:
  """Formats a line of a Markdown table."""
  return '| ' + ' | '.join(cells) + ' |'


if __name__ == '__main__':
  main()
