"""The one loop that runs every stage: restores, steps, logs, evaluates, saves, shows progress, heeds signals.

A stage says what a step is; nothing here knows what is trained. A run that is cut at any moment and started again ends
with the same parameters, bit for bit, and the same metrics (but for `time/…`) as one left alone.
"""

import collections
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
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime import metrics as metrics_lib

DEFAULTS = dict(
    steps=1000,  # updates
    log_every=10,  # steps between lines of metrics.jsonl; 0 = the last step only, as in the next two
    eval_every=100,  # steps between evaluations
    save_every=200,  # steps between checkpoints
    keep=2,  # checkpoints kept, at least 1
    tensorboard=True,  # also write TensorBoard events
    wandb_project='',  # also log to this Weights & Biases project
)


@dataclasses.dataclass(frozen=True)
class Stage:
  """What to train.

  Attributes:
    name: shown to the user.
    init: () → state, a flax.struct dataclass of global arrays with at least `step` ([] int32, updates made) and `params`.
    batches: next() → host batch; get_state() → JSON dict that later calls of next() leave alone; set_state(dict).
    step: (state, batch) → (state, metrics); may donate the state. Metrics: name → scalar, finite; `tokens` counts the
      batch's tokens. Where the update would not be finite the state comes back as it was, `step` included.
    evaluate: state → (name → float, samples as JSON dicts), or None.
  """
  name: str
  init: Callable[[], Any]
  batches: Iterator
  step: Callable[[Any, Any], tuple[Any, dict[str, Any]]]
  evaluate: Callable[[Any], tuple[dict[str, float], list[dict]]] | None = None


class Interrupted(SystemExit):
  """A signal stopped the run and its state is saved; uncaught, the process exits with 128 + signum."""

  def __init__(self, signum: int):
    super().__init__(128 + signum)
    self.signum = signum


def run(stage: Stage, config, directory, meta: dict):
  """Trains `stage` up to `config.steps` and returns the final state.

  `directory` gets checkpoints/, metrics.jsonl, samples.jsonl, TensorBoard events and, at the very end, done.json
  {step, seconds}: training time over all resumes, in seconds. A directory that is done is restored and returned at once.

  Args:
    config: the fields of DEFAULTS.
    meta: JSON kept in every checkpoint.

  Raises:
    UserError: nothing to train, a loss that is not finite, data that ended, checkpoints that do not fit or cannot be
      written.
    Interrupted: after SIGTERM or Ctrl-C, the state being saved. A second Ctrl-C ends the process at once.
  """
  if config.steps < 1:
    raise UserError(f'{stage.name}: steps: expected at least 1, got {config.steps}')
  began = time.monotonic()
  directory = Path(directory)
  with contextlib.ExitStack() as stack:
    signals = stack.enter_context(_signals())
    saver = checkpoint.Checkpoints(directory / 'checkpoints', config.keep)
    stack.callback(saver.close)
    state, earlier = _start(stage, saver)
    step = int(jax.device_get(state.step))
    if _finished(directory, config.steps):
      return state
    writer = stack.enter_context(
        metrics_lib.Writer(directory, config.tensorboard, config.wandb_project, resume_step=step))
    progress = _Progress(stage.name, step, config.steps)
    stack.callback(progress.close)
    saved = _Saved(step, stage.batches.get_state())

    def seconds():
      return earlier + time.monotonic() - began

    def save():
      nonlocal saved
      saved = _Saved(step, stage.batches.get_state())
      if saver.latest_step() != step:
        writer.flush()
        saver.save(step, state, saved.data, {'user': meta, 'seconds': seconds()})

    while step < config.steps:
      started = time.monotonic()
      try:
        batch = next(stage.batches)
      except StopIteration:
        raise UserError(f'{stage.name}: the data ended after {step} of {config.steps} steps: '
                        'give more data, repeat it, or lower steps') from None
      state, values = stage.step(state, batch)
      values = {name: float(value) for name, value in jax.device_get(values).items()}
      step += 1
      bad = [f'{name} is {value}' for name, value in values.items() if not math.isfinite(value)]
      if bad:
        kept = _keep_last_good(stage, state, step - 1, saved, saver, save_state=save)
        raise UserError(f'{stage.name}: step {step}: {", ".join(bad)}; {kept}; try a lower learning rate, '
                        'stronger gradient clipping, or look at the data of this step')
      values['time/step'] = time.monotonic() - started
      if 'tokens' in values:
        values['time/tokens_per_second'] = values['tokens'] / values['time/step']
      progress.show(step, values)
      if _due(step, config.log_every, config.steps):
        writer.metrics(step, values)
      if stage.evaluate and _due(step, config.eval_every, config.steps):
        _evaluate(stage, state, step, writer, progress)
      if _due(step, config.save_every, config.steps):
        save()
      signum = _agreed(signals)
      if signum and step < config.steps:
        save()
        saver.wait()
        progress.say(f'{stage.name}: stopped by {signal.Signals(signum).name} at step {step}, saved; '
                     'repeat the command to go on')
        raise Interrupted(signum)
    saver.wait()
    _write_done(directory, step, seconds())
    return state
