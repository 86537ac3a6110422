"""Byte-level BPE tokenizers from the metadata of GGUF files."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from rlhf_jax.interop.known_keys import (
  check_keys,
  COUNT,
  KnownKeys,
  list_of,
  SWITCH,
  TEXT,
  whole_number,
)

PREFIX = 'tokenizer.ggml.'
TEMPLATE = 'tokenizer.chat_template'

TOKEN_ID = whole_number(0)
# The part of each key after PREFIX. Other keys are ignored, such as those of other tokenizers.
KNOWN_KEYS = KnownKeys(
  read={
    'model': TEXT,
    'pre': TEXT,
    'tokens': list_of(TEXT),
    'token_type': list_of(COUNT),
    'merges': list_of(TEXT),
    'bos_token_id': TOKEN_ID,
    'eos_token_id': TOKEN_ID,
    'eot_token_id': TOKEN_ID,
    'eom_token_id': TOKEN_ID,
    'padding_token_id': TOKEN_ID,
    'unknown_token_id': TOKEN_ID,
    'add_bos_token': SWITCH,
  },
  refuse_others=False,
)

# Values of `token_type`.
CONTROL = 3
USER_DEFINED = 4

# The pattern by which Llama 3 and Qwen 2 split a text into words; %s is the
# pattern of a number.
WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
  r'|[^\r\n\p{L}\p{N}]?\p{L}+'
  r'|%s'
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*'
  r'|\s*[\r\n]+'
  r'|\s+(?!\S)'
  r'|\s+'
)


class GgufTokenizer(NamedTuple):
  """The parts of a tokenizer."""

  core: tokenizers.Tokenizer
  template: str | None  # the chat template
  roles: dict[str, str | None]  # 'bos', 'eos', 'pad' and 'unk' → the text of the special token
  end_ids: list[int]  # ids of the tokens that end a sequence, a turn or a message


def read_gguf_tokenizer(metadata: Mapping[str, Any]) -> GgufTokenizer | None:
  """Reads the tokenizer from the metadata of a GGUF file.

  Args:
    metadata: key → value, as plain Python values.

  Returns:
    The parts of the tokenizer; None where it is of a kind that is not supported.
  """
  values = {
    key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)
  }
  check_keys(values, KNOWN_KEYS, 'GGUF', prefix=PREFIX)
  if values.get('model') != 'gpt2' or values.get('pre') not in PRE_TOKENIZERS:
    return None
  roles = {
    'bos': _token_of(values, 'bos'),
    'eos': _token_of(values, 'eos'),
    'pad': _token_of(values, 'padding'),
    'unk': _token_of(values, 'unknown'),
  }
  core = _build_core(values)
  if roles['bos'] and _adds_bos(values):
    core.post_processor = processors.TemplateProcessing(
      single=f'{roles["bos"]} $A',
      special_tokens=[(roles['bos'], values['bos_token_id'])],
    )
  ends = [values.get(f'{role}_token_id') for role in ('eos', 'eot', 'eom')]
  end_ids = [number for number in dict.fromkeys(ends) if number is not None]
  return GgufTokenizer(core, metadata.get(TEMPLATE), roles, end_ids)


def _token_of(values: Mapping[str, Any], role: str) -> str | None:
  """Returns the text of the special token of a role; None where the file has none."""
  number = values.get(f'{role}_token_id')
  return None if number is None else values['tokens'][number]


def _adds_bos(values: Mapping[str, Any]) -> bool:
  """Tells whether texts begin with the beginning-of-sequence token."""
  stated = values.get('add_bos_token')
  if stated is None:
    return values['pre'] == 'llama-bpe'  # the default of llama.cpp
  return bool(stated)


def _build_core(values: Mapping[str, Any]) -> tokenizers.Tokenizer:
  """Builds the tokenizer of the tokenizers library."""
  tokens = values['tokens']
  kind = values['pre']
  model = models.BPE(
    {token: number for number, token in enumerate(tokens)},
    [tuple(merge.split(' ')) for merge in values['merges']],
    ignore_merges=kind == 'llama-bpe',  # a word of the vocabulary is not split, as in Llama 3
  )
  core = tokenizers.Tokenizer(model)
  core.pre_tokenizer = PRE_TOKENIZERS[kind]()
  core.decoder = decoders.ByteLevel()
  if kind == 'qwen2':
    core.normalizer = normalizers.NFC()
  for token, token_type in zip(tokens, values['token_type']):
    if token_type in (CONTROL, USER_DEFINED):
      special = token_type == CONTROL
      added = tokenizers.AddedToken(token, special=special, normalized=False)
      core.add_tokens([added])
  return core


def _split_like_gpt2() -> pre_tokenizers.PreTokenizer:
  """Splits into words and numbers, each with the space before it."""
  return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _split_like_smollm() -> pre_tokenizers.PreTokenizer:
  """Splits as GPT-2 does, but every digit is a word of its own."""
  digits = pre_tokenizers.Digits(individual_digits=True)
  return pre_tokenizers.Sequence([digits, _split_like_gpt2()])


def _split_like_llama3() -> pre_tokenizers.PreTokenizer:
  """Splits by WORDS, with at most three digits of a number in a word."""
  return _split_by_words(r'\p{N}{1,3}')


def _split_like_qwen2() -> pre_tokenizers.PreTokenizer:
  """Splits by WORDS, with every digit as a word of its own."""
  return _split_by_words(r'\p{N}')


def _split_by_words(number: str) -> pre_tokenizers.PreTokenizer:
  """Splits by the pattern WORDS, in which `number` is the pattern of a number."""
  words = tokenizers.Regex(WORDS % number)
  split = pre_tokenizers.Split(words, 'isolated')
  to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  return pre_tokenizers.Sequence([split, to_bytes])


PRE_TOKENIZERS = {  # value of `tokenizer.ggml.pre` → how a text is split before pairs are merged
  'smollm': _split_like_smollm,
  'gpt-2': _split_like_gpt2,
  'llama-bpe': _split_like_llama3,
  'qwen2': _split_like_qwen2,
}
