"""Rewards on a text alone: values by hand."""

import gzip
from pathlib import Path

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.rewards.builtin import text

LEXICON = Path(__file__).resolve().parents[3] / 'shared' / 'data' / 'lexicon.jsonl.gz'


@pytest.fixture
def lexicon(tmp_path):
  path = tmp_path / 'lexicon.jsonl.gz'
  with gzip.open(path, 'wt') as file:
    file.write(
      '{"token": "good", "valence": 2}\n{"token": "bad", "valence": -2.5, "std": 0.5}\n\n'
      '{"token": "no", "valence": -1}\n{"token": ":D", "valence": 3}\n'
    )
  return path


def one(program, response, **options):
  return program([[]], [response], [None], **options)[0]


@pytest.mark.parametrize(
  'response, value',
  [
    ('', 0.0),
    ('   ', 0.0),
    ('A table.', 0.0),
    ('good', 2.0),
    ('GOOD!', 2.0),
    ('“Good,” he said', 2.0),
    ('goods', 0.0),
    ('good good bad', 0.5),
    ('Hello :D', 3.0),
    ('not good', -2.0),
    ('not a very good', -2.0),
    ('not a very very good', 2.0),
    ("isn't bad", 2.5),
    ('isn’t bad', 2.5),
    ('No good', -2.0),
    ('no', 0.0),
    ('not, never good', -2.0),
    ('good, not bad', 2.25),
    ('good ' * 5000, 2.0),
  ],
)
def test_sentiment(lexicon, response, value):
  assert one(text.sentiment, response, path=str(lexicon)) == pytest.approx(value)


@pytest.mark.parametrize(
  'content, said',
  [
    ('{"token": "good"}\n', ':1: '),
    ('{"token": "good", "valence": 1}\nnot JSON\n', ':2: '),
    ('[1]\n', ':1: '),
    ('{"token": 3, "valence": 1}\n', ':1: '),
  ],
)
def test_a_bad_lexicon_is_named(tmp_path, content, said):
  path = tmp_path / 'lexicon.jsonl'
  path.write_text(content)
  with pytest.raises(UserError, match=said):
    one(text.sentiment, 'good', path=str(path))
  with pytest.raises(UserError, match='elsewhere.jsonl: cannot read'):
    one(text.sentiment, 'good', path=str(tmp_path / 'elsewhere.jsonl'))


@pytest.mark.skipif(not LEXICON.exists(), reason='the shared data are not here')
def test_sentiment_of_the_shared_lexicon():
  responses = ['A wonderful, happy day.', 'I do not like it.', 'A terrible disaster.']
  values = text.sentiment([], responses, [], path=LEXICON)
  assert values == pytest.approx([2.7, -1.5, -2.6])


@pytest.mark.parametrize(
  'response, options, value',
  [
    ('a b c', dict(most=3), 1.0),
    ('a b c', dict(most=2), 0.5),
    ('a b c d', dict(most=2), 0.0),
    ('a ' * 99, dict(most=2), 0.0),
    ('', dict(most=2), 1.0),
    ('', dict(least=1), 0.0),
    ('a', dict(least=4), 0.25),
    ('a b c d', dict(least=4), 1.0),
    ('a ' * 999, dict(least=4), 1.0),
    ('a b', dict(least=1, most=2, unit='characters'), 0.5),
    ('a b', {}, 1.0),
  ],
)
def test_length(response, options, value):
  assert one(text.length, response, **options) == value


@pytest.mark.parametrize(
  'options, said',
  [
    (dict(unit='lines'), 'words or characters'),
    (dict(least=3, most=2), 'least=3'),
    (dict(most=0), 'most=0'),
    (dict(least=-1), 'least=-1'),
  ],
)
def test_length_refuses(options, said):
  with pytest.raises(UserError, match=said):
    one(text.length, 'a', **options)


@pytest.mark.parametrize(
  'response, pattern, value',
  [
    ('yes', 'yes|no', 1.0),
    ('yes!', 'yes|no', 0.0),
    ('', 'yes|no', 0.0),
    ('', '', 1.0),
    ('a\nb', 'a.b', 0.0),
    ('a\nb', '(?s)a.b', 1.0),
    ('Yes', '(?i)yes', 1.0),
  ],
)
def test_matches(response, pattern, value):
  assert one(text.matches, response, pattern=pattern) == value


@pytest.mark.parametrize('pattern', ['(', None])
def test_a_bad_pattern_is_named(pattern):
  with pytest.raises(UserError, match='matches: pattern'):
    one(text.matches, 'a', pattern=pattern)


@pytest.mark.parametrize(
  'response, n, value',
  [
    ('', 3, 0.0),
    ('one', 3, 1.0),
    ('a a', 3, 1.0),
    ('a b c d', 3, 1.0),
    ('a a A a', 3, 0.5),
    ('a b a b', 2, 2 / 3),
    ('a a a a', 1, 0.25),
    ('a b ' * 501, 3, 0.002),
  ],
)
def test_not_repeated(response, n, value):
  assert one(text.not_repeated, response, n=n) == pytest.approx(value)


@pytest.mark.parametrize('n', [0, 1.5, 'two'])
def test_not_repeated_refuses(n):
  with pytest.raises(UserError, match='positive whole number'):
    one(text.not_repeated, 'a', n=n)
