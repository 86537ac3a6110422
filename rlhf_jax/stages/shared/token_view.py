"""Looks at the single tokens of a few held-out responses, for the report.

n responses of at most R tokens, with what a stage computes for each token: its
log-probability under policy and reference and, in PPO, its advantage.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax.data import batches
from rlhf_jax.generation import sampler
from rlhf_jax.generation.responses import Responses
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.runtime import hosts
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.types import Array, Params, Samples, Sequences, TrainState

# (state, Sequences [n, P + R], Samples [n, R], scores [n], reference's parameters)
# → name → [n, R] float32
AssessTokens = Callable[[TrainState, Sequences, Samples, Array, Params], dict[str, Array]]
# (state, responses to all held-out prompts, reference's parameters) → number of a
# prompt → the columns of its first response's tokens
LookAtTokens = Callable[[TrainState, Responses, Params], dict[int, dict[str, list]]]

DIGITS = 4  # behind the point


def build_token_view(
  context: Context,
  assess_tokens: AssessTokens,
  examples: Sequence[Mapping[str, Any]],
  options: SamplingOptions,
) -> LookAtTokens:
  """Builds the function that looks at the responses to the first held-out prompts.

  Args:
    context: the context of the stage.
    assess_tokens: what the stage computes; it is compiled here, for few rows.
    examples: these prompts, encoded.
    options: how the responses were sampled.
  """
  layout, tokenizer = context.layout, context.tokenizer
  if not examples:
    return _look_at_nothing
  # As many rows as divide over the devices; those that are added are left out.
  rows = -(-len(examples) // layout.batch_shards) * layout.batch_shards
  prompts = next(iter(batches.prompts_once(examples, rows)))

  @jax.jit
  def assess(state: Any, prompts: Any, samples: Samples, scores: Array, reference: Params) -> Any:
    sequences = sampler.join_sequences(prompts, samples)
    return assess_tokens(state, sequences, samples, scores, reference)

  def look(state: TrainState, completed: Responses, reference: Params) -> dict[int, dict]:
    count = min(len(examples), len(completed.texts))
    samples, scores = _stack(completed, count, rows, options.max_new_tokens, tokenizer.pad_id)
    placed = layout.place((prompts, samples, scores))
    columns = hosts.to_host(assess(state, *placed, reference))
    looked = {}
    for number in range(count):
      ids = completed.tokens[number][0] if completed.tokens else []
      known: dict[str, list] = {
        'token': [tokenizer.core.decode([i], skip_special_tokens=False) for i in ids]
      }
      for name, values in columns.items():
        shown = values[number, : len(ids)]
        known[name] = [round(float(x), DIGITS) for x in shown]
      looked[number] = known
    return looked

  return look


def _look_at_nothing(state: TrainState, completed: Responses, reference: Params) -> dict:
  del state, completed, reference
  return {}  # no response is shown


def _stack(
  completed: Responses, count: int, rows: int, length: int, pad_id: int
) -> tuple[Samples, np.ndarray]:
  """Stacks the first response to each of the first prompts again, as the sampler gave them.

  Args:
    completed: the responses to all prompts, with tokens.
    count: of these prompts.
    rows: n, with empty ones at the end.
    length: R.
    pad_id: behind the end of a response.

  Returns:
    Samples [n, R] and their scores [n], on the host. The logprobs are 0: whoever needs
    them computes them from the tokens.
  """
  tokens: Any = np.full((rows, length), pad_id, np.int32)
  mask: Any = np.zeros((rows, length), bool)
  ended: Any = np.zeros(rows, bool)
  scores = np.zeros(rows, np.float32)
  for number in range(count):
    ids = completed.tokens[number][0] if completed.tokens else []
    tokens[number, : len(ids)] = ids
    mask[number, : len(ids)] = True
    ended[number] = completed.ended[number, 0]
    if completed.scores is not None:
      scores[number] = completed.scores[number, 0]
  mask[count:, 0] = True  # a row without any token would divide by 0
  logprobs: Any = np.zeros((rows, length), np.float32)
  return Samples(tokens=tokens, mask=mask, logprobs=logprobs, ended=ended), scores
