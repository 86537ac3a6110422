"""The database of a collection: SQLite in the workdir, or PostgreSQL by URL.

There is one writer at a time, even among several servers, so that what a
transaction has read is still true when it writes. SQLite ensures this by `BEGIN
IMMEDIATE`, PostgreSQL by an advisory lock. Readers never wait. A transaction
that has ended without an error is on disk.
"""

from collections.abc import Iterator
import contextlib
from pathlib import Path
import secrets
import threading
from typing import Any

import sqlalchemy
from sqlalchemy import Connection, event

from rlhf_jax.collect import tables
from rlhf_jax.errors import UserError

FILE = 'collect.sqlite'
_BUSY_MILLISECONDS = 20_000  # how long a writer waits for another process's writer in SQLite
_LOCK_NUMBER = 0x726C6866  # id of PostgreSQL's advisory lock: a constant that only we use


class Database:
  """An open database; its methods may be called from any thread."""

  def __init__(self, engine: sqlalchemy.Engine):
    self.engine = engine
    # Writers of this process wait for this lock, instead of polling for that of SQLite.
    self._writer = threading.Lock()
    self.secret = ''  # signs links and cookies; set by `open_database`

  @contextlib.contextmanager
  def reading(self) -> Iterator[Connection]:
    """Provides a connection for reading, which sees one unchanging state of the database."""
    with self.engine.connect() as connection, connection.begin():
      yield connection

  @contextlib.contextmanager
  def writing(self) -> Iterator[Connection]:
    """Provides the only writing connection; commits when the block ends without an error."""
    with self._writer, self.engine.connect() as plain:
      connection = plain.execution_options(writing=True)
      with connection.begin():
        if self.engine.dialect.name == 'postgresql':
          connection.execute(sqlalchemy.select(sqlalchemy.func.pg_advisory_xact_lock(_LOCK_NUMBER)))
        yield connection

  def close(self) -> None:
    """Closes all connections."""
    self.engine.dispose()


def open_database(workdir: Path, url: str = '') -> Database:
  """Opens the database of a workdir, and creates it where there is none.

  Args:
    workdir: the folder of the collection, which is created where it is missing.
    url: the URL of the database, such as 'postgresql+psycopg://user@host/name';
      '' for SQLite in the workdir.

  Raises:
    UserError: the database cannot be opened, or it has the schema of another
      version.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  address = url or f'sqlite:///{workdir / FILE}'
  try:
    engine = _make_engine(address)
    database = Database(engine)
    with database.writing() as connection:
      tables.METADATA.create_all(connection)
      _add_fact(connection, 'schema', tables.SCHEMA)
      _add_fact(connection, 'secret', secrets.token_urlsafe(32))
      known = read_facts(connection)
  except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
    reason = str(error).splitlines()[0]
    raise UserError(f'--database: cannot open {_hide_password(address)}: {reason}') from None
  if known['schema'] != tables.SCHEMA:
    raise UserError(
      f'--database: expected schema {tables.SCHEMA}, got {known["schema"]}: '
      'another version of rlhf_jax has created this database'
    )
  database.secret = known['secret']
  return database


def read_facts(connection: Connection) -> dict[str, str]:
  """Reads the facts about the whole database: name → value."""
  rows = connection.execute(sqlalchemy.select(tables.facts))
  return {row.name: row.value for row in rows}


def insert(connection: Connection, table: sqlalchemy.Table, **values: Any) -> int:
  """Adds a row to a table, and returns its primary key."""
  result = connection.execute(sqlalchemy.insert(table).values(**values))
  key = result.inserted_primary_key
  assert key is not None, 'the table has a primary key'
  return key[0]


def _add_fact(connection: Connection, name: str, value: str) -> None:
  """Stores a fact, unless one of this name is stored already."""
  if name not in read_facts(connection):
    insert(connection, tables.facts, name=name, value=value)


def _make_engine(address: str) -> sqlalchemy.Engine:
  """Makes an engine, whose pool has a connection for each of the server's threads."""
  url = sqlalchemy.make_url(address)
  engine = sqlalchemy.create_engine(url, pool_size=8, max_overflow=56)
  if url.get_backend_name() == 'sqlite':
    event.listen(engine, 'connect', _prepare_sqlite)
    event.listen(engine, 'begin', _begin_sqlite)
  return engine


def _prepare_sqlite(connection: Any, record: Any) -> None:
  """Sets up a new connection to SQLite."""
  del record
  connection.isolation_level = None  # transactions begin where `_begin_sqlite` says
  connection.execute(f'PRAGMA busy_timeout = {_BUSY_MILLISECONDS}')
  connection.execute('PRAGMA journal_mode = WAL')  # readers do not wait for the writer
  connection.execute('PRAGMA synchronous = FULL')  # a commit survives a power cut
  connection.execute('PRAGMA foreign_keys = ON')


def _begin_sqlite(connection: Connection) -> None:
  """Begins a transaction; a writing one takes the lock before it reads."""
  writes = connection.get_execution_options().get('writing', False)
  connection.exec_driver_sql('BEGIN IMMEDIATE' if writes else 'BEGIN')


def _hide_password(address: str) -> str:
  """Returns an address without its password, for error messages."""
  try:
    return sqlalchemy.make_url(address).render_as_string(hide_password=True)
  except sqlalchemy.exc.ArgumentError:
    return 'the URL'
