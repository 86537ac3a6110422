"""Rankings by real people: responses go into the queue of `rlhf_jax.collect`, judgements come out.

The stage writes its responses into the queue once, then waits until people have
ranked them, or stops and says how many are missing; repeated, it reads what was
ranked meanwhile.
"""

from collections.abc import Sequence
import dataclasses
from pathlib import Path
import time
from typing import Any

from rlhf_jax.data import records
from rlhf_jax.data.records import Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.options import NonNegative, PositiveShare
from rlhf_jax.runtime import hosts
from rlhf_jax.stages.shared.context import Context

_POLL_SECONDS = 2.0  # between two looks at the queue; doubled up to a minute
_LONGEST_POLL = 60.0


@dataclasses.dataclass(frozen=True)
class PeopleOptions:
  """How real people's judgements are collected."""

  workdir: str = ''  # of `python -m rlhf_jax.collect`; '' = the folder `collect` of the run
  database: str = ''  # its database, where it is not SQLite in that folder
  # Of several people's rankings of a prompt: all, majority (one record each, by
  # Copeland's rule) or reliability (one record each, by a model of the people,
  # whose posterior is the record's confidence).
  combination: str = 'all'
  # How long to wait for people; 0 = not at all: the run stops, and goes on when
  # it is repeated.
  wait_hours: NonNegative = 0.0
  enough: PositiveShare = 1.0  # share of the items that must be finished


def check_options(options: PeopleOptions, where: str) -> None:
  """Checks the options; raises UserError for an unknown combination, or a missing extra."""
  try:
    from rlhf_jax.collect import export
  except ModuleNotFoundError as error:
    raise UserError(
      f"{where}: {error.name} is missing; people need: pip install 'rlhf_jax[collect]'"
    ) from None
  if options.combination not in export.COMBINATIONS:
    names = ', '.join(export.COMBINATIONS)
    raise UserError(f'{where}.combination: expected one of {names}, got {options.combination!r}')


def is_queued(context: Context, options: PeopleOptions, split: str) -> bool:
  """Says whether the responses of a split are in the queue; the same on every process."""
  queued = False
  if hosts.is_first_process():
    queued = any(row.batch == _batch(context, split) for row in _count(context, options))
  return bool(hosts.gather_from_processes(int(queued)).any())


def queue_responses(
  context: Context,
  options: PeopleOptions,
  split: str,
  prompts: Sequence[Prompt],
  texts: Sequence[Sequence[str]],
) -> None:
  """Brings the responses of a split into the queue.

  Args:
    context: the context of the stage.
    options: where the queue is.
    split: 'train' or 'validation'.
    prompts: N prompts.
    texts: N lists of responses.

  Raises:
    UserError: there are more responses to a prompt than people can rank.
  """
  if not hosts.is_first_process():
    return
  from rlhf_jax.collect import items
  from rlhf_jax.collect import settings as settings_file

  new_items = []
  for prompt, own in zip(prompts, texts, strict=True):
    item = items.NewItem(
      task='rank',
      messages=records.conversation(prompt),
      responses=[{'text': text, 'model': ''} for text in own],
      batch=_batch(context, split),
      record={
        'id': f'{prompt.id}/{split}',
        'source': prompt.source,
        'license': prompt.license,
        'meta': prompt.meta,
      },
    )
    new_items.append(items.check_item(item, f'{context.where}: prompt {prompt.id}'))
  settings = settings_file.read_settings(_workdir(context, options))
  store = _open(context, options)
  with store.writing() as connection:
    items.add_items(connection, new_items, settings.people_per_item)
  store.close()
  hosts.say(f'{context.name}: {len(new_items)} prompts of {split} wait for people')


def wait_and_read(context: Context, options: PeopleOptions, split: str) -> list[dict[str, Any]]:
  """Waits until people have ranked a split, and reads their rankings.

  Besides, `people.{split}.jsonl` in the stage's folder gets every judgement as it
  was given.

  Returns:
    Records of the kind `ranking`; [] on all processes but the first.

  Raises:
    UserError: the time is over, and too few items are finished.
  """
  rows: list[dict[str, Any]] = []
  if hosts.is_first_process():
    _wait(context, options, split)
    from rlhf_jax.collect import export

    store = _open(context, options)
    batch = _batch(context, split)
    with store.reading() as connection:
      rows = export.export_rankings(connection, batch, options.combination)
      raw = export.export_raw(connection, batch)
    store.close()
    records.write_records(context.directory / f'people.{split}.jsonl', raw)
  return rows


def _wait(context: Context, options: PeopleOptions, split: str) -> None:
  """Returns when enough items of a split are finished."""
  deadline = time.monotonic() + options.wait_hours * 3600
  pause = _POLL_SECONDS
  site = f'python -m rlhf_jax.collect --workdir={_workdir(context, options)}'
  told = False
  while True:
    finished, number = 0, 0
    for row in _count(context, options):
      if row.batch == _batch(context, split):
        finished += row.finished
        number += row.items
    if finished and finished >= options.enough * number:
      return
    if time.monotonic() >= deadline:
      raise UserError(
        f'{context.where}: people have finished {finished} of {number} items of {split}; '
        f'they rank at the site of: {site}; repeat this command to go on'
      )
    if not told:
      hosts.say(
        f'{context.name}: waits up to {options.wait_hours:g} hours until people have finished '
        f'{number} items of {split}; they rank at the site of: {site}'
      )
      told = True
    time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
    pause = min(2 * pause, _LONGEST_POLL)


def _count(context: Context, options: PeopleOptions) -> Sequence[Any]:
  """Counts the items of the queue by batch."""
  from rlhf_jax.collect import items

  store = _open(context, options)
  with store.reading() as connection:
    counts = items.count_items(connection)
  store.close()
  return counts


def _open(context: Context, options: PeopleOptions) -> Any:
  """Opens the database of the queue."""
  from rlhf_jax.collect import database

  return database.open_database(_workdir(context, options), options.database)


def _workdir(context: Context, options: PeopleOptions) -> Path:
  """Returns the folder of the queue."""
  return Path(options.workdir) if options.workdir else context.workdir / 'collect'


def _batch(context: Context, split: str) -> str:
  """Returns the name of a split's items; a queue can serve several stages."""
  return f'{context.name}/{split}'
