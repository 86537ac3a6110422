"""What a language model must beat: gzip, and a bigram model of characters."""

import collections
from collections.abc import Iterable, Sequence
import gzip
import math

from rlhf_jax.data.records import Document

MAX_CHARACTERS = 4_000_000  # of training text; enough for a table of bigrams


def nats_per_character(train: Iterable[Document], held_out: Sequence[Document]) -> dict[str, float]:
  """Computes what baselines need for held-out documents, in nats per character.

  Args:
    train: documents that the bigram model learns from.
    held_out: documents to encode.

  Returns:
    gzip_nats_per_character: level 9 on the held-out text alone;
    bigram_nats_per_character: P(c | previous), the counts of the training text
    mixed with unigrams (Witten–Bell 1991).
  """
  text = '\n'.join(document.text for document in held_out)
  known = _join_texts(train)
  gzip_bytes = len(gzip.compress(text.encode(), 9))
  return {
    'gzip_nats_per_character': 8 * math.log(2) * gzip_bytes / len(text),
    'bigram_nats_per_character': _bigram_nats(known, text) / len(text),
  }


def _join_texts(documents: Iterable[Document]) -> str:
  """Joins the first documents up to about MAX_CHARACTERS."""
  texts = []
  size = 0
  for document in documents:
    texts.append(document.text)
    size += len(document.text)
    if size > MAX_CHARACTERS:
      break
  return '\n'.join(texts)


def _bigram_nats(known: str, text: str) -> float:
  """Returns −log P(text) under a bigram model of the known text.

    P(c | b) = (n(b, c) + t(b) P(c)) / (n(b) + t(b)),   P(c) = (n(c) + 1) / (n + A)

  t(b) counts the different characters that follow b; A is the alphabet with one
  place for all unseen characters.
  """
  unigrams = collections.Counter(known)
  bigrams = collections.Counter(zip(known, known[1:], strict=False))
  followers: collections.Counter[str] = collections.Counter()  # n(b)
  kinds: collections.Counter[str] = collections.Counter()  # t(b)
  for (first, _), count in bigrams.items():
    followers[first] += count
    kinds[first] += 1
  alphabet = len(unigrams) + 1
  nats = 0.0
  for first, second in zip('\n' + text, text, strict=False):  # a document begins a line
    probability = (unigrams[second] + 1) / (len(known) + alphabet)
    if followers[first]:
      mass = bigrams[first, second] + kinds[first] * probability
      probability = mass / (followers[first] + kinds[first])
    nats -= math.log(probability)
  return nats
