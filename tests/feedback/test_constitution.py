import collections
import json

import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import constitution


@pytest.mark.parametrize(
  'path', sorted(constitution.SHIPPED.glob('*.yaml')), ids=lambda path: path.stem
)
def test_constitutions_of_the_package_load(path):
  said = constitution.load_constitution(path.stem)
  rng = np.random.default_rng(0)
  assert said.draw('critique', rng).revision and said.draw('choose', rng).choose
  if not path.stem.startswith('tinyworld'):
    assert said.critique_examples and said.comparison_examples
    assert all(
      'CritiqueRequest:' in text and 'Revision:' in text for text in said.critique_examples
    )


def test_principles_are_drawn_by_weight(tmp_path):
  path = tmp_path / 'own.json'
  path.write_text(
    json.dumps(
      {
        'principles': [
          dict(id='a', choose='A?', weight=3),
          dict(id='b', choose='B?'),
          dict(id='c', critique='C?', revision='C!'),
        ]
      }
    )
  )
  rng = np.random.default_rng(0)
  drawn = collections.Counter(
    constitution.load_constitution((str(path),)).draw('choose', rng).id for _ in range(2000)
  )
  assert drawn['a'] / 2000 == pytest.approx(0.75, abs=0.04) and set(drawn) == {'a', 'b'}
  assert constitution.load_constitution(str(path)).draw('critique', rng).id == 'c'


def test_the_published_layout(tmp_path):
  files = {
    'critiques': {
      'harmful0': {
        'prompt': ['\n\nCritiqueRequest: Find harm.\n\nCritique:'],
        'edit_request': '\n\nRevisionRequest: Mend it.\n\nRevision:',
      }
    },
    'choices': ['\nChoose the kinder one. Options:'],
    'shown': ['\n\nHuman: a\n\nAssistant: b\n\nCritiqueRequest: c\n\nCritique: d\n\nHuman:'],
    'compared': [
      dict(prompt='\n\nHuman: why\n\nAssistant:', corrects=[' good'], incorrects=[' bad'])
    ],
    'thought': [
      dict(
        prompt='\n\nHuman: {} (A) [[[a]]]\n\nAssistant: Let us think.\n\n'
        'Human:\nSo it is: (A)\n\nHuman:'
      )
    ],
  }
  for name, body in files.items():
    (tmp_path / f'{name}.json').write_text(json.dumps(body))
  said = constitution.load_constitution([str(tmp_path / f'{name}.json') for name in files])
  assert [(one.critique, one.revision, one.choose) for one in said.principles] == [
    ('Find harm.', 'Mend it.', ''),
    ('', '', 'Choose the kinder one.'),
  ]
  assert said.critique_examples[0].endswith('Critique: d')
  assert said.comparison_examples == (constitution.Example('why', 'good', 'bad'),)
  assert said.thought_examples == (
    'Human: {} (A) [[[a]]]\n\nAssistant: Let us think.\n\nHuman:\nSo it is: (A)',
  )


@pytest.mark.parametrize(
  'body,message',
  [
    ('principles: [{id: a, choice: b}]', "principle 1: unknown key 'choice'"),
    (
      'principles: [{id: a, critique: b}]',
      'principle 1: expected critique and revision, or choose',
    ),
    ('principles: [{id: a, choose: b, weight: 0}]', 'weight: expected more than 0'),
    ('principles: [{choose: b}]', 'principle 1: needs "id"'),
    ('principles: [{id: a, choose: 3}]', 'choose: expected a text'),
    ('principles: [{id: a, choose: b}, {id: a, choose: c}]', "two principles are called 'a'"),
    ('principle: []', 'expected a key "principles"'),
    ('a: [', 'own.yaml'),
    ('extra: 1\nprinciples: []', "unknown key 'extra'"),
  ],
)
def test_what_is_wrong_is_named(tmp_path, body, message):
  path = tmp_path / 'own.yaml'
  path.write_text(body)
  with pytest.raises(UserError, match=message):
    constitution.load_constitution(str(path))


def test_a_missing_file_is_reported_with_the_names_of_those_that_ship():
  with pytest.raises(UserError, match='harmlessness, helpfulness, honesty'):
    constitution.load_constitution('harmlesness')
