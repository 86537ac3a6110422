"""Continues what is finished: more steps of a stage, and another evaluation."""

from collections.abc import Mapping
import copy
import json
from pathlib import Path
from typing import Any

import ml_collections

from rlhf_jax import fingerprints
from rlhf_jax.errors import UserError
from rlhf_jax.experiment import config as configs
from rlhf_jax.experiment import take_over
from rlhf_jax.stages.shared import model_sources

RESULTS = 'results.json'


def extend(config: Any, workdir: Path, defaults: Mapping[str, Any]) -> list[str]:
  """Prepares finished stages to go on with the greater `loop.steps` that the config has now.

  What comes out is what the stage had become if it had had so many steps from the
  start, which is why a learning rate that depends on the number of steps is refused.

  Args:
    config: the config of this run, with {workdir} in it.
    workdir: its folder, in which a run with fewer steps has ended or was interrupted.
    defaults: the common sections with their defaults, which the config of an older
      version may lack.

  Returns:
    The names of the stages that go on.

  Raises:
    UserError: there is no such stage, or a longer run would have been another one.
  """
  path = workdir / 'config.json'
  old = fingerprints.read_json(path) if path.is_file() else {'stages': []}
  old, _ = configs.complete(old, config, defaults)
  new = json.loads(configs.as_json(config))
  extended = [name for name in new['stages'] if _has_more_steps(old.get(name), new[name])]
  if not extended:
    raise UserError(
      f'--extend: expected a stage with more loop.steps than in {path}, such as '
      '--config.sft.loop.steps=600, got none'
    )
  # All are checked before anything is changed.
  for name in extended:
    _check_extension(name, old, new, workdir)
  for name in extended:
    old[name]['loop']['steps'] = new[name]['loop']['steps']
    (workdir / name / model_sources.FINISHED).unlink(missing_ok=True)
  put_results_aside(workdir)
  # Last: if this process ends before, the same command prepares everything again.
  fingerprints.write_json(path, old)
  return extended


def put_results_aside(workdir: Path) -> str:
  """Renames results.json, so that the table is made anew; returns its new name, '' without one."""
  path = workdir / RESULTS
  if not path.is_file():
    return ''
  number = 1
  while (aside := path.with_name(f'results-{number}.json')).exists():
    number += 1
  path.rename(aside)
  return aside.name


def with_baseline(config: Any, source: str) -> Any:
  """Returns a config whose final table has the models of another run too, as rows RUN/ROW.

  Args:
    config: the config of this run.
    source: the workdir of the other run.

  Raises:
    UserError: there is no such run, or it has no table.
  """
  folder = Path(source).absolute()
  path = folder / 'config.json'
  if not path.is_file():
    raise UserError(
      f'--baseline={source}: expected the workdir of a run, but it has no config.json'
    )
  other = fingerprints.read_json(path)
  models = dict(config.evaluation.models)
  added = 0
  for row, stage in other['evaluation']['models'].items():
    if stage == config.evaluation.baseline and stage in config.stages:
      continue  # all are compared with this run's own
    if (folder / stage / model_sources.FINISHED).is_file():
      models[f'{folder.name}/{row}'] = str(folder / stage)
      added += 1
  if not added:
    raise UserError(f'--baseline={source}: no row of its table is the model of a finished stage')
  changed = copy.deepcopy(config)
  with changed.unlocked():
    changed.evaluation.models = ml_collections.ConfigDict(models)
  return changed


def _has_more_steps(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> bool:
  """Tells whether two sections differ, and only in that the second has more steps."""
  if old is None or 'loop' not in old or 'loop' not in new:
    return False
  steps = new['loop']['steps']
  # If anything else differs too, the workdir's own check names it.
  longer = copy.deepcopy(dict(old))
  longer['loop']['steps'] = steps
  return longer == new and steps > old['loop']['steps']


def _check_extension(
  name: str, old: Mapping[str, Any], new: Mapping[str, Any], workdir: Path
) -> None:
  """Refuses to extend a stage where this would not equal a run that was longer from the start."""
  section = new[name]
  schedule = section['optimizer']['schedule']
  if schedule != 'constant':
    raise UserError(
      f'--extend: config.{name}.optimizer.schedule is {schedule!r}, whose learning rate depends on '
      "the number of steps, so that a longer run is another one; expected 'constant'"
    )
  if section.get('centre'):
    raise UserError(
      f'--extend: config.{name}.centre has shifted the scores after the last step; expected False'
    )
  later = new['stages'][new['stages'].index(name) + 1 :]
  for other in later:
    uses = take_over.used_stages(new[other], new['stages'])
    has_begun = (workdir / other / model_sources.MODEL_JSON).is_file() or any(
      (workdir / other).glob('*.jsonl')
    )
    if name in uses and has_begun:
      raise UserError(
        f'--extend: {other!r} has begun with {name!r} as it is; extend it in another workdir, '
        f'without {other!r} in config.stages, from a copy: --from={workdir}'
      )
