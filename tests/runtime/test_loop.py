"""Interrupted and resumed runs equal uninterrupted ones; every failure leaves a good state.

Run as a program it trains the stage below. Its arguments: DIRECTORY, STEPS, a signal to send to
itself, and the number of the batch before which it is sent.
"""

import dataclasses
import functools
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.runtime import loop
from rlhf_jax.types import TrainState


class _Batches:
  """Rows of a linear regression.

  `events` maps the number of a batch to what happens before it is returned.
  """

  def __init__(self, events=None, end=10**9):
    self.index = 0
    self.events = events or {}
    self.end = end

  def __iter__(self):
    return self

  def __next__(self):
    self.index += 1
    if self.index > self.end:
      raise StopIteration
    rng = np.random.default_rng(self.index)
    x = rng.normal(size=(16, 8)).astype(np.float32)
    y = x @ np.arange(8, dtype=np.float32)
    event = self.events.pop(self.index, None)  # once: a batch may be read again
    return x, (event() if event else 1) * y

  def get_state(self):
    return {'index': self.index}

  def set_state(self, state):
    self.index = state['index']


@functools.cache
def _compiled(rows):
  optimizer = optax.adam(0.05)
  mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(AxisType.Auto,))

  def place(x):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*['fsdp'] * x.ndim)))

  def init():
    params = {'w': place(jnp.zeros((rows,)))}
    return TrainState(
      place(jnp.int32(0)),
      params,
      jax.tree.map(place, optimizer.init(params)),
      jax.device_put(jax.random.key(0), NamedSharding(mesh, PartitionSpec())),
    )

  def step(state, batch):
    x, y = batch
    noise = jax.random.normal(jax.random.fold_in(state.key, state.step), y.shape)

    def mean(params):
      return jnp.mean((x @ params['w'] - y - 0.1 * noise) ** 2)

    loss, grads = jax.value_and_grad(mean)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new = state.replace(
      step=state.step + 1,
      trained=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
    )
    fine = jnp.isfinite(loss)
    kept = jax.tree.map(
      lambda a, b: jnp.where(fine, a, b),
      new.replace(key=None),
      state.replace(key=None),
    )
    return kept.replace(key=new.key), {
      'loss': loss,
      'norm/gradient': optax.tree.norm(grads),
      'tokens': jnp.int32(x.size),
    }

  return init, jax.jit(step, donate_argnums=0)


def _stage(batches=None, evaluate=None, rows=8):
  def measure(state):
    return {'error': jnp.abs(state.params['w'] - jnp.arange(8)).max()}, [
      {'text': f'w {int(state.step)}'}
    ]

  init, step = _compiled(rows)
  return loop.Training('toy', init, batches or _Batches(), step, evaluate or measure)


def _options(**changes):
  options = loop.LoopOptions(
    steps=14,
    log_every=1,
    eval_every=5,
    save_every=4,
    tensorboard=False,
  )
  return dataclasses.replace(options, **changes)


def _bytes(state):
  return [
    np.asarray(x).tobytes()
    for x in jax.tree.leaves(state.replace(key=jax.random.key_data(state.key)))
  ]


def _lines(path):
  """Without what a clock says."""
  return [
    {k: v for k, v in json.loads(line).items() if not k.startswith('time/')}
    for line in path.read_text().splitlines()
  ]


def _send(signum):
  return lambda: os.kill(os.getpid(), signum) or 1


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  directory = tmp_path_factory.mktemp('alone')
  return loop.run(_stage(), _options(), directory, {}), directory


def _same(state, directory, alone):
  assert _bytes(state) == _bytes(alone[0])
  for name in ('metrics.jsonl', 'samples.jsonl'):
    assert _lines(directory / name) == _lines(alone[1] / name)


def test_run_left_alone(alone):
  state, directory = alone
  metrics = _lines(directory / 'metrics.jsonl')
  assert [line['step'] for line in metrics if 'loss' in line] == list(range(1, 15))
  assert [line['step'] for line in metrics if 'eval/error' in line] == [0, 5, 10, 14]
  assert _lines(directory / 'samples.jsonl') == [
    {'step': n, 'text': f'w {n}'} for n in (0, 5, 10, 14)
  ]
  first = json.loads((directory / 'metrics.jsonl').read_text().splitlines()[1])
  assert first['tokens'] == 128
  assert first['time/tokens_per_second'] == pytest.approx(128 / first['time/step'])
  assert sorted(path.name for path in (directory / 'checkpoints').iterdir()) == ['12', '14']
  done = json.loads((directory / 'done.json').read_text())
  assert done['step'] == 14 and done['seconds'] > 0
  # done: restored and returned, nothing trained
  again = loop.run(_stage(_Batches(end=0)), _options(), directory, {})
  assert (
    _bytes(again) == _bytes(state) and json.loads((directory / 'done.json').read_text()) == done
  )


class _Memory:
  count = 0

  def get_state(self):
    return {'count': self.count}

  def set_state(self, state):
    self.count = state['count']


def test_what_a_step_remembers_is_saved_with_the_state(tmp_path):
  for steps in (4, 6):  # the second run begins with a memory of its own
    stage, memory = _stage(), _Memory()

    def step(state, batch, stage=stage, memory=memory):
      memory.count += 1
      state, metrics = stage.step(state, batch)
      return state, metrics | {'seen': np.float32(memory.count)}

    stage = dataclasses.replace(stage, step=step, memory=memory)
    loop.run(stage, _options(steps=steps, eval_every=0), tmp_path, {})
  lines = _lines(tmp_path / 'metrics.jsonl')
  assert [line['seen'] for line in lines if 'seen' in line] == [1, 2, 3, 4, 5, 6]


def _program(*arguments):
  root = Path(__file__).parents[2]
  return subprocess.run(
    [sys.executable, __file__, *map(str, arguments)],
    capture_output=True,
    text=True,
    timeout=120,
    env={**os.environ, 'PYTHONPATH': str(root)},
  )


def test_killed_and_repeated(tmp_path, alone):
  for batch in (3, 5, 10):  # before any save, while step 4 is being saved, after some
    assert _program(tmp_path, 14, signal.SIGKILL, batch).returncode == -signal.SIGKILL
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 10, "lo')
  _same(loop.run(_stage(), _options(), tmp_path, {}), tmp_path, alone)


def test_sigterm_in_a_program(tmp_path, alone):
  # batch 8 is read while step 7 is made
  stopped = _program(tmp_path, 14, signal.SIGTERM, 8)
  assert stopped.returncode == 128 + signal.SIGTERM
  assert (
    stopped.stderr.splitlines()[-1]
    == 'toy: stopped by SIGTERM at step 7, saved; repeat the command to continue'
  )
  assert not (tmp_path / 'done.json').exists()
  _same(loop.run(_stage(), _options(), tmp_path, {}), tmp_path, alone)


def test_second_ctrl_c_leaves_at_once(tmp_path):
  stopped = _program(tmp_path, 14, signal.SIGINT, 7, signal.SIGINT)
  assert stopped.returncode == -signal.SIGINT
  saved = {path.name for path in (tmp_path / 'checkpoints').iterdir() if path.name.isdigit()}
  assert saved <= {'4'}  # which may still be on its way to the disk


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('batch', [1, 7, 9, 14])  # the ninth is not read ahead: step 8 is saved
def test_signal_saves_and_leaves(tmp_path, alone, signum, batch):
  handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  with pytest.raises(loop.Interrupted) as stopped:
    loop.run(_stage(_Batches({batch: _send(signum)})), _options(), tmp_path, {})
  assert stopped.value.signum == signum and stopped.value.code == 128 + signum
  assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
  assert not (tmp_path / 'done.json').exists()
  _same(loop.run(_stage(), _options(), tmp_path, {}), tmp_path, alone)


def test_signal_in_the_last_step(tmp_path, alone):
  stage = _stage()

  def step(state, batch):
    if int(state.step) == 13:
      _send(signal.SIGTERM)()
    return stage.step(state, batch)

  with pytest.raises(loop.Interrupted):
    loop.run(dataclasses.replace(stage, step=step), _options(), tmp_path, {})
  assert (tmp_path / 'done.json').exists()
  _same(loop.run(_stage(), _options(), tmp_path, {}), tmp_path, alone)


def test_runs_outside_the_main_thread(tmp_path, alone):
  states = []
  thread = threading.Thread(
    target=lambda: states.append(loop.run(_stage(), _options(), tmp_path, {}))
  )
  thread.start()
  thread.join()
  _same(states[0], tmp_path, alone)


def test_more_steps_go_on(tmp_path, alone):
  loop.run(_stage(), _options(steps=9, eval_every=0), tmp_path, {})
  assert json.loads((tmp_path / 'done.json').read_text())['step'] == 9
  state = loop.run(_stage(), _options(), tmp_path, {})
  assert _bytes(state) == _bytes(alone[0])
  assert json.loads((tmp_path / 'done.json').read_text())['step'] == 14


def test_damaged_last_checkpoint_is_trained_again(tmp_path, alone, caplog):
  loop.run(_stage(), _options(), tmp_path, {})
  for path in (tmp_path / 'checkpoints/14/params').rglob('d/*'):
    path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))
  _same(loop.run(_stage(), _options(), tmp_path, {}), tmp_path, alone)
  assert 'falling back to step 12' in caplog.text


@pytest.mark.parametrize('batch, kept', [(1, 0), (4, 3), (11, 10), (13, 12)])
def test_loss_that_is_not_finite(tmp_path, alone, batch, kept):
  poison = _Batches({batch: lambda: np.float32(np.nan)})
  with pytest.raises(UserError) as stopped:
    loop.run(_stage(poison), _options(), tmp_path, {})
  assert str(stopped.value).startswith(
    f'toy: step {batch}: loss is nan, norm/gradient is nan; '
    f'the state of step {kept} is kept in {tmp_path}; try '
  )
  assert not (tmp_path / 'done.json').exists()
  # State and position in the data are the last good ones: with the cause gone, the run goes on
  # as the one left alone.
  _same(loop.run(_stage(), _options(), tmp_path, {}), tmp_path, alone)


def test_step_that_lets_a_bad_update_through_does_not_spoil_the_checkpoint(tmp_path):
  stage = _stage()

  def step(state, batch):
    state, metrics = stage.step(state, batch)
    return state, {**metrics, 'kl': jnp.where(state.step == 6, jnp.inf, 0.0)}

  careless = loop.Training('toy', stage.init, stage.batches, step)
  with pytest.raises(UserError, match='toy: step 6: kl is inf; the state of step 4 is kept in'):
    loop.run(careless, _options(), tmp_path, {})
  assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['4']


def test_failing_evaluation_does_not_stop_the_training(tmp_path, alone, caplog):
  calls = []

  def evaluate(state):
    calls.append(int(state.step))
    if len(calls) == 1:
      raise RuntimeError('no\nsuch oracle')
    return {'error': 1.0}, [{'text': object()}] if len(calls) == 2 else []

  state = loop.run(_stage(evaluate=evaluate), _options(), tmp_path, {})
  assert _bytes(state) == _bytes(alone[0]) and calls == [0, 5, 10, 14]
  first, second = [record.getMessage() for record in caplog.records]
  assert (
    first == 'toy: step 0: the evaluation failed, training goes on: RuntimeError: no such oracle'
  )
  assert second.startswith('toy: step 5: the evaluation failed, training goes on: TypeError')
  assert [line['step'] for line in _lines(tmp_path / 'metrics.jsonl') if 'eval/error' in line] == [
    10,
    14,
  ]


def test_nothing_to_train(tmp_path):
  with pytest.raises(UserError, match='toy: steps: expected at least 1, got 0'):
    loop.run(_stage(), _options(steps=0), tmp_path / 'new', {})
  assert not (tmp_path / 'new').exists()


def test_data_that_ends(tmp_path):
  with pytest.raises(UserError, match='toy: the data ended after 6 of 14 steps'):
    loop.run(_stage(_Batches(end=6)), _options(), tmp_path, {})
  assert (tmp_path / 'checkpoints/4').is_dir()


def test_checkpoint_of_another_model(tmp_path):
  loop.run(_stage(), _options(steps=1, eval_every=0), tmp_path, {})
  with pytest.raises(
    UserError, match=r'params of another shape: w expected float32\[16\], found float32\[8\]'
  ):
    loop.run(_stage(rows=16), _options(), tmp_path, {})


def test_ten_lines_where_there_is_no_terminal(tmp_path, capsys):
  loop.run(_stage(), _options(steps=30, eval_every=0), tmp_path, {})
  lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('toy: step ')]
  steps = [
    line
    for line in lines
    if '/30: loss ' in line and ' tokens/s, ' in line and line.endswith(' left')
  ]
  assert [line.split()[2] for line in steps] == [f'{n}/30:' for n in range(3, 31, 3)]


if __name__ == '__main__':

  def _die(*signums):
    for number in signums:
      os.kill(os.getpid(), number)
    return 1

  _directory, _steps, _signum, _batch, *_more = sys.argv[1:]
  _events = {int(_batch): lambda: _die(int(_signum), *map(int, _more))}
  loop.run(_stage(_Batches(_events)), _options(steps=int(_steps)), _directory, {})
