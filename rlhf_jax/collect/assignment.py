"""Assignment of items to people: which item a person gets, and for how long.

A person works on one item at a time. A lease reserves the item for that person
for a limited time. An item is given to as many people as it still needs
judgements from, and to no more. A lease that has expired no longer reserves its
item, so the item goes to somebody else when a person leaves. Training items
come first, then the items of the highest priority; gold questions (control
questions whose answer is known, and which look like any other item) are mixed
in.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import random
import secrets
import time
from typing import Any

import sqlalchemy
from sqlalchemy import Connection, Row

from rlhf_jax.collect import answers, database, tables
from rlhf_jax.collect.refusals import Refused
from rlhf_jax.collect.settings import Settings

_SHUFFLE = random.SystemRandom()  # so that nobody can predict the order of the responses


@dataclasses.dataclass(frozen=True)
class Progress:
  """How much of the training and of the work a person has completed.

  Attributes:
    answered: number of answered items, without training items.
    trained: number of answered training items.
    agreement: share of the ordered pairs of the training items that the person
      ordered right; 1 while the training goes on, and where there is none.
    training_left: number of training items that are still to come.
    failed: whether the person has completed the training and did not pass it.
    done: whether the person gets no more items.
  """

  answered: int
  trained: int
  agreement: float
  training_left: int
  failed: bool
  done: bool


def measure_progress(connection: Connection, person_id: int, settings: Settings) -> Progress:
  """Measures how much of the training and of the work a person has completed."""
  items, leases = tables.items.c, tables.leases.c
  query = (
    sqlalchemy.select(items.training, sqlalchemy.func.count())
    .select_from(tables.leases.join(tables.items))
    .where(leases.person_id == person_id, leases.state == 'answered')
    .group_by(items.training)
  )
  counts = {bool(training): count for training, count in connection.execute(query)}
  answered = counts.get(False, 0)
  trained = counts.get(True, 0)
  left = max(0, settings.training_items - trained)
  agreement = 1.0
  if settings.training_items and not left:
    agreement = agreement_with_gold(connection, person_id, training=True)
  failed = agreement < settings.qualification
  full = bool(settings.answers_each) and answered >= settings.answers_each
  return Progress(answered, trained, agreement, left, failed, failed or full)


def agreement_with_gold(connection: Connection, person_id: int, training: bool) -> float:
  """Computes the share of the ordered pairs of known answers that a person orders alike.

  Args:
    connection: the connection to read from.
    person_id: the person whose judgements are compared.
    training: True for the training items, False for the gold questions.

  Returns:
    The share, 0 to 1, in which a pair that the person ties counts as one half;
    NaN where the person has judged no such item.
  """
  items, judgements = tables.items, tables.judgements
  query = (
    sqlalchemy.select(items.c.gold, judgements.c.answer)
    .select_from(judgements.join(items))
    .where(
      judgements.c.person_id == person_id,
      judgements.c.stands,
      items.c.training == training,
      items.c.gold.is_not(sqlalchemy.null()),
    )
  )
  right = 0.0
  pairs = 0
  for gold, answer in connection.execute(query):
    for axis, ranks in gold.items():
      own = answer.get('orders', {}).get(axis)
      if own is None:
        continue
      for better, worse in answers.ordered_pairs(ranks):
        pairs += 1
        right += 1.0 if own[better] < own[worse] else 0.5 if own[better] == own[worse] else 0.0
  return right / pairs if pairs else float('nan')


def give_item(
  connection: Connection,
  person_id: int,
  settings: Settings,
  tasks: Sequence[str],
) -> Row | None:
  """Gives a person the next item, or again the item that the person is working on.

  Args:
    connection: a connection of a writing transaction, so that an item that
      needs one more judgement is not given to two people.
    person_id: the person who asks for an item.
    settings: the settings of the workdir.
    tasks: the tasks that the person may get.

  Returns:
    The lease; None where there is no item for this person.
  """
  now = time.time()
  # Somebody who loads the page again, or comes back tomorrow, finds the
  # item that was begun.
  held = _held_lease(connection, person_id, settings, tasks, now)
  if held is not None:
    return held
  progress = measure_progress(connection, person_id, settings)
  if progress.done:
    return None
  item = _choose_item(connection, person_id, settings, tasks, progress, now)
  if item is None:
    return None
  # A new order for each person, so that what people think of the first
  # response is no property of a response.
  shown = list(range(len(item.responses)))
  _SHUFFLE.shuffle(shown)
  lease_id = database.insert(
    connection,
    tables.leases,
    token=secrets.token_urlsafe(18),
    item_id=item.id,
    person_id=person_id,
    shown=shown,
    state='open',
    started=now,
    expires=now + settings.lease_minutes * 60,
  )
  return _read_lease(connection, lease_id)


def find_lease(connection: Connection, token: str, person_id: int) -> Row:
  """Returns the lease whose token stands in an address.

  Raises:
    Refused: there is no such lease, or it belongs to another person.
  """
  table = tables.leases
  query = sqlalchemy.select(table).where(table.c.token == token)
  lease = connection.execute(query).one_or_none()
  if lease is None or lease.person_id != person_id:
    # the same message in both cases, so that nobody can find out which addresses exist
    raise Refused(404, 'There is no such item for you.')
  return lease


def check_open(connection: Connection, lease: Row, item: Row) -> None:
  """Checks that an answer to a lease is still accepted.

  A person may answer after the lease has expired, as long as the item still
  needs a judgement that nobody else has been asked for.

  Raises:
    Refused: the item was skipped, or other people have taken it after the lease
      expired.
  """
  if lease.state == 'skipped':
    raise Refused(409, 'You have skipped this item.')
  now = time.time()
  # An answered lease is open to the same answer once more, see `save`.
  if lease.state == 'answered' or lease.expires > now or _is_for_everybody(item):
    return
  if item.closed or _taken_places(connection, item.id, now) >= item.wanted:
    raise Refused(409, 'The time for this item was over, and somebody else has taken it.')


def save_draft(
  connection: Connection,
  lease: Row,
  fields: Mapping[str, Sequence[str]],
  settings: Settings,
) -> None:
  """Saves the fields of an unfinished form, and extends the lease of the person who writes."""
  now = time.time()
  drafts, leases = tables.drafts, tables.leases
  # One draft a lease: the newest.
  connection.execute(sqlalchemy.delete(drafts).where(drafts.c.lease_id == lease.id))
  database.insert(connection, drafts, lease_id=lease.id, fields=dict(fields), saved=now)
  # Whoever writes is there. An expired lease stays expired, as its item
  # may be somebody else's by now.
  if lease.state == 'open' and lease.expires > now:
    expires = now + settings.lease_minutes * 60
    extended = sqlalchemy.update(leases).where(leases.c.id == lease.id).values(expires=expires)
    connection.execute(extended)


def read_draft(connection: Connection, lease_id: int) -> dict[str, list[str]]:
  """Reads the form fields that were last saved or sent; {} where there are none."""
  drafts = tables.drafts
  query = sqlalchemy.select(drafts.c.fields).where(drafts.c.lease_id == lease_id)
  return connection.scalars(query).one_or_none() or {}


def skip(connection: Connection, lease: Row) -> None:
  """Skips an item: it becomes free for others, and this person does not get it again."""
  if lease.state == 'open':
    set_state(connection, lease.id, 'skipped')


def set_state(connection: Connection, lease_id: int, state: str, expires: float = 0.0) -> None:
  """Changes the state of a lease, and its time of expiry unless `expires` is 0."""
  values: dict[str, Any] = {'state': state}
  if expires:
    values['expires'] = expires
  table = tables.leases
  connection.execute(sqlalchemy.update(table).where(table.c.id == lease_id).values(**values))


def count_waiting(connection: Connection, person_id: int) -> dict[str, int]:
  """Counts the items that a person could get now: task → number."""
  table = tables.items
  query = (
    sqlalchemy.select(table.c.task, sqlalchemy.func.count())
    .where(*_open_conditions(person_id, time.time()))
    .group_by(table.c.task)
  )
  return {task: count for task, count in connection.execute(query)}


def _choose_item(
  connection: Connection,
  person_id: int,
  settings: Settings,
  tasks: Sequence[str],
  progress: Progress,
  now: float,
) -> Row | None:
  """Chooses the item that a person gets next."""
  table = tables.items
  items = sqlalchemy.select(table).where(~_seen_by(person_id)).limit(1)
  if progress.training_left:
    # of any task, because the training comes before all other items
    training = items.where(table.c.training).order_by(table.c.priority.desc(), table.c.id)
    return connection.execute(training).one_or_none()
  # Every n-th item is a question whose answer is known.
  if settings.gold_every and progress.answered % settings.gold_every == settings.gold_every - 1:
    gold = items.where(
      table.c.gold.is_not(sqlalchemy.null()),
      ~table.c.training,
      table.c.task.in_(tasks),
    ).order_by(table.c.id)
    item = connection.execute(gold).one_or_none()
    if item is not None:
      return item
  waiting = sqlalchemy.select(table).where(*_open_conditions(person_id, now))
  waiting = waiting.where(table.c.task.in_(tasks)).limit(1)
  # among items of equal priority, those with the most judgements are completed first
  waiting = waiting.order_by(table.c.priority.desc(), table.c.answers.desc(), table.c.id)
  return connection.execute(waiting).one_or_none()


def _open_conditions(person_id: int, now: float) -> list[sqlalchemy.ColumnElement[bool]]:
  """Returns the conditions under which an item can be given to a person."""
  table, leases = tables.items, tables.leases
  under_way = (
    sqlalchemy.select(sqlalchemy.func.count())
    .where(
      leases.c.item_id == table.c.id,
      leases.c.state == 'open',
      leases.c.expires > now,
    )
    .correlate(table)
    .scalar_subquery()
  )
  return [
    table.c.waiting,
    ~table.c.training,
    table.c.gold.is_(sqlalchemy.null()),
    # Places are counted with the people who are at work now: an item is
    # never given to more than it needs.
    table.c.answers + under_way < table.c.wanted,
    ~_seen_by(person_id),
  ]


def _seen_by(person_id: int) -> sqlalchemy.ColumnElement[bool]:
  """Returns the condition that a person was given an item before, whatever became of it."""
  leases = tables.leases
  mine = (
    sqlalchemy.select(leases.c.id)
    .where(leases.c.item_id == tables.items.c.id, leases.c.person_id == person_id)
    .correlate(tables.items)
  )
  return mine.exists()


def _held_lease(
  connection: Connection,
  person_id: int,
  settings: Settings,
  tasks: Sequence[str],
  now: float,
) -> Row | None:
  """Returns the open lease of a person; None where there is none.

  An expired lease is renewed if its item still needs a judgement.
  """
  leases, items = tables.leases, tables.items
  query = (
    sqlalchemy.select(leases)
    .select_from(leases.join(items))
    .where(
      leases.c.person_id == person_id,
      leases.c.state == 'open',
      sqlalchemy.or_(items.c.task.in_(tasks), items.c.training),
    )
    # the oldest first: an item that a reviewer sent back comes before the current one
    .order_by(leases.c.id)
  )
  for lease in connection.execute(query):
    if lease.expires > now:
      return lease
    item_query = sqlalchemy.select(items).where(items.c.id == lease.item_id)
    item = connection.execute(item_query).one()
    room = not item.closed and _taken_places(connection, item.id, now) < item.wanted
    if room or _is_for_everybody(item):
      expires = now + settings.lease_minutes * 60
      set_state(connection, lease.id, 'open', expires=expires)
      return _read_lease(connection, lease.id)
  return None


def _taken_places(connection: Connection, item_id: int, now: float) -> int:
  """Counts the judgements that an item has, plus the people who are working on it."""
  items, leases = tables.items, tables.leases
  answered = sqlalchemy.select(items.c.answers).where(items.c.id == item_id)
  under_way = (
    sqlalchemy.select(sqlalchemy.func.count())
    .select_from(leases)
    .where(leases.c.item_id == item_id, leases.c.state == 'open', leases.c.expires > now)
  )
  return connection.scalars(answered).one() + connection.scalars(under_way).one()


def _is_for_everybody(item: Row) -> bool:
  """Says whether an item has no limit of people: a training item or a gold question."""
  return item.training or item.gold is not None


def _read_lease(connection: Connection, lease_id: int) -> Row:
  """Reads a lease; the caller knows that it exists."""
  query = sqlalchemy.select(tables.leases).where(tables.leases.c.id == lease_id)
  return connection.execute(query).one()
