"""Judgements: saved once, never overwritten; taken back, returned and amended by new rows."""

from collections.abc import Sequence
import dataclasses
import time
from typing import Any

import sqlalchemy
from sqlalchemy import Connection, Row

from rlhf_jax.collect import assignment, database, tables
from rlhf_jax.collect.items import count_answer, read_item
from rlhf_jax.collect.refusals import Refused
from rlhf_jax.collect.settings import Settings


@dataclasses.dataclass(frozen=True)
class Given:
  """An answer as it came from a page.

  Attributes:
    answer: see answers.py.
    guidelines: version that the page showed.
    pasted: what the page saw of pastes.
    number: turn of a conversation; else 0.
    shown: numbers of the responses in the order of the page.
    complete: the item is done with it.
  """

  answer: dict[str, Any]
  guidelines: str
  pasted: dict[str, int]
  shown: Sequence[int]
  number: int = 0
  complete: bool = True


def save(connection: Connection, lease: Row, given: Given, settings: Settings) -> int:
  """Saves an answer; the same one sent twice is saved once.

  Args:
    connection: of a transaction that writes; the answer counts once it is committed.
    lease: read in this transaction.
    given: the answer.
    settings: the least time that an answer takes.

  Returns:
    The number of the judgement.

  Raises:
    Refused: the item is not the person's any more, or the answer came too soon.
  """
  earlier = find_standing(connection, lease.id, given.number)
  if earlier is not None:
    return _check_same(earlier, given)
  item = read_item(connection, lease.item_id)
  assignment.check_open(connection, lease, item)
  now = time.time()
  seconds = now - lease.started
  if seconds < settings.minimum_seconds:
    raise Refused(
      422,
      f'Please take at least {settings.minimum_seconds:.0f} seconds; this answer took '
      f'{seconds:.0f}. Nothing is lost: read once more and send it again.',
    )
  judgement_id = database.insert(
    connection,
    tables.judgements,
    item_id=item.id,
    person_id=lease.person_id,
    author_id=lease.person_id,
    lease_id=lease.id,
    number=given.number,
    task=item.task,
    answer=given.answer,
    shown=list(given.shown),
    guidelines=given.guidelines,
    seconds=seconds,
    pasted=given.pasted,
    amends=None,
    stands=True,
    created=now,
  )
  if given.complete:
    assignment.set_state(connection, lease.id, 'answered')
    count_answer(connection, item.id, 1)
  return judgement_id


def undo_last(connection: Connection, person_id: int, settings: Settings) -> Row:
  """Takes a person's last judgement back, and gives the item to the person again.

  Returns:
    The lease, open again.

  Raises:
    Refused: there is none, or a conversation went on from it.
  """
  table = tables.judgements
  query = (
    sqlalchemy.select(table)
    .where(table.c.person_id == person_id, table.c.author_id == person_id, table.c.stands)
    .order_by(table.c.id.desc())
    .limit(1)
  )
  last = connection.execute(query).one_or_none()
  if last is None:
    raise Refused(409, 'There is nothing to undo.')
  if last.task == 'converse':
    _reopen_turn(connection, last)
  revise(connection, last, 'undone', person_id, '')
  return reopen(connection, last, settings)


def return_to_person(
  connection: Connection,
  judgement: Row,
  reviewer_id: int,
  reason: str,
  settings: Settings,
) -> None:
  """Sends a judgement back: its person gets the item again, and reads the reason."""
  if judgement.task == 'converse':
    raise Refused(409, 'A turn of a conversation cannot be sent back; amend its ranking.')
  revise(connection, judgement, 'returned', reviewer_id, reason)
  reopen(connection, judgement, settings)


def amend(
  connection: Connection,
  judgement: Row,
  answer: dict[str, Any],
  reviewer_id: int,
  reason: str,
) -> int:
  """Puts a reviewer's answer in the place of a judgement, which keeps its row.

  Returns:
    The number of the new judgement, which is still its person's; its author is the
    reviewer.
  """
  revise(connection, judgement, 'amended', reviewer_id, reason)
  columns = dict(judgement._mapping)
  for name in ('id', 'author_id', 'answer', 'amends', 'stands', 'created'):
    del columns[name]
  return database.insert(
    connection,
    tables.judgements,
    author_id=reviewer_id,
    answer=answer,
    amends=judgement.id,
    stands=True,
    created=time.time(),
    **columns,
  )


def accept(connection: Connection, judgement: Row, reviewer_id: int) -> None:
  """Notes that a reviewer has read a judgement and lets it stand."""
  _add_revision(connection, judgement.id, 'accepted', reviewer_id, '')


def revise(
  connection: Connection,
  judgement: Row,
  action: str,
  person_id: int,
  reason: str,
) -> None:
  """Notes what became of a judgement that does not stand any more.

  Raises:
    Refused: it did not stand before.
  """
  table = tables.judgements
  withdrawn = connection.execute(
    sqlalchemy.update(table).where(table.c.id == judgement.id, table.c.stands).values(stands=False)
  )
  if withdrawn.rowcount != 1:
    raise Refused(409, 'This judgement was changed by somebody else meanwhile.')
  _add_revision(connection, judgement.id, action, person_id, reason)


def reopen(connection: Connection, judgement: Row, settings: Settings) -> Row:
  """Gives an item back to the person of a judgement, and returns the lease."""
  leases = tables.leases
  query = sqlalchemy.select(leases).where(leases.c.id == judgement.lease_id)
  lease = connection.execute(query).one()
  if lease.state == 'answered':
    count_answer(connection, judgement.item_id, -1)
  expires = time.time() + settings.lease_minutes * 60
  assignment.set_state(connection, lease.id, 'open', expires=expires)
  return connection.execute(query).one()


def read_judgement(connection: Connection, judgement_id: int) -> Row:
  """Reads a judgement; raises Refused where there is none of this number."""
  table = tables.judgements
  query = sqlalchemy.select(table).where(table.c.id == judgement_id)
  judgement = connection.execute(query).one_or_none()
  if judgement is None:
    raise Refused(404, 'There is no such judgement.')
  return judgement


def last_reason(connection: Connection, lease_id: int) -> str:
  """Returns why the last judgement under a lease was sent back; '' where it was not."""
  judgements, revisions = tables.judgements, tables.revisions
  query = (
    sqlalchemy.select(revisions.c.action, revisions.c.reason)
    .select_from(revisions.join(judgements))
    .where(judgements.c.lease_id == lease_id)
    .order_by(revisions.c.id.desc())
    .limit(1)
  )
  last = connection.execute(query).one_or_none()
  if last is None or last.action != 'returned':
    return ''
  return last.reason


def list_judgements(
  connection: Connection,
  standing: bool = True,
  batch: str = '',
  limit: int = 0,
) -> Sequence[Row]:
  """Lists judgements with the items and the people they belong to, the oldest first.

  Args:
    connection: to read from.
    standing: only those that stand.
    batch: only of this batch; '' = of all.
    limit: only the newest so many; 0 = all.

  Returns:
    Rows with the columns of a judgement, and `key`, `batch`, `record`, `messages`,
    `responses`, `gold`, `training` of its item, `pseudonym` of its person.
  """
  table, items, people = tables.judgements, tables.items, tables.people
  columns = [
    items.c.key,
    items.c.batch,
    items.c.record,
    items.c.messages,
    items.c.responses,
    items.c.gold,
    items.c.training,
    people.c.pseudonym,
  ]
  joined = table.join(items, table.c.item_id == items.c.id)
  joined = joined.join(people, table.c.person_id == people.c.id)
  query = sqlalchemy.select(table, *columns).select_from(joined)
  if standing:
    query = query.where(table.c.stands)
  if batch:
    query = query.where(items.c.batch == batch)
  if limit:
    newest = connection.execute(query.order_by(table.c.id.desc()).limit(limit)).all()
    return newest[::-1]
  return connection.execute(query.order_by(table.c.id)).all()


def list_revisions(connection: Connection) -> Sequence[Row]:
  """Lists all revisions, the oldest first."""
  return connection.execute(
    sqlalchemy.select(tables.revisions).order_by(tables.revisions.c.id)
  ).all()


def read_turns(connection: Connection) -> dict[tuple[int, int], Row]:
  """Reads all turns of conversations: (lease, number) → turn."""
  rows = connection.execute(sqlalchemy.select(tables.turns))
  return {(row.lease_id, row.number): row for row in rows}


def find_standing(connection: Connection, lease_id: int, number: int) -> Row | None:
  """Returns the judgement that stands for a turn of a lease."""
  table = tables.judgements
  query = sqlalchemy.select(table).where(
    table.c.lease_id == lease_id,
    table.c.number == number,
    table.c.stands,
  )
  return connection.execute(query).one_or_none()


def _check_same(earlier: Row, given: Given) -> int:
  """Returns the judgement that an answer was saved as before; refuses another answer."""
  if earlier.answer != given.answer:
    raise Refused(
      409,
      'You have answered this item already, and this answer is another one: it was not '
      'saved. Undo your last answer to change it.',
    )
  return earlier.id


def _add_revision(
  connection: Connection,
  judgement_id: int,
  action: str,
  person_id: int,
  reason: str,
) -> None:
  """Adds what became of a judgement."""
  database.insert(
    connection,
    tables.revisions,
    judgement_id=judgement_id,
    action=action,
    person_id=person_id,
    reason=reason,
    created=time.time(),
  )


def _reopen_turn(connection: Connection, judgement: Row) -> None:
  """Makes a turn of a conversation wait for its ranking again."""
  table = tables.turns
  later = sqlalchemy.select(table.c.id).where(
    table.c.lease_id == judgement.lease_id,
    table.c.number > judgement.number,
  )
  if connection.execute(later).first() is not None:
    raise Refused(409, 'The conversation went on from this ranking, so it stays.')
  connection.execute(
    sqlalchemy.update(table)
    .where(table.c.lease_id == judgement.lease_id, table.c.number == judgement.number)
    .values(state='ready')
  )
