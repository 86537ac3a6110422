"""Text ↔ token ids, and how a conversation becomes a prompt.

A tokenizer here is a `tokenizers.Tokenizer`, a chat template in jinja2 and the roles of a few
special tokens. What people wrote is text: special tokens inside a message are tokenised as
characters, so nobody ends a turn by writing `<|im_end|>`. Only those of the template become
special ids.
"""

from collections.abc import Iterable, Mapping, Sequence
import copy
from pathlib import Path
import re
from typing import Any

import tokenizers

from rlhf_jax import files
from rlhf_jax.errors import UserError
from rlhf_jax.interop.chat_template import (
  find_response_frame,
  Messages,
  render_chat,
  ResponseFrame,
)
from rlhf_jax.interop.gguf_tokenizer import read_gguf_tokenizer
from rlhf_jax.interop.json_files import read_json, write_json
from rlhf_jax.interop.known_keys import check_keys, KnownKeys

CORE = 'tokenizer.json'
CONFIG = 'tokenizer_config.json'
SPECIAL_TOKENS = 'special_tokens_map.json'  # of older directories; CONFIG counts more
TEMPLATE = 'chat_template.jinja'
ROLES = ('bos', 'eos', 'pad', 'unk')

# tokenizer_config.json; others are passed over: tokenizer.json says how text is split.
KNOWN_KEYS = KnownKeys(read=('chat_template', *(f'{role}_token' for role in ROLES)))

STAND_INS = range(0xF0002, 0xFFFFE)  # private-use characters for special tokens that people write


class Tokenizer:
  """A tokenizer with a chat template.

  Attributes:
    core: the `tokenizers.Tokenizer`.
    template: the jinja2 chat template, or None.
    vocab_size: ids are in [0, vocab_size).
    eos_id: end of turn, with which a response ends: the special token with which the template
      ends a response, else the tokenizer's end of sequence.
    bos_id: beginning of sequence, or None.
    pad_id: fills places that masks hide; never eos_id. Where the files name none (or name eos),
      it is the last special token that neither the template nor the other roles use; SmolLM2's is
      `<empty_output>`, 16. Where there is none to spare, as in GPT-2, it is any other id, which
      `save` does not name.
    response_prefix: what the template puts between the generation prompt and a response; ' '
      after 'Assistant:'.
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
  ):
    """Makes a tokenizer.

    Args:
      core: is copied.
      template: jinja2 source.
      eos: text of the special token that ends a sequence.
      bos: text of the one that begins it.
      pad: text of the one that pads.
      unk: text of the one for what the vocabulary lacks.

    Raises:
      UserError: a special token is not in the vocabulary, or there is no end of sequence.
    """
    self.core = _prepare_core(core, bos=bos, eos=eos, pad=pad, unk=unk)
    self.template = template
    self.vocab_size = self.core.get_vocab_size()
    self._plain = copy.deepcopy(self.core)
    self._plain.encode_special_tokens = True  # i.e. as characters, in this library's words
    self._special = _special_tokens(self.core)
    self._split = _match_any(self._special)

    self._roles = {'bos_token': bos, 'eos_token': eos, 'pad_token': pad, 'unk_token': unk}
    self._frame = ResponseFrame()
    if template is not None and self._special:
      self._frame = find_response_frame(template, self._roles, self._split)
    eos = self._frame.end or eos
    if eos is None:
      raise UserError('tokenizer: expected an end-of-sequence token')
    if pad in (None, eos, bos):
      pad = self._spare_token(eos=eos, bos=bos, unk=unk)
    self._roles.update(eos_token=eos, pad_token=pad)

    self.eos_id = _id_of(self.core, eos)
    self.bos_id = None if bos is None else _id_of(self.core, bos)
    if pad is None:
      self.pad_id = 1 if self.eos_id == 0 else 0
    else:
      self.pad_id = _id_of(self.core, pad)
    self._adds_bos = bos is not None and self.core.encode('').ids[:1] == [self.bos_id]

  @property
  def response_prefix(self) -> str:
    """What the template puts between the generation prompt and a response."""
    return self._frame.prefix

  def with_template(self, template: str) -> 'Tokenizer':
    """Returns the same vocabulary with another chat template (jinja2)."""
    roles = {role: self._roles[f'{role}_token'] for role in ROLES}
    return Tokenizer(self.core, template, **roles)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, nothing added; special tokens in it are characters."""
    return self._plain.encode(_encodable(text), add_special_tokens=False).ids

  def text(self, text: str) -> list[int]:
    """Returns the ids of a text that begins a sequence.

    The beginning-of-sequence token comes first, where the tokenizer adds one.
    """
    if self._adds_bos:
      assert self.bos_id is not None
      return [self.bos_id, *self.encode(text)]
    return self.encode(text)

  def prompt(self, messages: Messages) -> list[int]:
    """Returns the ids of a conversation up to where the assistant's response begins.

    The beginning-of-sequence token comes once, whether the template writes it or the tokenizer
    adds it.

    Args:
      messages: dicts of `role` and `content`.

    Raises:
      UserError: there is no template, or it refuses these messages.
    """
    hidden = self._choose_stand_ins(message['content'] for message in messages)
    messages = [
      {**message, 'content': _replace(message['content'], hidden)} for message in messages
    ]
    ids = self._tokenise(self._render_prompt(messages), hidden)
    if self._adds_bos and ids[:1] != [self.bos_id]:
      assert self.bos_id is not None
      return [self.bos_id, *ids]
    return ids

  def response(self, text: str) -> list[int]:
    """Returns the ids of a response, stripped of outer blanks, that ends its turn.

    prompt(messages) + response(text) are the ids of the whole conversation, except for what the
    template writes after the end of the turn.
    """
    hidden = self._choose_stand_ins([text])
    shown = self._frame.prefix + _replace(text.strip(), hidden) + self._frame.suffix
    # Some tokenizers treat the beginning of a text differently: read the response where it stands,
    # after the generation prompt.
    tail = self._tokenise(self._frame.tail, hidden)
    both = self._tokenise(self._frame.tail + shown, hidden)
    return [*both[len(tail) :], self.eos_id]

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of a response, up to the end of its turn, without special tokens.

    Args:
      ids: [R].
    """
    ids = [int(i) for i in ids]
    if self.eos_id in ids:
      ids = ids[: ids.index(self.eos_id)]
    text = self.core.decode(ids, skip_special_tokens=True)
    return text.removeprefix(self.response_prefix)

  def save(self, directory: str | Path) -> None:
    """Writes the files that transformers and `load` read: vocabulary, config and template."""
    directory = Path(directory)
    config = {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'clean_up_tokenization_spaces': False,
      **self._roles,
    }
    files.write_text(directory / CORE, self.core.to_str())
    write_json(directory / CONFIG, config, ensure_ascii=False)
    if self.template is not None:
      files.write_text(directory / TEMPLATE, self.template)

  @classmethod
  def load(cls, directory: str | Path) -> 'Tokenizer':
    """Reads the tokenizer of a Hugging Face directory.

    Raises:
      UserError: there is no readable tokenizer.json, or as the constructor.
    """
    directory = Path(directory)
    core = _read_core(directory / CORE)
    config = _read_config(directory)
    roles = {role: _token_text(config.get(f'{role}_token')) for role in ROLES}
    return cls(core, _read_template(directory, config), **roles)

  @classmethod
  def from_gguf(cls, metadata: Mapping[str, Any]) -> 'Tokenizer | None':
    """Makes the tokenizer that a GGUF file's metadata describe.

    Args:
      metadata: plain values by key.

    Returns:
      The tokenizer, None where it is not one of the byte-level BPE tokenizers that are read.
    """
    parts = read_gguf_tokenizer(metadata)
    if parts is None:
      return None
    return cls(parts.core, parts.template, **parts.roles)

  def _spare_token(self, *, eos: str, bos: str | None, unk: str | None) -> str | None:
    """Returns a token for padding that means nothing else, None where there is none."""
    used_by_template = self.template or ''
    for token in reversed(self._special):
      if token not in (eos, bos, unk) and token not in used_by_template:
        return token
    return None if unk in (eos, bos) else unk

  def _render_prompt(self, messages: Messages) -> str:
    """Renders a conversation up to where the response begins."""
    if self.template is None:
      raise UserError('tokenizer: no chat template')
    return render_chat(self.template, messages, self._roles, add_generation_prompt=True)

  def _choose_stand_ins(self, texts: Iterable[str]) -> dict[str, str]:
    """Chooses a character that stands for each special token which people wrote.

    Returns:
      Token → a character that is in none of the texts.
    """
    if not self._special:
      return {}
    text = ''.join(texts)
    free = (chr(i) for i in STAND_INS if chr(i) not in text)
    return {token: next(free) for token in set(self._split.findall(text))}

  def _tokenise(self, text: str, hidden: Mapping[str, str]) -> list[int]:
    """Returns the ids of rendered text.

    Args:
      text: whose special tokens count.
      hidden: special token → the character that stands for it where people wrote it.
    """
    text = _encodable(text)
    if not hidden:
      return self.core.encode(text, add_special_tokens=False).ids
    shown = {character: token for token, character in hidden.items()}
    ids = []
    for piece in self._split.split(text):
      if piece in self._special:
        ids.append(self._special[piece])
      elif piece:
        ids += self._plain.encode(_replace(piece, shown), add_special_tokens=False).ids
    return ids


def _prepare_core(core: tokenizers.Tokenizer, **roles: str | None) -> tokenizers.Tokenizer:
  """Returns a copy that neither cuts nor pads, in which the tokens with roles are special."""
  core = copy.deepcopy(core)
  core.no_truncation()
  core.no_padding()
  for role, token in roles.items():
    if token is not None and core.token_to_id(token) is None:
      raise UserError(f'tokenizer: {role} token {token!r} is not in the vocabulary')
  added = {token.content for token in core.get_added_tokens_decoder().values()}
  ends = (roles['bos'], roles['eos'], roles['pad'])  # unk may be an ordinary token
  core.add_special_tokens([token for token in ends if token is not None and token not in added])
  core.encode_special_tokens = False  # special tokens in a text become their ids
  return core


def _special_tokens(core: tokenizers.Tokenizer) -> dict[str, int]:
  """Returns text → id of the special tokens, by id."""
  added = sorted(core.get_added_tokens_decoder().items())
  return {token.content: number for number, token in added if token.special}


def _id_of(core: tokenizers.Tokenizer, token: str) -> int:
  """Returns the id of a token of the vocabulary."""
  number = core.token_to_id(token)
  assert number is not None, token
  return number


def _match_any(tokens: Iterable[str]) -> re.Pattern[str]:
  """Compiles a pattern that matches the longest of these tokens, as a group."""
  longest_first = sorted(tokens, key=len, reverse=True)
  return re.compile('(' + '|'.join(re.escape(token) for token in longest_first) + ')')


def _read_core(path: Path) -> tokenizers.Tokenizer:
  """Reads tokenizer.json."""
  if not path.is_file():
    raise UserError(
      f'{path}: not found; transformers writes it: '
      'AutoTokenizer.from_pretrained(d).save_pretrained(d)'
    )
  try:
    return tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises nothing narrower
    raise UserError(f'{path}: not a tokenizer ({error})') from None


def _read_config(directory: Path) -> dict[str, Any]:
  """Reads the files about special tokens, {} where there are none."""
  config: dict[str, Any] = {}
  for name in (SPECIAL_TOKENS, CONFIG):
    path = directory / name
    if path.is_file():
      values = read_json(path)
      check_keys(values, KNOWN_KEYS, str(path))
      config.update(values)
  return config


def _read_template(directory: Path, config: Mapping[str, Any]) -> str | None:
  """Reads the chat template: a file of its own, or in older directories a key of the config."""
  file = directory / TEMPLATE
  if file.is_file():
    return file.read_text('utf-8')
  template = config.get('chat_template')
  if isinstance(template, list):  # several, by name
    return _default_template(template)
  return template


def _default_template(templates: Sequence[Mapping[str, str]]) -> str | None:
  """Returns the template named default, None where there is none."""
  for template in templates:
    if template['name'] == 'default':
      return template['template']
  return None


def _token_text(token: Any) -> str | None:
  """Returns the text of a special token, which older files write as a dict of its settings."""
  return token['content'] if isinstance(token, dict) else token


def _replace(text: str, table: Mapping[str, str]) -> str:
  """Replaces the table's keys by its values."""
  for old, new in table.items():
    text = text.replace(old, new)
  return text


def _encodable(text: str) -> str:
  """Replaces halves of surrogate pairs, which JSON can carry and UTF-8 cannot, by '?'."""
  return text.encode('utf-8', 'replace').decode('utf-8')
