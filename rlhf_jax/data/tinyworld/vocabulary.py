"""TinyWorld's chat template, and the training of a tokenizer of about a thousand entries."""

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from rlhf_jax.errors import UserError

# Jinja, as Hugging Face has it: 'Human: …\n\nAssistant: …<eos>', turns divided by empty lines.
CHAT_TEMPLATE = (
  "{% for message in messages %}{% if message['role'] == 'user' %}"
  "{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
  "{{ 'Human: ' + message['content'] + '\\n\\nAssistant:' }}{% else %}"
  "{{ ' ' + message['content'] + '<eos>' }}{% endif %}{% endfor %}"
)

SPECIAL_TOKENS = ('<pad>', '<eos>')  # 0 and 1
_MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)  # every byte has an entry


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> tokenizers.Tokenizer:
  """Trains a byte-level BPE tokenizer; `<pad>` is 0 and `<eos>` is 1.

  Args:
    texts: what to train on.
    vocab_size: how many entries, 258 (bytes and special tokens) or more.

  Returns:
    A tokenizer of Hugging Face's library `tokenizers`.

  Raises:
    UserError: the vocabulary is too small.
  """
  if vocab_size < _MIN_VOCAB_SIZE:
    raise UserError(
      f'tokenizer.vocab_size: expected {_MIN_VOCAB_SIZE} (bytes and special tokens) or more, '
      f'got {vocab_size}'
    )
  tokenizer = tokenizers.Tokenizer(models.BPE())
  # No space before the first word: decoding then gives back the very text.
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(SPECIAL_TOKENS),
    show_progress=False,
    # Sorted, as the library gives the bytes in another order each time.
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
  )
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer
