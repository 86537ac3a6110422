"""Makes foreign text harmless to terminals, logs and error messages.

Prompts, responses and other people's files may hold escape sequences that move the cursor or set a
terminal's title, and half surrogate pairs, which no stream in UTF-8 can write.
"""

import re

# Controls but for tab and line feed, the right-to-left overrides, half surrogate pairs.
_HIDDEN = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]')


def visible(text: str) -> str:
  r"""Returns a text in which what a terminal would obey or refuse is an escape sequence.

  >>> visible('a\x1b[31mb\ud800')
  'a\\x1b[31mb\\ud800'
  """
  return _HIDDEN.sub(_escape, text)


def one_line(text: str, limit: int = 0) -> str:
  r"""Returns a text as one visible line, its middle left out where it is longer than `limit`.

  >>> one_line('a\n  b')
  'a b'
  """
  line = visible(' '.join(text.split()))
  if limit and len(line) > limit:
    line = f'{line[: limit // 2]} … {line[-limit // 2 :]}'
  return line


def describe_error(error: BaseException | None, limit: int = 300) -> str:
  """Returns the kind and text of an error in one line of limited length."""
  name = type(error).__name__
  text = one_line(str(error), limit)
  return f'{name}: {text}' if text else name


def _escape(match: re.Match[str]) -> str:
  code = ord(match.group())
  return f'\\x{code:02x}' if code < 256 else f'\\u{code:04x}'
