"""Text ↔ token ids, and how a conversation becomes a prompt.

A tokenizer here is a `tokenizers.Tokenizer`, a chat template in Jinja (rendered as
transformers renders it) and the roles of a few special tokens. What people wrote is
text: special-token strings inside a message are tokenised as characters, so that nobody
ends a turn by writing `<|im_end|>`; only the template's own become special ids.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import copy
import functools
from pathlib import Path
import re
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from rlhf_jax import files
from rlhf_jax.errors import UserError
from rlhf_jax.interop.json_files import read_json, write_json

ROLES = ('bos', 'eos', 'pad', 'unk')  # of special tokens, as transformers calls them

# Files of a Hugging Face directory.
TOKENIZER = 'tokenizer.json'
CONFIG = 'tokenizer_config.json'
OLD_CONFIG = 'special_tokens_map.json'  # some roles stand only there
TEMPLATE = 'chat_template.jinja'

# Private-use characters. Two mark a message's place in a rendered template, the others take the
# place of special tokens that people wrote.
QUESTION = '\U000f0000'
RESPONSE = '\U000f0001'
STAND_INS = range(0xF0002, 0xFFFFE)

Message = Mapping[str, str]  # `role` and `content`


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

    self._frame = _Frame()
    if template is not None and self._special_ids:
      self._frame = _read_frame(template, roles, self._special_pattern)
      eos = self._frame.end_of_turn or eos
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
    self.response_prefix = self._frame.before_response
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
    config: dict[str, Any] = {}
    for name in (OLD_CONFIG, CONFIG):  # the later one counts
      if (directory / name).is_file():
        config.update(read_json(directory / name))
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
    values = _GgufValues(metadata)
    if not values.is_known_kind:
      return None
    return cls(
      _build_gguf_core(values),
      metadata.get('tokenizer.chat_template'),
      bos=values.token('bos'),
      eos=values.token('eos'),
      pad=values.token('padding'),
      unk=values.token('unknown'),
    )

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

  def prompt(self, messages: Sequence[Message]) -> list[int]:
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
    text = _render(
      self.template,
      self._roles,
      messages,
      add_generation_prompt=True,
    )
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
    framed = self._frame.before_response + content + self._frame.after_response
    # Encoded behind the end of the prompt: some tokenizers treat the beginning of a text
    # differently, as SentencePiece does, which puts a blank there.
    lead = self._frame.end_of_prompt
    lead_ids = self._encode_rendered(lead, hidden)
    ids = self._encode_rendered(lead + framed, hidden)
    return ids[len(lead_ids) :] + [self.eos_id]

  def decode(self, ids: Iterable[int]) -> str:
    """Decodes a response's ids [R]: up to the end of turn, without special tokens."""
    ids = [int(i) for i in ids]
    if self.eos_id in ids:
      ids = ids[: ids.index(self.eos_id)]
    text = self.core.decode(ids, skip_special_tokens=True)
    return text.removeprefix(self.response_prefix)

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


# Chat templates.


class _Frame(NamedTuple):
  """What a chat template puts around a response."""

  end_of_prompt: str = ''  # between the last message and the response
  before_response: str = ''  # more that is only there when the response is
  after_response: str = ''  # before the end of turn
  end_of_turn: str | None = None  # a special token; None where the template writes none


def _read_frame(
  template: str,
  roles: Mapping[str, str | None],
  special_pattern: re.Pattern[str],
) -> _Frame:
  """Finds what stands around a response by rendering a conversation of two marks."""
  question = {'role': 'user', 'content': QUESTION}
  response = {'role': 'assistant', 'content': RESPONSE}
  prompt = _render(template, roles, [question], add_generation_prompt=True)
  messages = [question, response]
  conversation = _render(template, roles, messages, add_generation_prompt=False)
  before, _, after = conversation.partition(RESPONSE)
  end = special_pattern.search(after)
  frame = _Frame(end_of_prompt=prompt.rpartition(QUESTION)[2])
  if before.startswith(prompt):
    frame = frame._replace(before_response=before[len(prompt) :])
  if end:
    frame = frame._replace(
      after_response=after[: end.start()],
      end_of_turn=end.group(),
    )
  return frame


def _render(
  template: str | None,
  roles: Mapping[str, str | None],
  messages: Sequence[Message],
  add_generation_prompt: bool,
) -> str:
  """Renders a conversation as text."""
  if template is None:
    raise UserError('tokenizer: no chat template')
  import jinja2  # here, as a run without conversations does not need it

  tokens = {key: token for key, token in _role_keys(roles).items() if token is not None}
  try:
    return _compile_template(template).render(
      messages=messages,
      add_generation_prompt=add_generation_prompt,
      **tokens,
    )
  except (jinja2.TemplateError, TypeError) as error:  # TypeError: such as None + 'text'
    raise UserError(f'chat template: {error}') from None


@functools.lru_cache(maxsize=16)
def _compile_template(template: str) -> Any:
  """Compiles a template with the settings of transformers, in a sandbox."""
  import jinja2.ext
  import jinja2.sandbox

  class Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words and prints them."""

    tags = {'generation'}

    def parse(self, parser: Any) -> Any:
      """Parses the block as if its marks were not there."""
      next(parser.stream)
      return parser.parse_statements(('name:endgeneration',), drop_needle=True)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,  # a line that only holds a block leaves no blank line
    lstrip_blocks=True,
    extensions=[Generation, jinja2.ext.loopcontrols],
  )
  environment.globals['raise_exception'] = _raise_template_error
  return environment.from_string(template)


def _raise_template_error(message: str) -> None:
  """Ends rendering; templates call it where they refuse messages."""
  import jinja2

  raise jinja2.TemplateError(message)


# Tokenizers of GGUF files.

# Words as GPT-4's tokenizer cuts them; `%s` is a pattern for digits.
GGUF_WORDS = '|'.join(
  (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r'[^\r\n\p{L}\p{N}]?\p{L}+',
    r'%s',
    r' ?[^\s\p{L}\p{N}]+[\r\n]*',
    r'\s*[\r\n]+',
    r'\s+(?!\S)',
    r'\s+',
  )
)

# Values of `tokenizer.ggml.token_type`.
CONTROL_TOKEN = 3
USER_DEFINED_TOKEN = 4


def _split_as_gpt2() -> pre_tokenizers.PreTokenizer:
  """Returns GPT-2's way to cut a text."""
  return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _split_as_smollm() -> pre_tokenizers.PreTokenizer:
  """Returns GPT-2's way with each digit alone."""
  digits = pre_tokenizers.Digits(individual_digits=True)
  return pre_tokenizers.Sequence([digits, _split_as_gpt2()])


def _split_words(digits: str) -> pre_tokenizers.PreTokenizer:
  """Returns GPT-4's way to cut a text, with a pattern for digits."""
  pattern = tokenizers.Regex(GGUF_WORDS % digits)
  words = pre_tokenizers.Split(pattern, 'isolated')
  letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  return pre_tokenizers.Sequence([words, letters])


# Known values of `tokenizer.ggml.pre` → how a text is cut before pairs are merged.
GGUF_SPLITS: Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
  'smollm': _split_as_smollm,
  'gpt-2': _split_as_gpt2,
  'llama-bpe': functools.partial(_split_words, r'\p{N}{1,3}'),
  'qwen2': functools.partial(_split_words, r'\p{N}'),
}


class _GgufValues:
  """The metadata of a GGUF file about its tokenizer, by keys without `tokenizer.ggml.`."""

  def __init__(self, metadata: Mapping[str, Any]):
    self._metadata = metadata

  def get(self, key: str) -> Any:
    """Returns a value, None where there is none."""
    return self._metadata.get('tokenizer.ggml.' + key)

  @property
  def is_known_kind(self) -> bool:
    """Whether this is a byte-level BPE whose way to cut texts is in GGUF_SPLITS."""
    return self.get('model') == 'gpt2' and self.get('pre') in GGUF_SPLITS

  @property
  def adds_bos(self) -> bool:
    """Whether a text begins with the beginning of sequence; Llama's does where no key says."""
    adds = self.get('add_bos_token')
    if adds is None:
      return self.get('pre') == 'llama-bpe'
    return bool(adds)

  def token(self, role: str) -> str | None:
    """Returns the text of the special token with a role; None where there is none."""
    token_id = self.get(role + '_token_id')
    if token_id is None:
      return None
    return self.get('tokens')[token_id]


def _build_gguf_core(values: _GgufValues) -> tokenizers.Tokenizer:
  """Builds the byte-level BPE of a GGUF file."""
  tokens = values.get('tokens')
  model = models.BPE(
    {token: token_id for token_id, token in enumerate(tokens)},
    [tuple(merge.split(' ')) for merge in values.get('merges')],
    ignore_merges=values.get('pre') == 'llama-bpe',  # a word of the vocabulary stays one token
  )
  core = tokenizers.Tokenizer(model)
  core.pre_tokenizer = GGUF_SPLITS[values.get('pre')]()
  core.decoder = decoders.ByteLevel()
  if values.get('pre') == 'qwen2':
    core.normalizer = normalizers.NFC()
  for token, kind in zip(tokens, values.get('token_type')):
    if kind not in (CONTROL_TOKEN, USER_DEFINED_TOKEN):
      continue
    added = tokenizers.AddedToken(
      token,
      special=kind == CONTROL_TOKEN,
      normalized=False,
    )
    core.add_tokens([added])
  bos = values.token('bos')
  if bos and values.adds_bos:
    core.post_processor = processors.TemplateProcessing(
      single=f'{bos} $A',
      special_tokens=[(bos, values.get('bos_token_id'))],
    )
  return core


# Text.


def _replace_all(text: str, replacements: Mapping[str, str]) -> str:
  """Replaces each key by its value, one after the other."""
  for old, new in replacements.items():
    text = text.replace(old, new)
  return text


def _repair(text: str) -> str:
  """Replaces half surrogate pairs, which JSON can carry and UTF-8 cannot, by '?'."""
  return text.encode('utf-8', 'replace').decode('utf-8')
