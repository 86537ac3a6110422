"""Limits of what a chat template, which is a foreign program, may use of time and memory.

Jinja's sandbox keeps templates away from files and other code, but not from loops
without end or texts that double in each turn. The classes here are used where
transformers compiles a template.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import ctypes
import functools
import re
import threading
import time
from typing import Any

SECONDS = 2.0  # of CPU time for one conversation, so that a pause of the process costs none
CHARACTERS = 20_000_000  # of a text, or items of a list, that a template builds

_WIDTH = re.compile(r'\d{7,}')  # in a format such as '%9999999d'


class TemplateLimitError(Exception):
  """A template uses too much time or memory."""


def bounded_environment(base: type) -> type:
  """Returns a sandbox of Jinja in which what a template builds has bounds.

  Args:
    base: jinja2.sandbox.ImmutableSandboxedEnvironment, which takes long to import.
  """

  class BoundedEnvironment(base):  # type: ignore[misc, valid-type]
    """The sandbox with bounds."""

    intercepted_binops = frozenset(['+', '*', '**', '%'])

    def __init__(self, *args: Any, **options: Any):
      super().__init__(*args, **options)
      # Filters of constants are computed when the template is compiled.
      filters: dict[str, Any] = self.filters
      filters.update({name: _bounded_filter(name, call) for name, call in filters.items()})

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
      """Joins the pieces of what a template writes."""
      return _join_pieces(pieces)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
      """Computes an operation of two values."""
      _check_operation(operator, left, right)
      return super().call_binop(context, operator, left, right)

    def call(self, context: Any, called: Any, *args: Any, **options: Any) -> Any:
      """Calls a function or method."""
      text = getattr(called, '__self__', None)
      if isinstance(text, str):
        _check_arguments(getattr(called, '__name__', ''), (text, *args), options)
      return super().call(context, called, *args, **options)

  return BoundedEnvironment


def bound_joins(template: Any) -> None:
  """Bounds the operator ~ and the macros of a compiled template."""
  names = template.root_render_func.__globals__
  if 'concat' in names:
    names['concat'] = _join_pieces
  for name in ('str_join', 'markup_join'):
    if name in names and not isinstance(names[name], functools.partial):  # not bounded yet
      names[name] = functools.partial(_join, names[name])


def _join_pieces(pieces: Iterable[str]) -> str:
  """Joins texts as long as they are not too many."""
  joined = []
  size = 0
  for piece in pieces:
    size += len(piece)
    _check_size(size)
    joined.append(piece)
  return ''.join(joined)


def _join(join: Callable[[Any], str], parts: Any) -> str:
  parts = list(parts)
  _check_size(sum(len(part) for part in parts if isinstance(part, str)))
  return join(parts)


def _check_operation(operator: str, left: Any, right: Any) -> None:
  """Refuses an operation whose result would be too large."""
  if operator == '+' and isinstance(left, (str, list)) and isinstance(right, (str, list)):
    _check_size(len(left) + len(right))
  elif operator == '*':
    for value, times in ((left, right), (right, left)):
      if isinstance(value, (str, list, tuple)) and isinstance(times, int):
        _check_size(len(value) * times)
    if isinstance(left, int) and isinstance(right, int):
      _check_size(left.bit_length() + right.bit_length())
  elif operator == '**' and isinstance(left, int) and isinstance(right, int):
    _check_size(left.bit_length() * right)
  elif operator == '%' and isinstance(left, str):
    _check_format(left)


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a filter that refuses arguments which would make its result too large."""

  @functools.wraps(function)  # keeps the marks by which Jinja passes a context
  def bounded(*args: Any, **options: Any) -> Any:
    _check_arguments(name, args, options)
    return function(*args, **options)

  return bounded


def _check_arguments(name: str, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
  """Refuses arguments of a method of texts or of a filter."""
  for value in (*args, *options.values()):
    if isinstance(value, int):
      _check_size(value)
  texts = [value for value in args if isinstance(value, str)]
  if name == 'replace' and len(texts) >= 3:
    text, old, new = texts[:3]
    _check_size(len(text) + (text.count(old) * len(new)))
  elif name == 'join':
    for value in args:
      if isinstance(value, (list, tuple)):
        between = max(map(len, texts), default=0)
        _check_size(sum(len(item) + between for item in value if isinstance(item, str)))
  elif name in ('format', 'format_map') and texts:
    _check_format(texts[0])


def _check_format(text: str) -> None:
  if _WIDTH.search(text):
    raise TemplateLimitError('it formats to a width of millions')


def _check_size(size: int) -> None:
  if size > CHARACTERS:
    raise TemplateLimitError(f'it builds a value of more than {CHARACTERS:,} characters')


class _Watch:
  """A thread that raises an exception in another one when its time is over."""

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._started = False
    self._thread = 0  # the identity of the thread that is watched
    self._clock = 0  # of the CPU time of that thread
    self._deadline = 0.0  # by that clock; 0 = none

  @contextlib.contextmanager
  def limit(self, seconds: float) -> Iterator[None]:
    """Raises TemplateLimitError in this thread if the block needs more seconds of CPU time."""
    if self._deadline:  # inside another block, or another thread renders
      yield
      return
    self._start()
    with self._lock:
      self._thread = threading.get_ident()
      self._clock = time.pthread_getcpuclockid(self._thread)
      self._deadline = time.clock_gettime(self._clock) + seconds
    try:
      yield
    finally:
      with self._lock:
        self._deadline = 0.0

  def _start(self) -> None:
    if not self._started:
      self._started = True
      threading.Thread(target=self._watch, name='template limits', daemon=True).start()

  def _watch(self) -> None:
    while True:
      time.sleep(0.5)
      with self._lock:
        if self._deadline and time.clock_gettime(self._clock) > self._deadline:
          self._deadline = 0.0
          ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(self._thread), ctypes.py_object(TemplateLimitError)
          )


time_limit = _Watch().limit
