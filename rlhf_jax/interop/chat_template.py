"""Chat templates in jinja2, rendered as transformers renders them.

Also found here is what a template puts around a response.
"""

from collections.abc import Mapping, Sequence
import functools
import re
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from rlhf_jax.errors import UserError

Messages = Sequence[Mapping[str, Any]]  # dicts of `role` and `content`

# Stand-ins that show where a template puts a message; private-use characters.
QUESTION = '\U000f0000'
RESPONSE = '\U000f0001'


def render_chat(
  template: str,
  messages: Messages,
  roles: Mapping[str, str | None],
  add_generation_prompt: bool,
) -> str:
  """Renders a conversation.

  Args:
    template: jinja2 source.
    messages: the conversation.
    roles: variable of the template → special token: 'bos_token', 'eos_token', …; None: undefined.
    add_generation_prompt: whether the assistant's turn is opened at the end.

  Raises:
    UserError: the template is no jinja2, or refuses these messages.
  """
  defined = {role: token for role, token in roles.items() if token is not None}
  try:
    return _compile_template(template).render(
      messages=messages,
      add_generation_prompt=add_generation_prompt,
      **defined,
    )
  except (jinja2.TemplateError, TypeError) as error:
    raise UserError(f'chat template: {error}') from None


class ResponseFrame(NamedTuple):
  """What a template puts around a response."""

  tail: str = ''  # the generation prompt: from the end of the question on
  prefix: str = ''  # between the generation prompt and the response; ' ' after 'Assistant:'
  suffix: str = ''  # between the response and the end of the turn
  end: str | None = None  # the special token that ends the turn, None where there is none


def find_response_frame(
  template: str,
  roles: Mapping[str, str | None],
  special_tokens: re.Pattern[str],
) -> ResponseFrame:
  """Finds out what a template puts around a response, by rendering one question and response.

  Args:
    template: jinja2 source.
    roles: as render_chat.
    special_tokens: matches the special tokens of the tokenizer.

  Raises:
    UserError: as render_chat.
  """
  question = {'role': 'user', 'content': QUESTION}
  response = {'role': 'assistant', 'content': RESPONSE}
  prompt = render_chat(template, [question], roles, add_generation_prompt=True)
  rendered = render_chat(template, [question, response], roles, add_generation_prompt=False)
  before, _, after = rendered.partition(RESPONSE)
  end = special_tokens.search(after)
  return ResponseFrame(
    tail=prompt.rpartition(QUESTION)[2],
    prefix=before[len(prompt) :] if before.startswith(prompt) else '',
    suffix=after[: end.start()] if end else '',
    end=end.group() if end else None,
  )


class _Generation(jinja2.ext.Extension):
  """`{% generation %}…{% endgeneration %}`, which marks the assistant's words, prints them."""

  tags = {'generation'}

  def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
    """Parses the block as the statements that it holds."""
    next(parser.stream)
    return parser.parse_statements(('name:endgeneration',), drop_needle=True)


def _refuse(message: str) -> None:
  """Is `raise_exception` of templates."""
  raise jinja2.TemplateError(message)


@functools.lru_cache(maxsize=16)
def _compile_template(template: str) -> jinja2.Template:
  """Compiles a template with the settings of transformers, in a sandbox: it is foreign code."""
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, jinja2.ext.loopcontrols],
  )
  environment.globals['raise_exception'] = _refuse
  return environment.from_string(template)
