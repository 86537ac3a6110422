"""Text ↔ token ids, and how a conversation becomes a prompt.

A tokenizer here is a `tokenizers.Tokenizer`, a chat template in Jinja and the
roles of a few special tokens. Prompt and response come from one rendering of the
whole conversation (chat_template.py); special tokens that people wrote stay text
(literal_text.py).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import copy
import functools
import itertools
from pathlib import Path
import re
from typing import Any, NamedTuple

import tokenizers

from rlhf_jax import files
from rlhf_jax.errors import UserError
from rlhf_jax.interop import chat_template, literal_text, tokenizer_files
from rlhf_jax.interop.chat_template import compile_pattern
from rlhf_jax.interop.gguf_tokenizer import read_gguf_tokenizer
from rlhf_jax.interop.json_files import write_json

# Matches marks of turns, such as '<|im_end|>', and not '<think>' or '<tool_call>'.
TURN_MARK = re.compile(r'<\|.+\|>|<｜.+｜>|\[/?[A-Z_]+\]|<(start|end)_of_turn>')

# Conversations for `response`, which has none of its own; the second is for
# templates that demand a system message.
PLAIN_QUESTIONS = (
  [{'role': 'user', 'content': 'a'}],
  [{'role': 'system', 'content': 'a'}, {'role': 'user', 'content': 'a'}],
)

LEADS = ('a', '.', ':', '\n')  # texts put before one that begins in the middle of another
PROBES = 'aeiou0123456789'  # single characters that nearly every vocabulary has


class Exchange(NamedTuple):
  """A prompt and a response to it as token ids, [P] and [R]."""

  prompt: list[int]
  response: list[int]  # with all that the template writes around it, up to the end of its turn


class Tokenizer:
  """Text ↔ ids, and the chat template.

  The template is rendered for the first time when a conversation is encoded, or
  when `eos_id` or `pad_id` is read. So a directory whose template does not work
  can still encode bare texts.

  Attributes:
    core: the `tokenizers.Tokenizer`.
    template: the Jinja chat template, or None.
    vocab_size: how many tokens there are; where ids are skipped, the highest id is above it.
    end_ids: the end-of-sequence ids that the model's files list; () where they list none.
    bos_id: the id of the beginning-of-sequence token, or None.
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
      core: a tokenizer of the library `tokenizers`.
      template: the chat template, in Jinja.
      eos: the text of the end-of-sequence token.
      bos: the text of the beginning-of-sequence token.
      pad: the text of the padding token.
      unk: the text of the token for unknown characters.
      more: further special tokens that templates may use: name, such as 'cls_token' → text.
      end_ids: end-of-sequence ids that the model's files list beside that of `eos`.

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
      variables = {**self._more, **tokenizer_files.role_keys(self._roles)}
      defined = {name: token for name, token in variables.items() if token is not None}
      self._chat = chat_template.ChatTemplate(template, defined, self._special_ids)
    elif eos is None:
      raise UserError('tokenizer: expected an end-of-sequence token')
    # Tried on the core, as files have several ways to say whether it adds one.
    self._adds_bos = bos is not None and self.core.encode('').ids[:1] == [self.bos_id]

  @classmethod
  def load(cls, directory: str | Path) -> 'Tokenizer':
    """Reads the tokenizer of a Hugging Face directory.

    Raises:
      UserError: there is no readable tokenizer.json, or as the constructor.
    """
    parts = tokenizer_files.read_tokenizer_files(Path(directory))
    return cls(
      parts.core,
      parts.template,
      more=parts.further_tokens,
      end_ids=parts.end_ids,
      **parts.roles,
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
    return cls(parts.core, parts.template, more={}, end_ids=parts.end_ids, **parts.roles)

  def with_template(self, template: str) -> 'Tokenizer':
    """Returns a tokenizer with the same vocabulary and another chat template, in Jinja."""
    return Tokenizer(self.core, template, more=self._more, end_ids=self.end_ids, **self._roles)

  def with_end_ids(self, end_ids: Sequence[int]) -> 'Tokenizer':
    """Returns the same tokenizer with other ends of sequence."""
    return Tokenizer(self.core, self.template, more=self._more, end_ids=end_ids, **self._roles)

  def save(self, directory: str | Path) -> None:
    """Writes the files that transformers reads.

    These are tokenizer.json and tokenizer_config.json; also chat_template.jinja if there is a
    template, and generation_config.json if several tokens can end a response.
    """
    directory = Path(directory)
    roles = {**self._roles, 'eos': self._roles['eos'] or self._end, 'pad': self._padding}
    config = {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'clean_up_tokenization_spaces': False,
      **self._more,
      **tokenizer_files.role_keys(roles),
    }
    files.write_text(directory / tokenizer_files.TOKENIZER, self.core.to_str())
    write_json(directory / tokenizer_files.CONFIG, config, ensure_ascii=False)
    if len(self.stop_ids) > 1:
      write_json(directory / tokenizer_files.GENERATION, self.id_keys())
    if self.template is not None:
      files.write_text(directory / tokenizer_files.TEMPLATE, self.template)

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
    """The id of the token that ends a response.

    It is the special token that the template writes after a response. If the
    template writes none, it is the tokenizer's end-of-sequence token.
    """
    return _token_id(self.core, self._end)

  @property
  def stop_ids(self) -> tuple[int, ...]:
    """All ids that end a response: those that the model's files list, and `eos_id`."""
    if self.eos_id in self.end_ids:
      return self.end_ids
    return (self.eos_id, *self.end_ids)

  @functools.cached_property
  def tokens(self) -> dict[int, str]:
    """The token that each id stands for."""
    vocabulary = self.core.get_vocab(with_added_tokens=True)
    return {token_id: token for token, token_id in vocabulary.items()}

  def empty_ids(self, vocab_size: int) -> tuple[tuple[int, int], ...]:
    """Finds the ids of a model's vocabulary that stand for no token.

    Args:
      vocab_size: the model's vocabulary size, which may be padded beyond the tokenizer's.

    Returns:
      Half-open ranges (first id, end), ascending.
    """
    ranges = []
    known = sorted(token_id for token_id in self.tokens if token_id < vocab_size)
    for before, after in zip([-1, *known], [*known, vocab_size]):
      if after > before + 1:
        ranges.append((before + 1, after))
    return tuple(ranges)

  def find_difference(self, other: 'Tokenizer') -> int | None:
    """Finds the first id that stands for different tokens here and in another tokenizer.

    Ids that only one of them has do not count: vocabularies are often extended at the end.
    """
    common = self.tokens.keys() & other.tokens.keys()
    different = [i for i in common if self.tokens[i] != other.tokens[i]]
    return min(different, default=None)

  @functools.cached_property
  def pad_id(self) -> int:
    """The id that fills masked places; never eos_id.

    Where the files name no padding token, or name eos, it is the last special
    token that neither the template nor another role uses; SmolLM2's is
    `<empty_output>`, 16. Where no special token is free, as in GPT-2, it is an
    ordinary id, and `save` names no padding token.
    """
    if self._padding is None:
      return 1 if self.eos_id == 0 else 0
    return _token_id(self.core, self._padding)

  @property
  def response_prefix(self) -> str:
    """What the template writes between generation prompt and response, such as ' ' after 'A:'."""
    return self._frame.prefix

  # Encoding.

  def encode(self, text: str) -> list[int]:
    """Encodes a text and adds nothing; a special token's string in it is ordinary text."""
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

    It begins with the beginning-of-sequence token if the tokenizer adds one.
    """
    begin = [self.bos_id] if self.bos_id is not None and self._adds_bos else []
    return begin + self.encode(text)

  def prompt(
    self,
    messages: chat_template.Messages,
    tools: chat_template.Tools = None,
  ) -> list[int]:
    """Encodes a conversation up to where the assistant's response begins.

    Nothing is added to what the template writes: the beginning-of-sequence token
    is there only if the template writes it, as in transformers.

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

    Prompt and response together are the rendered conversation up to the end of
    the response's turn. If the template does not mark the end of a turn, the
    end-of-sequence token is added. The prompt equals `prompt(messages)`, unless
    the template renders the conversation differently once a response follows.

    Args:
      messages: the conversation.
      response: its text, or a message of the assistant with more than text, such as function
        calls.
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
      (ids [T], owners [T]). An owner is the number, from 1, of the assistant's message to which
      the token belongs; 0 for tokens that the assistant did not write.

    Raises:
      UserError: as `exchange`.
    """
    template = self._open_template()
    shown = self._hide([*messages, _response_message(response)], tools)
    turns = template.all_turns(shown.messages, shown.tools)
    cuts = [place for turn in turns for place in (turn.begin, turn.end)]
    ids: list[int] = []
    owners: list[int] = []
    # Parts alternate: text before a turn, that turn, and so on. The last part is the last turn.
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
    """Encodes a response to a plain question, with the token that ends its turn.

    What the template writes around a response may depend on the conversation;
    `exchange` encodes a response in its own conversation.
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
    """Decodes a response's ids [R] up to the end of its turn, without special tokens.

    Text that the template writes around every response is removed too.
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

  # Private parts.

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
    """Returns the template; raises UserError if there is none."""
    if self._chat is None:
      raise UserError(
        'tokenizer: no chat template; in an experiment, config.tokenizer.chat_template gives one'
      )
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
    """Encodes rendered text: the template's special tokens as such, those of people as text.

    Args:
      text: rendered, with a stand-in wherever a person wrote a special token's string.
      hidden: stand-in → the string that it stands for.

    Returns:
      (the encoding, a function from a part of `text` to the characters encoded for it).
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
    """The ids of special tokens except `unk`, which ordinary text can contain."""
    unk = self._roles['unk']
    return frozenset(i for token, i in self._special_ids.items() if token != unk)

  def _encode_parts(
    self, text: str, cuts: Sequence[int], hidden: Mapping[str, str]
  ) -> list[list[int]]:
    """Encodes a text in parts, so that no token lies across a cut.

    The ids before the first cut are those that a model gets as its prompt.

    Args:
      text: rendered, with stand-ins.
      cuts: offsets in the text, ascending.
      hidden: stand-in → special token.

    Returns:
      The ids of each part; there is one part more than there are cuts.
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
    """Encodes a prompt. The last one is cached, as its K responses are encoded in a row."""
    if self._last_head[:2] != (text, hidden):
      self._last_head = (text, dict(hidden), self._encode(text, hidden)[0].ids)
    return self._last_head[2]

  _last_head: tuple[str | None, dict[str, str], list[int]] = (None, {}, [])

  def _continue(
    self, before: list[int], text_before: str, text: str, hidden: Mapping[str, str]
  ) -> list[int] | None:
    """Encodes a text that continues another one, whose ids are already fixed.

    Some tokenizers treat the beginning of a text differently: SentencePiece puts
    a space there. So the text is encoded after each of a few short leads, and the
    first result that decodes to the right text is taken.

    Args:
      before: the ids of `text_before`.
      text_before: the text before it.
      text: the continuation.
      hidden: stand-in → special token.

    Returns:
      The ids of `text`; None if no lead gives ids that decode to it.
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
    """Decodes ids from the middle of a text, without special tokens.

    Some decoders drop a space at the beginning of a text, so a lead is decoded before them.
    """
    lead, text = self._lead
    decoded = self.core.decode(lead + ids, skip_special_tokens=True)
    if decoded.startswith(text):
      return decoded[len(text) :]
    return self.core.decode(ids, skip_special_tokens=True)

  @functools.cached_property
  def _lead(self) -> tuple[list[int], str]:
    """The ids and text of a lead that decodes to itself, to put before other ids."""
    for lead in LEADS:
      ids = self._encode(lead, {})[0].ids
      text = self.core.decode(ids, skip_special_tokens=True)
      if text == lead:
        return ids, text
    return [], ''

  @functools.cached_property
  def _decoded_frame(self) -> tuple[str, str]:
    """What decoding gives before and after the words of a response: (prefix, suffix)."""
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
  """Returns a copy of the core that neither truncates nor pads, and knows the special tokens.

  Made special are bos, eos and pad, and the template's turn marks, which are
  often added to a vocabulary as ordinary tokens.
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
  """Returns the last special token without another use, or else unk; None if unk is used too."""
  free = [token for token in special_tokens if token not in (*used, unk) and token not in template]
  if free:
    return free[-1]
  return None if unk in used else unk


# Text.


def _response_message(response: str | chat_template.Message) -> dict[str, Any]:
  """Returns the message of a response."""
  if isinstance(response, str):
    return {'role': 'assistant', 'content': response}
  return {**response, 'role': 'assistant'}


def _unchanged(text: str) -> str:
  return text


def _split_at_offsets(encoding: tokenizers.Encoding, places: Sequence[int]) -> list[list[int]]:
  """Splits ids at offsets of the text; a token across an offset goes to the part after it.

  Args:
    encoding: the encoding of a text.
    places: offsets in that text, ascending.
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
  """Replaces lone surrogates, which JSON can hold and UTF-8 cannot, by '?'."""
  return text.encode('utf-8', 'replace').decode('utf-8')
