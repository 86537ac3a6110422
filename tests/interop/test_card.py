from pathlib import Path

import yaml

from rlhf_jax.interop import card
from rlhf_jax.models import transformer

SCRIPTS = Path(__file__).parents[2] / 'scripts'
CONFIG = transformer.ModelConfig(64, 32, 2, 4, 2, 8, 48, head=True)


def test_a_card_says_data_results_and_config():
  text = card.write_card(
    CONFIG,
    'reward',
    'reward',
    'sft',
    {'data': 'jsonl, a.jsonl'},
    {'accuracy': 0.75},
    {'loss': 'pairwise', 'batch_size': 16},
  )
  _, head, body = text.split('---\n', 2)
  assert yaml.safe_load(head) == {
    'library_name': 'transformers',
    'pipeline_tag': 'text-classification',
    'tags': ['rlhf_jax', 'reward'],
  }
  for words in (
    '- data: jsonl, a.jsonl',
    '| accuracy | 0.75 |',
    '"loss": "pairwise"',
    'LlamaForSequenceClassification',
  ):
    assert words in body


def test_the_page_of_families_is_that_of_the_code(monkeypatch):
  monkeypatch.syspath_prepend(str(SCRIPTS))
  import family_table

  page = (SCRIPTS.parent / 'docs' / 'families.md').read_text()
  block = family_table.BLOCK.search(page)[0]
  assert block == f'<!-- families -->\n{family_table.table()}<!-- /families -->'
