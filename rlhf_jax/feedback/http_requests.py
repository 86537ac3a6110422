"""JSON over HTTP, for judges and rewards that are servers.

This module does only the transport: it checks addresses, reads keys, sends one
request, and computes the delay before a retry. What a reply means is decided by
the caller.
"""

import asyncio
from collections.abc import Mapping
import contextlib
import dataclasses
import email.utils
import json
import os
import random
import re
import time
from typing import Any

import httpx

from rlhf_jax import plain_text
from rlhf_jax.errors import UserError

_THIS_MACHINE = re.compile(r'localhost|127\.[\d.]+|::1|0\.0\.0\.0')
LONGEST_BODY = 16 * 2**20  # bytes of a reply
_LONGEST_HOST = 253  # characters of a host's name
_KEY = re.compile(r'[!#-\[\]-~]*')  # printable ASCII that needs no escapes in JSON


@dataclasses.dataclass(frozen=True)
class Reply:
  """The reply of a server, or the reason why there is none."""

  status: int  # of HTTP; 0 = there was no reply
  body: str  # of the reply; the reason where there was none
  pause: float = 0.0  # seconds to wait before the next request, as the server asks (Retry-After)

  @property
  def is_refusal(self) -> bool:
    """Whether the same request would be refused again, so that no retry helps."""
    # 408: timeout, 409: conflict, 429: too many requests.
    return 300 <= self.status < 500 and self.status not in (408, 409, 429)


def is_address(name: str) -> bool:
  """Tells whether a name in a config is a web address."""
  return name.startswith(('http://', 'https://'))


def check_address(url: Any, message: str) -> str:
  """Returns a server's address without a trailing slash.

  Args:
    url: an http or https URL without user, query or fragment.
    message: the error message for any other value.

  Raises:
    UserError: the URL is invalid. The URL itself is not shown, as it may hold a
      secret.
  """
  with contextlib.suppress(httpx.InvalidURL, TypeError, ValueError):
    address = httpx.URL(url)
    # A user, a query or a fragment may hold a secret, which must not appear in logs.
    has_secrets = address.userinfo or address.query or address.fragment
    host_fits = 0 < len(address.host) <= _LONGEST_HOST and '..' not in address.host
    port_fits = address.port is None or 0 < address.port < 65536
    if address.scheme in ('http', 'https') and host_fits and port_fits and not has_secrets:
      return str(address).rstrip('/')
  raise UserError(message)


def read_key(variable: str) -> str:
  """Returns the API key in an environment variable; '' where the variable is not set.

  Args:
    variable: its name; '' = no key.

  Raises:
    UserError: the key cannot be sent in a header. The key itself is not shown.
  """
  key = os.environ.get(variable, '').strip() if variable else ''
  if not _KEY.fullmatch(key):
    expected = 'a key of ASCII letters, digits and punctuation without spaces'
    raise UserError(f'{variable}: expected {expected}')
  return key


def open_client(address: str, key: str) -> httpx.AsyncClient:
  """Opens an HTTP client for one server.

  The environment's proxies are used, except for servers on this machine.

  Args:
    address: the server's URL.
    key: sent as a bearer token; '' = no key.
  """
  headers = {'content-type': 'application/json'}
  if key:
    headers['authorization'] = f'Bearer {key}'
  is_local = _THIS_MACHINE.fullmatch(httpx.URL(address).host) is not None
  return httpx.AsyncClient(headers=headers, timeout=None, trust_env=not is_local)


async def post_json(
  client: httpx.AsyncClient,
  address: str,
  request: Mapping[str, Any],
  timeout: float,
) -> Reply:
  """Posts a request and returns the reply, whatever its status.

  It does not raise where the server cannot be reached; the reply's status is 0
  then.

  Args:
    client: from `open_client`.
    address: the URL to post to.
    request: the body, sent as JSON.
    timeout: seconds for the whole call; httpx's own timeouts are for single
      reads.
  """
  try:
    async with asyncio.timeout(timeout):
      content = json.dumps(request).encode()
      async with client.stream('POST', address, content=content) as response:
        body = await _read_body(response)
  except TimeoutError:
    return Reply(status=0, body=f'no answer in {timeout:g} s')
  except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
    return Reply(status=0, body=plain_text.describe_error(error))
  if body is None:
    return Reply(status=0, body=f'its answer is longer than {LONGEST_BODY // 2**20} MiB')
  pause = _read_retry_after(response.headers.get('retry-after', ''))
  # JSON is UTF-8, whatever charset the server names.
  return Reply(response.status_code, body.decode('utf-8', 'replace'), max(0.0, pause))


async def _read_body(response: httpx.Response) -> bytes | None:
  """Reads the body of a reply; None where it is too long.

  It is decompressed piece by piece, so that a small body that stands for a
  large one costs no memory.
  """
  body = bytearray()
  async for piece in response.aiter_bytes():
    body += piece
    if len(body) > LONGEST_BODY:
      return None
  return bytes(body)


def _read_retry_after(header: str) -> float:
  """Returns the seconds in a Retry-After header, which holds a number or a date."""
  with contextlib.suppress(TypeError, ValueError, ArithmeticError):
    if header[:1].isdigit():
      return float(header)
    return email.utils.parsedate_to_datetime(header).timestamp() - time.time()
  return 0.0


def retry_delay(tries: int, pause: float, backoff: float, longest_wait: float) -> float:
  """Returns how many seconds to wait before the next retry: exponential backoff with jitter.

  Args:
    tries: retries so far.
    pause: seconds that the server asked to wait; 0 = it did not ask.
    backoff: seconds before the first retry, doubled for each further one.
    longest_wait: upper limit of the doubled delay, seconds.
  """
  wait = backoff
  if not pause:
    # The exponent is bounded so that the power stays a float.
    wait = min(longest_wait, backoff * 2 ** min(tries, 30))
  # Half of the delay is random, so that many clients do not retry at the same moment.
  return pause + wait * random.uniform(0.5, 1)


def hide_key(text: str, key: str) -> str:
  """Returns a text in which the key is replaced by '…'."""
  return text.replace(key, '…') if key else text


def excerpt(body: str, key: str) -> str:
  """Returns the beginning of a reply on one line, with the key hidden."""
  with contextlib.suppress(ValueError, RecursionError):
    # Decoding undoes JSON escapes, behind which a key could be overlooked.
    body = json.dumps(json.loads(body), ensure_ascii=False)
  return plain_text.one_line(hide_key(body, key))[:200] or 'nothing'
