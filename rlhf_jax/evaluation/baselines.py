"""What a language model must beat: gzip, and a bigram model of characters. Nats per character of held-out text."""

import collections
import gzip
import math

BYTES = 4_000_000  # of training text, enough for a bigram table


def nats_per_character(train, held_out) -> dict[str, float]:
  """Baselines on held-out documents.

  Args:
    train, held_out: sequences of Documents.

  Returns:
    {'gzip': level 9 on the held-out text alone, 'bigram': P(c | previous), the counts of the training text mixed with
    unigrams (Witten–Bell)}, nats per character.
  """
  text = '\n'.join(record.text for record in held_out)
  seen, size = [], 0
  for record in train:
    seen.append(record.text)
    size += len(record.text)
    if size > BYTES:
      break
  known = '\n'.join(seen)
  single, pairs = collections.Counter(known), collections.Counter(zip(known, known[1:]))
  follows, kinds = collections.Counter(), collections.Counter()
  for (first, _), count in pairs.items():
    follows[first] += count
    kinds[first] += 1
  alphabet = len(single) + 1
  nats = 0.0
  for first, second in zip('\n' + text, text):
    unigram = (single[second] + 1) / (len(known) + alphabet)
    nats -= math.log((pairs[first, second] + kinds[first] * unigram) / (follows[first] + kinds[first])
                     if follows[first] else unigram)
  return {'gzip_nats_per_character': 8 * math.log(2) * len(gzip.compress(text.encode(), 9)) / len(text),
          'bigram_nats_per_character': nats / len(text)}
