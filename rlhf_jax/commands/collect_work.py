"""The work of the command `collect`: one function for each of its words.

Models are opened in `collect_models`, which is imported only where one is needed.
"""

import argparse
from collections.abc import Callable, Sequence
import json
from pathlib import Path

from rlhf_jax import files
from rlhf_jax.collect import (
  database,
  items,
  layouts,
  people,
  quality,
  selection,
  server,
)
from rlhf_jax.collect import (
  export as exports,
)
from rlhf_jax.collect import settings as settings_file
from rlhf_jax.collect.conversation import EndpointReplies, Replies
from rlhf_jax.collect.database import Database
from rlhf_jax.data import records
from rlhf_jax.errors import UserError


def serve(options: argparse.Namespace) -> None:
  """Serves the pages until it is interrupted."""
  settings = settings_file.read_settings(options.workdir)
  server.serve(
    options.workdir,
    host=options.host,
    port=options.port,
    url=options.database,
    public_url=options.public_url,
    replies=_open_replies(options),
    count_tokens=_open_counter(settings.tokenizer),
  )


def add(options: argparse.Namespace) -> None:
  """Brings the items of a file into the queue."""
  rows = layouts.read_items(options.input, options.format)
  new_items = []
  for number, fields in enumerate(rows, start=1):
    where = f'{options.input}:{number}'
    new_items.append(items.item_from_fields(fields, where, options.task, options.batch))
  store, settings = _open(options)
  with store.writing() as connection:
    added = items.add_items(connection, new_items, settings.people_per_item)
  print(f'{added} new items of {len(new_items)} in {options.input}')


def sample(options: argparse.Namespace) -> None:
  """Lets models respond to prompts, and brings the responses into the queue."""
  from rlhf_jax.commands import collect_models  # JAX takes seconds to import

  if options.task == 'edit' and options.samples != 1:
    raise UserError(f'--samples: expected 1 for --task=edit, got {options.samples}')
  prompts = records.read_records(options.input, 'prompt')
  if not prompts:
    raise UserError(f'--input: {options.input} holds no prompts')
  new_items = collect_models.sample_items(options, prompts)
  store, settings = _open(options)
  with store.writing() as connection:
    added = items.add_items(connection, new_items, settings.people_per_item)
  print(f'{added} new items, {options.samples} responses each')


def invite(options: argparse.Namespace) -> None:
  """Prints an invitation link."""
  store, _ = _open(options)
  with store.writing() as connection:
    number = people.invite(connection, options.role, options.places, options.days, options.label)
  print(f'{options.public_url.rstrip("/")}/join/{people.make_token(store, number)}')


def status(options: argparse.Namespace) -> None:
  """Prints progress and agreement."""
  store, settings = _open_existing(options)
  with store.reading() as connection:
    counts = items.count_items(connection)
    orders = selection.read_orders(connection, settings.axes[0])
  for row in counts:
    print(
      f'{row.batch}: {row.task}: {row.finished} of {row.items} items finished, '
      f'{row.answers} of {row.wanted} judgements'
    )
  if not orders:
    return
  report = quality.measure(orders)
  share = report.agreement
  print(
    f'pairs ordered alike {share.value:.3f} ({share.low:.3f} to {share.high:.3f}), '
    f'α {report.alpha:.3f}, W {report.kendall:.3f}'
  )
  for each in report.people:
    print(
      f'{each.person}: {each.judgements} judgements, reliability {each.reliability:.2f} '
      f'({each.low:.2f} to {each.high:.2f}), as the others {each.consensus:.2f}'
    )


def select(options: argparse.Namespace) -> None:
  """Sets priorities by reward models, and closes items that are sure enough."""
  from rlhf_jax.commands import collect_models  # JAX takes seconds to import

  names = _split(options.reward)
  store, settings = _open_existing(options)
  scores = [collect_models.open_score(name, options.batch_size) for name in names]
  with store.writing() as connection:
    result = selection.refit(connection, settings)
    count = selection.prioritise(connection, scores)
  print(f'{count} items ordered, {result.closed} closed')


def export(options: argparse.Namespace) -> None:
  """Writes records.

  Raises:
    UserError: there is no collection in the workdir.
  """
  store, _ = _open_existing(options)
  with store.reading() as connection:
    rows = exports.export_kind(connection, options.kind, options.batch, options.combination)
  if options.format == 'jsonl':
    records.write_records(options.output, rows)
  else:
    converted = layouts.write_rows(rows, options.format)
    files.write_text(options.output, json.dumps(converted, indent=1))
  print(f'{len(rows)} records in {options.output}')


def _open_existing(
  options: argparse.Namespace,
) -> tuple[Database, settings_file.Settings]:
  """Opens a collection for a command that only reads it.

  Raises:
    UserError: there is none in the workdir. `_open` would make an empty one.
  """
  path = options.workdir / database.FILE
  if not options.database and not path.is_file():
    raise UserError(f'--workdir={options.workdir}: expected a collection, but there is no {path}')
  return _open(options)


def _open(options: argparse.Namespace) -> tuple[Database, settings_file.Settings]:
  """Opens the database and the settings of a workdir."""
  settings = settings_file.read_settings(options.workdir)
  return database.open_database(options.workdir, options.database), settings


def _open_replies(options: argparse.Namespace) -> Replies | None:
  """Opens who replies in conversations; None where nobody is named."""
  names = _split(options.models)
  if not names:
    if options.endpoint:
      raise UserError('--models: expected the name of a model at --endpoint')
    return None
  if options.endpoint:
    return EndpointReplies([options.endpoint] * len(names), names, options.max_new_tokens)
  from rlhf_jax.commands import collect_worker

  return collect_worker.WorkerReplies(names, options.max_new_tokens)


def _open_counter(tokenizer: str) -> Callable[[str], int] | None:
  """Opens a tokenizer's count; None where none is set."""
  if not tokenizer:
    return None
  import tokenizers

  path = Path(tokenizer) / 'tokenizer.json'
  if not path.exists():
    raise UserError(f'{settings_file.FILE}: tokenizer: {path} does not exist')
  core = tokenizers.Tokenizer.from_file(str(path))

  def count_tokens(text: str) -> int:
    return len(core.encode(text, add_special_tokens=False).ids)

  return count_tokens


def _split(names: str) -> Sequence[str]:
  """Splits names at commas."""
  return [name.strip() for name in names.split(',') if name.strip()]
