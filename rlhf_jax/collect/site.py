"""The state that all pages share (`Site`), and the request that a page answers (`Visit`)."""

from collections.abc import Callable
import dataclasses
import hashlib
import logging
from pathlib import Path
import time
from typing import Any

import jinja2
import sqlalchemy
from sqlalchemy import Row
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from rlhf_jax.collect import answers, database, rendering, security, tables
from rlhf_jax.collect import settings as settings_file
from rlhf_jax.collect.conversation import Replier
from rlhf_jax.collect.database import Database
from rlhf_jax.collect.refusals import Refused
from rlhf_jax.collect.settings import Settings

_NO_GUIDELINES = 'There are no written guidelines yet. Prefer what helps the person who asks.'
_NO_CONSENT = (
  'What you write and choose here is stored under a pseudonym and used to train and to '
  'study language models. You may stop at any time, and you can delete all of it '
  'yourself under *My data*. Texts may come from language models: they can be wrong, '
  'and some can be unpleasant.'
)


@dataclasses.dataclass
class Site:
  """The state that all pages share: database, settings, templates, rate limits, caches."""

  workdir: Path
  store: Database
  settings: Settings
  environment: jinja2.Environment
  people_limit: security.Limiter  # request rate of each person who is signed in
  address_limit: security.Limiter  # request rate of each address where nobody is signed in
  secure: bool  # the site is served over https; browsers then send the cookies only over https
  count_tokens: Callable[[str], int] | None  # None: pages count characters instead
  replier: Replier | None  # the models that reply in conversations; None: no conversations
  # versions of the guidelines that are known to be in the database
  versions: set[str] = dataclasses.field(default_factory=set)
  # cache: the last report of the lead's page, with the state of the judgements it describes
  reports: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def tasks(self) -> tuple[str, ...]:
    """The tasks that this site can give to people; `converse` needs a replier."""
    tasks = ('rank', 'demonstrate', 'edit')
    return tasks if self.replier is None else (*tasks, 'converse')

  def read_page(self, name: str) -> str:
    """Reads a Markdown file that the lead wrote; returns a default text where it is absent."""
    path = self.workdir / name
    if path.exists():
      return path.read_text('utf-8', errors='replace')
    return _NO_GUIDELINES if name == settings_file.GUIDELINES else _NO_CONSENT

  def guidelines_version(self) -> str:
    """Returns the version (a hash) of the current guidelines; stores new ones in the database."""
    text = self.read_page(settings_file.GUIDELINES)
    version = hashlib.sha256(text.encode()).hexdigest()[:12]
    if version in self.versions:
      return version
    table = tables.guidelines
    known = sqlalchemy.select(table).where(table.c.version == version)
    with self.store.reading() as connection:
      if connection.execute(known).first() is not None:
        self.versions.add(version)
        return version
    with self.store.writing() as connection:
      if connection.execute(known).first() is None:
        database.insert(connection, table, version=version, text=text, created=time.time())
    return version


@dataclasses.dataclass
class Visit:
  """One request, with the person who makes it.

  Attributes:
    site: the state that all pages share.
    request: the request, from Starlette.
    person: the row of the person who is signed in; None where nobody is.
    form: the fields of a POST request, name → values; empty for a GET request.
  """

  site: Site
  request: Request
  person: Any
  form: dict[str, list[str]]

  def field(self, name: str) -> str:
    """Returns the first value of a form field; '' where the field is absent."""
    return answers.first(self.form, name)

  def path(self, name: str) -> str:
    """Returns a parameter of the address's path, such as `token` of /item/{token}."""
    return str(self.request.path_params[name])

  def number(self, name: str) -> int:
    """Reads a whole number from the address or else from the form.

    Raises:
      Refused: the value is not a number of at most 9 digits.
    """
    text = str(self.request.path_params.get(name, self.field(name)))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
      raise Refused(400, f'{name}: expected a number.')
    return int(text)

  def show(self, template: str, status: int = 200, **values: Any) -> Response:
    """Renders a template as the response."""
    token = ''
    if self.person is not None:
      token = security.form_token(self.site.store, self.person.session)
    text = self.site.environment.get_template(template).render(
      settings=self.site.settings,
      person=self.person,
      form_token=token,
      path=self.request.url.path,
      **values,
    )
    return HTMLResponse(text.encode('utf-8', 'replace'), status_code=status)

  def redirect(self, address: str) -> Response:
    """Redirects the browser to another page (HTTP 303, as after a POST)."""
    return RedirectResponse(address, status_code=303)


def open_site(
  workdir: Path,
  store: Database,
  secure: bool = False,
  replier: Replier | None = None,
  count_tokens: Callable[[str], int] | None = None,
) -> Site:
  """Reads the settings of a workdir and makes its site.

  Args:
    workdir: the folder with the settings and the guidelines.
    store: the database.
    secure: whether the site is served over https.
    replier: the models that reply in conversations; None for no conversations.
    count_tokens: text → number of tokens; None to count characters.

  Raises:
    UserError: the settings cannot be read.
  """
  settings = settings_file.read_settings(workdir)
  return Site(
    workdir=workdir,
    store=store,
    settings=settings,
    environment=rendering.make_environment(),
    people_limit=security.Limiter(settings.requests_per_minute),
    # ten times as many, because a whole office may share one address
    address_limit=security.Limiter(10 * settings.requests_per_minute),
    secure=secure,
    count_tokens=count_tokens,
    replier=replier,
  )


def find_person(site: Site, request: Request) -> Row | None:
  """Returns the row of the person who is signed in; None where nobody is."""
  session = security.read_session(site.store, request)
  if session is None:
    return None
  person_id, name = session
  table = tables.people
  query = sqlalchemy.select(table).where(table.c.id == person_id)
  with site.store.reading() as connection:
    person = connection.execute(query).one_or_none()
  if person is None or person.blocked or person.session != name:
    return None
  return person


def show_refusal(site: Site, request: Request, refused: Refused) -> Response:
  """Renders the reason why a request was refused, as a page or as plain text."""
  wants_page = 'text/html' in request.headers.get('accept', 'text/html')
  logging.info('%s %s: %d', request.method, request.url.path, refused.status)
  if not wants_page:
    return Response(refused.message, refused.status, media_type='text/plain')
  visit = Visit(site, request, None, {})
  return visit.show('message.html', refused.status, title='Not done', message=refused.message)
