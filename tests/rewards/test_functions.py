import multiprocessing
from pathlib import Path
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from rlhf_jax.data import records
from rlhf_jax.errors import UserError
from rlhf_jax.rewards import functions, worker

PROGRAMS = """
  import os, time

  def words(prompts, responses, records, each=1.0):
    return [each * len(said.split()) + records[i].meta['bonus'] for i, said in enumerate(responses)]

  def fragile(prompts, responses, records):
    for said in responses:
      if said == 'bad':
        raise KeyError('no such word')
      if said == 'slow':
        time.sleep(60)
      if said == 'deadly':
        os._exit(3)
    return [0.75] * len(responses)

  def short(prompts, responses, records):
    return [0.0]

  def nan(prompts, responses, records):
    return [float('nan')] * len(responses)

  def text(prompts, responses, records):
    return ['good'] * len(responses)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
  """A module of programs in the current directory."""
  (tmp_path / 'own_programs.py').write_text(textwrap.dedent(PROGRAMS))
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.delitem(__import__('sys').modules, 'own_programs', raising=False)
  return 'own_programs'


def asked(responses, **config):
  def run(name):
    rows = [
      records.Prompt(f'p{i}', '', '', [{'role': 'user', 'content': 'Hi'}], {'bonus': 10.0 * i})
      for i in range(len(responses))
    ]
    return functions.build_reward_function(name, functions.RewardFunctionOptions(**config))(
      [row.messages for row in rows], responses, rows
    )

  return run


@pytest.mark.parametrize('workers', [0, 2])
def test_floats_of_many_answers_in_their_order(module, workers):
  responses = ['w ' * (i % 5) for i in range(70)]
  values, failed = asked(responses, workers=workers)(f'{module}:words(each=0.25)')
  np.testing.assert_array_equal(values, [0.25 * (i % 5) + 10 * i for i in range(70)])
  assert failed == 0 and values.dtype == np.float32


def test_a_bad_a_slow_and_a_deadly_answer_cost_only_themselves(module, caplog):
  responses = ['fine'] * 20
  responses[3], responses[7], responses[11] = 'bad', 'slow', 'deadly'
  values, failed = asked(responses, workers=2, seconds=1.5, failed_score=-1.0)(f'{module}:fragile')
  assert failed == 3
  np.testing.assert_array_equal(values, [-1.0 if said != 'fine' else 0.75 for said in responses])
  said = caplog.text
  assert (
    "KeyError: 'no such word'; prompt p3, response 'bad'" in said
    and 'no result in time' in said
    and 'p11' in said
  )


def test_workers_that_die_between_two_calls_are_replaced(module):
  """As the system's guard of memory would end them: the next call starts new ones."""
  others = {child.pid for child in multiprocessing.active_children()}
  score = functions.build_reward_function(
    f'{module}:fragile', functions.RewardFunctionOptions(workers=1, seconds=20.0)
  )
  row = records.Prompt('p', '', '', [{'role': 'user', 'content': 'Hi'}], {})
  asked_once = ([row.messages] * 2, ['a', 'deadly'], [row] * 2)
  assert score(*asked_once)[0].tolist() == [0.75, 0.0]
  for child in multiprocessing.active_children():
    if child.pid not in others:
      child.kill()
  time.sleep(0.5)  # the pool sees that they are gone, and gives up
  values, failed = score(*asked_once)
  assert values.tolist() == [0.75, 0.0] and failed == 1


def test_a_reward_function_that_always_fails_stops_the_run(module):
  with pytest.raises(
    UserError,
    match="reward 'own_programs:fragile': KeyError: 'no such word'; it failed on every response",
  ):
    asked(['bad', 'bad'], workers=0)(f'{module}:fragile')


@pytest.mark.parametrize(
  'name,message',
  [
    ('own_programs:short', 'expected 3 finite floats, got [0.0]'),
    ('own_programs:nan', '3 finite floats, got [nan, nan'),
    ('own_programs:text', "3 finite floats, got ['good', "),
    ('own_programs:nothing', 'nothing'),
    ('nowhere:f', 'nowhere'),
    ('own_programs:words(1)', 'options must be given by name'),
    ('own_programs:words(each=open)', 'option=value'),
  ],
)
def test_wrong_programs_are_named(module, name, message):
  with pytest.raises(UserError) as error:
    asked(['a', 'b', 'c'], workers=0)(name)
  assert (
    f'reward {name!r}: ' in str(error.value)
    and message in str(error.value)
    and '\n' not in str(error.value)
  )


def test_workers_need_nothing_heavy():
  """What every worker process imports: neither JAX nor NumPy, so that it starts at once."""
  code = (
    'import sys, rlhf_jax.rewards.worker\n'
    "heavy = {'jax', 'numpy', 'ml_collections', 'pebble'} & {*sys.modules}\n"
    'assert not heavy, heavy'
  )
  subprocess.run([sys.executable, '-c', code], check=True, cwd=Path(__file__).parents[2])


def test_a_worker_prepares_and_calls(module):
  worker.prepare(f'{module}:words')
  row = records.Prompt('p', '', '', [], {'bonus': 1.0})
  assert worker.call_function(f'{module}:words(each=2)', [[]], ['a b'], [row]) == [5.0]
