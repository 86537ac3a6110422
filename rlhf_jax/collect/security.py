"""Security: signed sessions, protection from cross-site requests, headers, rate limits.

The protections are:
  host: only the host names that the server was started for are served, against DNS rebinding.
  session: a signed cookie that scripts cannot read. A session ends when the name of the session
    in the person's row changes, or when the person is blocked.
  cross-site posts: `Origin` and `Sec-Fetch-Site`, which browsers set themselves,
    are checked, and so is a token in each form.
  frames, and scripts and styles of other sites: the headers of every response forbid them.
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
_MOST_FIELDS = 500  # largest number of fields of a form

HEADERS = {
  'Content-Security-Policy': (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
  ),
  'X-Content-Type-Options': 'nosniff',
  'X-Frame-Options': 'DENY',
  # An address can hold an invitation, so other sites must not see it. With
  # 'no-referrer' browsers would hide `Origin` from this server too.
  'Referrer-Policy': 'same-origin',
  'Cross-Origin-Opener-Policy': 'same-origin',
  'Cross-Origin-Resource-Policy': 'same-origin',
  'Permissions-Policy': 'camera=(), microphone=(), geolocation=()',
}


def add_headers(response: Response, cached: bool = False) -> None:
  """Adds the headers that every response has; `cached` ones may be kept for an hour."""
  for name, value in HEADERS.items():
    response.headers[name] = value
  # the next person at the same computer must not see this person's pages
  response.headers['Cache-Control'] = 'max-age=3600' if cached else 'no-store'


def start_session(
  store: Database, response: Response, person_id: int, session: str, secure: bool
) -> None:
  """Signs a person in by setting the session cookie."""
  response.set_cookie(
    COOKIE,
    _session_signer(store).dumps([person_id, session]),
    max_age=_SESSION_DAYS * 86_400,
    httponly=True,
    samesite='lax',
    secure=secure,
  )


def read_session(store: Database, request: Request) -> tuple[int, str] | None:
  """Returns (id of the person, name of the session); None without a valid cookie."""
  cookie = request.cookies.get(COOKIE, '')
  try:
    person_id, session = _session_signer(store).loads(cookie, max_age=_SESSION_DAYS * 86_400)
  except (itsdangerous.BadData, TypeError, ValueError):
    return None
  return int(person_id), str(session)


def form_token(store: Database, session: str) -> str:
  """Returns the token that every form of a session contains."""
  return hmac.new(store.secret.encode(), f'form {session}'.encode(), hashlib.sha256).hexdigest()


def check_form_token(store: Database, session: str, token: str) -> None:
  """Checks the token of a form.

  Raises:
    Refused: the form does not come from a page of this session.
  """
  expected = form_token(store, session)
  # as bytes: compare_digest takes no text that is not ASCII
  if not secrets.compare_digest(expected.encode(), token.encode('utf-8', 'replace')):
    raise Refused(403, 'The form did not come from this page. Load the page again.')


def check_same_site(request: Request) -> None:
  """Checks that a POST request comes from a page of this site, by the browser's headers.

  Raises:
    Refused: another site caused the request.
  """
  site = request.headers.get('sec-fetch-site', 'same-origin')
  origin = request.headers.get('origin')
  if site not in ('same-origin', 'none'):
    raise Refused(403, 'This request came from another site.')
  if origin is None:
    return  # not sent by a current browser, but by a program, which no other site controls
  if urllib.parse.urlsplit(origin).netloc != request.headers.get('host'):
    raise Refused(403, 'This request came from another site.')


async def read_form(request: Request, largest: int) -> dict[str, list[str]]:
  """Reads the fields of a form from the body of a request.

  Args:
    request: the POST request.
    largest: the largest number of bytes; reading stops as soon as there are
      more.

  Returns:
    Name of a field → its values.

  Raises:
    Refused: the body is too large, or is not a URL-encoded form.
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
  """A rate limit (token bucket) for each client: a number of requests, refilled in a minute."""

  def __init__(self, per_minute: float):
    self._per_minute = per_minute
    self._lock = threading.Lock()
    self._left: dict[str, tuple[float, float]] = {}  # who → (requests left, at what time)

  def check(self, who: str) -> None:
    """Counts a request of a client.

    Raises:
      Refused: the client has sent too many requests.
    """
    now = time.monotonic()
    with self._lock:
      left, before = self._left.get(who, (self._per_minute, now))
      left = min(self._per_minute, left + (now - before) * self._per_minute / 60)
      if left < 1:
        raise Refused(429, 'Too many requests. Wait a moment and try again.')
      self._left[who] = (left - 1, now)
      if len(self._left) > 10_000:  # clients that are idle for a minute need no entry any more
        self._left = {key: value for key, value in self._left.items() if now - value[1] < 60}


def _session_signer(store: Database) -> itsdangerous.URLSafeTimedSerializer:
  """Returns the signer of session cookies."""
  return itsdangerous.URLSafeTimedSerializer(store.secret, salt='session')
