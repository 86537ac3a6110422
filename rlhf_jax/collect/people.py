"""People: invitations, the people they admit, and the deletion of a person's data."""

from collections.abc import Mapping, Sequence
import secrets
import time

import itsdangerous
import sqlalchemy
from sqlalchemy import Connection, Row

from rlhf_jax.collect import database, items, tables
from rlhf_jax.collect.database import Database
from rlhf_jax.collect.refusals import Refused
from rlhf_jax.errors import UserError

# Each role may do everything that the roles before it may do.
ROLES = ('annotator', 'reviewer', 'lead')
DAY = 86_400.0  # seconds

# URL parameters in which crowd platforms pass their id of a person.
_PERSON_PARAMETERS = ('PROLIFIC_PID', 'workerId', 'participant', 'external_id')
_FIRST_LEAD = 'printed at the start'  # label of the first lead's invitation
_MOST_PARAMETERS = 12  # URL parameters that are stored
_LONGEST_PARAMETER = 200  # characters of each that are stored


def invite(
  connection: Connection,
  role: str,
  places: int = 1,
  days: float = 14.0,
  label: str = '',
) -> int:
  """Makes an invitation.

  Args:
    connection: a connection of a writing transaction.
    role: one of ROLES.
    places: the number of people that the invitation admits. With one place it
      is a personal link, which signs the same person in again.
    days: the days until it expires.
    label: a text for the lead's list of invitations; the invited people do not
      see it.

  Returns:
    The id of the invitation.

  Raises:
    UserError: the role is unknown, or a number is out of its range.
  """
  if role not in ROLES:
    raise UserError(f'--role: expected one of {", ".join(ROLES)}, got {role!r}')
  if places < 1:
    raise UserError(f'--places: expected 1 or more, got {places}')
  if not 0 < days <= 3650:
    raise UserError(f'--days: expected more than 0 and at most 3650, got {days}')
  now = time.time()
  return database.insert(
    connection,
    tables.invitations,
    role=role,
    label=label,
    expires=now + days * DAY,
    places=places,
    revoked=False,
    created=now,
  )


def lead_invitation(connection: Connection) -> int:
  """Returns the id of the first lead's personal invitation; makes one where there is none."""
  table = tables.invitations
  query = sqlalchemy.select(table.c.id).where(
    table.c.role == 'lead',
    table.c.places == 1,
    table.c.label == _FIRST_LEAD,
    ~table.c.revoked,
    table.c.expires > time.time(),
  )
  known = connection.scalars(query).first()
  if known is not None:
    return known
  return invite(connection, 'lead', days=365.0, label=_FIRST_LEAD)


def make_token(store: Database, invitation_id: int) -> str:
  """Returns the signed token in the link of an invitation."""
  return _signer(store).dumps(invitation_id)


def open_invitation(store: Database, connection: Connection, token: str) -> Row:
  """Returns the invitation that belongs to the token of a link.

  Raises:
    Refused: the link is forged, revoked or expired.
  """
  try:
    invitation_id = _signer(store).loads(token)
  except itsdangerous.BadSignature:
    raise Refused(403, 'This invitation link is not valid. Ask for a new one.') from None
  table = tables.invitations
  query = sqlalchemy.select(table).where(table.c.id == invitation_id)
  invitation = connection.execute(query).one_or_none()
  if invitation is None or invitation.revoked:
    raise Refused(403, 'This invitation has been withdrawn. Ask for a new one.')
  if invitation.expires < time.time():
    raise Refused(403, 'This invitation has expired. Ask for a new one.')
  return invitation


def accept(connection: Connection, invitation: Row, parameters: Mapping[str, str]) -> Row:
  """Admits a person who has consented, or finds the person if admitted before.

  A personal link always belongs to the same person. With a link for several
  people, a person is recognised by the id that a crowd platform passes.

  Args:
    connection: a connection of a writing transaction.
    invitation: the invitation, from `open_invitation`.
    parameters: the URL parameters that a crowd platform adds to the link.

  Returns:
    The row of the person.

  Raises:
    Refused: all places are taken, or the person was blocked.
  """
  external = _external_name(parameters)
  table = tables.people
  of_invitation = sqlalchemy.select(table).where(table.c.invitation_id == invitation.id)
  admitted = connection.execute(of_invitation).all()
  for person in admitted:
    returns = invitation.places == 1 or (external and person.external == external)
    if not returns:
      continue
    if person.blocked:
      raise Refused(403, 'This access has been closed.')
    return person
  if len(admitted) >= invitation.places:
    raise Refused(403, 'All places of this invitation are taken.')
  person_id = database.insert(
    connection,
    table,
    pseudonym=f'p-{secrets.token_hex(5)}',
    role=invitation.role,
    invitation_id=invitation.id,
    external=external,
    parameters=_kept_parameters(parameters),
    session=secrets.token_urlsafe(16),
    consented=time.time(),
    blocked=False,
    created=time.time(),
  )
  return read_person(connection, person_id)


def read_person(connection: Connection, person_id: int) -> Row:
  """Reads the row of a person, who must exist."""
  query = sqlalchemy.select(tables.people).where(tables.people.c.id == person_id)
  return connection.execute(query).one()


def list_people(connection: Connection) -> Sequence[Row]:
  """Lists all people in the order in which they joined."""
  return connection.execute(sqlalchemy.select(tables.people).order_by(tables.people.c.id)).all()


def list_invitations(connection: Connection) -> Sequence[Row]:
  """Lists the invitations that are open, the newest first."""
  table = tables.invitations
  query = (
    sqlalchemy.select(table)
    .where(~table.c.revoked, table.c.expires > time.time())
    .order_by(table.c.id.desc())
  )
  return connection.execute(query).all()


def revoke(connection: Connection, invitation_id: int) -> None:
  """Withdraws an invitation; people whom it has admitted keep their access."""
  table = tables.invitations
  update = sqlalchemy.update(table).where(table.c.id == invitation_id)
  connection.execute(update.values(revoked=True))


def block(connection: Connection, person_id: int) -> None:
  """Blocks a person: ends the person's access, and keeps the judgements."""
  table = tables.people
  update = sqlalchemy.update(table).where(table.c.id == person_id)
  connection.execute(update.values(blocked=True, session=secrets.token_urlsafe(16)))


def delete_data(connection: Connection, person_id: int) -> int:
  """Deletes everything that a person has given, and everything a platform passed about them.

  Items whose judgements are deleted are given to other people again. The
  person's row is kept without its data, so that nobody else gets the same id.

  Returns:
    The number of deleted judgements.
  """
  mine = tables.judgements.c.person_id == person_id
  judgement_ids = sqlalchemy.select(tables.judgements.c.id).where(mine)
  lease_ids = sqlalchemy.select(tables.leases.c.id).where(tables.leases.c.person_id == person_id)
  _forget_answers(connection, person_id)
  revisions = tables.revisions
  connection.execute(
    sqlalchemy.delete(revisions).where(revisions.c.judgement_id.in_(judgement_ids))
  )
  # an amendment refers to the judgement that it amends; without the references any order will do
  connection.execute(sqlalchemy.update(tables.judgements).where(mine).values(amends=None))
  deleted = connection.execute(sqlalchemy.delete(tables.judgements).where(mine)).rowcount
  for table in (tables.drafts, tables.turns):
    connection.execute(sqlalchemy.delete(table).where(table.c.lease_id.in_(lease_ids)))
  for table in (tables.leases, tables.flags):
    connection.execute(sqlalchemy.delete(table).where(table.c.person_id == person_id))
  people = tables.people
  connection.execute(
    sqlalchemy.update(people)
    .where(people.c.id == person_id)
    .values(
      pseudonym=f'deleted-{secrets.token_hex(5)}',
      external='',
      parameters={},
      session=secrets.token_urlsafe(16),
      blocked=True,
    )
  )
  return deleted


def at_least(role: str, needed: str) -> bool:
  """Says whether a role may do what requires the role `needed`."""
  return ROLES.index(role) >= ROLES.index(needed)


def _forget_answers(connection: Connection, person_id: int) -> None:
  """Subtracts a person's complete answers from the items' numbers of answers."""
  # by leases, not by judgements: a conversation counts once, however many turns were judged
  answered = sqlalchemy.select(tables.leases.c.item_id).where(
    tables.leases.c.person_id == person_id,
    tables.leases.c.state == 'answered',
  )
  for item_id in connection.scalars(answered).all():
    items.count_answer(connection, item_id, -1)


def _signer(store: Database) -> itsdangerous.URLSafeSerializer:
  """Returns the signer of invitation links."""
  return itsdangerous.URLSafeSerializer(store.secret, salt='invitation')


def _external_name(parameters: Mapping[str, str]) -> str:
  """Returns a platform's id of a person as 'parameter=id'; '' where there is none."""
  for name in _PERSON_PARAMETERS:
    if parameters.get(name):
      return f'{name}={parameters[name]}'[:_LONGEST_PARAMETER]
  return ''


def _kept_parameters(parameters: Mapping[str, str]) -> dict[str, str]:
  """Returns the parameters of a link that are stored, limited in number and length."""
  kept = list(parameters.items())[:_MOST_PARAMETERS]
  return {name[:_LONGEST_PARAMETER]: value[:_LONGEST_PARAMETER] for name, value in kept}
