"""Text ↔ token ids, and how a conversation becomes a prompt.

A tokenizer here is a `tokenizers.Tokenizer`, a chat template in Jinja (rendered as
transformers renders it) and the roles of a few special tokens. What people wrote is
text: special-token strings inside a message are tokenised as characters, so that nobody
ends a turn by writing `<|im_end|>`; only the template's own become special ids.
"""

from collections.abc import Iterable, Mapping
import copy
from pathlib import Path
import re
from typing import Any

import tokenizers

from rlhf_jax import files
from rlhf_jax.errors import UserError
from rlhf_jax.interop import chat_template
from rlhf_jax.interop.gguf_tokenizer import read_gguf_tokenizer
from rlhf_jax.interop.json_files import read_json, write_json
from rlhf_jax.interop.known_keys import check_keys, KnownKeys

ROLES = ('bos', 'eos', 'pad', 'unk')  # of special tokens, as transformers calls them

# Files of a Hugging Face directory.
TOKENIZER = 'tokenizer.json'
CONFIG = 'tokenizer_config.json'
OLD_CONFIG = 'special_tokens_map.json'  # some roles stand only there
TEMPLATE = 'chat_template.jinja'

# tokenizer_config.json has many more keys; tokenizer.json says how a text is split.
KNOWN_KEYS = KnownKeys(
  ignored=('chat_template', *(role + '_token' for role in ROLES)),
  refuse_others=False,
)

# Private-use characters that take the place of special tokens in what people wrote;
# chat_template.py has the two before these.
STAND_INS = range(0xF0002, 0xFFFFE)


class Tokenizer:
  """Text ↔ ids, and the chat template.

  Attributes:
    core: the `tokenizers.Tokenizer`.
    template: the Jinja chat template, or None.
    vocab_size: ids are in [0, vocab_size).
    eos_id: end of turn, with which a response ends: the special token that the template
      puts behind a response, else the tokenizer's end of sequence.
    bos_id: beginning of sequence, or None.
    pad_id: fills places that masks hide; never eos_id. Where the files name none (or name
      eos), the last special token that neither the template nor the other roles use;
      SmolLM2's is `<empty_output>`, 16. Where none is left, as in GPT-2, any other id,
      which the files that are written then do not name.
    response_prefix: what the template puts between the generation prompt and a response,
      such as ' ' after 'Assistant:'.
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
    """Makes a tokenizer; the core is copied.

    Args:
      core: of the tokenizers library.
      template: Jinja source.
      eos: text of the special token with this role.
      bos: likewise.
      pad: likewise.
      unk: likewise.

    Raises:
      UserError: a special token is not in the vocabulary, there is no end of sequence, or
        the template does not render.
    """
    roles = {'bos': bos, 'eos': eos, 'pad': pad, 'unk': unk}
    self.core = _prepare_core(core, roles)
    self.template = template
    self.vocab_size = self.core.get_vocab_size()
    # Encodes special-token strings like any other characters.
    self._literal_core = copy.deepcopy(self.core)
    self._literal_core.encode_special_tokens = True
    self._special_ids = _list_special_tokens(self.core)
    self._special_pattern = _compile_pattern(self._special_ids)

    self._frame = chat_template.ResponseFrame()
    if template is not None and self._special_ids:
      self._frame = chat_template.find_response_frame(
        template,
        _role_keys(roles),
        self._special_pattern,
      )
      eos = self._frame.end or eos
    if pad in (None, eos, bos):
      pad = _choose_padding(
        self._special_ids,
        template or '',
        bos=bos,
        eos=eos,
        unk=unk,
      )
    if eos is None:
      raise UserError('tokenizer: expected an end-of-sequence token')

    self._roles = {'bos': bos, 'eos': eos, 'pad': pad, 'unk': unk}
    self.eos_id = _token_id(self.core, eos)
    self.bos_id = None if bos is None else _token_id(self.core, bos)
    if pad is None:
      self.pad_id = 1 if self.eos_id == 0 else 0  # any other id: masks hide it
    else:
      self.pad_id = _token_id(self.core, pad)
    self.response_prefix = self._frame.prefix
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
    roles = {role: _token_text(config.get(role + '_token')) for role in ROLES}
    return cls(core, _read_template(directory, config), **roles)

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
    return cls(parts.core, parts.template, **parts.roles)

  def with_template(self, template: str) -> 'Tokenizer':
    """Returns a tokenizer with the same vocabulary and another chat template, in Jinja."""
    return Tokenizer(self.core, template, **self._roles)

  def save(self, directory: str | Path) -> None:
    """Writes the files that transformers reads.

    These are tokenizer.json, tokenizer_config.json and, where there is a template,
    chat_template.jinja.
    """
    directory = Path(directory)
    config = {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'clean_up_tokenization_spaces': False,
      **_role_keys(self._roles),
    }
    files.write_text(directory / TOKENIZER, self.core.to_str())
    write_json(directory / CONFIG, config, ensure_ascii=False)
    if self.template is not None:
      files.write_text(directory / TEMPLATE, self.template)

  def encode(self, text: str) -> list[int]:
    """Encodes a text and adds nothing; special-token strings are characters like any other."""
    return self._literal_core.encode(_repair(text), add_special_tokens=False).ids

  def text(self, text: str) -> list[int]:
    """Encodes a text that stands alone.

    A beginning of sequence comes before it where the tokenizer adds one.
    """
    return self._begin() + self.encode(text)

  def prompt(self, messages: chat_template.Messages) -> list[int]:
    """Encodes a conversation up to where the assistant's response begins.

    The beginning-of-sequence token comes once, where the template writes it or the
    tokenizer itself adds it.

    Args:
      messages: with `role` and `content`.

    Raises:
      UserError: there is no template, or it refuses these messages.
    """
    hidden = self._hide_special_tokens(message['content'] for message in messages)
    messages = [
      {**message, 'content': _replace_all(message['content'], hidden)} for message in messages
    ]
    text = self._render_prompt(messages)
    ids = self._encode_rendered(text, hidden)
    begin = self._begin()
    if ids[: len(begin)] == begin:
      return ids
    return begin + ids

  def response(self, text: str) -> list[int]:
    """Encodes a response, stripped of outer blanks, that ends its turn.

    prompt(m) + response(t) are the ids of the complete conversation, up to what the
    template writes after the end of turn.
    """
    hidden = self._hide_special_tokens([text])
    content = _replace_all(text.strip(), hidden)
    framed = self._frame.prefix + content + self._frame.suffix
    # Encoded behind the end of the prompt: some tokenizers treat the beginning of a text
    # differently, as SentencePiece does, which puts a blank there.
    tail = self._frame.tail
    tail_ids = self._encode_rendered(tail, hidden)
    ids = self._encode_rendered(tail + framed, hidden)
    return ids[len(tail_ids) :] + [self.eos_id]

  def decode(self, ids: Iterable[int]) -> str:
    """Decodes a response's ids [R]: up to the end of turn, without special tokens."""
    ids = [int(i) for i in ids]
    if self.eos_id in ids:
      ids = ids[: ids.index(self.eos_id)]
    text = self.core.decode(ids, skip_special_tokens=True)
    return text.removeprefix(self.response_prefix)

  def _render_prompt(self, messages: chat_template.Messages) -> str:
    """Renders a conversation up to where the response begins."""
    if self.template is None:
      raise UserError('tokenizer: no chat template')
    return chat_template.render_chat(
      self.template,
      messages,
      _role_keys(self._roles),
      add_generation_prompt=True,
    )

  def _begin(self) -> list[int]:
    """Returns the ids that the tokenizer itself puts before a text."""
    if self.bos_id is None or not self._adds_bos:
      return []
    return [self.bos_id]

  def _hide_special_tokens(self, texts: Iterable[str]) -> dict[str, str]:
    """Chooses a stand-in character for each special token that people wrote.

    Returns:
      Token → a character that is in none of the texts.
    """
    if not self._special_ids:
      return {}  # the pattern would match the empty string everywhere
    text = ''.join(texts)
    free = (chr(code) for code in STAND_INS if chr(code) not in text)
    written = set(self._special_pattern.findall(text))
    return {token: next(free) for token in written}

  def _encode_rendered(self, text: str, hidden: Mapping[str, str]) -> list[int]:
    """Encodes rendered text, in which special tokens count and the hidden ones are characters.

    Args:
      text: with stand-ins.
      hidden: token → its stand-in.
    """
    text = _repair(text)
    if not hidden:
      return self.core.encode(text, add_special_tokens=False).ids
    shown = {stand_in: token for token, stand_in in hidden.items()}
    ids: list[int] = []
    for piece in self._special_pattern.split(text):
      if piece in self._special_ids:
        ids.append(self._special_ids[piece])
      elif piece:
        literal = _replace_all(piece, shown)
        ids += self._literal_core.encode(literal, add_special_tokens=False).ids
    return ids


# Special tokens.


def _prepare_core(
  core: tokenizers.Tokenizer,
  roles: Mapping[str, str | None],
) -> tokenizers.Tokenizer:
  """Returns a copy of the core that cuts and pads nothing and knows bos, eos and pad as special."""
  core = copy.deepcopy(core)
  core.no_truncation()
  core.no_padding()
  for role, token in roles.items():
    if token is not None and core.token_to_id(token) is None:
      raise UserError(f'tokenizer: {role} token {token!r} is not in the vocabulary')
  added = {token.content for token in core.get_added_tokens_decoder().values()}
  named = [roles[role] for role in ('bos', 'eos', 'pad')]
  core.add_special_tokens([token for token in named if token is not None and token not in added])
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


def _compile_pattern(special_tokens: Iterable[str]) -> re.Pattern[str]:
  """Compiles a pattern that finds special tokens, the longest where several begin."""
  longest_first = sorted(special_tokens, key=len, reverse=True)
  # In a group, so that `split` keeps them.
  return re.compile('(' + '|'.join(map(re.escape, longest_first)) + ')')


def _choose_padding(
  special_tokens: Iterable[str],
  template: str,
  *,
  bos: str | None,
  eos: str | None,
  unk: str | None,
) -> str | None:
  """Returns the last special token without another use, else unk, else None."""
  used = (eos, bos, unk)
  free = [token for token in special_tokens if token not in used and token not in template]
  if free:
    return free[-1]
  if unk in (eos, bos):
    return None
  return unk


def _token_text(token: str | Mapping[str, Any] | None) -> str | None:
  """Returns the text of a token in tokenizer_config.json, which may describe it by a table."""
  if isinstance(token, Mapping):
    return token['content']
  return token


def _role_keys(roles: Mapping[str, str | None]) -> dict[str, str | None]:
  """Returns roles by the keys of tokenizer_config.json, which templates use too."""
  return {role + '_token': token for role, token in roles.items()}


# Files.


def _read_core(path: Path) -> tokenizers.Tokenizer:
  """Reads a tokenizer.json."""
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


def _read_template(directory: Path, config: Mapping[str, Any]) -> str | None:
  """Reads the chat template: a file of its own or, in older directories, a key of the config."""
  path = directory / TEMPLATE
  if path.is_file():
    return path.read_text('utf-8')
  template = config.get('chat_template')
  if not isinstance(template, list):
    return template
  for choice in template:  # several, by name
    if choice['name'] == 'default':
      return choice['template']
  return None


# Text.


def _replace_all(text: str, replacements: Mapping[str, str]) -> str:
  """Replaces each key by its value, one after the other."""
  for old, new in replacements.items():
    text = text.replace(old, new)
  return text


def _repair(text: str) -> str:
  """Replaces half surrogate pairs, which JSON can carry and UTF-8 cannot, by '?'."""
  return text.encode('utf-8', 'replace').decode('utf-8')
