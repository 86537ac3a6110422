"""The files of a tokenizer in a Hugging Face directory.

tokenizer.json holds the vocabulary and how a text is split. The roles of special
tokens, the chat template and the ends of sequence are in files of their own.
"""

from collections.abc import Mapping
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from rlhf_jax import fingerprints
from rlhf_jax.errors import UserError
from rlhf_jax.interop.json_files import read_json
from rlhf_jax.interop.known_keys import (
  Allowed,
  check_keys,
  KnownKeys,
  or_null,
  show,
  SWITCH,
  whole_number,
)

ROLES = ('eos', 'bos', 'pad', 'unk')  # roles of special tokens, by transformers' names

_MOST_GROWTH = 1000  # times that a text may become longer
_LONGEST_TOKEN = 10_000  # characters

# Files of a Hugging Face directory.
TOKENIZER = 'tokenizer.json'
CONFIG = 'tokenizer_config.json'
OLD_CONFIG = 'special_tokens_map.json'  # in older directories the only place of some roles
TEMPLATE = 'chat_template.jinja'
GENERATION = 'generation_config.json'
MODEL_CONFIG = 'config.json'


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

# tokenizer_config.json has many more keys. They are ignored: tokenizer.json says
# how a text is split, and transformers, where it has that file, ignores keys such
# as `add_bos_token` too.
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

# Classes of transformers that use tokenizer.json as it is; others change
# `add_prefix_space` in it.
PLAIN_CLASSES = ('PreTrainedTokenizerFast', 'TokenizersBackend')


class TokenizerFiles(NamedTuple):
  """What the files of a directory say of a tokenizer."""

  core: tokenizers.Tokenizer
  template: str | None  # the chat template, in Jinja
  roles: dict[str, str | None]  # each of ROLES → the text of the special token
  further_tokens: dict[str, str]  # names of other special tokens in templates → their texts
  end_ids: list[int]  # the end-of-sequence ids that the model's files list


def read_tokenizer_files(directory: Path) -> TokenizerFiles:
  """Reads the tokenizer of a Hugging Face directory.

  Raises:
    UserError: there is no readable tokenizer.json, or the files contradict each other.
  """
  core = _read_core(directory / TOKENIZER)
  config = _read_config(directory)
  _check_splitting(core, config, directory / CONFIG)
  _add_stated_tokens(core, config, directory / CONFIG)
  return TokenizerFiles(
    core=core,
    template=_read_template(directory, config),
    roles={role: _token_text(config.get(role + '_token')) for role in ROLES},
    further_tokens=_further_tokens(config),
    end_ids=_read_end_ids(directory),
  )


def role_keys(roles: Mapping[str, str | None]) -> dict[str, str | None]:
  """Returns the tokens by their keys in tokenizer_config.json and templates, as 'eos_token'."""
  return {role + '_token': token for role, token in roles.items()}


def _read_core(path: Path) -> tokenizers.Tokenizer:
  """Reads a tokenizer.json."""
  if not path.is_file():
    raise UserError(
      f'{path}: not found; transformers writes it: '
      'AutoTokenizer.from_pretrained(d).save_pretrained(d)'
    )
  fingerprints.check_file(path)
  try:
    core = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises nothing narrower
    raise UserError(f'{path}: not a tokenizer ({error})') from None
  _check_growth(core, path)
  return core


def _check_growth(core: tokenizers.Tokenizer, path: Path) -> None:
  """Refuses a tokenizer that makes texts so much longer that they would fill the memory.

  A few replacements, each of one character by ten, do that in seconds, within the
  library, where nothing could stop them.
  """
  for name in ('normalizer', 'decoder'):
    part = getattr(core, name)
    growth = 1.0 if part is None else _growth(json.loads(part.__getstate__()))
    if growth > _MOST_GROWTH:
      raise UserError(f'{path}: its {name} can make a text more than {_MOST_GROWTH} times longer')
  longest = max(map(len, core.get_vocab()), default=0)
  if longest > _LONGEST_TOKEN:
    raise UserError(
      f'{path}: expected tokens of at most {_LONGEST_TOKEN:,} characters, got one of {longest:,}'
    )


def _growth(part: Mapping[str, Any]) -> float:
  """Returns the factor by which a normalizer or decoder can lengthen a text, at most.

  Only replacements and additions count; Unicode's normal forms stay below 18.
  """
  inner = [*part.get('normalizers', ()), *part.get('decoders', ())]
  if inner:
    return math.prod(map(_growth, inner))
  added = max(len(str(part.get(key) or '')) for key in ('content', 'prepend'))
  pattern = part.get('pattern') or {}
  replaced = len(pattern.get('String', ''))
  # A pattern may match between all characters, and so may a text of none.
  return max(1.0, added / replaced) if replaced else 1.0 + added


def _check_splitting(core: tokenizers.Tokenizer, config: Mapping[str, Any], path: Path) -> None:
  """Refuses files that disagree on `add_prefix_space`, a space before each text."""
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
  """Adds the tokens that only tokenizer_config.json has, as transformers does.

  Raises:
    UserError: it gives a token another id than tokenizer.json does.
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
  """Reads the two files about special tokens as one dict; {} if there are none."""
  config: dict[str, Any] = {}
  for name in (OLD_CONFIG, CONFIG):  # the second overrides the first
    path = directory / name
    if not path.is_file():
      continue
    values = read_json(path)
    check_keys(values, KNOWN_KEYS, str(path))
    config.update(values)
  return config


def _read_end_ids(directory: Path) -> list[int]:
  """Reads the end-of-sequence ids that a model's files list, as transformers' `generate` does.

  They are those of generation_config.json or, if it has none, of config.json.
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
  """Reads the chat template: from its own file or, in older directories, from the config."""
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
  for choice in template:  # several templates with names
    if choice['name'] == 'default':
      return choice['template']
  return None


def _token_text(token: str | Mapping[str, Any] | None) -> str | None:
  """Returns a token's text; tokenizer_config.json may have an object with more properties."""
  if isinstance(token, Mapping):
    return token['content']
  return token


def _further_tokens(config: Mapping[str, Any]) -> dict[str, str]:
  """Returns the config's special tokens that have no role: name in templates → text."""
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
