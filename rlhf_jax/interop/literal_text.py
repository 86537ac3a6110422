"""Keeps special tokens that people write text.

Nobody ends a turn by writing `<|im_end|>`: what people wrote is encoded character by character,
and only what the template itself writes becomes a special id. For that, special tokens in
people's messages are hidden from the template by stand-ins, and a conversation that has some is
encoded by a tokenizer in which the special tokens have other names.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools
import json
import re
from typing import Any, NamedTuple

import tokenizers

from rlhf_jax.errors import UserError
from rlhf_jax.interop import chat_template

# The other names of special tokens: private-use characters, of another plane than the stand-ins.
# Where a text has one of them the next block is taken.
NAME_BLOCKS = range(0x100000, 0x10F000, 0x800)


class Conversation(NamedTuple):
  """A conversation as a template sees it."""

  messages: list[dict[str, Any]]
  tools: list[Any] | None
  hidden: dict[str, str]  # stand-in → the special token that people wrote

  def show(self, text: str) -> str:
    """Puts the special tokens that people wrote back into a text."""
    return replace_all(text, self.hidden)


def hide_special_tokens(
  messages: chat_template.Messages,
  tools: chat_template.Tools,
  special_tokens: re.Pattern[str],
  render: Callable[[Sequence[Any], Any], str],
) -> Conversation:
  """Hides the special tokens that people wrote, wherever in a conversation they stand.

  A template may look for one of them, as for '</think>', and print another text where it is
  hidden. In the message in which it does that token stays as it is.

  Args:
    messages: the conversation.
    tools: functions that the model may call.
    special_tokens: finds the special tokens.
    render: (messages, tools) → text.

  Returns:
    The conversation with stand-ins, which the template prints as it prints the given one.
  """
  plain = [dict(message) for message in messages]
  tools = list(tools) if tools else None
  strings = _list_strings([plain, tools])
  written = sorted({token for text in strings for token in special_tokens.findall(text)})
  if not written:
    return Conversation(plain, tools, {})
  names = {token: chat_template.free_character(strings, skip) for skip, token in enumerate(written)}
  hidden = {stand_in: token for token, stand_in in names.items()}
  expected = render(plain, tools)

  def is_printed_alike(changed: Sequence[Any], changed_tools: Any) -> bool:
    try:
      return replace_all(render(changed, changed_tools), hidden) == expected
    except UserError:
      return False

  hidden_tools = _replace_strings(tools, names)
  all_hidden = [_replace_strings(message, names) for message in plain]
  if is_printed_alike(all_hidden, hidden_tools):
    return Conversation(all_hidden, hidden_tools, hidden)
  result = list(plain)
  for index, token in itertools.product(range(len(plain)), written):
    changed = list(result)
    changed[index] = _replace_strings(result[index], {token: names[token]})
    if is_printed_alike(changed, tools):
      result = changed
  if not is_printed_alike(result, hidden_tools):
    hidden_tools = tools
  return Conversation(result, hidden_tools, hidden)


class LiteralEncoder:
  """Encodes texts in which some special tokens are marks and others are people's words."""

  def __init__(self, core: tokenizers.Tokenizer, special_ids: Mapping[str, int]):
    """Keeps the tokenizer; the ones with other names are made when they are needed.

    Args:
      core: the tokenizer, which makes each special token its id.
      special_ids: special token → id.
    """
    self._core = core
    self._special_ids = special_ids
    self._pattern = chat_template.compile_pattern(special_ids)
    self._renamed: dict[int, tokenizers.Tokenizer] = {}  # by the beginning of their block

  def encode(self, text: str, hidden: Mapping[str, str]) -> tuple[tokenizers.Encoding, 'Rewriter']:
    """Encodes a text.

    Args:
      text: special tokens in it are marks.
      hidden: stand-in → special token that is text.

    Returns:
      (the encoding, what maps a part of the text to the text that was encoded).
    """
    shown = replace_all(text, hidden)
    for block in NAME_BLOCKS:
      names = {token: chr(block + place) for place, token in enumerate(self._special_ids)}
      if not any(name in shown for name in names.values()):
        break
    else:
      raise UserError('tokenizer: a text uses up the private-use characters of plane 16')
    if block not in self._renamed:
      self._renamed[block] = _rename_special_tokens(self._core, names)
    rewriter = Rewriter(self._pattern, names, hidden)
    return self._renamed[block].encode(rewriter(text), add_special_tokens=False), rewriter


@dataclasses.dataclass(frozen=True)
class Rewriter:
  """Gives special tokens their other names, and what stands for people's its own."""

  pattern: re.Pattern[str]
  names: Mapping[str, str]
  hidden: Mapping[str, str]

  def __call__(self, text: str) -> str:
    """Rewrites a text; that of a beginning is the beginning of that of the whole."""
    renamed = self.pattern.sub(lambda match: self.names[match.group()], text)
    return replace_all(renamed, self.hidden)


def replace_all(text: str, replacements: Mapping[str, str]) -> str:
  """Replaces each key by its value, one after the other."""
  for old, new in replacements.items():
    text = text.replace(old, new)
  return text


def _rename_special_tokens(
  core: tokenizers.Tokenizer, names: Mapping[str, str]
) -> tokenizers.Tokenizer:
  """Makes a tokenizer whose special tokens have the same ids and other names.

  Args:
    core: the tokenizer.
    names: special token → its other name.
  """
  parts = json.loads(core.to_str())
  for token in parts['added_tokens']:
    token['content'] = names.get(token['content'], token['content'])
  model = parts['model']
  # Names in the model's own vocabulary too: a text could otherwise become such a token whole.
  vocabulary = model['vocab']
  if isinstance(vocabulary, dict):
    model['vocab'] = {names.get(token, token): number for token, number in vocabulary.items()}
  else:  # Unigram: [token, score]
    model['vocab'] = [[names.get(token, token), score] for token, score in vocabulary]
  if model.get('unk_token') in names:
    model['unk_token'] = names[model['unk_token']]
  if 'merges' in model:
    model['merges'] = [merge for merge in model['merges'] if not _makes(merge, names)]
  parts['post_processor'] = None  # nothing is added to what is encoded here
  return tokenizers.Tokenizer.from_str(json.dumps(parts))


def _makes(merge: Any, names: Mapping[str, str]) -> bool:
  """Tells whether a merge of BPE has to do with a special token."""
  first, second = merge.split(' ') if isinstance(merge, str) else merge
  return first in names or second in names or first + second in names


def _list_strings(value: Any) -> list[str]:
  """Returns all texts in a value made of lists and dicts."""
  if isinstance(value, str):
    return [value]
  if isinstance(value, Mapping):
    return [text for item in [*value, *value.values()] for text in _list_strings(item)]
  if isinstance(value, (list, tuple)):
    return [text for item in value for text in _list_strings(item)]
  return []


def _replace_strings(value: Any, replacements: Mapping[str, str]) -> Any:
  """Returns a value made of lists and dicts with replacements in all its texts."""
  if isinstance(value, str):
    return replace_all(value, replacements)
  if isinstance(value, Mapping):
    return {
      _replace_strings(key, replacements): _replace_strings(item, replacements)
      for key, item in value.items()
    }
  if isinstance(value, (list, tuple)):
    return [_replace_strings(item, replacements) for item in value]
  return value
