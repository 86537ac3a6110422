"""The templates of the pages, and the rendering of untrusted text as safe HTML.

Texts of models and of people may contain HTML, scripts, terminal escapes, or
characters that reverse the direction of writing. Markdown is rendered with HTML
turned off, and the result is sanitised once more; control characters are
replaced by visible symbols.
"""

from pathlib import Path
import re

import jinja2
import markdown_it
import markupsafe
import nh3

_ROOT = Path(__file__).parent
_MARKDOWN = markdown_it.MarkdownIt('commonmark', {'html': False}).enable('table')

# No links and no images, so that a text can neither lead to another site nor load from one.
_TAGS = set(
  'p br hr h1 h2 h3 h4 h5 h6 strong em code pre blockquote ul ol li '
  'table thead tbody tr th td'.split()
)
_CONTROL = re.compile(r'[\x00-\x08\x0b-\x1f\x7f]')  # all of ASCII's except tab and newline
# C1 controls, characters that set the direction of writing, zero-width
# characters, surrogates
_HIDDEN = re.compile(
  '[\x80-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]'
)


def render_markdown(text: str) -> markupsafe.Markup:
  """Renders an untrusted Markdown text as HTML without scripts, links or images.

  >>> print(render_markdown('**a** <script>b</script>').strip())
  <p><strong>a</strong> &lt;script&gt;b&lt;/script&gt;</p>
  """
  rendered = _MARKDOWN.render(show_hidden(text))
  return markupsafe.Markup(nh3.clean(rendered, tags=_TAGS, attributes={}))


def show_hidden(text: str) -> str:
  r"""Replaces control characters and invisible characters of a text by visible symbols.

  >>> show_hidden('a\x1b[31m')
  'a␛[31m'
  """
  text = text.replace('\r\n', '\n')
  text = _CONTROL.sub(_control_picture, text)
  return _HIDDEN.sub(_code_point, text)


def make_environment() -> jinja2.Environment:
  """Returns the environment of the templates, which escapes every inserted value."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_ROOT / 'templates'),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters['markdown'] = render_markdown
  environment.filters['visible'] = show_hidden
  environment.filters['seconds'] = format_seconds
  environment.filters['percent'] = format_percent
  return environment


def format_seconds(value: float) -> str:
  """Formats a duration in minutes and seconds.

  >>> format_seconds(75)
  '1 min 15 s'
  """
  minutes, seconds = divmod(round(value), 60)
  return f'{minutes} min {seconds} s' if minutes else f'{seconds} s'


def format_percent(value: float) -> str:
  """Formats a share as a percentage; '–' for NaN.

  >>> format_percent(0.123)
  '12%'
  """
  return '–' if value != value else f'{100 * value:.0f}%'


def _control_picture(match: re.Match[str]) -> str:
  """Returns the Unicode symbol that depicts a control character, such as ␛ for escape."""
  code = ord(match.group())
  return '␡' if code == 0x7F else chr(0x2400 + code)


def _code_point(match: re.Match[str]) -> str:
  """Returns the code point of an invisible character as text, such as ⟨U+200B⟩."""
  return f'⟨U+{ord(match.group()):04X}⟩'
