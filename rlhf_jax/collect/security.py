"""Security: signed sessions, protection from cross-site requests, headers, rates.

What is checked where:
  host: only names that the server was started for, against DNS rebinding.
  session: a signed cookie, unreadable for scripts; it ends when the person's row says so.
  cross-site posts: the browser's own `Origin` and `Sec-Fetch-Site`, and a token in each form.
  frames, scripts and styles of others: forbidden by the headers of every answer.
"""

import hashlib
import hmac
import secrets
import threading
import time
import urllib.parse

import itsdangerous
from starlette.requests import Request
from starlette.responses import Response

from rlhf_jax.collect.database import Database
from rlhf_jax.collect.refusals import Refused

COOKIE = 'collect_session'
_SESSION_DAYS = 60
_MOST_FIELDS = 500  # of a form

HEADERS = {
  'Content-Security-Policy': (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
  ),
  'X-Content-Type-Options': 'nosniff',
  'X-Frame-Options': 'DENY',
  # an address can hold an invitation; with 'no-referrer' browsers hide `Origin` from us too
  'Referrer-Policy': 'same-origin',
  'Cross-Origin-Opener-Policy': 'same-origin',
  'Cross-Origin-Resource-Policy': 'same-origin',
  'Permissions-Policy': 'camera=(), microphone=(), geolocation=()',
}


def add_headers(response: Response, cached: bool = False) -> None:
  """Adds the headers that every answer has."""
  for name, value in HEADERS.items():
    response.headers[name] = value
  # what a person sees must not come up again for the next one at the same machine
  response.headers['Cache-Control'] = 'max-age=3600' if cached else 'no-store'


def start_session(
  store: Database, response: Response, person_id: int, session: str, secure: bool
) -> None:
  """Signs a person in: sets the cookie."""
  response.set_cookie(
    COOKIE,
    _session_signer(store).dumps([person_id, session]),
    max_age=_SESSION_DAYS * 86_400,
    httponly=True,
    samesite='lax',
    secure=secure,
  )


def read_session(store: Database, request: Request) -> tuple[int, str] | None:
  """Returns (number of the person, name of the session); None without a valid cookie."""
  cookie = request.cookies.get(COOKIE, '')
  try:
    person_id, session = _session_signer(store).loads(cookie, max_age=_SESSION_DAYS * 86_400)
  except (itsdangerous.BadData, TypeError, ValueError):
    return None
  return int(person_id), str(session)


def form_token(store: Database, session: str) -> str:
  """Returns the token that stands in every form of a session."""
  return hmac.new(store.secret.encode(), f'form {session}'.encode(), hashlib.sha256).hexdigest()


def check_form_token(store: Database, session: str, token: str) -> None:
  """Raises Refused for a form that does not come from a page of this session."""
  expected = form_token(store, session)
  # as bytes, since texts that are not ASCII cannot be compared in constant time
  if not secrets.compare_digest(expected.encode(), token.encode('utf-8', 'replace')):
    raise Refused(403, 'The form did not come from this page. Load the page again.')


def check_same_site(request: Request) -> None:
  """Raises Refused for a post that another site has caused; browsers say so themselves."""
  site = request.headers.get('sec-fetch-site', 'same-origin')
  origin = request.headers.get('origin')
  if site not in ('same-origin', 'none'):
    raise Refused(403, 'This request came from another site.')
  if origin is None:
    return  # no browser of today, or a program
  if urllib.parse.urlsplit(origin).netloc != request.headers.get('host'):
    raise Refused(403, 'This request came from another site.')


async def read_form(request: Request, largest: int) -> dict[str, list[str]]:
  """Reads a form; stops at the first byte too many.

  Raises:
    Refused: the body is too large, or no form of a page.
  """
  kind = request.headers.get('content-type', '').split(';')[0].strip()
  if kind != 'application/x-www-form-urlencoded':
    raise Refused(415, 'Expected the fields of a form.')
  body = bytearray()
  async for chunk in request.stream():
    body += chunk
    if len(body) > largest:
      raise Refused(413, f'The request is larger than {largest // 1024} KiB.')
  try:
    fields = urllib.parse.parse_qs(
      body.decode('ascii'),
      keep_blank_values=True,
      errors='strict',
      max_num_fields=_MOST_FIELDS,
    )
  except ValueError:
    raise Refused(400, 'The fields of the form cannot be read.') from None
  if any('\0' in value for values in fields.values() for value in values):
    raise Refused(400, 'The fields of the form hold a null character.')
  return fields


class Limiter:
  """Limits how often somebody asks: so many requests at once, refilled over a minute."""

  def __init__(self, per_minute: float):
    self._per_minute = per_minute
    self._lock = threading.Lock()
    self._left: dict[str, tuple[float, float]] = {}  # who → (requests left, at what time)

  def check(self, who: str) -> None:
    """Counts a request; raises Refused where there were too many."""
    now = time.monotonic()
    with self._lock:
      left, before = self._left.get(who, (self._per_minute, now))
      left = min(self._per_minute, left + (now - before) * self._per_minute / 60)
      if left < 1:
        raise Refused(429, 'Too many requests. Wait a moment and try again.')
      self._left[who] = (left - 1, now)
      if len(self._left) > 10_000:  # who is full again needs no entry
        self._left = {key: value for key, value in self._left.items() if now - value[1] < 60}


def _session_signer(store: Database) -> itsdangerous.URLSafeTimedSerializer:
  """Returns what signs sessions."""
  return itsdangerous.URLSafeTimedSerializer(store.secret, salt='session')
