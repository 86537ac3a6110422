"""TinyWorld's chat template and the training of a tokenizer of about a thousand entries."""

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from rlhf_jax.errors import UserError

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{{ 'Human: ' + message['content'] + '\\n\\nAssistant:' }}{% else %}"
    "{{ ' ' + message['content'] + '<eos>' }}{% endif %}{% endfor %}"
)


def train(texts: Iterable[str], vocab_size: int = 1024) -> tokenizers.Tokenizer:
  """A byte-level BPE tokenizer of the texts; `<pad>` is 0 and `<eos>` is 1.

  Args:
    vocab_size: how many entries, 258 (bytes and special tokens) or more.

  Raises:
    UserError: fewer.
  """
  if vocab_size < 258:
    raise UserError(f'tokenizer.vocab_size: expected 258 (bytes and special tokens) or more, got {vocab_size}')
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
      vocab_size=vocab_size, special_tokens=['<pad>', '<eos>'], show_progress=False,
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
  return tokenizer
