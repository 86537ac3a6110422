"""Chat templates, rendered by transformers' own renderer, and where in its text a response stands.

What a template puts around a response depends on the conversation: on the role before it, on
thinking in it, on the place of the turn. So the real conversation is rendered and the response
found in it, by rendering it once more with a stand-in and comparing the two texts.
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

# Private-use characters, of which those that a conversation does not hold stand for a response
# or for a special token that people wrote.
STAND_INS = range(0xF0000, 0xFFFFE)

_now: datetime.datetime | None = None  # of `strftime_now`, fixed at its first use


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
  """What a template puts around a response in the plainest conversation."""

  tail: str = ''  # the generation prompt, from the end of the question on
  prefix: str = ''  # between the generation prompt and the response; ' ' after 'Assistant:'
  suffix: str = ''  # between the response and the mark that ends the turn
  end: str | None = None  # that mark, a special token; None where there is none
  rest: str = ''  # all that follows the response
  problem: str = ''  # why the template cannot be used; '' where nothing is known against it


class Turn(NamedTuple):
  """Where a response stands in the text of a conversation.

  `text[begin:end]` is the response with what the template puts around it, from the end of the
  generation prompt to the end of the turn.
  """

  text: str
  begin: int
  end: int
  marked: bool  # whether the template marks the end by a special token


class ChatTemplate:
  """A template with the special tokens that it may name.

  Attributes:
    source: the Jinja source.
  """

  def __init__(self, source: str, variables: Mapping[str, str], marks: Iterable[str]):
    """Keeps the template; nothing is compiled yet.

    Args:
      source: the Jinja source.
      variables: names of special tokens in the template, such as 'bos_token' → the token.
      marks: the special tokens.
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
      UserError: the template is no Jinja, or refuses these messages.
    """
    # keys that are null are dropped, which many templates print as 'None'
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
    """What the template puts around a response to a single question.

    It says how a response that is sampled ends. Where the template refuses the question, one
    with a system message before it is tried, and where it refuses that too nothing is known.
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
    """Renders a conversation that ends with a response, and finds that in it.

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
    # Mostly the template puts the same around every response, and the text proves it.
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
    """Finds every response of a conversation that ends with one.

    Args:
      messages: the conversation; the assistant speaks last.
      tools: functions that the model may call.

    Returns:
      The turns of the assistant in their order, all in the same text. The end of a turn in the
      middle is a target where the template marks it as it marks the last one's.
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
    """Finds a response that the template prints in another way when more follows.

    Args:
      whole: the text of the whole conversation.
      messages: the conversation.
      index: of the response.
      tools: functions that the model may call.
      alone: the same response where it is the last.

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
    """Finds the words of a message in a text, by rendering a stand-in in their place.

    Returns:
      (start, stop) of the words; of a message that only calls functions, a place in the call.

    Raises:
      UserError: the template does not print the message.
    """
    stand_in = free_character([whole])
    message = messages[index]
    changed = {**message, 'content': stand_in}
    if message.get('tool_calls'):
      # the words come before the calls; the turn ends behind the last of these
      changed = {**message, 'tool_calls': _mark_last_call(message['tool_calls'], stand_in)}
    probe = self.render([*messages[:index], changed, *messages[index + 1 :]], tools)
    head, found, rest = probe.rpartition(stand_in)
    if not found:
      what = 'calls of functions' if message.get('tool_calls') else 'a response'
      raise UserError(f'chat template: it does not print {what} (message {index + 1})')
    start = _common_prefix(whole, head)
    stop = len(whole) - _common_suffix(whole[start:], rest)
    content = message.get('content')
    if not message.get('tool_calls') and content:
      # part of the words may be what the template itself writes there, such as '<think>'
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
      start: where the words of the response begin at the latest.
      before: the messages before the response.
      tools: functions that the model may call.
    """
    if whole.startswith(prompt):
      return len(prompt)
    closed = self.render(before, tools)
    tail = prompt[len(closed) :] if prompt.startswith(closed) else ''
    common = _common_prefix(whole, prompt)
    if tail and common >= len(closed):
      # The generation prompt decides what the response could choose, as an empty thinking block.
      return self._before_mark(whole, min(common, start))
    # The response changes what stands before it: look for the generation prompt there.
    place = whole.rfind(tail, 0, start) if tail else -1
    return start if place < 0 else place + len(tail)

  def _before_mark(self, text: str, place: int) -> int:
    """Moves a place inside a special token to the token's beginning."""
    for mark in self._marks.finditer(text, max(0, place - 200)):
      if mark.start() >= place:
        break
      if mark.end() > place:
        return mark.start()
    return place

  def _find_end(
    self, rest: str, tail: str, response: Message | None = None
  ) -> re.Match[str] | None:
    """Finds the special token that ends a turn in what follows the response.

    Args:
      rest: all that follows.
      tail: the generation prompt, which some templates always write at the end.
      response: the message; None while the frame is looked for.
    """
    if tail and rest.startswith(tail):
      return None
    if response is None or not response.get('tool_calls'):
      return self._marks.search(rest)
    # Calls of functions may be written with special tokens, which do not end the turn.
    matches = list(self._marks.finditer(rest))
    for match in matches:
      if match.group() == self.frame.end:
        return match
    return matches[-1] if matches else None


def compile_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
  """Compiles a pattern that finds special tokens, the longest where several begin."""
  longest_first = sorted(tokens, key=len, reverse=True)
  if not longest_first:
    return re.compile('(?!)')  # finds nothing
  # In a group, so that `split` keeps them.
  return re.compile('(' + '|'.join(map(re.escape, longest_first)) + ')')


def free_character(texts: Iterable[str], skip: int = 0) -> str:
  """Returns a stand-in character that is in none of the texts; `skip` chooses another one."""
  used = set().union(*map(set, texts))
  free = (chr(code) for code in STAND_INS if chr(code) not in used)
  for _ in range(skip):
    next(free)
  return next(free)


def _closing_text(rest: str, tail: str) -> str:
  """Returns what closes a turn without a special token: no blanks, no generation prompt."""
  if tail and rest.startswith(tail):
    return ''
  return rest.rstrip()


def _mark_last_call(calls: Sequence[Any], stand_in: str) -> list[Any]:
  """Returns calls of functions with a stand-in behind the name of the last one."""
  *earlier, last = calls
  if 'function' in last:
    function = {**last['function'], 'name': f'{last["function"].get("name")}{stand_in}'}
    return [*earlier, {**last, 'function': function}]
  return [*earlier, {**last, 'name': f'{last.get("name")}{stand_in}'}]


def _common_prefix(first: str, second: str) -> int:
  """Returns how many characters two texts have in common at the beginning."""
  return len(os.path.commonprefix([first, second]))


def _common_suffix(first: str, second: str) -> int:
  """Returns how many characters two texts have in common at the end."""
  return _common_prefix(first[::-1], second[::-1])


@functools.cache
def _renderer() -> Any:
  """Imports the module of transformers that renders chat templates, which takes a second."""
  silent = 'TRANSFORMERS_NO_ADVISORY_WARNINGS'
  before = os.environ.get(silent)
  os.environ[silent] = '1'  # it would say that PyTorch is missing, which nothing here needs
  try:
    from transformers.utils import chat_template_utils
  finally:
    if before is None:
      del os.environ[silent]
    else:
      os.environ[silent] = before
  return chat_template_utils


def _format_date(form: str) -> str:
  """Is `strftime_now` of templates."""
  return current_date().strftime(form)


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> Callable[..., str]:
  """Compiles a template with transformers' environment, in a sandbox: it is foreign code.

  Returns:
    (messages, tools, **variables) → text.
  """
  module = _renderer()
  compiled = _compile_bounded(module, source)

  def render(messages: Messages, tools: Tools, **variables: Any) -> str:
    # The same object as the renderer uses, as what was compiled is kept.
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
