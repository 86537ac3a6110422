"""Baselines that a language model must beat: gzip, and a bigram model of characters."""

import collections
from collections.abc import Iterable, Sequence
import gzip
import math

from rlhf_jax.data.records import Document

MAX_CHARACTERS = 4_000_000  # characters of training text, enough to count bigrams


def nats_per_character(train: Iterable[Document], held_out: Sequence[Document]) -> dict[str, float]:
  """Computes the code length of held-out documents under the baselines, in nats per character.

  Args:
    train: the documents from which the bigram model is counted.
    held_out: the documents to encode.

  Returns:
    gzip_nats_per_character: for gzip at level 9, applied to the held-out text alone;
    bigram_nats_per_character: for P(c | previous character), counted on the training text and
    interpolated with unigrams (Witten–Bell 1991).
  """
  text = '\n'.join(document.text for document in held_out)
  known = _join_texts(train)
  gzip_bytes = len(gzip.compress(text.encode(), 9))
  return {
    'gzip_nats_per_character': 8 * math.log(2) * gzip_bytes / len(text),
    'bigram_nats_per_character': _bigram_nats(known, text) / len(text),
  }


def _join_texts(documents: Iterable[Document]) -> str:
  """Joins the first documents, up to about MAX_CHARACTERS in total."""
  texts = []
  size = 0
  for document in documents:
    texts.append(document.text)
    size += len(document.text)
    if size > MAX_CHARACTERS:
      break
  return '\n'.join(texts)


def _bigram_nats(known: str, text: str) -> float:
  """Returns −log P(text) under a bigram model that is counted on the text `known`.

    P(c | b) = (n(b, c) + t(b) P(c)) / (n(b) + t(b)),   P(c) = (n(c) + 1) / (n + A)

  n(b, c), n(b), n(c) and n count bigrams, bigrams that begin with b, characters
  c, and all characters. t(b) is the number of different characters that follow b.
  A is the size of the alphabet, in which all unseen characters count as one.
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
  for first, second in zip('\n' + text, text, strict=False):  # a document begins after a newline
    probability = (unigrams[second] + 1) / (len(known) + alphabet)
    if followers[first]:
      mass = bigrams[first, second] + kinds[first] * probability
      probability = mass / (followers[first] + kinds[first])
    nats -= math.log(probability)
  return nats
