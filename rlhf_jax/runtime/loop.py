"""The loop that runs every stage: restores, steps, logs, evaluates, saves, handles signals.

A stage defines the step; the loop does not depend on what is trained. A run that
is interrupted at any moment and started again ends with the same parameters, bit
for bit, and the same metrics (except for `time/…`) as an uninterrupted one.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import logging
import math
import os
from pathlib import Path
import shutil
import signal
import sys
import textwrap
import threading
import time
from typing import Any, Protocol

import jax
import tqdm

from rlhf_jax import fingerprints, json_lines, plain_text, text_table
from rlhf_jax.errors import UserError
from rlhf_jax.options import Count, Natural
from rlhf_jax.runtime import checkpoint, hosts
from rlhf_jax.runtime import metrics as metrics_lib
from rlhf_jax.runtime.meter import Meter
from rlhf_jax.runtime.read_ahead import Batches, ReadAhead

DONE = 'done.json'  # {step, seconds}, written when a run has made all its steps


@dataclasses.dataclass(frozen=True)
class LoopOptions:
  """How long a stage trains, and how often it logs, evaluates and saves."""

  steps: Count = 1000  # updates
  # Steps between lines of metrics.jsonl; 0 = only after the last step, here and
  # in the next two.
  log_every: Natural = 10
  # Steps between evaluations; above 0, the initial model is evaluated too.
  eval_every: Natural = 100
  save_every: Natural = 200  # steps between checkpoints
  keep: Count = 2  # the number of checkpoints that are kept, at least 1
  tensorboard: bool = True  # also write TensorBoard events
  wandb_project: str = ''  # also log to this Weights & Biases project


class Memory(Protocol):
  """What the steps of a run remember on the host, beside their state and their data."""

  def get_state(self) -> dict:
    """Returns it as a JSON object, which later steps do not change."""

  def set_state(self, state: dict) -> None:
    """Sets it to what `get_state` returned."""


@dataclasses.dataclass(frozen=True)
class Training:
  """What to train.

  Attributes:
    name: the name of the stage, shown to the user.
    init: () → state, a flax.struct dataclass of global arrays with at least `step`
      ([] int32, updates made), `trained` and `frozen`. It is also called before a
      restore, which then replaces all arrays but the frozen ones.
    batches: the host batches.
    step: (state, batch) → (state, metrics); may donate the state. Metrics are
      scalars by name; `tokens` is the number of tokens in the batch. A metric
      that is not finite ends the run. If the update would not be finite, the step
      returns the state unchanged, with the same `step`.
    evaluate: state → (name → float, samples as JSON objects), or None.
    finish: state → state, applied once after the last step, before that state is
      evaluated and saved; or None.
    meter: compares the time of the steps with their work; None if that is not known.
    learning_rate: number of steps made → the learning rate of the next one; or None.
    described: how trackers call the run.
    warn: metrics of a step → a warning, '' = none; the first one is shown.
    evaluated: is called after each evaluation; must not raise. Or None.
    memory: what `step` remembers on the host; it is saved with the state. Or None.
  """

  name: str
  init: Callable[[], Any]
  batches: Batches
  step: Callable[[Any, Any], tuple[Any, dict[str, Any]]]
  evaluate: Callable[[Any], tuple[dict[str, float], list[dict]]] | None = None
  finish: Callable[[Any], Any] | None = None
  meter: Meter | None = None
  learning_rate: Callable[[int], float] | None = None
  described: metrics_lib.RunDescription = metrics_lib.RunDescription()
  warn: Callable[[dict[str, float]], str] | None = None
  evaluated: Callable[[], None] | None = None
  memory: Memory | None = None


class Interrupted(SystemExit):
  """Raised when a signal stopped the run and its state is saved; exits with 128 + signum.

  Attributes:
    signum: the signal.
    agreed: whether all processes stop at this place, not this one alone.
  """

  def __init__(self, signum: int, agreed: bool = False):
    super().__init__(128 + signum)
    self.signum = signum
    self.agreed = agreed


def run(
  training: Training,
  options: LoopOptions,
  directory: str | os.PathLike,
  meta: dict,
  on_saved: Callable[[], None] | None = None,
) -> Any:
  """Trains up to `options.steps` and returns the final state.

  `directory` gets checkpoints/, metrics.jsonl, samples.jsonl, TensorBoard events
  and, at the very end, done.json with the seconds of training over all resumes.
  If a run is done already, its final state is restored and returned at once.

  Args:
    training: what to train.
    options: how long, and how often it logs, evaluates and saves.
    directory: the folder of this run.
    meta: a JSON object that is saved in every checkpoint.
    on_saved: called on every process when a checkpoint is on disk, before the next
      step; each process then has a directory of its own. None = all see one
      directory, and checkpoints are written in the background.

  Raises:
    UserError: there is nothing to train, a metric is not finite, the data ended, or
      checkpoints do not fit or cannot be written.
    Interrupted: after SIGTERM or Ctrl-C (a second one ends the process at once).
  """
  if options.steps < 1:
    raise UserError(f'{training.name}: steps: expected at least 1, got {options.steps}')
  began = time.monotonic()
  directory = Path(directory)
  with contextlib.ExitStack() as stack:
    signals = stack.enter_context(_collect_signals())
    checkpoints = checkpoint.Checkpoints(
      directory / 'checkpoints', options.keep, own_directories=on_saved is not None
    )
    stack.callback(checkpoints.close)
    # Entered after `close` is registered, so that it is left first: `close` would
    # wait for all processes.
    stack.enter_context(hosts.exit_with_peers())
    state, seconds_before = _start(training, checkpoints)
    step = int(jax.device_get(state.step))
    # Without done.json the run was killed between its last checkpoint and its end.
    if step >= options.steps and (directory / DONE).exists():
      return state
    writer = stack.enter_context(_open_writer(directory, options, step, training.described))
    progress = stack.enter_context(_Progress(training.name, step, options.steps))
    saver = _Saver(
      directory=directory,
      checkpoints=checkpoints,
      writer=writer,
      data=ReadAhead(training.batches),  # after `_start`, which sets their position
      meta=meta,
      began=began - seconds_before,
      on_saved=on_saved,
      memory=training.memory,
    )
    reporter = _Reporter(training, writer, progress)
    state, step, signum = _train(training, options, state, step, saver, reporter, signals)
    checkpoints.wait()  # the last one is on disk before anything says so
    if step >= options.steps:
      _write_done(directory, step, saver.seconds())
    if signum:
      reporter.say_interrupted(step, signum)
      raise Interrupted(signum, agreed=True)
    return state


def _start(
  training: Training,
  checkpoints: checkpoint.Checkpoints,
) -> tuple[Any, float]:
  """Returns the state and the seconds trained so far, new or from the last checkpoint."""
  state = training.init()
  if checkpoints.latest_step() is None:
    return state, 0.0
  frozen = state.frozen
  abstract = jax.tree.map(_to_abstract, state.replace(frozen={}))
  del state  # two states might not fit in memory
  restored = checkpoints.restore(abstract)
  assert restored is not None  # as there is a latest step
  state, data_state, meta = restored
  training.batches.set_state(data_state)
  if training.memory and 'memory' in meta:  # older checkpoints have none
    training.memory.set_state(meta['memory'])
  return state.replace(frozen=frozen), meta['seconds']


def _to_abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
  """Returns the shape, dtype and sharding of an array."""
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _open_writer(
  directory: Path,
  options: LoopOptions,
  step: int,
  described: metrics_lib.RunDescription,
) -> metrics_lib.Writer:
  """Opens the metrics of a run that goes on after `step`, and is thus not done."""
  if hosts.is_first_process():
    (directory / DONE).unlink(missing_ok=True)  # `steps` may be larger than before
  return metrics_lib.Writer(
    directory,
    options.tensorboard,
    options.wandb_project,
    resume_step=step or -1,  # -1 drops step 0 too, which is evaluated again
    described=described,
  )


def _write_done(directory: Path, step: int, seconds: float) -> None:
  """Writes done.json, on process 0."""
  if hosts.is_first_process():
    fingerprints.write_json(directory / DONE, {'step': step, 'seconds': seconds})


def _train(
  training: Training,
  options: LoopOptions,
  state: Any,
  step: int,
  saver: '_Saver',
  reporter: '_Reporter',
  signals: list[int],
) -> tuple[Any, int, int]:
  """Trains until the last step or a signal, and starts saving the final state.

  Args:
    training: what to train.
    options: how long, and how often it logs, evaluates and saves.
    state: the state to start from.
    step: the updates it has made.
    saver: saves states, and has the data.
    reporter: logs, evaluates and shows the progress.
    signals: the list to which the signals that this process receives are appended.

  Returns:
    The state, the updates it has made, and the signal that ended the training, or 0.
  """
  if step == 0 and options.eval_every:
    reporter.evaluate(step, state)
  signum = 0
  while step < options.steps and not signum:
    started = time.monotonic()
    batch = _next_batch(training.name, saver.data, step, options.steps)
    state, values = training.step(state, batch)
    step += 1
    save_is_due = _is_due(step, options.save_every, options.steps)
    if not save_is_due:  # a save needs the position of the data before the next batch
      saver.data.read()  # while the devices compute
    metrics = _timed_metrics(values, started, training.meter)  # waits for the devices
    problems = _list_non_finite(metrics)
    if problems:
      reporter.writer.metrics(step, metrics)  # as null; a resume drops the line
      saved_step = saver.save_before(step, state)
      message = _explain_stop(training.name, step, problems, saved_step, saver.directory)
      raise UserError(message)
    reporter.progress.show(step, metrics)
    reporter.warn_once(step, metrics)
    if _is_due(step, options.log_every, options.steps):
      reporter.writer.metrics(step, metrics | _describe_progress(training, step))
    if step == options.steps and training.finish:
      state = training.finish(state)
    if _is_due(step, options.eval_every, options.steps):
      reporter.evaluate(step, state)
    signum = _agree_on_signal(signals)
    if signum or save_is_due:
      saver.save(step, state)
  return state, step, signum


@dataclasses.dataclass
class _Saver:
  """Saves states, each with all that a resume needs, and measures the time trained.

  Attributes:
    directory: the folder of the run.
    checkpoints: writes the states.
    writer: writes the metrics.
    data: the batches, whose position is saved with each state.
    meta: the caller's JSON object.
    began: the monotonic time of the start, moved back by the seconds trained before
      it.
    on_saved: called when a state is on disk; or None.
    memory: what the step remembers on the host; or None.
  """

  directory: Path
  checkpoints: checkpoint.Checkpoints
  writer: metrics_lib.Writer
  data: ReadAhead
  meta: dict
  began: float
  on_saved: Callable[[], None] | None = None
  memory: Memory | None = None

  def seconds(self) -> float:
    """Returns the seconds trained, over all resumes."""
    return time.monotonic() - self.began

  def save(self, step: int, state: Any) -> None:
    """Starts saving the state after a step, unless it is saved already."""
    position = self.data.position()
    if self.checkpoints.latest_step() == step:
      return
    self.writer.flush()  # so that no line from before the checkpoint can be lost
    meta = {'user': self.meta, 'seconds': self.seconds()}
    if self.memory:
      meta['memory'] = self.memory.get_state()
    self.checkpoints.save(step, state, position, meta)
    if self.on_saved:
      self.checkpoints.wait()
      self.on_saved()

  def save_before(self, step: int, state: Any) -> int | None:
    """Saves the state as it was before a step with a metric that is not finite.

    It is saved only if the step left it unchanged.

    Returns:
      The step of the newest checkpoint, or None.
    """
    last_good = step - 1
    if int(jax.device_get(state.step)) == last_good:
      self.data.step_back()
      self.save(last_good, state)
      self.checkpoints.wait()
    return self.checkpoints.latest_step()


def _next_batch(name: str, data: ReadAhead, step: int, steps: int) -> Any:
  """Returns the next host batch; raises UserError where the data ended."""
  try:
    return data.take()
  except StopIteration:
    raise UserError(
      f'{name}: the data ended after {step} of {steps} steps: give more data, repeat '
      'it, or lower steps'
    ) from None


def _timed_metrics(
  values: dict[str, Any],
  started: float,
  meter: Meter | None,
) -> dict[str, float]:
  """Returns metrics as floats, with time/step, time/tokens_per_second and the meter's."""
  metrics = {name: float(value) for name, value in jax.device_get(values).items()}
  metrics['time/step'] = time.monotonic() - started
  if 'tokens' in metrics:
    metrics['time/tokens_per_second'] = metrics['tokens'] / metrics['time/step']
    if meter:
      shared = metrics.get('packed/shared_share', 0.0)
      metrics |= meter.measure_step(metrics['tokens'], metrics['time/step'], shared)
  return metrics


def _describe_progress(training: Training, step: int) -> dict[str, float]:
  """Returns how far the run is: learning rate, epoch and the most memory of a device."""
  values = {}
  if training.learning_rate:
    values['learning_rate'] = training.learning_rate(step - 1)
  epoch = getattr(training.batches, 'epoch', None)
  if epoch:
    values['epoch'] = epoch()
  statistics = [device.memory_stats() for device in jax.local_devices()]
  peaks = [found['peak_bytes_in_use'] for found in statistics if found]
  if peaks:  # CPUs do not say
    values['memory/peak_gigabytes'] = max(peaks) / 1e9
  return values


def _list_non_finite(metrics: dict[str, float]) -> list[str]:
  """Returns a message such as 'loss is nan' for each metric that is not finite."""
  problems = []
  for name, value in metrics.items():
    if not math.isfinite(value):
      problems.append(f'{name} is {value}')
  return problems


def _explain_stop(
  name: str,
  step: int,
  problems: list[str],
  saved_step: int | None,
  directory: Path,
) -> str:
  """Returns the error message for a step with a metric that is not finite."""
  if saved_step is None:
    saved = 'no state was saved'
  else:
    saved = f'the state of step {saved_step} is kept in {directory}'
  return (
    f'{name}: step {step}: {", ".join(problems)}; {saved}; try a lower learning rate or tighter '
    'gradient clipping, and look at the data'
  )


def _is_due(step: int, every: int, last: int) -> bool:
  """Returns whether a step is one of every `every` steps, or the last one."""
  return step == last or (every > 0 and step % every == 0)


@dataclasses.dataclass
class _Reporter:
  """Evaluates the state, and logs and shows the results."""

  training: Training
  writer: metrics_lib.Writer
  progress: '_Progress'
  has_warned: bool = False

  def warn_once(self, step: int, metrics: dict[str, float]) -> None:
    """Shows the first warning that the stage has of the metrics of its steps."""
    if self.has_warned or self.training.warn is None:
      return
    message = self.training.warn(metrics)
    if message:
      self.has_warned = True
      logging.warning('%s: step %d: %s', self.training.name, step, message)

  def evaluate(self, step: int, state: Any) -> None:
    """Evaluates the state, if the stage can; if that fails, training goes on."""
    if self.training.evaluate is None:
      return
    name = self.training.name
    try:
      values, samples = self.training.evaluate(state)
      metrics = {f'eval/{key}': float(value) for key, value in values.items()}
      for sample in samples:
        json_lines.format_value(sample)  # what is no JSON fails here, not in the writer
    except Exception as error:  # of any kind: it is the stage's own code
      logging.warning(
        '%s: step %d: the evaluation failed, training goes on: %s',
        name,
        step,
        plain_text.describe_error(error),
      )
      return
    self.writer.metrics(step, metrics)
    self.writer.samples(step, samples)
    shown = [f'{key} {value:.4g}' for key, value in metrics.items()]
    if len(shown) > 5:
      shown = [*shown[:5], '…']
    self.progress.say(f'{name}: step {step}: ' + ', '.join(shown))
    for sample in samples[:2]:  # all are in samples.jsonl
      self.progress.say(_format_sample(sample))
    if self.training.evaluated:
      self.training.evaluated()

  def say_interrupted(self, step: int, signum: int) -> None:
    """Tells the user that a signal stopped the run."""
    name = self.training.name
    signal_name = signal.Signals(signum).name
    self.progress.say(
      f'{name}: stopped by {signal_name} at step {step}, saved; repeat the command to continue'
    )


def _format_sample(sample: dict[str, Any]) -> str:
  """Returns a sample as a block of lines: each field behind its name, at most 400 characters."""
  width = min(shutil.get_terminal_size().columns, 120)
  indent = 2 + max((len(name) for name in sample), default=0) + 2
  lines = []
  for name, value in sample.items():
    text = f'{value:.4g}' if isinstance(value, float) else str(value)
    if len(text) > 400:
      text = text[:400] + ' …'
    beginning = f'  {name}:'.ljust(indent)
    for number, line in enumerate(text.splitlines() or ['']):
      before = ' ' * indent if number else beginning
      room = max(width - indent, 20)
      wrapped = textwrap.wrap(plain_text.visible(line), room) or ['']
      lines.append(before + wrapped[0])
      lines += [' ' * indent + rest for rest in wrapped[1:]]
  return '\n'.join(lines)


@contextlib.contextmanager
def _collect_signals() -> Iterator[list[int]]:
  """Collects SIGTERM and Ctrl-C in a list; raises Interrupted at the end if it has one.

  Python handles signals in the main thread only; in another thread the list stays
  empty.
  """
  received: list[int] = []
  if threading.current_thread() is not threading.main_thread():
    yield received
    return

  def record(signum: int, _: Any) -> None:
    received.append(signum)
    for number in handlers:  # a second one ends the process at once
      signal.signal(number, signal.SIG_DFL)

  handlers = {}
  for signum in (signal.SIGTERM, signal.SIGINT):
    # signal.signal returns None for a handler that was not set in Python.
    handlers[signum] = signal.signal(signum, record) or signal.SIG_DFL
  try:
    yield received
  finally:
    for signum, handler in handlers.items():
      signal.signal(signum, handler)
  if received:
    raise Interrupted(received[0])


def _agree_on_signal(signals: list[int]) -> int:
  """Returns the signal that any process received, so that all stop at one step; 0 = none."""
  mine = signals[0] if signals else 0
  return int(hosts.gather_from_processes(mine).max())


class _Progress:
  """Shows the progress: a bar on a terminal, ten lines elsewhere; on process 0 only."""

  def __init__(self, name: str, step: int, steps: int):
    self._name = name
    self._first = step
    self._steps = steps
    self._began = time.monotonic()
    self._quiet = not hosts.is_first_process()
    self._bar: tqdm.tqdm | None = None
    if sys.stderr.isatty() and not self._quiet:
      self._bar = tqdm.tqdm(
        total=steps,
        initial=step,
        desc=name,
        unit='step',
        dynamic_ncols=True,
      )

  def __enter__(self) -> '_Progress':
    return self

  def __exit__(self, *_: Any) -> None:
    if self._bar:
      self._bar.close()

  def show(self, step: int, metrics: dict[str, float]) -> None:
    """Shows that a step has been made, with its reward or loss and its speed."""
    parts = []
    for name in ('reward/mean', 'loss'):  # the first of them that the stage has
      if name in metrics:
        parts.append(f'{name} {metrics[name]:.4g}')
        break
    if 'kl' in metrics:
      parts.append(f'kl {metrics["kl"]:.4g}')
    is_narrow = self._bar is not None and shutil.get_terminal_size().columns < 100
    if 'time/tokens_per_second' in metrics and not is_narrow:
      parts.append(f'{metrics["time/tokens_per_second"]:,.0f} tokens/s')
    if self._bar:
      self._bar.set_postfix_str(', '.join(parts), refresh=False)
      if step == self._first + 1:
        self._forget_compilation(step)
      else:
        self._bar.update()  # redraws a few times a second at most
      return
    if step == self._first + 1:
      self._began = time.monotonic()  # the first step has compiled the programs
    tenth = step * 10 // self._steps  # a line whenever another tenth is done
    if tenth == (step - 1) * 10 // self._steps:
      return
    if step > self._first + 1:
      seconds_per_step = (time.monotonic() - self._began) / (step - self._first - 1)
      left = seconds_per_step * (self._steps - step)
      parts.append(f'{tqdm.tqdm.format_interval(left)} left')
    self.say(f'{self._name}: step {step}/{self._steps}: ' + ', '.join(parts))

  def _forget_compilation(self, step: int) -> None:
    """Makes the bar's time begin after the first step, which has compiled the programs."""
    assert self._bar is not None
    self._bar.reset()
    self._bar.initial = self._bar.n = self._bar.last_print_n = step
    self._bar.refresh()

  def say(self, text: str) -> None:
    """Prints lines without disturbing the bar."""
    if not self._quiet:
      tqdm.tqdm.write(text_table.fit_terminal(text, sys.stderr), file=sys.stderr)
