"""Measures what a reward model has learnt, by its accuracy on pairs that differ in one respect."""

from collections import defaultdict

import numpy as np

from rlhf_jax.data import batches, encode, sources
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.options import from_section
from rlhf_jax.runtime import hosts
from rlhf_jax.stages import reward
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.model_store import ModelStore

NUM_PAIRS = 1400  # 200 of each kind
_BATCH_SIZE = 16  # rows in a batch
_PER_ROW = 8  # responses in a row


def measure(context: Context) -> dict[str, dict[str, float]]:
  """Measures the accuracy of the evaluation's reward model on each kind of TinyWorld's pairs.

  Args:
    context: the context of any stage of the run.

  Returns:
    'seen' or 'unseen' → kind of pair (see pairs.py) → share of pairs whose better response has the
    higher score; equal scores count one half. A pair is 'unseen' if its prompt asks about a family,
    fact, person or harm that training does not have.
  """
  section = context.config.evaluation
  data = from_section(DataOptions, section.data)
  opened = ModelStore(context).open_reward(section.reward)
  pairs = sources.load_records(
    DataOptions(seed=data.seed, people=data.people, variant='by_kind', count=NUM_PAIRS),
    'ranking',
    section.split,
  )
  length = section.max_length + section.sampling.max_new_tokens
  examples = encode.rankings(pairs, opened.tokenizer, length)
  score = reward.build_batch_score(opened.model, context.layout, packed_rows=0)
  params = opened.read()
  right: dict[str, dict[str, list[float]]] = {
    'seen': defaultdict(list),
    'unseen': defaultdict(list),
  }
  for batch in batches.rankings_once(examples, _BATCH_SIZE, _PER_ROW, length):
    scores = hosts.to_host(score(params, context.layout.place(batch)))
    for row, better, worse in reward.untied_pairs(batch):
      pair = pairs[int(batch.index[row, better])]
      group = pair.source.rpartition('/')[2]
      margin = scores[row, better] - scores[row, worse]
      right[group][pair.domain].append(0.5 + 0.5 * float(np.sign(margin)))
  return {
    group: {kind: float(np.mean(values)) for kind, values in sorted(kinds.items())}
    for group, kinds in right.items()
  }
