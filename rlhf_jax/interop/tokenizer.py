"""Text ↔ token ids, and how a conversation becomes a prompt.

A tokenizer here is a `tokenizers.Tokenizer`, a chat template in jinja2 (rendered as transformers renders it) and
the roles of a few special tokens. What people wrote is text: special-token strings inside a message are tokenised
as characters, so nobody ends a turn by writing `<|im_end|>`; only the template's own become special ids.
"""

import copy
import functools
import json
import os
from pathlib import Path
import re

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from rlhf_jax.errors import UserError

_QUESTION, _ANSWER = '\U000f0000', '\U000f0001'  # stand-ins to find a message's place in the template
_STAND_INS = range(0xf0002, 0xffffe)  # private-use characters

# What `tokenizer.ggml.pre` stands for: how a text is cut before pairs are merged.
_byte_level = functools.partial(pre_tokenizers.ByteLevel, add_prefix_space=False)
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_cut = lambda numbers: pre_tokenizers.Sequence([
    pre_tokenizers.Split(tokenizers.Regex(_WORDS % numbers), 'isolated'), _byte_level(use_regex=False)])
_GGUF_SPLITS = {
    'smollm': lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
    'gpt-2': _byte_level,
    'llama-bpe': lambda: _cut(r'\p{N}{1,3}'),
    'qwen2': lambda: _cut(r'\p{N}'),
}


class Tokenizer:
  """Text ↔ ids and the chat template.

  Attributes:
    core: the `tokenizers.Tokenizer`.
    template: the jinja2 chat template, or None.
    vocab_size: ids are in [0, vocab_size).
    eos_id: end of turn, what a response ends with: the special token with which the template ends an answer, else
      the tokenizer's end of sequence.
    bos_id: beginning of sequence, or None.
    pad_id: fills places that masks hide; never eos_id. Where the files name none (or name eos), the last special
      token that neither the template nor the other roles use; SmolLM2's is `<empty_output>`, 16. Where there is none
      to spare, as in GPT-2, any other id, which files then do not name.
    response_prefix: what the template puts between the generation prompt and an answer; ' ' after 'Assistant:'.
  """

  def __init__(self, core, template=None, *, eos, bos=None, pad=None, unk=None):
    """core: `tokenizers.Tokenizer`; template: jinja2 source; eos, bos, pad, unk: texts of special tokens.

    Raises:
      UserError: a special token that is not in the vocabulary, or no end of sequence.
    """
    core = copy.deepcopy(core)
    core.no_truncation()
    core.no_padding()
    for role, token in {'bos': bos, 'eos': eos, 'pad': pad, 'unk': unk}.items():
      if token is not None and core.token_to_id(token) is None:
        raise UserError(f'tokenizer: {role} token {token!r} is not in the vocabulary')
    added = {token.content for token in core.get_added_tokens_decoder().values()}
    core.add_special_tokens([token for token in (bos, eos, pad) if token is not None and token not in added])
    core.encode_special_tokens = False
    self.core, self.template, self.vocab_size = core, template, core.get_vocab_size()
    self._plain = copy.deepcopy(core)
    self._plain.encode_special_tokens = True
    added = sorted(core.get_added_tokens_decoder().items())
    self._special = {token.content: i for i, token in added if token.special}
    longest = sorted(self._special, key=len, reverse=True)
    self._split = re.compile('(' + '|'.join(re.escape(token) for token in longest) + ')')
    self._roles = {'bos_token': bos, 'eos_token': eos, 'pad_token': pad, 'unk_token': unk}
    self.response_prefix = self._suffix = self._tail = ''
    if template is not None and self._special:
      eos = self._read_template() or eos
    if pad in (None, eos, bos):
      free = [x for x in self._special if x not in (eos, bos, unk) and x not in (template or '')]
      pad = free[-1] if free else None if unk in (eos, bos) else unk
    if eos is None:
      raise UserError('tokenizer: expected an end-of-sequence token')
    self._roles.update(eos_token=eos, pad_token=pad)
    self.eos_id = core.token_to_id(eos)
    self.pad_id = int(self.eos_id == 0) if pad is None else core.token_to_id(pad)
    self.bos_id = None if bos is None else core.token_to_id(bos)
    self._adds_bos = bos is not None and core.encode('').ids[:1] == [self.bos_id]

  def with_template(self, template: str) -> 'Tokenizer':
    """The same vocabulary with another chat template (jinja2)."""
    return Tokenizer(self.core, template, **{role.removesuffix('_token'): text for role, text in self._roles.items()})

  def encode(self, text: str) -> list[int]:
    """Ids of a text, nothing added; special-token strings are characters like any other."""
    return self._plain.encode(_whole(text), add_special_tokens=False).ids

  def text(self, text: str) -> list[int]:
    """Ids of a text that begins anew: behind the beginning-of-sequence token, where the tokenizer adds one."""
    return ([self.bos_id] if self._adds_bos else []) + self.encode(text)

  def prompt(self, messages) -> list[int]:
    """Ids of a conversation up to where the assistant's answer begins.

    Args:
      messages: dicts of `role` and `content`. The beginning-of-sequence token comes once, where the template writes
        it or the tokenizer itself adds it.

    Raises:
      UserError: there is no template, or it refuses these messages.
    """
    hidden = self._hide(message['content'] for message in messages)
    messages = [{**message, 'content': _replace(message['content'], hidden)} for message in messages]
    ids = self._tokenise(self._render(messages, add_generation_prompt=True), hidden)
    return [self.bos_id] + ids if self._adds_bos and ids[:1] != [self.bos_id] else ids

  def response(self, text: str) -> list[int]:
    """Ids of an answer, stripped of outer blanks, that ends its turn: prompt(m) + response(t) are the ids of the
    whole conversation (up to what the template writes after the end of turn)."""
    hidden = self._hide([text])
    text = self.response_prefix + _replace(text.strip(), hidden) + self._suffix
    # read after the generation prompt, because some tokenizers treat the beginning of a text differently
    return self._tokenise(self._tail + text, hidden)[len(self._tokenise(self._tail, hidden)):] + [self.eos_id]

  def decode(self, ids) -> str:
    """Text of a response's ids [R]: up to the end of turn, without special tokens."""
    ids = [int(i) for i in ids]
    ids = ids[:ids.index(self.eos_id)] if self.eos_id in ids else ids
    return self.core.decode(ids, skip_special_tokens=True).removeprefix(self.response_prefix)

  def save(self, directory):
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja, as transformers reads them."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False, **self._roles}
    _write(directory / 'tokenizer.json', self.core.to_str())
    _write(directory / 'tokenizer_config.json', json.dumps(config, indent=2, ensure_ascii=False) + '\n')
    if self.template is not None:
      _write(directory / 'chat_template.jinja', self.template)

  @classmethod
  def load(cls, directory) -> 'Tokenizer':
    """The tokenizer of a Hugging Face directory.

    Raises:
      UserError: there is no readable tokenizer.json, or as the constructor.
    """
    directory = Path(directory)
    path = directory / 'tokenizer.json'
    if not path.is_file():
      raise UserError(f'{path}: not found; transformers writes it: '
                      'AutoTokenizer.from_pretrained(d).save_pretrained(d)')
    try:
      core = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
      raise UserError(f'{path}: not a tokenizer ({error})') from None
    config = {}
    for name in ('special_tokens_map.json', 'tokenizer_config.json'):
      if (directory / name).is_file():
        try:
          config.update(json.loads((directory / name).read_text('utf-8')))
        except ValueError as error:
          raise UserError(f'{directory / name}: not JSON ({error})') from None
    template, file = config.get('chat_template'), directory / 'chat_template.jinja'
    if isinstance(template, list):  # several, by name
      template = next((x['template'] for x in template if x['name'] == 'default'), None)
    if file.is_file():
      template = file.read_text('utf-8')
    text = lambda token: token['content'] if isinstance(token, dict) else token
    roles = {role: text(config.get(role + '_token')) for role in ('bos', 'eos', 'pad', 'unk')}
    return cls(core, template, **roles)

  @classmethod
  def from_gguf(cls, fields: dict) -> 'Tokenizer | None':
    """The byte-level BPE tokenizer that a GGUF file's metadata describe, plain values by key; None for other kinds."""
    get = lambda key: fields.get('tokenizer.ggml.' + key)
    if get('model') != 'gpt2' or get('pre') not in _GGUF_SPLITS:
      return None
    tokens = get('tokens')
    core = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)},
                                           [tuple(merge.split(' ')) for merge in get('merges')],
                                           ignore_merges=get('pre') == 'llama-bpe'))
    core.pre_tokenizer, core.decoder = _GGUF_SPLITS[get('pre')](), decoders.ByteLevel()
    if get('pre') == 'qwen2':
      core.normalizer = normalizers.NFC()
    for token, kind in zip(tokens, get('token_type')):
      if kind in (3, 4):  # control, user defined
        core.add_tokens([tokenizers.AddedToken(token, special=kind == 3, normalized=False)])
    name = lambda key: None if get(key + '_token_id') is None else tokens[get(key + '_token_id')]
    adds = get('add_bos_token')
    if name('bos') and (adds or (adds is None and get('pre') == 'llama-bpe')):
      core.post_processor = processors.TemplateProcessing(
          single=f'{name("bos")} $A', special_tokens=[(name('bos'), get('bos_token_id'))])
    return cls(core, fields.get('tokenizer.chat_template'), bos=name('bos'), eos=name('eos'), pad=name('padding'),
               unk=name('unknown'))

  def _render(self, messages, **flags):
    if self.template is None:
      raise UserError('tokenizer: no chat template')
    import jinja2
    try:
      roles = {role: token for role, token in self._roles.items() if token is not None}
      return _compile(self.template).render(messages=messages, **roles, **flags)
    except (jinja2.TemplateError, TypeError) as error:
      raise UserError(f'chat template: {error}') from None

  def _read_template(self):
    """Finds what stands around an answer; returns the text of the end-of-turn token, if the template has one."""
    question, answer = {'role': 'user', 'content': _QUESTION}, {'role': 'assistant', 'content': _ANSWER}
    prompt = self._render([question], add_generation_prompt=True)
    before, _, after = self._render([question, answer], add_generation_prompt=False).partition(_ANSWER)
    self._tail = prompt.rpartition(_QUESTION)[2]
    self.response_prefix = before[len(prompt):] if before.startswith(prompt) else ''
    end = self._split.search(after)
    self._suffix = after[:end.start()] if end else ''
    return end and end.group()

  def _hide(self, texts):
    """A stand-in character for each special token that people wrote, {token: character}."""
    text = ''.join(texts)
    free = (chr(i) for i in _STAND_INS if chr(i) not in text)
    return {token: next(free) for token in set(self._split.findall(text))} if self._special else {}

  def _tokenise(self, text, hidden):
    """Ids of rendered text in which special tokens count, and the hidden ones are characters."""
    text = _whole(text)
    if not hidden:
      return self.core.encode(text, add_special_tokens=False).ids
    shown, ids = {character: token for token, character in hidden.items()}, []
    for piece in self._split.split(text):
      if piece in self._special:
        ids.append(self._special[piece])
      elif piece:
        ids += self._plain.encode(_replace(piece, shown), add_special_tokens=False).ids
    return ids


@functools.lru_cache(maxsize=16)
def _compile(template):
  """A template with the settings of transformers, in a sandbox."""
  import jinja2.ext
  import jinja2.sandbox

  class Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words; it prints what it holds."""
    tags = {'generation'}

    def parse(self, parser):
      next(parser.stream)
      return parser.parse_statements(['name:endgeneration'], drop_needle=True)

  def refuse(message):
    raise jinja2.TemplateError(message)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
  environment.globals['raise_exception'] = refuse
  return environment.from_string(template)


def _replace(text, table):
  for old, new in table.items():
    text = text.replace(old, new)
  return text


def _whole(text):
  """Half surrogate pairs, which JSON can carry and UTF-8 cannot, become '?'."""
  return text.encode('utf-8', 'replace').decode('utf-8')


def _write(path, text):
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(text, encoding='utf-8')
  os.replace(temporary, path)
