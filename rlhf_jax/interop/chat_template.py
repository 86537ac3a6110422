"""Renders chat templates with transformers' own renderer, and locates responses in the text.

What a template writes around a response depends on the conversation: on the role
before it, on thinking in it, on the number of the turn. So the real conversation
is rendered; where the response is in that text is found by rendering it once more
with a stand-in and comparing the two texts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import datetime
import functools
import importlib
import os
import re
from typing import Any, NamedTuple

from rlhf_jax.errors import UserError
from rlhf_jax.interop import template_limits

Message = Mapping[str, Any]  # `role`, `content` and whatever else the template reads
Messages = Sequence[Message]
Tools = Sequence[Any] | None  # JSON schemas of functions

# Private-use characters. One that does not occur in a conversation can stand for
# a response in it, or for a special token's string that a person wrote.
STAND_INS = range(0xF0000, 0xFFFFE)

_now: datetime.datetime | None = None  # what `strftime_now` formats; fixed at its first use


def fix_date(now: datetime.datetime) -> None:
  """Fixes the date that templates see as today's, for this process.

  A run that is continued on another day must render the same prompts as before.
  """
  global _now
  _now = now


def current_date() -> datetime.datetime:
  """Returns the date that templates see, the same during the whole process."""
  global _now
  if _now is None:
    _now = datetime.datetime.now()
  return _now


class Frame(NamedTuple):
  """What a template writes around a response in the plainest conversation."""

  tail: str = ''  # what follows the question: the end of its turn and the generation prompt
  prefix: str = ''  # between the generation prompt and the response; ' ' after 'Assistant:'
  suffix: str = ''  # between the response and the mark that ends the turn
  end: str | None = None  # that mark, a special token; None where there is none
  rest: str = ''  # all that follows the response
  problem: str = ''  # why the template cannot be used; '' if no reason is known


class Turn(NamedTuple):
  """Where a response stands in the text of a conversation.

  `text[begin:end]` is the response with what the template writes around it, from
  the end of the generation prompt to the end of the turn.
  """

  text: str
  begin: int
  end: int
  marked: bool  # whether the template marks the end by a special token


class ChatTemplate:
  """A chat template with the special tokens that it may name.

  Attributes:
    source: the template's Jinja source.
  """

  def __init__(self, source: str, variables: Mapping[str, str], marks: Iterable[str]):
    """Keeps the template; nothing is compiled yet.

    Args:
      source: the Jinja source.
      variables: the template's name of a special token, such as 'bos_token' → the token.
      marks: all special tokens of the tokenizer.
    """
    self.source = source
    self._variables = dict(variables)
    self._marks = compile_pattern(marks)
    self._over_limit = ''  # what was said when it used too much time or memory

  def render(
    self,
    messages: Messages,
    tools: Tools = None,
    *,
    add_generation_prompt: bool = False,
  ) -> str:
    """Renders a conversation, as `apply_chat_template` of transformers does.

    Args:
      messages: the conversation.
      tools: functions that the model may call.
      add_generation_prompt: whether the assistant's turn is opened at the end.

    Raises:
      UserError: the template is not valid Jinja, or refuses these messages.
    """
    # Keys that are null are dropped: many templates would print them as 'None'.
    plain = [
      {key: value for key, value in message.items() if value is not None} for message in messages
    ]
    if self._over_limit:  # seconds each time, for every conversation
      raise UserError(self._over_limit)
    _renderer()  # the import is not the template's fault
    try:
      with template_limits.time_limit(template_limits.SECONDS):
        render = _compile(self.source)
        return render(plain, tools, add_generation_prompt=add_generation_prompt, **self._variables)
    except template_limits.TemplateLimitError as error:
      reason = str(error) or f'one conversation took more than {template_limits.SECONDS:.0f} s'
      self._over_limit = f'chat template: {reason}'
      raise UserError(self._over_limit) from None
    except Exception as error:  # whatever foreign code raises
      reason = ' '.join(str(error).split()) or type(error).__name__
      raise UserError(f'chat template: {reason}') from None

  @functools.cached_property
  def frame(self) -> Frame:
    """What the template writes around a response to a single question.

    Its `end` is the token that ends a sampled response. If the template refuses
    the question, a conversation with a system message is tried; if it refuses
    that too, the frame is empty.
    """
    question, answer = chr(STAND_INS[0]), chr(STAND_INS[1])
    ask = {'role': 'user', 'content': question}
    for before in ([ask], [{'role': 'system', 'content': 'Be brief.'}, ask]):
      try:
        prompt = self.render(before, add_generation_prompt=True)
        whole = self.render([*before, {'role': 'assistant', 'content': answer}])
      except UserError:
        continue
      if question not in prompt or answer not in whole:
        return Frame(problem='chat template: it does not print the messages')
      head, _, rest = whole.rpartition(answer)
      tail = prompt.rpartition(question)[2]
      end = self._find_end(rest, tail)
      return Frame(
        tail=tail,
        prefix=head[len(prompt) :] if head.startswith(prompt) else '',
        suffix=rest[: end.start()] if end else _closing_text(rest, tail),
        end=end.group() if end else None,
        rest=rest,
      )
    return Frame()

  def prompt(self, messages: Messages, tools: Tools = None) -> str:
    """Renders a conversation up to where the assistant's response begins."""
    if self.frame.problem:
      raise UserError(self.frame.problem)
    if tools and 'tools' not in self.source:
      raise UserError('chat template: it does not print tools, which this conversation has')
    return self.render(messages, tools, add_generation_prompt=True)

  def last_turn(self, messages: Messages, tools: Tools = None) -> Turn:
    """Renders a conversation that ends with a response, and locates the response.

    Args:
      messages: the conversation; the assistant speaks last.
      tools: functions that the model may call.

    Returns:
      The text up to the end of the response's turn. What the template writes behind it, such as
      a line's end, is left out.
    """
    *before, response = messages
    prompt = self.prompt(before, tools)
    whole = self.render(messages, tools)
    content = response.get('content') or ''
    frame = self.frame
    # Most templates write the same around every response; comparing the texts confirms it.
    if whole == prompt + frame.prefix + content + frame.rest and not response.get('tool_calls'):
      start, stop = len(prompt + frame.prefix), len(whole) - len(frame.rest)
    else:
      start, stop = self._find_content(whole, messages, len(before), tools)
    begin = self._find_begin(whole, prompt, start, before, tools)
    end = self._find_end(whole[stop:], frame.tail, response)
    if end is not None:
      return Turn(whole[: stop + end.end()], begin, stop + end.end(), True)
    closing = _closing_text(whole[stop:], frame.tail)
    return Turn(whole[:stop] + closing, begin, stop + len(closing), False)

  def all_turns(self, messages: Messages, tools: Tools = None) -> list[Turn]:
    """Locates every response of a conversation that ends with one.

    Args:
      messages: the conversation; the assistant speaks last.
      tools: functions that the model may call.

    Returns:
      The assistant's turns in their order, all with the same `text`. A turn before the last
      includes its end mark only if the template writes it there as it does for a last turn.
    """
    last = self.last_turn(messages, tools)
    whole = self.render(messages, tools)
    turns = []
    for index, message in enumerate(messages[:-1]):
      if message['role'] != 'assistant':
        continue
      alone = self.last_turn(messages[: index + 1], tools)
      if whole.startswith(alone.text):  # what follows changes nothing
        begin, end, marked = alone.begin, alone.end, alone.marked
      else:
        begin, end, marked = self._find_earlier_turn(whole, messages, index, tools, alone)
      turns.append(Turn(last.text, begin, end, marked))
    return [*turns, last]

  def _find_earlier_turn(
    self,
    whole: str,
    messages: Messages,
    index: int,
    tools: Tools,
    alone: Turn,
  ) -> tuple[int, int, bool]:
    """Locates a response that the template renders differently once more messages follow.

    Args:
      whole: the text of the whole conversation.
      messages: the conversation.
      index: the response's index in `messages`.
      tools: functions that the model may call.
      alone: its turn in the conversation that ends with it.

    Returns:
      (begin, end, whether the end is marked).
    """
    start, stop = self._find_content(whole, messages, index, tools)
    until = messages[: index + 1]
    alone_start, alone_stop = self._find_content(self.render(until, tools), until, index, tools)
    prompt = self.prompt(messages[:index], tools)
    opening = alone.text[alone.begin : alone_start]
    if whole.startswith(prompt) and len(prompt) <= start:
      begin = len(prompt)
    else:
      begin = start - len(opening) if whole[:start].endswith(opening) else start
    closing = alone.text[alone_stop : alone.end]
    if closing and whole.startswith(closing, stop):
      return begin, stop + len(closing), alone.marked
    return begin, stop, False

  def _find_content(
    self, whole: str, messages: Messages, index: int, tools: Tools
  ) -> tuple[int, int]:
    """Finds a message's content in a text, by rendering the text again with a stand-in for it.

    Returns:
      (start, stop) of the content; for a message with function calls, a place in the last call.

    Raises:
      UserError: the template does not print the message.
    """
    stand_in = free_character([whole])
    message = messages[index]
    changed = {**message, 'content': stand_in}
    if message.get('tool_calls'):
      # The content comes before the calls; the turn ends after the last call.
      changed = {**message, 'tool_calls': _mark_last_call(message['tool_calls'], stand_in)}
    probe = self.render([*messages[:index], changed, *messages[index + 1 :]], tools)
    head, found, rest = probe.rpartition(stand_in)
    if not found:
      what = 'function calls' if message.get('tool_calls') else 'a response'
      raise UserError(f'chat template: it does not print {what} (message {index + 1})')
    start = _common_prefix(whole, head)
    stop = len(whole) - _common_suffix(whole[start:], rest)
    content = message.get('content')
    if not message.get('tool_calls') and content:
      # The content may begin with what the template itself writes there, such as '<think>'.
      verbatim = stop - len(content)
      if 0 <= verbatim < start and whole.startswith(content, verbatim):
        start = verbatim
    return start, stop

  def _find_begin(
    self,
    whole: str,
    prompt: str,
    start: int,
    before: Messages,
    tools: Tools,
  ) -> int:
    """Finds where the generation prompt ends and the response begins.

    Args:
      whole: the text with the response.
      prompt: the text with the generation prompt.
      start: where the response's content begins; the response begins there or before.
      before: the messages before the response.
      tools: functions that the model may call.
    """
    if whole.startswith(prompt):
      return len(prompt)
    closed = self.render(before, tools)
    tail = prompt[len(closed) :] if prompt.startswith(closed) else ''
    common = _common_prefix(whole, prompt)
    if tail and common >= len(closed):
      # The generation prompt fixes a choice of the response, such as an empty thinking block.
      return self._before_mark(whole, min(common, start))
    # The response changes the text before it, so search that text for the
    # generation prompt.
    place = whole.rfind(tail, 0, start) if tail else -1
    return start if place < 0 else place + len(tail)

  def _before_mark(self, text: str, place: int) -> int:
    """Returns the beginning of the special token that a place is inside of, else the place."""
    for mark in self._marks.finditer(text, max(0, place - 200)):
      if mark.start() >= place:
        break
      if mark.end() > place:
        return mark.start()
    return place

  def _find_end(
    self, rest: str, tail: str, response: Message | None = None
  ) -> re.Match[str] | None:
    """Finds the special token that ends a turn, in the text after the response's content.

    Args:
      rest: that text.
      tail: what follows a question, which some templates also write after a response.
      response: the response's message; None while `frame` itself is being determined.
    """
    if tail and rest.startswith(tail):
      return None
    if response is None or not response.get('tool_calls'):
      return self._marks.search(rest)
    # Function calls may contain special tokens, which do not end the turn.
    matches = list(self._marks.finditer(rest))
    for match in matches:
      if match.group() == self.frame.end:
        return match
    return matches[-1] if matches else None


def compile_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
  """Compiles a pattern that finds special tokens, the longest of those at the same place."""
  longest_first = sorted(tokens, key=len, reverse=True)
  if not longest_first:
    return re.compile('(?!)')  # finds nothing
  # In a group, so that `split` keeps them.
  return re.compile('(' + '|'.join(map(re.escape, longest_first)) + ')')


def free_character(texts: Iterable[str], skip: int = 0) -> str:
  """Returns a stand-in that is in none of the texts, after skipping the first `skip` such."""
  used = set().union(*map(set, texts))
  free = (chr(code) for code in STAND_INS if chr(code) not in used)
  for _ in range(skip):
    next(free)
  return next(free)


def _closing_text(rest: str, tail: str) -> str:
  """Returns the text that closes a turn without a special token.

  It has no white space at its end, and is empty if only `tail`, a generation prompt, follows.
  """
  if tail and rest.startswith(tail):
    return ''
  return rest.rstrip()


def _mark_last_call(calls: Sequence[Any], stand_in: str) -> list[Any]:
  """Returns function calls in which a stand-in follows the name of the last one."""
  *earlier, last = calls
  if 'function' in last:
    function = {**last['function'], 'name': f'{last["function"].get("name")}{stand_in}'}
    return [*earlier, {**last, 'function': function}]
  return [*earlier, {**last, 'name': f'{last.get("name")}{stand_in}'}]


def _common_prefix(first: str, second: str) -> int:
  """Returns the length of the common prefix of two texts."""
  return len(os.path.commonprefix([first, second]))


def _common_suffix(first: str, second: str) -> int:
  """Returns the length of the common suffix of two texts."""
  return _common_prefix(first[::-1], second[::-1])


@functools.cache
def _renderer() -> Any:
  """Imports the module of transformers that renders chat templates, which takes a second."""
  silent = 'TRANSFORMERS_NO_ADVISORY_WARNINGS'
  before = os.environ.get(silent)
  os.environ[silent] = '1'  # else it warns that PyTorch is missing, which is not needed here
  try:
    from transformers.utils import chat_template_utils
  finally:
    if before is None:
      del os.environ[silent]
    else:
      os.environ[silent] = before
  return chat_template_utils


def _format_date(form: str) -> str:
  """Formats the current date: the function `strftime_now` of templates."""
  return current_date().strftime(form)


@functools.lru_cache(maxsize=16)
def check_source(source: str, where: str) -> None:
  """Checks that a template is valid Jinja; whether it fits conversations shows when it is used.

  Args:
    source: the Jinja source.
    where: what an error message begins with.

  Raises:
    UserError: it is not, or takes too long to compile.
  """
  if source.endswith('.jinja'):
    raise UserError(f'{where}: expected the text of a Jinja template, got the file name {source!r}')
  _renderer()  # the import is not the template's fault
  try:
    with template_limits.time_limit(template_limits.SECONDS):
      _compile(source)
  except Exception as error:  # of any kind, as in `render`
    reason = ' '.join(str(error).split()) or type(error).__name__
    raise UserError(f'{where}: expected a Jinja template, got {source!r:.60}: {reason}') from None


def _compile(source: str) -> Callable[..., str]:
  """Compiles a template in transformers' sandbox, as a template is code of unknown origin.

  Returns:
    (messages, tools, **variables) → text.
  """
  module = _renderer()
  compiled = _compile_bounded(module, source)

  def render(messages: Messages, tools: Tools, **variables: Any) -> str:
    # The renderer caches compiled templates, so this is the object that it uses below.
    compiled.globals['strftime_now'] = _format_date
    texts, _ = module.render_jinja_template(
      [messages], tools=tools or None, documents=None, chat_template=source, **variables
    )
    return texts[0]

  return render


def _compile_bounded(module: Any, source: str) -> Any:
  """Compiles a template by transformers, in its sandbox with limits (template_limits.py).

  Args:
    module: of transformers; it keeps what was compiled, by the source.
    source: the template.
  """
  sandbox: Any = importlib.import_module('jinja2.sandbox')
  plain = sandbox.ImmutableSandboxedEnvironment
  sandbox.ImmutableSandboxedEnvironment = template_limits.bounded_environment(plain)
  module.ImmutableSandboxedEnvironment = sandbox.ImmutableSandboxedEnvironment
  try:
    compiled = module._compile_jinja_template(source)
  finally:
    sandbox.ImmutableSandboxedEnvironment = plain
    module.ImmutableSandboxedEnvironment = plain
  template_limits.bound_joins(compiled)
  return compiled
