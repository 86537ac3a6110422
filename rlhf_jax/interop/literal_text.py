"""Encoding of special tokens that people write in messages: as plain text, not as special ids.

Nobody can end a turn by writing `<|im_end|>` into a message: only the special tokens that the
template itself writes become special ids; those in people's messages are encoded like any other
text. For this purpose, special tokens in messages are replaced by stand-ins before the template is
rendered, and a conversation with such tokens is encoded by a tokenizer whose special tokens have
other names.
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

# The other names of special tokens are private-use characters, from another
# Unicode plane than the stand-ins. If a text contains a character of one block,
# the next block is used.
NAME_BLOCKS = range(0x100000, 0x10F000, 0x800)


class Conversation(NamedTuple):
  """A conversation as the template gets it, with stand-ins for special tokens in messages."""

  messages: list[dict[str, Any]]
  tools: list[Any] | None
  hidden: dict[str, str]  # stand-in → the special token that people wrote

  def show(self, text: str) -> str:
    """Replaces the stand-ins in a text by the special tokens that people wrote."""
    return replace_all(text, self.hidden)


def hide_special_tokens(
  messages: chat_template.Messages,
  tools: chat_template.Tools,
  special_tokens: re.Pattern[str],
  render: Callable[[Sequence[Any], Any], str],
) -> Conversation:
  """Replaces the special tokens that people wrote in a conversation by stand-ins.

  Some templates search messages for a token such as '</think>' and print a
  different text if they do not find it. In a message where the stand-in of a
  token changes the printed text, the token is kept.

  Args:
    messages: the conversation.
    tools: the functions that the model may call.
    special_tokens: the pattern that matches special tokens.
    render: renders the template, (messages, tools) → text.

  Returns:
    The conversation with stand-ins. Apart from them, the template prints it as the original.
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
  """Encodes texts in which some special tokens are control tokens and others are plain text."""

  def __init__(self, core: tokenizers.Tokenizer, special_ids: Mapping[str, int]):
    """Stores the tokenizer; tokenizers with other names are made when they are needed.

    Args:
      core: the tokenizer, which encodes each special token as its id.
      special_ids: special token → id.
    """
    self._core = core
    self._special_ids = special_ids
    self._pattern = chat_template.compile_pattern(special_ids)
    # first character of a block of names → the tokenizer with these names
    self._renamed: dict[int, tokenizers.Tokenizer] = {}

  def encode(self, text: str, hidden: Mapping[str, str]) -> tuple[tokenizers.Encoding, 'Rewriter']:
    """Encodes a text.

    Args:
      text: the text, in which special tokens are control tokens.
      hidden: stand-in in the text → the special token that it stands for as plain text.

    Returns:
      (the encoding; the function that maps a beginning of `text` to the corresponding beginning
      of the text that was encoded).

    Raises:
      UserError: the text uses characters of every block of names.
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
  """Renames control tokens in a text, and replaces stand-ins by the tokens that people wrote."""

  pattern: re.Pattern[str]
  names: Mapping[str, str]
  hidden: Mapping[str, str]

  def __call__(self, text: str) -> str:
    """Rewrites a text; a beginning of the text becomes a beginning of the rewritten text."""
    renamed = self.pattern.sub(lambda match: self.names[match.group()], text)
    return replace_all(renamed, self.hidden)


def replace_all(text: str, replacements: Mapping[str, str]) -> str:
  """Replaces each key in a text by its value, one key after the other."""
  for old, new in replacements.items():
    text = text.replace(old, new)
  return text


def _rename_special_tokens(
  core: tokenizers.Tokenizer, names: Mapping[str, str]
) -> tokenizers.Tokenizer:
  """Makes a copy of a tokenizer in which the special tokens have other names but the same ids.

  Args:
    core: the tokenizer.
    names: special token → its other name.
  """
  parts = json.loads(core.to_str())
  for token in parts['added_tokens']:
    token['content'] = names.get(token['content'], token['content'])
  model = parts['model']
  # Rename them in the model's vocabulary too. Otherwise a token that people wrote
  # could still be encoded as one special id.
  vocabulary = model['vocab']
  if isinstance(vocabulary, dict):
    model['vocab'] = {names.get(token, token): number for token, number in vocabulary.items()}
  else:  # Unigram: [token, score]
    model['vocab'] = [[names.get(token, token), score] for token, score in vocabulary]
  if model.get('unk_token') in names:
    model['unk_token'] = names[model['unk_token']]
  if 'merges' in model:
    model['merges'] = [merge for merge in model['merges'] if not _makes(merge, names)]
  parts['post_processor'] = None  # no special tokens are added at the beginning or the end
  return tokenizers.Tokenizer.from_str(json.dumps(parts))


def _makes(merge: Any, names: Mapping[str, str]) -> bool:
  """Tells whether a merge of BPE takes or produces a special token."""
  first, second = merge.split(' ') if isinstance(merge, str) else merge
  return first in names or second in names or first + second in names


def _list_strings(value: Any) -> list[str]:
  """Returns all texts in a nested value of lists and dicts, keys included."""
  if isinstance(value, str):
    return [value]
  if isinstance(value, Mapping):
    return [text for item in [*value, *value.values()] for text in _list_strings(item)]
  if isinstance(value, (list, tuple)):
    return [text for item in value for text in _list_strings(item)]
  return []


def _replace_strings(value: Any, replacements: Mapping[str, str]) -> Any:
  """Returns a copy of a nested value of lists and dicts, with replacements in all its texts."""
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
