"""The two screens of a chat: a terminal, and a pipe in which each line is a message."""

from collections.abc import Iterator, Mapping
import sys

import prompt_toolkit
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
import rich.box
import rich.console
import rich.live
import rich.panel
import rich.table
import rich.text

from rlhf_jax import plain_text

_MORE = '\\'  # at the end of a line: the message goes on in the next one
_NARROW = 72  # columns; below, two responses stand under each other
_QUESTION = 'Which is better? 1, 2, = (equal), or Enter for neither: '


class Terminal:
  """A terminal: lines that can be edited, streamed text, two columns."""

  def __init__(self) -> None:
    self._console = rich.console.Console(highlight=False)
    self._session: prompt_toolkit.PromptSession[str] = prompt_toolkit.PromptSession(
      history=InMemoryHistory(), key_bindings=_bind_keys(), multiline=True
    )

  def read_message(self) -> str | None:
    """Returns what the user has typed; Ctrl-C empties the line, Ctrl-D ends."""
    while True:
      try:
        return self._session.prompt('› ', prompt_continuation='  ')
      except KeyboardInterrupt:
        continue
      except EOFError:
        return None

  def read_vote(self) -> str:
    """Returns the user's choice; '' for none, as with Ctrl-C and Ctrl-D."""
    try:
      return prompt_toolkit.prompt(_QUESTION).strip()
    except (KeyboardInterrupt, EOFError):
      return ''

  def say(self, text: str) -> None:
    """Shows a line of the program itself, dimmed."""
    self._console.print(rich.text.Text(plain_text.visible(text), style='dim'))

  def show_help(self, commands: Mapping[str, str]) -> None:
    """Shows the commands as a table."""
    table = rich.table.Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in commands.items():
      table.add_row(rich.text.Text(name, style='bold'), rich.text.Text(text))
    self._console.print(table)

  def show_response(self, parts: Iterator[str]) -> None:
    """Writes a response part by part."""
    for part in parts:
      # Not through rich, which would wrap each part for itself.
      self._console.file.write(plain_text.visible(part))
      self._console.file.flush()
    self._console.file.write('\n\n')

  def show_pair(self, parts: Iterator[tuple[int, str]]) -> None:
    """Draws two responses beside each other, again with every part."""
    texts = ['', '']  # of 1 and 2
    drawing = rich.live.Live(
      self._draw(texts), console=self._console, refresh_per_second=12, transient=True
    )
    with drawing as live:
      for number, part in parts:
        texts[number] += plain_text.visible(part)
        live.update(self._draw(texts))
    # Once more as a whole: what grows is cut at the height of the terminal.
    self._console.print(self._draw(texts))

  def _draw(self, texts: list[str]) -> rich.table.Table:
    """Returns two panels, beside each other where there is room."""
    panels = [
      rich.panel.Panel(rich.text.Text(text), title=str(number), box=rich.box.ROUNDED)
      for number, text in enumerate(texts, start=1)
    ]
    grid = rich.table.Table.grid(expand=True, padding=0)
    # Below each other on a narrow terminal.
    if self._console.width < _NARROW:
      grid.add_column(ratio=1)
      for panel in panels:
        grid.add_row(panel)
      return grid
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    grid.add_row(*panels)
    return grid


def _bind_keys() -> KeyBindings:
  """Makes Enter send a message, and Alt-Enter or a backslash before Enter begin a new line."""
  keys = KeyBindings()

  @keys.add('enter')
  def send(event: KeyPressEvent) -> None:
    buffer = event.current_buffer
    if buffer.document.text_before_cursor.endswith(_MORE):
      buffer.delete_before_cursor()
      buffer.insert_text('\n')
    else:
      buffer.validate_and_handle()

  @keys.add('escape', 'enter')  # terminals send Alt as Escape
  def break_line(event: KeyPressEvent) -> None:
    event.current_buffer.insert_text('\n')

  return keys


class Pipe:
  """Plain text from stdin to stdout, with what the program itself says on stderr."""

  def read_message(self) -> str | None:
    """Returns the next line, joined with those after it while it ends with a backslash."""
    read = []
    for line in sys.stdin:  # ends where the pipe is closed
      text = line.rstrip('\r\n')
      if not text.endswith(_MORE):
        read.append(text)
        return '\n'.join(read)
      read.append(text.removesuffix(_MORE))
    return '\n'.join(read) if read else None

  def read_vote(self) -> str:
    """Returns the next line."""
    self.say(_QUESTION)
    return sys.stdin.readline().strip()

  def say(self, text: str) -> None:
    """Writes a line to stderr."""
    print(plain_text.visible(text), file=sys.stderr, flush=True)

  def show_help(self, commands: Mapping[str, str]) -> None:
    """Writes the commands to stderr."""
    for name, text in commands.items():
      self.say(f'{name:16}{text}')

  def show_response(self, parts: Iterator[str]) -> None:
    """Writes a response part by part."""
    for part in parts:
      print(plain_text.visible(part), end='', flush=True)
    print(flush=True)

  def show_pair(self, parts: Iterator[tuple[int, str]]) -> None:
    """Writes both responses when they are complete."""
    texts = ['', '']
    for number, part in parts:
      texts[number] += plain_text.visible(part)
    for number, text in enumerate(texts, start=1):
      print(f'{number}: {text}', flush=True)
