"""Reads what a run has left in its workdir, whole or not: a killed run has a report too."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
from pathlib import Path
from typing import Any

from rlhf_jax import fingerprints, json_lines
from rlhf_jax.errors import UserError
from rlhf_jax.report import kept_responses
from rlhf_jax.report.kept_responses import Kept

SESSIONS = 'sessions.json'  # in the workdir, see sessions.py

Lines = Sequence[Mapping[str, Any]]  # the lines of a metrics.jsonl


@dataclasses.dataclass(frozen=True)
class Stage:
  """What a stage has left.

  Attributes:
    name: of its section.
    kind: of the stage.
    metrics: the lines of its metrics.jsonl.
    steps: how many updates it makes; 0 for a stage without.
    seconds: that it took; None if it is not finished.
    checkpoint: {step, fingerprint} of the final parameters; {} without.
    transcripts: critiques and revisions, as stages.critique writes them.
    has_begun: whether it has a folder.
  """

  name: str
  kind: str
  metrics: Lines = ()
  steps: int = 0
  seconds: float | None = None
  checkpoint: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  transcripts: Lines = ()
  has_begun: bool = False


@dataclasses.dataclass(frozen=True)
class Run:
  """What a run has left.

  Attributes:
    name: of its folder.
    config: the contents of config.json.
    stages: all of the config, in the order in which they run.
    results: the contents of results.json; {} if the run is not finished.
    responses: the held-out responses of all evaluations.
    sessions: the contents of sessions.json: how and with what it was started.
    problems: what could not be read, in words.
  """

  name: str
  config: Mapping[str, Any]
  stages: Sequence[Stage]
  results: Mapping[str, Any]
  responses: Sequence[Kept]
  sessions: Mapping[str, Any]
  problems: Sequence[str] = ()

  @property
  def baseline(self) -> str:
    """The row of the final table with which the others are compared; '' without a table."""
    section = self.config.get('evaluation', {})
    best_of = section.get('best_of') or {}  # rows of these are chosen, not sampled
    for row, stage in (section.get('models') or {}).items():
      if stage == section.get('baseline') and row not in best_of:
        return row
    return ''


def read_run(workdir: str | Path, results: Mapping[str, Any] | None = None) -> Run:
  """Reads a workdir.

  Args:
    workdir: of the run.
    results: of a run that is about to write them; None to read results.json.

  Raises:
    UserError: there is no run.
  """
  workdir = Path(workdir)
  problems: list[str] = []
  path = workdir / 'config.json'
  if not path.is_file():
    raise UserError(f'{workdir}: expected the workdir of a run, but it has no config.json')
  config = fingerprints.read_json(path)
  # A stage that has not begun has no folder; it is listed all the same.
  stages = [_read_stage(workdir, name, config, problems) for name in config.get('stages', ())]
  if results is None:  # not from a run that is at its end
    results = _read_json(workdir / 'results.json', problems)
  return Run(
    name=workdir.resolve().name,
    config=config,
    stages=stages,
    results=results,
    responses=kept_responses.read(workdir),
    sessions=_read_json(workdir / SESSIONS, problems),
    problems=problems,
  )


def _read_stage(workdir: Path, name: str, config: Mapping[str, Any], problems: list[str]) -> Stage:
  """Reads the folder of a stage."""
  section = config.get(name, {})
  directory = workdir / name
  finished = _read_json(directory / 'finished.json', problems)
  return Stage(
    name=name,
    kind=section.get('kind', name),
    metrics=read_metrics(directory),
    steps=section.get('loop', {}).get('steps', 0),
    seconds=finished.get('seconds'),
    checkpoint=finished.get('checkpoint') or {},
    transcripts=read_transcripts(directory),
    has_begun=directory.is_dir(),
  )


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
  """Reads a JSON file of the run; {} without one. That it is damaged is noted."""
  if not path.is_file():
    return {}
  try:
    return fingerprints.read_json(path)
  except UserError as error:
    problems.append(str(error))
    return {}


def read_metrics(directory: str | Path) -> list[dict]:
  """Reads the metrics.jsonl in a stage's folder; returns [] where there is no such file."""
  return _read_whole_lines(Path(directory) / 'metrics.jsonl')


def last_evaluation(rows: Lines) -> dict[str, Any]:
  """Returns the values of a stage's last evaluation, with names without the prefix `eval/`.

  Args:
    rows: the lines of the stage's metrics.jsonl, from `read_metrics`.

  Returns:
    Name → value; empty if the stage has no evaluation.
  """
  for row in reversed(rows):
    values = {}
    for key, value in row.items():
      if key.startswith('eval/'):
        values[key.removeprefix('eval/')] = value
    if values:
      return values
  return {}


def read_transcripts(directory: str | Path, count: int = 20) -> list[dict]:
  """Reads the first critiques and revisions in the transcripts.jsonl of a stage."""
  path = Path(directory) / 'transcripts.jsonl'  # written whole, unlike metrics.jsonl
  if not path.is_file():
    return []
  return [row for _, row in json_lines.read_values(path)][:count]


def _read_whole_lines(path: Path) -> list[dict]:
  """Reads the lines of a file that a running or killed process may have left with half a line."""
  if not path.is_file():
    return []
  lines = path.read_bytes().split(b'\n')
  rows = [_parse(line) for line in lines[:-1]]  # behind the last line feed is nothing, or half
  return [row for row in rows if isinstance(row, dict)]


def _parse(line: bytes) -> Any:
  """Parses a line; None where it is damaged."""
  try:
    return json.loads(line)
  except ValueError:
    return None
