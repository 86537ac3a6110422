"""Judgements: how they are saved, undone, returned and amended, and how they are read.

A judgement is saved once and never overwritten. What happens to it later is a
row of the table of revisions.
"""

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
class SentAnswer:
  """An answer that a page has sent.

  Attributes:
    answer: the content of the answer, see answers.py.
    guidelines: the version of the guidelines that the page showed.
    pasted: number and length of the pastes that the page noticed.
    number: the turn of a conversation; 0 for other tasks.
    shown: the numbers of the responses, in the order on the page.
    complete: whether this answer completes the item for the person.
  """

  answer: dict[str, Any]
  guidelines: str
  pasted: dict[str, int]
  shown: Sequence[int]
  number: int = 0
  complete: bool = True


def save(connection: Connection, lease: Row, sent: SentAnswer, settings: Settings) -> int:
  """Saves an answer; an answer that is sent twice is saved once.

  Args:
    connection: a connection of a writing transaction; the answer is saved when
      it commits.
    lease: the person's lease of the item, read in this transaction.
    sent: the answer.
    settings: the settings, of which `minimum_seconds` is used.

  Returns:
    The id of the judgement.

  Raises:
    Refused: the person no longer has the item, has already given another
      answer, or has answered too fast.
  """
  # A browser that got no reply sends the same form again: that is not
  # a second judgement.
  earlier = find_standing(connection, lease.id, sent.number)
  if earlier is not None:
    return _check_same(earlier, sent)
  item = read_item(connection, lease.item_id)
  assignment.check_open(connection, lease, item)
  now = time.time()
  # From when the item was given, so that the time counts whatever the
  # page says.
  seconds = now - lease.started
  if seconds < settings.minimum_seconds:
    raise Refused(
      422,
      f'Please take at least {settings.minimum_seconds:.0f} seconds; this answer took '
      f'{seconds:.0f}. Nothing is lost: read the item once more and send your answer again.',
    )
  judgement_id = database.insert(
    connection,
    tables.judgements,
    item_id=item.id,
    person_id=lease.person_id,
    author_id=lease.person_id,
    lease_id=lease.id,
    number=sent.number,
    task=item.task,
    answer=sent.answer,
    shown=list(sent.shown),
    guidelines=sent.guidelines,
    seconds=seconds,
    pasted=sent.pasted,
    # A first judgement; `amend` adds those that replace another.
    amends=None,
    stands=True,
    created=now,
  )
  # A conversation is complete after its last turn only.
  if sent.complete:
    assignment.set_state(connection, lease.id, 'answered')
    count_answer(connection, item.id, 1)
  return judgement_id


def undo_last(connection: Connection, person_id: int, settings: Settings) -> Row:
  """Undoes a person's last judgement, and gives the item to the person again.

  Returns:
    The lease, which is open again.

  Raises:
    Refused: there is no judgement to undo, or the conversation has continued
      from it.
  """
  table = tables.judgements
  query = (
    sqlalchemy.select(table)
    # The author is another than the person where a reviewer has amended:
    # what a reviewer wrote, the person cannot undo.
    .where(table.c.person_id == person_id, table.c.author_id == person_id, table.c.stands)
    .order_by(table.c.id.desc())
    .limit(1)
  )
  last = connection.execute(query).one_or_none()
  if last is None:
    raise Refused(409, 'There is nothing to undo.')
  # The ranking of a turn chose how the conversation went on.
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
  """Returns a judgement to its person, who gets the item again and reads the reason.

  Raises:
    Refused: it is a turn of a conversation, or it does not stand any more.
  """
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
  """Replaces a judgement by one with a reviewer's answer; the old one keeps its row.

  Returns:
    The id of the new judgement. It still belongs to the person who judged the
    item; its author is the reviewer.
  """
  # Fails where somebody else has changed it meanwhile, and nothing is
  # added then.
  revise(connection, judgement, 'amended', reviewer_id, reason)
  columns = dict(judgement._mapping)
  # All other columns, such as the time that the person took, are kept.
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
  """Records that a reviewer has read a judgement and lets it stand."""
  _add_revision(connection, judgement.id, 'accepted', reviewer_id, '')


def revise(
  connection: Connection,
  judgement: Row,
  action: str,
  person_id: int,
  reason: str,
) -> None:
  """Marks a judgement as no longer standing, and records the action and its reason.

  Raises:
    Refused: the judgement did not stand before.
  """
  table = tables.judgements
  # The condition on `stands` makes the change happen once, whoever else
  # writes at the same moment.
  withdrawn = connection.execute(
    sqlalchemy.update(table).where(table.c.id == judgement.id, table.c.stands).values(stands=False)
  )
  if withdrawn.rowcount != 1:
    raise Refused(409, 'Somebody else has changed this judgement in the meantime.')
  _add_revision(connection, judgement.id, action, person_id, reason)


def reopen(connection: Connection, judgement: Row, settings: Settings) -> Row:
  """Gives an item back to the person of a judgement, and returns the lease."""
  leases = tables.leases
  query = sqlalchemy.select(leases).where(leases.c.id == judgement.lease_id)
  lease = connection.execute(query).one()
  # A lease whose conversation was not complete has not been counted.
  if lease.state == 'answered':
    count_answer(connection, judgement.item_id, -1)
  expires = time.time() + settings.lease_minutes * 60
  assignment.set_state(connection, lease.id, 'open', expires=expires)
  return connection.execute(query).one()


def read_judgement(connection: Connection, judgement_id: int) -> Row:
  """Reads a judgement by its id; raises Refused where there is none."""
  table = tables.judgements
  query = sqlalchemy.select(table).where(table.c.id == judgement_id)
  judgement = connection.execute(query).one_or_none()
  if judgement is None:
    raise Refused(404, 'There is no such judgement.')
  return judgement


def last_reason(connection: Connection, lease_id: int) -> str:
  """Returns the reviewer's reason if the latest revision of a lease was a return; else ''."""
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
    connection: the connection to read from.
    standing: whether to list only judgements that stand.
    batch: the batch whose judgements are listed; '' for all batches.
    limit: the number of judgements, of which the newest are listed; 0 for all.

  Returns:
    Rows with the columns of the judgement, the columns `key`, `batch`,
    `record`, `messages`, `responses`, `gold` and `training` of its item, and
    the `pseudonym` of its person.
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
  # The newest are found from the end, and returned in the order of time.
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
  """Returns the judgement that stands for a turn of a lease; None where there is none."""
  table = tables.judgements
  query = sqlalchemy.select(table).where(
    table.c.lease_id == lease_id,
    table.c.number == number,
    table.c.stands,
  )
  return connection.execute(query).one_or_none()


def _check_same(earlier: Row, sent: SentAnswer) -> int:
  """Returns the id of the judgement that was saved before from the same answer.

  Raises:
    Refused: the saved answer is a different one.
  """
  if earlier.answer != sent.answer:
    raise Refused(
      409,
      'You have already answered this item. This different answer was not saved. Undo your '
      'last answer to change it.',
    )
  return earlier.id


def _add_revision(
  connection: Connection,
  judgement_id: int,
  action: str,
  person_id: int,
  reason: str,
) -> None:
  """Adds a revision of a judgement."""
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
  """Sets a turn of a conversation back to the state in which it waits for its ranking.

  Raises:
    Refused: the conversation has later turns.
  """
  table = tables.turns
  # A later turn was made from this ranking's best response.
  later = sqlalchemy.select(table.c.id).where(
    table.c.lease_id == judgement.lease_id,
    table.c.number > judgement.number,
  )
  if connection.execute(later).first() is not None:
    raise Refused(409, 'The conversation has continued from this ranking; it cannot be undone.')
  connection.execute(
    sqlalchemy.update(table)
    .where(table.c.lease_id == judgement.lease_id, table.c.number == judgement.number)
    # The responses are there already; only their ranking is missing.
    .values(state='ready')
  )
