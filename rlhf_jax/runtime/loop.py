"""The one loop that runs every stage: restores, steps, logs, evaluates, saves, shows progress, heeds signals.

A stage says what a step is; nothing here knows what is trained. A run that is cut at any moment and started again
ends with the same parameters, bit for bit, and the same metrics (but for `time/…`) as one left alone.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import json
import logging
import math
import os
from pathlib import Path
import signal
import sys
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np
import tqdm

from rlhf_jax.errors import UserError
from rlhf_jax.runtime import checkpoint, hosts
from rlhf_jax.runtime import metrics as metrics_lib

DEFAULTS = dict(
    steps=1000,  # updates
    log_every=10,  # steps between lines of metrics.jsonl; 0 = the last step only, as in the next two
    eval_every=100,  # steps between evaluations; the first is of the model as it begins
    save_every=200,  # steps between checkpoints
    keep=2,  # checkpoints kept, at least 1
    tensorboard=True,  # also write TensorBoard events
    wandb_project='',  # also log to this Weights & Biases project
)


@dataclasses.dataclass(frozen=True)
class Training:
  """What to train.

  Attributes:
    name: shown to the user.
    init: () → state, a flax.struct dataclass of global arrays with at least `step` ([] int32, updates made), `trained`
      and `frozen`. Also called before a restore, which then replaces all arrays but the frozen ones.
    batches: next() → host batch; get_state() → JSON dict that later calls of next() leave alone; set_state(dict).
    step: (state, batch) → (state, metrics); may donate the state. Metrics: name → scalar, finite; `tokens` counts
      the batch's tokens. Where the update would not be finite the state comes back as it was, `step` included.
    evaluate: state → (name → float, samples as JSON dicts), or None.
    finish: state → state, made of the state after the last step before it is evaluated and saved, or None.
  """
  name: str
  init: Callable[[], Any]
  batches: Iterator
  step: Callable[[Any, Any], tuple[Any, dict[str, Any]]]
  evaluate: Callable[[Any], tuple[dict[str, float], list[dict]]] | None = None
  finish: Callable[[Any], Any] | None = None


class Interrupted(SystemExit):
  """A signal stopped the run and its state is saved; uncaught, the process exits with 128 + signum."""

  def __init__(self, signum: int):
    super().__init__(128 + signum)
    self.signum = signum


def run(stage: Training, config, directory, meta: dict):
  """Trains `stage` up to `config.steps` and returns the final state.

  `directory` gets checkpoints/, metrics.jsonl, samples.jsonl, TensorBoard events and, at the very end, done.json
  {step, seconds}: training time over all resumes, in seconds. A directory that is done is restored and returned at
  once.

  Args:
    config: the fields of DEFAULTS.
    meta: JSON kept in every checkpoint.

  Raises:
    UserError: nothing to train, a metric that is not finite, data that ended, checkpoints that do not fit or cannot
      be written.
    Interrupted: after SIGTERM or Ctrl-C, the state being saved. A second Ctrl-C ends the process at once.
  """
  if config.steps < 1:
    raise UserError(f'{stage.name}: steps: expected at least 1, got {config.steps}')
  began = time.monotonic()
  directory = Path(directory)
  done = directory / 'done.json'
  with contextlib.ExitStack() as stack:
    signals = stack.enter_context(_signals())
    saver = checkpoint.Checkpoints(directory / 'checkpoints', config.keep)
    stack.callback(saver.close)
    stack.enter_context(hosts.exit_with_peers())  # inside, as closing waits for a process that died
    state, earlier = _start(stage, saver)
    step = int(jax.device_get(state.step))
    if step >= config.steps and done.exists():
      return state
    writer = stack.enter_context(metrics_lib.Writer(
        directory, config.tensorboard, config.wandb_project, resume_step=step or -1))  # step 0 is evaluated again
    progress = stack.enter_context(_Progress(stage.name, step, config.steps))
    if jax.process_index() == 0:
      done.unlink(missing_ok=True)
    data_step, data_state = step, stage.batches.get_state()
    signum = 0

    def save():
      if saver.latest_step() != step:
        writer.flush()
        saver.save(step, state, data_state, {'user': meta, 'seconds': earlier + time.monotonic() - began})

    if stage.evaluate and config.eval_every and step == 0:
      _evaluate(stage, state, step, writer, progress)
    while step < config.steps and not signum:
      started = time.monotonic()
      try:
        batch = next(stage.batches)
      except StopIteration:
        raise UserError(f'{stage.name}: the data ended after {step} of {config.steps} steps: give more data, '
                        'repeat it, or lower steps') from None
      state, values = stage.step(state, batch)
      values = {name: float(value) for name, value in jax.device_get(values).items()}
      step += 1
      values['time/step'] = time.monotonic() - started
      if 'tokens' in values:
        values['time/tokens_per_second'] = values['tokens'] / values['time/step']
      bad = [f'{name} is {value}' for name, value in values.items() if not math.isfinite(value)]
      if bad:
        writer.metrics(step, values)
        trouble = f'{stage.name}: step {step}: {", ".join(bad)}'
        step -= 1
        if int(jax.device_get(state.step)) == step:
          _rewind(stage.batches, data_state, step - data_step)
          data_state = stage.batches.get_state()
          save()
          saver.wait()
        kept = saver.latest_step()
        raise UserError(f'{trouble}; ' + ('no state was saved' if kept is None else
                        f'the state of step {kept} is kept in {directory}') +
                        '; try a lower learning rate or tighter gradient clipping, and look at the data')
      progress.show(step, values)
      if _due(step, config.log_every, config.steps):
        writer.metrics(step, values)
      if stage.finish and step == config.steps:
        state = stage.finish(state)
      if stage.evaluate and _due(step, config.eval_every, config.steps):
        _evaluate(stage, state, step, writer, progress)
      signum = _agreed(signals)
      if signum or _due(step, config.save_every, config.steps):
        data_step, data_state = step, stage.batches.get_state()
        save()

    saver.wait()
    if step >= config.steps and jax.process_index() == 0:
      temporary = done.with_suffix('.tmp')
      temporary.write_text(json.dumps({'step': step, 'seconds': earlier + time.monotonic() - began}) + '\n')
      os.replace(temporary, done)
    if signum:
      progress.say(f'{stage.name}: stopped by {signal.Signals(signum).name} at step {step}, saved; '
                   'repeat the command to go on')
      raise Interrupted(signum)
    return state


def _start(stage, saver):
  """The state and the seconds trained: of the last checkpoint, or new."""
  state = stage.init()
  if saver.latest_step() is None:
    return state, 0.0
  frozen, abstract = state.frozen, jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.replace(frozen={}))
  del state  # never two of them in memory
  state, data_state, meta = saver.restore(abstract)
  stage.batches.set_state(data_state)
  return state.replace(frozen=frozen), meta['seconds']


def _rewind(batches, data_state, count):
  """Back to `count` batches after `data_state`: cheaper than asking for the state at every step."""
  batches.set_state(data_state)
  for _ in range(count):
    next(batches)


def _due(step, every, last) -> bool:
  return step == last or (every > 0 and step % every == 0)


def _evaluate(stage, state, step, writer, progress):
  """Whatever fails in here, the training goes on."""
  try:
    values, samples = stage.evaluate(state)
    values = {f'eval/{name}': float(value) for name, value in values.items()}
    lines = [json.dumps(sample, ensure_ascii=False) for sample in samples]
  except Exception as error:  # a stage's own code
    logging.warning('%s: step %d: the evaluation failed, training goes on: %s: %s', stage.name, step,
                    type(error).__name__, ' '.join(str(error).split())[:300])
    return
  writer.metrics(step, values)
  writer.samples(step, samples)
  shown = [f'{name} {value:.4g}' for name, value in values.items()]
  progress.say(f'{stage.name}: step {step}: ' + ', '.join(shown[:5] + ['…'] * (len(shown) > 5)))
  for line in lines[:2]:
    progress.say(f'  {line[:400]}')


@contextlib.contextmanager
def _signals():
  """Collects SIGTERM and Ctrl-C in a list (main thread only); leaves with Interrupted if one came."""
  received = []
  if threading.current_thread() is not threading.main_thread():
    yield received
    return

  def note(signum, _):
    received.append(signum)
    if signum == signal.SIGINT:
      signal.signal(signal.SIGINT, signal.SIG_DFL)

  before = {signum: signal.signal(signum, note) or signal.SIG_DFL for signum in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield received
  finally:
    for signum, handler in before.items():
      signal.signal(signum, handler)
  if received:
    raise Interrupted(received[0])


def _agreed(signals) -> int:
  """The signal that any process got, 0 = none."""
  mine = signals[0] if signals else 0
  if jax.process_count() == 1:
    return mine
  return int(multihost_utils.process_allgather(np.int32(mine)).max())


class _Progress:
  """A bar on a terminal, ten lines elsewhere; nothing but on process 0."""

  def __init__(self, name, step, steps):
    self._name, self._first, self._steps, self._began = name, step, steps, time.monotonic()
    self._quiet = jax.process_index() > 0
    self._bar = None
    if sys.stderr.isatty() and not self._quiet:
      self._bar = tqdm.tqdm(total=steps, initial=step, desc=name, unit='step', dynamic_ncols=True)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._bar:
      self._bar.close()

  def show(self, step, values):
    parts = [f'{name} {values[name]:.4g}' for name in ('reward/mean', 'loss') if name in values][:1]
    if 'time/tokens_per_second' in values:
      parts.append(f'{values["time/tokens_per_second"]:,.0f} tokens/s')
    if self._bar:
      self._bar.set_postfix_str(', '.join(parts), refresh=False)
      self._bar.update()
    elif step * 10 // self._steps > (step - 1) * 10 // self._steps:
      left = (time.monotonic() - self._began) / (step - self._first) * (self._steps - step)
      parts.append(f'{tqdm.tqdm.format_interval(left)} left')
      self.say(f'{self._name}: step {step}/{self._steps}: ' + ', '.join(parts))

  def say(self, text):
    if not self._quiet:
      tqdm.tqdm.write(text, file=sys.stderr)
