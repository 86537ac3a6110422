"""Items: the prompts and responses that people judge. They are made from records of files."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import hashlib
import json
import time
from typing import Any

import sqlalchemy
from sqlalchemy import Connection, Row

from rlhf_jax.collect import database, tables
from rlhf_jax.data import records
from rlhf_jax.errors import UserError

TASKS = ('rank', 'demonstrate', 'edit', 'converse')
MOST_RESPONSES = 9  # because a response is ranked by one of the keys 1 to 9

Response = dict[str, str]  # {'text': …, 'model': the model's name, which people never see}


@dataclasses.dataclass(frozen=True)
class NewItem:
  """An item to add.

  Attributes:
    task: one of TASKS.
    messages: the conversation, whose last message is the user's; may be empty
      for `converse`.
    responses: the 2 to 9 responses to rank, or the one response to edit; empty
      for the other tasks.
    batch: the name of the batch; items of a batch can be exported together.
    record: fields of the record that the item comes from: id, source, license,
      domain, context, meta.
    gold: axis → ranks of the responses, where the correct order is known; else
      None.
    explanation: the text that a person reads after answering a training item.
    training: whether the item is part of the training phase.
    priority: items of the highest priority are given first.
    wanted: the number of judgements that the item needs; 0 = as many as the
      settings say.
  """

  task: str
  messages: list[records.Message]
  responses: list[Response] = dataclasses.field(default_factory=list)
  batch: str = 'items'
  record: dict[str, Any] = dataclasses.field(default_factory=dict)
  gold: dict[str, list[int]] | None = None
  explanation: str = ''
  training: bool = False
  priority: float = 0.0
  wanted: int = 0


def add_items(
  connection: Connection,
  new_items: Iterable[NewItem],
  people_per_item: int,
) -> int:
  """Adds items to the database; an item that it holds already is left unchanged.

  Args:
    connection: a connection of a writing transaction.
    new_items: the items, checked by `check_item`.
    people_per_item: the number of judgements of items whose `wanted` is 0.

  Returns:
    The number of items that were new.
  """
  known = set(connection.scalars(sqlalchemy.select(tables.items.c.key)))
  added = 0
  for item in new_items:
    key = make_key(item)
    if key in known:
      continue
    known.add(key)
    added += 1
    database.insert(
      connection,
      tables.items,
      key=key,
      batch=item.batch,
      task=item.task,
      record=item.record,
      messages=item.messages,
      responses=item.responses,
      gold=item.gold if item.gold is not None else sqlalchemy.null(),
      explanation=item.explanation,
      training=item.training,
      priority=item.priority,
      wanted=item.wanted or people_per_item,
      answers=0,
      closed=False,
      waiting=True,
      created=time.time(),
    )
  return added


def make_key(item: NewItem) -> str:
  """Returns the key of an item, a hash by which an item that was added before is recognised."""
  content = [
    item.batch,
    item.task,
    str(item.record.get('id', '')),
    item.messages,
    [response['text'] for response in item.responses],
    item.gold is not None,
  ]
  # ASCII escapes, because a lone surrogate cannot be encoded as UTF-8
  return hashlib.sha256(json.dumps(content).encode('ascii')).hexdigest()


def check_item(item: NewItem, where: str) -> NewItem:
  """Checks that an item is complete for its task, and returns it.

  Args:
    item: the item, from a file or a program.
    where: the place of the item in error messages, such as 'file:line'.

  Raises:
    UserError: the task is unknown, or the responses, messages or known ranks do
      not suit it.
  """
  if item.task not in TASKS:
    raise UserError(f'{where}: task: expected one of {", ".join(TASKS)}, got {item.task!r}')
  count = len(item.responses)
  if item.task == 'rank' and not 2 <= count <= MOST_RESPONSES:
    raise UserError(f'{where}: responses: expected 2 to {MOST_RESPONSES} to rank, got {count}')
  if item.task == 'edit' and count != 1:
    raise UserError(f'{where}: responses: expected one to edit, got {count}')
  if item.task != 'converse' and not item.messages:
    raise UserError(f'{where}: messages: expected a conversation, got none')
  for ranks in (item.gold or {}).values():
    if len(ranks) != count:
      raise UserError(f'{where}: gold: expected {count} ranks, got {ranks}')
  return item


def item_from_fields(fields: Mapping[str, Any], where: str, task: str, batch: str) -> NewItem:
  """Makes an item from the fields of a line of a file.

  Args:
    fields: `messages` (the prompt), optionally with `responses` (a list of
      texts) or `response`; also `task`, `batch`, `models`, `gold` (ranks, or
      axis → ranks), `explanation`, `training`, `priority`, `wanted` and the
      fields of a record. The `ranks` of a record are not used as known ranks:
      they are often the opinion of one person.
    where: 'file:line', for error messages.
    task: one of TASKS; '' = the line's `task`, or else rank for a line with
      responses and demonstrate for one without.
    batch: the name of the batch, unless the line has its own.

  Raises:
    UserError: the fields do not describe an item.
  """
  texts = fields.get('responses')
  if texts is None and isinstance(fields.get('response'), str):
    texts = [fields['response']]
  texts = [] if texts is None else texts
  if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
    raise UserError(f'{where}: field "responses": expected a list of texts, got {texts!r:.60}')
  task = task or str(fields.get('task') or ('rank' if texts else 'demonstrate'))
  models = fields.get('models') or [''] * len(texts)
  if len(models) != len(texts):
    raise UserError(f'{where}: field "models": expected {len(texts)} names, got {len(models)}')
  item = NewItem(
    task=task,
    messages=_read_messages(fields, where, task),
    responses=[{'text': text, 'model': str(name)} for text, name in zip(texts, models)],
    batch=str(fields.get('batch') or batch),
    record=_record_fields(fields, where),
    gold=_read_gold(fields, where),
    explanation=str(fields.get('explanation') or ''),
    training=fields.get('training') is True,
    priority=_read_number(fields, 'priority', where),
    wanted=int(_read_number(fields, 'wanted', where)),
  )
  if task in ('demonstrate', 'converse'):
    item = dataclasses.replace(item, responses=[])
  return check_item(item, where)


def read_item(connection: Connection, item_id: int) -> Row:
  """Reads the row of an item, which must exist."""
  query = sqlalchemy.select(tables.items).where(tables.items.c.id == item_id)
  return connection.execute(query).one()


def count_items(connection: Connection) -> Sequence[Row]:
  """Counts items by batch and task: rows (batch, task, items, finished, answers, wanted)."""
  table = tables.items.c
  finished = sqlalchemy.case((table.waiting, 0), else_=1)
  query = (
    sqlalchemy.select(
      table.batch,
      table.task,
      sqlalchemy.func.count().label('items'),
      sqlalchemy.func.sum(finished).label('finished'),
      sqlalchemy.func.sum(table.answers).label('answers'),
      sqlalchemy.func.sum(table.wanted).label('wanted'),
    )
    .group_by(table.batch, table.task)
    .order_by(table.batch, table.task)
  )
  return connection.execute(query).all()


def count_answer(connection: Connection, item_id: int, change: int) -> None:
  """Adds `change` (1 or −1) to the number of answers of an item, and updates `waiting`."""
  table = tables.items
  answers = table.c.answers + change
  connection.execute(
    sqlalchemy.update(table)
    .where(table.c.id == item_id)
    .values(answers=answers, waiting=sqlalchemy.and_(~table.c.closed, answers < table.c.wanted))
  )


def close(connection: Connection, item_id: int) -> int:
  """Closes an item, so that nobody gets it any more; returns 1, or 0 if it was closed before."""
  table = tables.items
  update = sqlalchemy.update(table).where(table.c.id == item_id, ~table.c.closed)
  return connection.execute(update.values(closed=True, waiting=False)).rowcount


def _read_messages(fields: Mapping[str, Any], where: str, task: str) -> list[records.Message]:
  """Returns the conversation of a line, with the same checks as for any record."""
  if task == 'converse' and not fields.get('messages'):
    return []  # the person writes the first message
  prompt = records.parse_record('prompt', dict(fields), where)
  return [{'role': each['role'], 'content': each['content']} for each in prompt.messages]


def _record_fields(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Returns the fields of the original record that exports repeat."""
  record: dict[str, Any] = {'id': str(fields.get('id') or where)}
  for name in ('source', 'license', 'domain', 'context'):
    record[name] = str(fields.get(name) or '')
  meta = fields.get('meta')
  record['meta'] = meta if isinstance(meta, dict) else {}
  return record


def _read_gold(fields: Mapping[str, Any], where: str) -> dict[str, list[int]] | None:
  """Reads the known ranks of a line as axis → ranks; None where there are none."""
  gold = fields.get('gold')
  if gold is None:
    return None
  by_axis = {'overall': gold} if isinstance(gold, list) else gold
  if not isinstance(by_axis, dict):
    raise UserError(f'{where}: field "gold": expected ranks, got {gold!r:.60}')
  for ranks in by_axis.values():
    if not isinstance(ranks, list) or not all(type(rank) is int for rank in ranks):
      raise UserError(f'{where}: field "gold": expected whole numbers, got {ranks!r:.60}')
  return by_axis


def _read_number(fields: Mapping[str, Any], name: str, where: str) -> float:
  """Reads a number from a line; 0 where it is absent."""
  value = fields.get(name)
  if value is None:
    return 0.0
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise UserError(f'{where}: field "{name}": expected a number, got {value!r:.60}')
  return float(value)
