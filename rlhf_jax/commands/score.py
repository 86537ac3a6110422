"""Log-probabilities of texts under a language model, or scores of a reward model, for a file of lines.

  python -m rlhf_jax.score --model=DIR --input=FILE.jsonl --output=FILE.jsonl

A line is {"text": …}, {"messages": …} (the assistant speaks last), {"prompt": …, "response": …} or {"tokens": [ids]}, which
needs no tokenizer. A language model adds `tokens` and `logprobs`, one for each token after the first: natural logarithms,
float32. A reward model (a sequence-classification directory, or a stage that trained one) adds `score`.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.commands import lines
from rlhf_jax.models import heads
from rlhf_jax.stages import reward


def main(arguments=None) -> int:
  """The exit code: 0 done, 2 a user's mistake."""
  return lines.run(score, lines.parser('score', __doc__).parse_args(arguments))


def score(options) -> None:
  """Writes --output."""
  (rows, places), opened = lines.read(options.input), lines.open_model(options)
  ids = lines.encode(rows, places, opened, whole=True)
  model, B = opened.model, options.batch_size

  @jax.jit
  def read(params, tokens, mask):
    positions, segments = jnp.where(mask, jnp.arange(tokens.shape[1]), 0), mask.astype(jnp.int32)
    if model.config.head:
      return reward.last_scores(model, params, tokens, positions, segments)
    hidden, _ = model.apply(params, tokens, positions, segments)
    return heads.token_logprobs(model, params, hidden[:, :-1], tokens[:, 1:])[0]

  def work(numbers, length, _):
    tokens, mask = np.zeros((B, length), np.int32), np.zeros((B, length), bool)
    for row, number in enumerate(numbers):
      tokens[row, :len(ids[number])], mask[row, :len(ids[number])] = ids[number], True
    found = jax.device_get(read(opened.params, *opened.layout.place((tokens, mask))))
    if model.config.head:
      return [dict(score=lines.number(value)) for value in found[:len(numbers)]]
    return [dict(tokens=ids[number], logprobs=[lines.number(x) for x in values[:len(ids[number]) - 1]])
            for number, values in zip(numbers, found)]

  lines.process(options, dict(command='score'), rows, ids, work, lines.limit(model.config))


if __name__ == '__main__':
  sys.exit(main())
