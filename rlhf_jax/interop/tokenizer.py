"""Text ↔ token ids, and how a conversation becomes a prompt.

A tokenizer here is a `tokenizers.Tokenizer`, a chat template in Jinja and the roles of a few
special tokens. Prompt and response come from one rendering of the whole conversation
(chat_template.py); special tokens that people wrote stay text (literal_text.py).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import copy
import functools
import itertools
import json
from pathlib import Path
import re
from typing import Any, NamedTuple

import tokenizers

from rlhf_jax import files, fingerprints
from rlhf_jax.errors import UserError
from rlhf_jax.interop import chat_template, literal_text
from rlhf_jax.interop.chat_template import compile_pattern
from rlhf_jax.interop.gguf_tokenizer import read_gguf_tokenizer
from rlhf_jax.interop.json_files import read_json, write_json
from rlhf_jax.interop.known_keys import (
  Allowed,
  check_keys,
  KnownKeys,
  or_null,
  show,
  SWITCH,
  whole_number,
)

ROLES = ('eos', 'bos', 'pad', 'unk')  # of special tokens, as transformers calls them

# Files of a Hugging Face directory.
TOKENIZER = 'tokenizer.json'
CONFIG = 'tokenizer_config.json'
OLD_CONFIG = 'special_tokens_map.json'  # some roles stand only there
TEMPLATE = 'chat_template.jinja'
GENERATION = 'generation_config.json'
MODEL_CONFIG = 'config.json'


# tokenizer_config.json has many more keys. Where there is a tokenizer.json that says how a text is
# split, for transformers too, which then passes over keys such as `add_bos_token`.
def _is_token(value: Any) -> bool:
  """Tells whether a value is a token, which a table may describe."""
  return isinstance(value.get('content') if isinstance(value, Mapping) else value, str)


def _is_template(value: Any) -> bool:
  """Tells whether a value is a chat template, or several by name."""
  if not isinstance(value, list):
    return isinstance(value, str)
  if not all(isinstance(choice, Mapping) for choice in value):
    return False
  texts = [choice.get(key) for choice in value for key in ('name', 'template')]
  return all(isinstance(text, str) for text in texts)


def _is_table_of_tokens(value: Any) -> bool:
  """Tells whether a value is a table of ids and tokens."""
  return isinstance(value, Mapping) and all(
    number.isdecimal() and isinstance(token, Mapping) and _is_token(token)
    for number, token in value.items()
  )


TOKEN = or_null(Allowed('a token', _is_token))
KNOWN_KEYS = KnownKeys(
  read={
    **{role + '_token': TOKEN for role in ROLES},
    'chat_template': or_null(Allowed('a text', _is_template)),
    'added_tokens_decoder': or_null(Allowed('a table of ids and tokens', _is_table_of_tokens)),
    'add_prefix_space': or_null(SWITCH),
  },
  only={'split_special_tokens': (False, None), 'fix_mistral_regex': (False, None)},
  ignored=('extra_special_tokens',),
  refuse_others=False,
)

# The classes of transformers that take tokenizer.json as it is; others set the blank before a text.
PLAIN_CLASSES = ('PreTrainedTokenizerFast', 'TokenizersBackend')

# What the marks of turns look like; '<think>' and '<tool_call>' are none of them.
TURN_MARK = re.compile(r'<\|.+\|>|<｜.+｜>|\[/?[A-Z_]+\]|<(start|end)_of_turn>')

# Conversations that a response is tried on where no real one is at hand; some templates want a
# system message.
PLAIN_QUESTIONS = (
  [{'role': 'user', 'content': 'a'}],
  [{'role': 'system', 'content': 'a'}, {'role': 'user', 'content': 'a'}],
)

LEADS = ('a', '.', ':', '\n')  # what may stand before a text that begins in the middle
PROBES = 'aeiou0123456789'  # single characters that nearly every vocabulary has


class Exchange(NamedTuple):
  """A prompt and a response to it as token ids, [P] and [R]."""

  prompt: list[int]
  response: list[int]  # with what the template puts around it, up to the end of the turn


class Tokenizer:
  """Text ↔ ids, and the chat template.

  A template is rendered for the first time when a conversation is encoded, or one of `eos_id`,
  `pad_id` is asked for. So a directory whose template cannot be used opens for bare texts.

  Attributes:
    core: the `tokenizers.Tokenizer`.
    template: the Jinja chat template, or None.
    vocab_size: how many tokens there are; the greatest id may be greater.
    end_ids: of the ends of sequence that the model's files list; () where they list none.
    bos_id: beginning of sequence, or None.
  """

  def __init__(
    self,
    core: tokenizers.Tokenizer,
    template: str | None = None,
    *,
    eos: str | None,
    bos: str | None = None,
    pad: str | None = None,
    unk: str | None = None,
    more: Mapping[str, str] | None = None,
    end_ids: Sequence[int] = (),
  ):
    """Makes a tokenizer; the core is copied.

    Args:
      core: of the tokenizers library.
      template: Jinja source.
      eos: text of the special token with this role.
      bos: likewise.
      pad: likewise.
      unk: likewise.
      more: names of further special tokens, such as 'cls_token', as templates may use them →
        their texts.
      end_ids: what the model's files call ends of sequence, beside `eos`.

    Raises:
      UserError: a special token is not in the vocabulary, or there is no end of sequence.
    """
    self._roles = {'bos': bos, 'eos': eos, 'pad': pad, 'unk': unk}
    self._more = dict(more or {})
    self.end_ids = tuple(end_ids)
    self.core = _prepare_core(core, self._roles, template or '')
    self.template = template
    self.vocab_size = self.core.get_vocab_size()
    self.bos_id = None if bos is None else _token_id(self.core, bos)
    self._special_ids = _list_special_tokens(self.core)
    self._pattern = compile_pattern(self._special_ids)
    self._literal = literal_text.LiteralEncoder(self.core, self._special_ids)
    self._chat = None
    if template is not None:
      variables = {**self._more, **_role_keys(self._roles)}
      defined = {name: token for name, token in variables.items() if token is not None}
      self._chat = chat_template.ChatTemplate(template, defined, self._special_ids)
    elif eos is None:
      raise UserError('tokenizer: expected an end-of-sequence token')
    # Asks the core: files say it in several ways.
    self._adds_bos = bos is not None and self.core.encode('').ids[:1] == [self.bos_id]

  @classmethod
  def load(cls, directory: str | Path) -> 'Tokenizer':
    """Reads the tokenizer of a Hugging Face directory.

    Raises:
      UserError: there is no readable tokenizer.json, or as the constructor.
    """
    directory = Path(directory)
    core = _read_core(directory / TOKENIZER)
    config = _read_config(directory)
    _check_splitting(core, config, directory / CONFIG)
    _add_stated_tokens(core, config, directory / CONFIG)
    eos, bos, pad, unk = (_token_text(config.get(role + '_token')) for role in ROLES)
    return cls(
      core,
      _read_template(directory, config),
      eos=eos,
      bos=bos,
      pad=pad,
      unk=unk,
      more=_further_tokens(config),
      end_ids=_read_end_ids(directory),
    )

  @classmethod
  def from_gguf(cls, metadata: Mapping[str, Any]) -> 'Tokenizer | None':
    """Makes the byte-level BPE tokenizer that the metadata of a GGUF file describe.

    Args:
      metadata: plain values by key.

    Returns:
      The tokenizer; None where it is of another kind.
    """
    parts = read_gguf_tokenizer(metadata)
    if parts is None:
      return None
    eos, bos, pad, unk = (parts.roles[role] for role in ROLES)
    return cls(
      parts.core,
      parts.template,
      eos=eos,
      bos=bos,
      pad=pad,
      unk=unk,
      end_ids=parts.end_ids,
    )

  def with_template(self, template: str) -> 'Tokenizer':
    """Returns a tokenizer with the same vocabulary and another chat template, in Jinja."""
    return Tokenizer(self.core, template, more=self._more, end_ids=self.end_ids, **self._roles)

  def with_end_ids(self, end_ids: Sequence[int]) -> 'Tokenizer':
    """Returns the same tokenizer with other ends of sequence."""
    return Tokenizer(self.core, self.template, more=self._more, end_ids=end_ids, **self._roles)

  def save(self, directory: str | Path) -> None:
    """Writes the files that transformers reads.

    These are tokenizer.json, tokenizer_config.json, where there is a template
    chat_template.jinja, and where a response has several ends generation_config.json.
    """
    directory = Path(directory)
    roles = {**self._roles, 'eos': self._roles['eos'] or self._end, 'pad': self._padding}
    config = {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'clean_up_tokenization_spaces': False,
      **self._more,
      **_role_keys(roles),
    }
    files.write_text(directory / TOKENIZER, self.core.to_str())
    write_json(directory / CONFIG, config, ensure_ascii=False)
    if len(self.stop_ids) > 1:
      write_json(directory / GENERATION, self.id_keys())
    if self.template is not None:
      files.write_text(directory / TEMPLATE, self.template)

  def id_keys(self) -> dict[str, Any]:
    """Returns the special ids by the keys of config.json and generation_config.json."""
    stop_ids = list(self.stop_ids)
    return {
      'bos_token_id': self.bos_id,
      'eos_token_id': stop_ids if len(stop_ids) > 1 else stop_ids[0],
      'pad_token_id': self.pad_id,
    }

  # Special ids.

  @functools.cached_property
  def eos_id(self) -> int:
    """End of turn, with which a response ends.

    It is the special token that the template puts behind a response, else the tokenizer's end
    of sequence.
    """
    return _token_id(self.core, self._end)

  @property
  def stop_ids(self) -> tuple[int, ...]:
    """All ids with any of which a response ends: those of the model's files, and `eos_id`."""
    if self.eos_id in self.end_ids:
      return self.end_ids
    return (self.eos_id, *self.end_ids)

  @functools.cached_property
  def tokens(self) -> dict[int, str]:
    """The token that each id stands for."""
    vocabulary = self.core.get_vocab(with_added_tokens=True)
    return {token_id: token for token, token_id in vocabulary.items()}

  def empty_ids(self, vocab_size: int) -> tuple[tuple[int, int], ...]:
    """Finds the ids of a model that stand for no token.

    Args:
      vocab_size: of the model, which may be padded beyond the tokenizer's.

    Returns:
      Ranges (first id, first id behind it), ascending.
    """
    ranges = []
    known = sorted(token_id for token_id in self.tokens if token_id < vocab_size)
    for before, after in zip([-1, *known], [*known, vocab_size]):
      if after > before + 1:
        ranges.append((before + 1, after))
    return tuple(ranges)

  def find_difference(self, other: 'Tokenizer') -> int | None:
    """Finds the first id that stands for another token in another tokenizer.

    Ids that only one of them has are no difference: vocabularies get more tokens at their end.
    """
    common = self.tokens.keys() & other.tokens.keys()
    different = [i for i in common if self.tokens[i] != other.tokens[i]]
    return min(different, default=None)

  @functools.cached_property
  def pad_id(self) -> int:
    """What fills places that masks hide; never eos_id.

    Where the files name none (or name eos), it is the last special token that neither the
    template nor the other roles use; SmolLM2's is `<empty_output>`, 16. Where none is left, as
    in GPT-2, it is any other id, which the files that are written then do not name.
    """
    if self._padding is None:
      return 1 if self.eos_id == 0 else 0
    return _token_id(self.core, self._padding)

  @property
  def response_prefix(self) -> str:
    """What the template puts between the generation prompt and a response, as ' ' after 'A:'."""
    return self._frame.prefix

  # Encoding.

  def encode(self, text: str) -> list[int]:
    """Encodes a text and adds nothing; special-token strings are characters like any other."""
    written = {token for token in self._pattern.findall(text)}
    strings = [text, *written]
    hidden = {}
    for skip, token in enumerate(sorted(written, key=len, reverse=True)):
      hidden[chat_template.free_character(strings, skip)] = token
    for stand_in, token in hidden.items():
      text = text.replace(token, stand_in)
    return self._encode(text, hidden)[0].ids

  def text(self, text: str) -> list[int]:
    """Encodes a text that stands alone.

    A beginning of sequence comes before it where the tokenizer adds one.
    """
    begin = [self.bos_id] if self.bos_id is not None and self._adds_bos else []
    return begin + self.encode(text)

  def prompt(
    self,
    messages: chat_template.Messages,
    tools: chat_template.Tools = None,
  ) -> list[int]:
    """Encodes a conversation up to where the assistant's response begins.

    The ids are those of what the template writes and no more: a beginning of sequence is there
    where the template writes it, as in transformers.

    Args:
      messages: with `role` and `content`, and whatever else the template reads.
      tools: JSON schemas of functions that the model may call.

    Raises:
      UserError: there is no template, or it refuses these messages.
    """
    template = self._open_template()

    def render(messages: Any, tools: Any) -> str:
      return template.render(messages, tools, add_generation_prompt=True)

    shown = literal_text.hide_special_tokens(messages, tools, self._pattern, render)
    text = template.prompt(shown.messages, shown.tools)
    return self._encode(text, shown.hidden)[0].ids

  def exchange(
    self,
    messages: chat_template.Messages,
    response: str | chat_template.Message,
    tools: chat_template.Tools = None,
  ) -> Exchange:
    """Encodes a conversation and a response to it.

    Decoded, prompt and response are what the template makes of the whole conversation, up to
    the end of the response's turn. Where the template marks no end, the end of sequence is
    added. The prompt is `prompt(messages)`, unless the template prints the conversation in
    another way when a response follows.

    Args:
      messages: the conversation.
      response: its text, or a message of the assistant with more than a text, such as calls of
        functions.
      tools: JSON schemas of functions that the model may call.

    Raises:
      UserError: as `prompt`, or the template does not print the response.
    """
    template = self._open_template()
    shown = self._hide([*messages, _response_message(response)], tools)
    turn = template.last_turn(shown.messages, shown.tools)
    prompt, ids = self._encode_parts(turn.text, [turn.begin], shown.hidden)
    return Exchange(prompt, ids if turn.marked else ids + [self.eos_id])

  def all_turns(
    self,
    messages: chat_template.Messages,
    response: str | chat_template.Message,
    tools: chat_template.Tools = None,
  ) -> tuple[list[int], list[int]]:
    """Encodes a conversation and a response to it, and says which tokens the assistant wrote.

    Args:
      messages: the conversation.
      response: as in `exchange`.
      tools: JSON schemas of functions that the model may call.

    Returns:
      (ids [T], for each of them the number of the assistant's message that it belongs to, from
      1, or 0 where it belongs to none [T]).

    Raises:
      UserError: as `exchange`.
    """
    template = self._open_template()
    shown = self._hide([*messages, _response_message(response)], tools)
    turns = template.all_turns(shown.messages, shown.tools)
    cuts = [place for turn in turns for place in (turn.begin, turn.end)]
    ids: list[int] = []
    owners: list[int] = []
    # Texts between turns and turns alternate; behind the last one nothing is left.
    for number, part in enumerate(self._encode_parts(turns[-1].text, cuts[:-1], shown.hidden)):
      ids += part
      owners += [(number + 1) // 2 if number % 2 else 0] * len(part)
    if not turns[-1].marked:
      ids.append(self.eos_id)
      owners.append(len(turns))
    return ids, owners

  def begun(self, messages: chat_template.Messages, beginning: str) -> list[int]:
    """Encodes a conversation up to a place within the response.

    Args:
      messages: the conversation.
      beginning: how the response begins.
    """
    template = self._open_template()
    conversation = [*messages, {'role': 'assistant', 'content': beginning}]
    shown = self._hide(conversation, None)
    text = template.prompt(shown.messages[:-1])
    whole = text + self.response_prefix + shown.messages[-1]['content']
    prompt, words = self._encode_parts(whole, [len(text)], shown.hidden)
    return prompt + words

  def response(self, text: str) -> list[int]:
    """Encodes a response to a plain question, with what ends its turn.

    What the template puts around a response may depend on the conversation: `exchange` encodes
    both.
    """
    if self._chat is None:
      return self.encode(text) + [self.eos_id]
    for number, question in enumerate(PLAIN_QUESTIONS):
      try:
        return self.exchange(question, text).response
      except UserError:
        if number + 1 == len(PLAIN_QUESTIONS):
          raise
    raise AssertionError('there is always a question')

  def decode(self, ids: Iterable[int]) -> str:
    """Decodes a response's ids [R]: up to the end of turn, without special tokens.

    What the template puts around a response is taken away too.
    """
    ids = [int(i) for i in ids]
    ends = [place for place, token_id in enumerate(ids) if token_id in self.stop_ids]
    ended = bool(ends)
    if ended:
      ids = ids[: ends[0]]
    text = self._decode_words(ids)
    prefix, suffix = self._decoded_frame
    text = text.removeprefix(prefix)
    return text.removesuffix(suffix) if ended else text

  # How it is done.

  @property
  def _frame(self) -> chat_template.Frame:
    """What the template puts around a response to a plain question."""
    return chat_template.Frame() if self._chat is None else self._chat.frame

  @property
  def _end(self) -> str:
    """The text of the token `eos_id`."""
    end = self._frame.end or self._roles['eos']
    if end is None:
      raise UserError('tokenizer: expected an end-of-sequence token')
    return end

  @functools.cached_property
  def _padding(self) -> str | None:
    """The text of the token `pad_id`, None where no special token is left for it."""
    pad = self._roles['pad']
    bos = self._roles['bos']
    if pad not in (None, self._end, self._roles['eos'], bos):
      return pad
    return _choose_padding(
      self._special_ids,
      self.template or '',
      used=(self._end, self._roles['eos'], bos),
      unk=self._roles['unk'],
    )

  def _open_template(self) -> chat_template.ChatTemplate:
    """Returns the template, which must be there."""
    if self._chat is None:
      raise UserError('tokenizer: no chat template')
    return self._chat

  def _hide(
    self, messages: chat_template.Messages, tools: chat_template.Tools
  ) -> literal_text.Conversation:
    """Hides the special tokens in a whole conversation."""
    render = self._open_template().render
    return literal_text.hide_special_tokens(messages, tools, self._pattern, render)

  def _encode(
    self, text: str, hidden: Mapping[str, str]
  ) -> tuple[tokenizers.Encoding, Callable[[str], str]]:
    """Encodes rendered text, in which special tokens are marks and the hidden ones are not.

    Args:
      text: with stand-ins.
      hidden: stand-in → the special token that people wrote.

    Returns:
      (the encoding, what gives for a part of the text the part that was encoded).
    """
    text = _repair(text)
    if not hidden:
      encoding = self.core.encode(text, add_special_tokens=False)
      num_marks = len(self._pattern.findall(text))
      # A normaliser may make a special token of other characters, as NFKC of full-width ones.
      if sum(i in self._mark_ids for i in encoding.ids) <= num_marks:
        return encoding, _unchanged
    encoding, rewrite = self._literal.encode(text, hidden)
    return encoding, rewrite

  @functools.cached_property
  def _mark_ids(self) -> frozenset[int]:
    """The ids of special tokens, without that of unknown characters, which stands in any text."""
    unk = self._roles['unk']
    return frozenset(i for token, i in self._special_ids.items() if token != unk)

  def _encode_parts(
    self, text: str, cuts: Sequence[int], hidden: Mapping[str, str]
  ) -> list[list[int]]:
    """Encodes a text in parts, so that no token stands on both sides of a cut.

    The prompt of a response is encoded as it is when a model responds to it.

    Args:
      text: rendered, with stand-ins.
      cuts: places in it, ascending.
      hidden: stand-in → special token.

    Returns:
      One list of ids more than there are cuts.
    """
    whole, rewrite = self._encode(text, hidden)
    heads = [self._encode_head(text[:cut], hidden) for cut in cuts]
    if all(whole.ids[: len(head)] == head for head in heads):
      places = [0, *map(len, heads), len(whole.ids)]
      return [whole.ids[first:last] for first, last in itertools.pairwise(places)]
    parts = [heads[0]]
    for begin, end in itertools.pairwise([*cuts, len(text)]):
      before = [i for part in parts for i in part]
      part = self._continue(before, text[:begin], text[begin:end], hidden)
      if part is None:
        return _split_at_offsets(whole, [len(rewrite(text[:cut])) for cut in cuts])
      parts.append(part)
    return parts

  def _encode_head(self, text: str, hidden: Mapping[str, str]) -> list[int]:
    """Encodes a prompt; K responses to it follow one another, so the last one is kept."""
    if self._last_head[:2] != (text, hidden):
      self._last_head = (text, dict(hidden), self._encode(text, hidden)[0].ids)
    return self._last_head[2]

  _last_head: tuple[str | None, dict[str, str], list[int]] = (None, {}, [])

  def _continue(
    self, before: list[int], text_before: str, text: str, hidden: Mapping[str, str]
  ) -> list[int] | None:
    """Encodes a text that stands behind others, of which the ids are fixed.

    Some tokenizers treat the beginning of a text differently, as SentencePiece does, which puts
    a blank there. So a few characters are tried before it, and what decodes right is taken.

    Args:
      before: the ids of `text_before`.
      text_before: all that stands before.
      text: what follows.
      hidden: stand-in → special token.

    Returns:
      The ids of `text`; None where none are found.
    """
    wanted = self._decode_all(self._encode(text_before + text, hidden)[0].ids)
    for lead in ('', *LEADS):
      lead_ids = self._encode(lead, hidden)[0].ids
      ids = self._encode(lead + text, hidden)[0].ids
      if ids[: len(lead_ids)] != lead_ids:
        continue
      candidate = ids[len(lead_ids) :]
      if self._decode_all(before + candidate) == wanted:
        return candidate
    return None

  def _decode_all(self, ids: list[int]) -> str:
    """Decodes ids, special tokens too."""
    return self.core.decode(ids, skip_special_tokens=False)

  def _decode_words(self, ids: list[int]) -> str:
    """Decodes ids of the middle of a text, without special tokens.

    Some decoders take a blank from the beginning of a text: something else stands there.
    """
    lead, text = self._lead
    decoded = self.core.decode(lead + ids, skip_special_tokens=True)
    if decoded.startswith(text):
      return decoded[len(text) :]
    return self.core.decode(ids, skip_special_tokens=True)

  @functools.cached_property
  def _lead(self) -> tuple[list[int], str]:
    """Ids that may stand before others when these are decoded, and their text."""
    for lead in LEADS:
      ids = self._encode(lead, {})[0].ids
      text = self.core.decode(ids, skip_special_tokens=True)
      if text == lead:
        return ids, text
    return [], ''

  @functools.cached_property
  def _decoded_frame(self) -> tuple[str, str]:
    """What stands before and behind the words of a response when it is decoded."""
    frame = self._frame
    letter = next(letter for letter in PROBES if letter not in frame.prefix)
    try:
      ids = self.response(letter) if self._chat is not None else []
    except UserError:
      ids = []
    if self.eos_id in ids:
      ids = ids[: ids.index(self.eos_id)]
    prefix, found, suffix = self._decode_words(ids).partition(letter)
    return (prefix, suffix) if found else (frame.prefix, frame.suffix)


# Special tokens.


def _prepare_core(
  core: tokenizers.Tokenizer,
  roles: Mapping[str, str | None],
  template: str,
) -> tokenizers.Tokenizer:
  """Returns a copy of the core that cuts and pads nothing and knows which tokens are special.

  These are bos, eos and pad, and the marks of turns in the template, which people often add to a
  vocabulary as ordinary tokens.
  """
  core = copy.deepcopy(core)
  core.no_truncation()
  core.no_padding()
  for role, token in roles.items():
    if token is not None and core.token_to_id(token) is None:
      raise UserError(f'tokenizer: {role} token {token!r} is not in the vocabulary')
  named = {roles[role]: None for role in ('bos', 'eos', 'pad')}  # an ordered set
  named.pop(None, None)
  for added in core.get_added_tokens_decoder().values():
    is_mark = added.content in template and TURN_MARK.fullmatch(added.content) is not None
    if not added.special and (is_mark or added.content in named):
      added.special = True  # the other properties stay
      core.add_special_tokens([added])
    if added.special:
      named.pop(added.content, None)
  core.add_special_tokens([token for token in named if token is not None])
  core.encode_special_tokens = False  # special-token strings become their ids
  return core


def _token_id(core: tokenizers.Tokenizer, token: str) -> int:
  """Returns the id of a token that is in the vocabulary."""
  token_id = core.token_to_id(token)
  assert token_id is not None, token
  return token_id


def _list_special_tokens(core: tokenizers.Tokenizer) -> dict[str, int]:
  """Returns text → id of the special tokens, in the order of ids."""
  added = sorted(core.get_added_tokens_decoder().items())
  return {token.content: token_id for token_id, token in added if token.special}


def _choose_padding(
  special_tokens: Iterable[str],
  template: str,
  *,
  used: Sequence[str | None],
  unk: str | None,
) -> str | None:
  """Returns the last special token without another use, else unk, else None."""
  free = [token for token in special_tokens if token not in (*used, unk) and token not in template]
  if free:
    return free[-1]
  return None if unk in used else unk


def _token_text(token: str | Mapping[str, Any] | None) -> str | None:
  """Returns the text of a token in tokenizer_config.json, which may describe it by a table."""
  if isinstance(token, Mapping):
    return token['content']
  return token


def _role_keys(roles: Mapping[str, str | None]) -> dict[str, str | None]:
  """Returns roles by the keys of tokenizer_config.json, which templates use too."""
  return {role + '_token': token for role, token in roles.items()}


def _further_tokens(config: Mapping[str, Any]) -> dict[str, str]:
  """Returns the special tokens of a config beside the roles, by their names in templates."""
  extra = config.get('extra_special_tokens')
  named = {**config, **extra} if isinstance(extra, Mapping) else config
  tokens = {}
  for name, value in named.items():
    if not name.endswith('_token') or name.removesuffix('_token') in ROLES:
      continue
    text = _token_text(value) if isinstance(value, (str, Mapping)) else None
    if text is not None:
      tokens[name] = text
  return tokens


# Files.


def _read_core(path: Path) -> tokenizers.Tokenizer:
  """Reads a tokenizer.json."""
  if not path.is_file():
    raise UserError(
      f'{path}: not found; transformers writes it: '
      'AutoTokenizer.from_pretrained(d).save_pretrained(d)'
    )
  fingerprints.check_file(path)
  try:
    return tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises nothing narrower
    raise UserError(f'{path}: not a tokenizer ({error})') from None


def _check_splitting(core: tokenizers.Tokenizer, config: Mapping[str, Any], path: Path) -> None:
  """Refuses a blank before texts that tokenizer_config.json and tokenizer.json do not agree on."""
  stated = config.get('add_prefix_space')
  if stated is None or config.get('tokenizer_class') in PLAIN_CLASSES:
    return
  splitter = json.loads(core.to_str())['pre_tokenizer'] or {}
  for part in splitter.get('pretokenizers', [splitter]):
    if part.get('type') == 'ByteLevel' and part['add_prefix_space'] != stated:
      raise UserError(
        f'{path}: add_prefix_space is {show(stated)}, but {part["add_prefix_space"]} in {TOKENIZER}'
      )


def _add_stated_tokens(core: tokenizers.Tokenizer, config: Mapping[str, Any], path: Path) -> None:
  """Adds the tokens that tokenizer_config.json alone has, as transformers does.

  Raises:
    UserError: it states another token for an id than tokenizer.json.
  """
  stated = config.get('added_tokens_decoder') or {}
  present = core.get_added_tokens_decoder()
  for number, table in sorted((int(number), table) for number, table in stated.items()):
    token = tokenizers.AddedToken(**{key: table[key] for key in _TOKEN_KEYS if key in table})
    if core.token_to_id(token.content) is None:
      core.add_tokens([token])
    elif number in present and token.special and not present[number].special:
      core.add_special_tokens([token])
    actual = core.token_to_id(token.content)
    if actual != number:
      raise UserError(
        f'{path}: added_tokens_decoder says that {token.content!r} is {number}, but it is {actual} '
        f'by {TOKENIZER}'
      )
  for name in ('extra_special_tokens', 'additional_special_tokens'):
    texts = config.get(name)
    for text in texts if isinstance(texts, list) else ():
      token_text = _token_text(text)
      if token_text is not None and core.token_to_id(token_text) is None:
        core.add_special_tokens([token_text])


_TOKEN_KEYS = ('content', 'special', 'lstrip', 'rstrip', 'normalized', 'single_word')


def _read_config(directory: Path) -> dict[str, Any]:
  """Reads the files about special tokens; {} where there are none."""
  config: dict[str, Any] = {}
  for name in (OLD_CONFIG, CONFIG):  # the later one counts
    path = directory / name
    if not path.is_file():
      continue
    values = read_json(path)
    check_keys(values, KNOWN_KEYS, str(path))
    config.update(values)
  return config


def _read_end_ids(directory: Path) -> list[int]:
  """Reads the ends of sequence that a model's files list, as transformers' `generate` does.

  generation_config.json counts where it says so, else config.json.
  """
  for name in (GENERATION, MODEL_CONFIG):
    path = directory / name
    stated = read_json(path).get('eos_token_id') if path.is_file() else None
    if stated is None:
      continue
    end_ids = stated if isinstance(stated, list) else [stated]
    if not end_ids or not all(map(whole_number(0).accepts, end_ids)):
      raise UserError(f'{path}: eos_token_id is {show(stated)}, expected an id or a list of ids')
    return list(dict.fromkeys(end_ids))
  return []


def _read_template(directory: Path, config: Mapping[str, Any]) -> str | None:
  """Reads the chat template: a file of its own or, in older directories, a key of the config."""
  path = directory / TEMPLATE
  if path.is_file():
    fingerprints.check_file(path)
    try:
      return path.read_text('utf-8')
    except (OSError, ValueError) as error:
      raise UserError(f'{path}: cannot read: {error}') from None
  template = config.get('chat_template')
  if not isinstance(template, list):
    return template
  for choice in template:  # several, by name
    if choice['name'] == 'default':
      return choice['template']
  return None


# Text.


def _response_message(response: str | chat_template.Message) -> dict[str, Any]:
  """Returns the message of a response."""
  if isinstance(response, str):
    return {'role': 'assistant', 'content': response}
  return {**response, 'role': 'assistant'}


def _unchanged(text: str) -> str:
  return text


def _split_at_offsets(encoding: tokenizers.Encoding, places: Sequence[int]) -> list[list[int]]:
  """Splits ids before the token that reaches beyond each place.

  Args:
    encoding: of a text.
    places: in that text, ascending.
  """
  bounds = [0]
  for place in places:
    index = bounds[-1]
    while index < len(encoding.ids) and encoding.offsets[index][1] <= place:
      index += 1
    bounds.append(index)
  return [
    encoding.ids[first:last] for first, last in itertools.pairwise([*bounds, len(encoding.ids)])
  ]


def _repair(text: str) -> str:
  """Replaces half surrogate pairs, which JSON can carry and UTF-8 cannot, by '?'."""
  return text.encode('utf-8', 'replace').decode('utf-8')
