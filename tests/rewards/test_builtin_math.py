"""Rewards for questions with one right answer: what counts as the answer, and when it is right."""

import gzip
import json
from pathlib import Path
import sys

import pytest

from rlhf_jax.data.records import Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.rewards.builtin import math

GSM8K = Path(__file__).resolve().parents[3] / 'shared' / 'data' / 'math.validation.jsonl.gz'
SHARE = {'final_number': 0.97, 'verified': 0.97}  # right, when the '####' line is cut off


def score(program, response, final):
  return program([[]], [response], [Prompt('q1', '', '', [], {'final': final})])[0]


@pytest.mark.parametrize(
  'response, final',
  [
    ('5 + 3 = <<5+3=8>>8 apples.\n#### 8', '8'),
    ('####8', '8'),
    ('####\n8 apples', '8'),
    ('#### x = 8.', '8'),
    ('#### 3\n#### 8', '8'),
    ('#### 8 or 9', '8'),
    ('It is 8.', '8'),
    ('First 3, then 5, so 8', '8'),
    ('**8**', '8'),
    (r'So \boxed{8}, not 3', '8'),
    (r'\boxed{3} \boxed{8}', '8'),
    (r'\boxed{\text{x} = {8}} 3', '8'),
    (r'\boxed{8', '8'),
    ('1,000', '1000'),
    ('1000', '1,000'),
    ('1,234,567.50', '1234567.5'),
    (r'1{,}000', '1000'),
    ('8.0', '8'),
    ('8.00.', '8'),
    ('$8', '8'),
    (r'\$8', '8'),
    ('US$8', '8'),
    ('$8$', '8'),
    ('8%', '8'),
    ('-8', '-8'),
    ('−8', '-8'),
    ('-$8', '-8'),
    ('$-8', '-8'),
    ('10-8', '8'),
    ('between 3 - 8', '8'),
    ('0.50', '1/2'),
    ('1/2', '0.5'),
    ('.5', '1/2'),
    ('50/2', '25'),
    (r'-\frac{1}{2}', '-0.50'),
    ('50 / 2 = 25', '25'),
    ('007', '7'),
    ('1,2,8', '8'),
  ],
)
def test_right_final_number(response, final):
  assert score(math.final_number, response, final) == 1.0


@pytest.mark.parametrize(
  'response, final',
  [
    ('', '8'),
    ('eight', '8'),
    ('#### ', '8'),
    ('8\n####', '8'),
    ('#### eight, 8 \n#### none', '8'),
    ('8 #### 9', '8'),
    (r'8 \boxed{}', '8'),
    (r'8 \boxed{9}', '8'),
    ('-8', '8'),
    ('8', '-8'),
    ('8 or 9', '8'),
    ('1,00', '100'),
    ('8.01', '8'),
    ('1/0', '8'),
    ('50%', '0.5'),
    ('0.3333', '1/3'),
    ('9' * 5000, '8'),
    ('8 ' * 5000 + '9', '8'),
    ('x8', '8'),
  ],
)
def test_wrong_final_number(response, final):
  assert score(math.final_number, response, final) == 0.0


@pytest.mark.parametrize(
  'response, final, value',
  [
    ('#### 8', '8', 1.0),
    ('$5 and $3, so #### $8', '8', 1.0),
    ('1,000', '1000', 1.0),
    ('0.50', '1/2', 1.0),
    (r'$\frac{1}{2}$', '0.5', 1.0),
    (r'\boxed{1 + x^2}', 'x^2+1', 1.0),
    (r'\boxed{\{2, 1\}}', r'\{1, 2\}', 1.0),
    ('-8', '8', 0.0),
    ('', '8', 0.0),
    ('#### ', '8', 0.0),
    ('eight', '8', 0.0),
    ('[[[', '8', 0.0),
    (r'\frac{1', '8', 0.0),
    (r'\boxed{x^3+1}', 'x^2+1', 0.0),
  ],
)
def test_verified(response, final, value):
  pytest.importorskip('math_verify')
  assert score(math.verified, response, final) == value


def test_verified_names_the_missing_library(monkeypatch):
  monkeypatch.setitem(sys.modules, 'math_verify', None)
  with pytest.raises(
    UserError, match=r'math-verify is not installed, run: pip install rlhf_jax\[math\]'
  ):
    score(math.verified, '8', '8')


def test_verified_does_not_disturb_a_pending_alarm():
  pytest.importorskip('math_verify')
  signal = pytest.importorskip('signal')
  signal.alarm(100)
  try:
    score(math.verified, '#### 8', '8')
    assert signal.alarm(0) > 90
  finally:
    signal.alarm(0)


@pytest.mark.parametrize(
  'final, said', [(None, 'meta lacks "final"'), ('many', 'expected a number'), ('1 or 2', 'number')]
)
def test_records_without_a_number(final, said):
  with pytest.raises(UserError, match=f'record q1: .*{said}'):
    score(math.final_number, '8', final)


def test_verified_names_records_without_an_answer():
  pytest.importorskip('math_verify')
  for final in (None, ''):
    with pytest.raises(UserError, match='record q1: .*final'):
      score(math.verified, '8', final)


@pytest.mark.skipif(not GSM8K.exists(), reason='the shared data are not here')
@pytest.mark.parametrize('program', ['final_number', 'verified'])
def test_gsm8k(program):
  if program == 'verified':
    pytest.importorskip('math_verify')
  rows = [json.loads(line) for line in gzip.open(GSM8K)]
  answers = [row['answer'] for row in rows]
  records = [Prompt(row['id'], '', '', [], {'final': row['final']}) for row in rows]

  def mean(responses):
    return sum(getattr(math, program)([], responses, records)) / len(records)

  assert mean(answers) == 1.0
  assert mean([answer.partition('####')[0] for answer in answers]) > SHARE[program]
  assert mean(answers[1:] + answers[:1]) < 0.02
