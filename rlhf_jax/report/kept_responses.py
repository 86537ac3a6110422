"""The held-out responses of every evaluation of a run: `WORKDIR/evaluation/responses.jsonl`.

A row is one response; `Kept` says what it has. Rows are in the order in which
they were made: those of each stage's evaluations, and at last those of the
final table. An evaluation that is repeated, as a resumed run does, takes the
place of what it wrote before, so that no row is there twice.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import json
import logging
import math
import os
from pathlib import Path
import re
from typing import Any

import numpy as np

from rlhf_jax import files, json_lines, plain_text
from rlhf_jax.data.records import conversation, response_text

PLACE = Path('evaluation', 'responses.jsonl')  # in the workdir
FINAL = 'final'  # the value of `evaluation` in rows of the final table
TRAINING = 'training'  # the same in rows of a stage's own evaluations
GIVEN = 'given'  # the value of `decoding` in rows of responses of the data, which nothing sampled

MAX_ROWS = 4096  # of one model in one evaluation; of more, every n-th prompt is kept
MAX_CHARACTERS = 2**22  # of them together
MAX_TEXT = 2**14  # characters of a prompt or a response; a longer one is cut

# How a line begins; the writer puts these fields first.
_BEGINNING = re.compile(
  rb'\{"evaluation": "(\w+)", "stage": ("(?:[^"\\]|\\.)*"), "step": (\d+|null)'
)


@dataclasses.dataclass(frozen=True)
class Kept:
  """A held-out response as it is kept.

  Attributes:
    evaluation: TRAINING or FINAL.
    stage: whose model responded.
    step: the updates that it had made; None in the final table.
    model: the row of the final table; '' during training.
    decoding: 'sampled' or 'greedy'; GIVEN where a reward model scored a
      response of the data.
    prompt_id: of the prompt's record; '' where it has none.
    sample: which of several responses to the same prompt, from 0.
    prompt: the last message of the prompt.
    response: the text.
    score: what the reward gives it; None without one.
    kl: Σ_t log π − log π_ref, nats; None where it is not measured.
    length: its tokens, with the end token.
    ended: whether it ends by itself.
    verdict: measure → value, of the judge; of a GIVEN response `rank`, as
      people ordered it, 1 is the best; {} without one.
    tokens: of some responses, a column for each of `token`, `logprob`,
      `reference_logprob` and, in PPO, `advantage`; {} else.
  """

  evaluation: str
  stage: str
  step: int | None
  model: str
  decoding: str
  prompt_id: str
  sample: int
  prompt: str
  response: str
  score: float | None
  kl: float | None
  length: int
  ended: bool
  verdict: Mapping[str, float] = dataclasses.field(default_factory=dict)
  tokens: Mapping[str, list] = dataclasses.field(default_factory=dict)


def make_rows(
  responses: Any,
  prompts: Sequence[str],
  prompt_ids: Sequence[str],
  verdicts: Mapping[str, np.ndarray] | None = None,
  tokens: Mapping[int, Mapping[str, list]] | None = None,
  **common: Any,
) -> list[Kept]:
  """Makes the rows of one model's responses in one evaluation.

  Args:
    responses: S to each of N prompts, a generation.responses.Responses.
    prompts: [N] texts.
    prompt_ids: [N], of the prompts' records.
    verdicts: measure → [N, S] float; NaN where the measure does not apply.
    tokens: number of a prompt → the columns of its first response's tokens.
    **common: evaluation, stage, step, model and decoding of all rows.
  """
  rows = []
  # Whole prompts are left out, so that the samples of those that stay can be compared.
  for number in _thin_out(responses.texts, prompts):
    for sample, text in enumerate(responses.texts[number]):
      place = (number, sample)
      verdict = {name: values[place] for name, values in (verdicts or {}).items()}
      rows.append(
        Kept(
          prompt_id=prompt_ids[number],
          sample=sample,
          prompt=prompts[number][:MAX_TEXT],
          response=text[:MAX_TEXT],
          score=_number_at(responses.scores, place),
          kl=_number_at(responses.kl, place),
          length=int(responses.lengths[place]),
          ended=bool(responses.ended[place]),
          verdict={name: _round(x) for name, x in verdict.items() if math.isfinite(x)},
          tokens=(tokens or {}).get(number, {}) if sample == 0 else {},
          **common,
        )
      )
  return rows


def make_given_rows(
  rankings: Sequence[Any],
  scores: Mapping[int, Sequence[float]],
  lengths: Mapping[int, Sequence[int]],
  **common: Any,
) -> list[Kept]:
  """Makes the rows of the responses of a data set that a reward model scored.

  Args:
    rankings: the records, data.records.Ranking.
    scores: number of a record → the score of each of its responses.
    lengths: number of a record → the tokens of each of its responses.
    **common: stage and step of all rows.
  """
  numbers = [*scores]
  texts = [[response_text(text) for text in rankings[number].responses] for number in numbers]
  prompts = [conversation(rankings[number])[-1]['content'] or '' for number in numbers]
  rows = []
  for place in _thin_out(texts, prompts):
    number = numbers[place]
    for sample, text in enumerate(texts[place]):
      rows.append(
        Kept(
          evaluation=TRAINING,
          model='',
          decoding=GIVEN,
          prompt_id=rankings[number].id,
          sample=sample,
          prompt=prompts[place][:MAX_TEXT],
          response=text[:MAX_TEXT],
          score=_round(scores[number][sample]),
          kl=None,
          length=int(lengths[number][sample]),
          ended=True,
          verdict={'rank': float(rankings[number].ranks[sample])},
          **common,
        )
      )
  return rows


def _thin_out(texts: Sequence[Sequence[str]], prompts: Sequence[str]) -> range:
  """Returns which prompts are kept: all, or every n-th where they are too many."""
  characters = 0
  for prompt, own in zip(prompts, texts, strict=True):
    characters += sum(len(text[:MAX_TEXT]) + len(prompt[:MAX_TEXT]) for text in own)
  count = sum(map(len, texts))
  # The larger of the two distances keeps both bounds.
  every = max(1, -(-count // MAX_ROWS), -(-characters // MAX_CHARACTERS))
  return range(0, len(texts), every)


def _number_at(values: np.ndarray | None, place: tuple[int, int]) -> float | None:
  """Returns a number of a column, rounded; None without a column, or where it is not finite."""
  # JSON has no NaN, which a scorer that failed leaves.
  if values is None or not np.isfinite(values[place]):
    return None
  return _round(values[place])


def _round(value: Any) -> float:
  """Rounds to the 7 digits that a float32 has, which keeps the file small."""
  return float(f'{float(value):.7g}')


def keep(workdir: str | os.PathLike, rows: Sequence[Kept]) -> None:
  """Adds the rows of one evaluation to the file of a run.

  They replace what the same evaluation and later ones of the same stage wrote,
  as these are made again. A file that cannot be written is a warning, not an
  error: the training goes on.

  Args:
    workdir: the run's folder.
    rows: all of one stage, or all of the final table.
  """
  if not rows:
    return
  try:
    _replace(Path(workdir) / PLACE, rows)
  except OSError as error:
    logging.warning('%s: not kept: %s', PLACE, plain_text.describe_error(error))


def _replace(path: Path, rows: Sequence[Kept]) -> None:
  """Writes the rows behind those that stay."""
  before = path.read_bytes() if path.is_file() else b''
  lines = before.splitlines(keepends=True)
  kept = [line for line in lines if line.endswith(b'\n') and not _is_replaced(line, rows[0])]
  added = ''.join(json_lines.format_value(_to_json(row)) + '\n' for row in rows).encode()
  if len(kept) < len(lines) or not before:  # something is replaced: the file is written anew
    with files.replacing(path) as temporary:
      temporary.write_bytes(b''.join(kept) + added)
    return
  # One write: if the process dies in it, the half line is dropped the next time.
  with open(path, 'ab') as file:
    file.write(added)
    file.flush()
    os.fsync(file.fileno())


def _is_replaced(line: bytes, first: Kept) -> bool:
  """Says whether an evaluation that begins with the row `first` replaces a line."""
  match = _BEGINNING.match(line)
  if match is None:
    return True  # damaged
  evaluation, stage, step = match.groups()
  # The table replaces only the table, and a stage's evaluation only that stage's.
  if evaluation.decode() != first.evaluation:
    return False
  if first.evaluation == FINAL:
    return True
  # Later steps too: an earlier process made them, and this one will make them again.
  return json.loads(stage) == first.stage and int(step) >= (first.step or 0)


def _to_json(row: Kept) -> dict[str, Any]:
  """Returns a row as a JSON object, without what it does not have."""
  return {name: value for name, value in vars(row).items() if value not in ('', {})}


def copy_stage(source: Path, workdir: Path, stage: str) -> None:
  """Copies the rows of a stage from another run, whose stage is taken over."""
  rows = [row for row in read(source) if row.stage == stage and row.evaluation == TRAINING]
  keep(workdir, rows)


def read(workdir: str | os.PathLike) -> list[Kept]:
  """Reads the rows of a run; [] where there are none. Lines that are damaged are left out."""
  path = Path(workdir) / PLACE
  if not path.is_file():
    return []
  return list(_parse(path.read_bytes().splitlines()))


def _parse(lines: Iterable[bytes]) -> Iterable[Kept]:
  """Yields the row of each line that is whole."""
  # What `_to_json` leaves out.
  optional = {'model': '', 'prompt_id': '', 'prompt': '', 'response': ''}
  for line in lines:
    try:
      yield Kept(**{**optional, **json.loads(line)})
    except (ValueError, TypeError):
      continue
