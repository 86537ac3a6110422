"""What a run was: seed, command, versions, config, time, and the fingerprints of its parameters."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from rlhf_jax.report.run_files import Run, Stage

PHASES = ('time/rollout', 'time/scoring', 'time/update')
MAX_VALUE = 160  # characters of a value of the config
_OWN_KEYS = {'fingerprint'}


@dataclasses.dataclass(frozen=True)
class Duration:
  """How long something took, with its share of the whole in percent."""

  name: str
  seconds: float
  share: float
  is_part: bool = False  # of the line above it


@dataclasses.dataclass(frozen=True)
class Change:
  """A value that differs: of the config from its default, or of one run from another."""

  key: str
  values: Sequence[str]


def list_durations(run: Run) -> list[Duration]:
  """Lists the seconds of every stage and of the evaluation; of a rollout stage, of its phases."""
  seconds = {stage.name: stage.seconds or _seconds_so_far(stage) for stage in run.stages}
  evaluation = (run.results.get('seconds') or {}).get('evaluation')
  if evaluation:
    seconds['final table'] = evaluation
  whole = sum(seconds.values()) or 1.0  # before anything was measured
  stages = {stage.name: stage for stage in run.stages}
  durations = []
  for name, value in seconds.items():
    durations.append(Duration(name, value, round(100 * value / whole, 1)))
    phases = _list_phases(stages[name]) if name in stages else {}
    for phase, part in phases.items():
      durations.append(Duration(phase, part, round(100 * part / whole, 1), is_part=True))
  return durations


def _seconds_so_far(stage: Stage) -> float:
  """Returns the seconds of the steps that an unfinished stage has made."""
  return _total(stage, 'time/step')


def _list_phases(stage: Stage) -> dict[str, float]:
  """Returns the seconds of each phase of a rollout stage; {} of others."""
  if not any(PHASES[0] in line for line in stage.metrics):
    return {}
  return {name.removeprefix('time/'): _total(stage, name) for name in PHASES}


def _total(stage: Stage, metric: str) -> float:
  """Returns a metric summed over all steps, those that were not logged counted like the others."""
  logged = [line[metric] for line in stage.metrics if isinstance(line.get(metric), (int, float))]
  if not logged:
    return 0.0
  # Every step took its time, whether it was logged or not.
  steps = max(line.get('step', 0) for line in stage.metrics)
  return sum(logged) * max(1.0, steps / len(logged))


def list_changes(usual: Mapping[str, Any], config: Mapping[str, Any]) -> list[Change]:
  """Lists the values of a config that differ from its defaults, as [default, value]."""
  return list_differences([usual, config])


def list_differences(configs: Sequence[Mapping[str, Any]]) -> list[Change]:
  """Lists the values that are not the same in all configs.

  Args:
    configs: nested dicts, as JSON has them.
  """
  flat = [_flatten(config) for config in configs]
  keys = dict.fromkeys(key for values in flat for key in values)
  changes = []
  for key in sorted(keys):
    texts = [_format(values[key]) if key in values else '–' for values in flat]
    if len(set(texts)) > 1:
      changes.append(Change(key, texts))
  return changes


def _flatten(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Returns 'section.key' → value."""
  flat: dict[str, Any] = {}
  for key, value in config.items():
    if not prefix and key in _OWN_KEYS:  # is of the file, not of the run
      continue
    # An empty section is a value like any other.
    if isinstance(value, Mapping) and value:
      flat |= _flatten(value, f'{prefix}{key}.')
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def _format(value: Any) -> str:
  """Formats a value of a config as an override takes it."""
  # JSON has made lists of tuples.
  if isinstance(value, (list, tuple)):
    value = tuple(value)
  text = value if isinstance(value, str) and value else repr(value)
  return text if len(text) <= MAX_VALUE else text[:MAX_VALUE] + ' …'


def list_checkpoints(run: Run) -> list[tuple[str, str, str]]:
  """Lists (stage, step, fingerprint) of the final parameters of every finished stage."""
  rows = []
  for stage in run.stages:
    if stage.checkpoint:
      step, fingerprint = stage.checkpoint.get('step'), stage.checkpoint.get('fingerprint')
      rows.append((stage.name, f'{step}', f'{fingerprint}'))
  return rows
