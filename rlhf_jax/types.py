"""Defines the values that flow between the packages: batches, rollouts and train states.

Letters: B batch, T length, P prompt, R response, K responses to one prompt, V vocabulary, D width.
Padding is never inferred from token values, as a token may have the id of PAD: `segment_ids`
are 0 there, and masks False.
"""

from typing import Any

import flax.struct
import jax

Array = jax.Array  # batches hold numpy arrays until they are placed on a mesh
Params = Any  # a plain nested dict of arrays


# PyTreeNode makes a frozen dataclass and a pytree of each class, and type checkers
# know its `replace`.
class Sequences(flax.struct.PyTreeNode):
  """Token sequences with a loss.

  Attributes:
    tokens: [B, T] int32.
    positions: [B, T] int32, from 0 in each segment.
    segment_ids: [B, T] int32, 0 = padding; tokens of one row attend only within their
      segment.
    loss_mask: [B, T] float32, 1 where `tokens[b, t]` is a target, predicted from what
      stands before it in its segment; the first token of a segment is never a target.
  """

  tokens: Array
  positions: Array
  segment_ids: Array
  loss_mask: Array


class Rankings(flax.struct.PyTreeNode):
  """Responses to score, K to a row, and how people ordered them.

  Rankings of any size share rows as sequences share a packed row: `group` says which
  responses belong to one prompt, and the responses to a prompt are never split over
  rows.

  Attributes:
    tokens: [B, K, T] int32, right-padded: prompt, response, end of turn.
    positions: [B, K, T] int32.
    segment_ids: [B, K, T] int32, 1 = real, 0 = padding.
    group: [B, K] int32, 0 = no response in this place; equal numbers = same prompt.
    ranks: [B, K] int32, 1 = best, equal = tie.
    index: [B, K] int32, the record's place in its data set; -1 where the place is
      empty.
    begins: [B, K] int32, the place of the response's first token.
    confidence: [B, K] float32, the probability that the order of the prompt's
      responses is right.
    reference_logprobs: [B, K] float32, log π_ref(y|x) where it was computed
      beforehand, else 0.
  """

  tokens: Array
  positions: Array
  segment_ids: Array
  group: Array
  ranks: Array
  index: Array  # the record may hold what tokens do not, such as a true answer
  begins: Array
  confidence: Array  # below 1 for soft labels, such as those of an AI judge
  reference_logprobs: Array


class Prompts(flax.struct.PyTreeNode):
  """Prompts to respond to, left-padded.

  Attributes:
    tokens: [B, P] int32.
    mask: [B, P] bool, True = a token of the prompt.
    index: [B] int32, the record's place in its data set; -1 for a row that only pads
      the batch.
  """

  tokens: Array
  mask: Array
  index: Array


class Samples(flax.struct.PyTreeNode):
  """Responses as they were generated; row b * K + k responds to prompt b.

  Attributes:
    tokens: [B * K, R] int32, PAD after the end.
    mask: [B * K, R] bool, True up to and including the stop token.
    logprobs: [B * K, R] float32, of the chosen tokens under softmax(logits /
      temperature) over the complete vocabulary (top-k and top-p choose, they do not
      renormalise); 0 outside the mask.
    ended: [B * K] bool, True where a stop token was produced.
  """

  tokens: Array
  mask: Array
  logprobs: Array
  ended: Array


class TrainState(flax.struct.PyTreeNode):
  """Everything that a training run must remember from step to step.

  Attributes:
    step: [] int32, steps made.
    trained: the parameters that are trained, float32.
    opt_state: the optimizer's state.
    key: [] the root random key; step n uses fold_in(key, n).
    frozen: parameters beside the trained ones that stay as they are and may be shared
      with other models. They are neither donated nor checkpointed. Trees by the name
      of what they belong to, such as {'params': …}.
  """

  step: Array  # counts only updates that were finite
  trained: Params  # donated to the next step, as are opt_state and key
  opt_state: Any  # of optax; sharded as `trained` is
  key: Array  # never replaced: a resumed run derives the same keys
  # Last and by keyword, so that states with more fields can extend this one.
  frozen: dict = flax.struct.field(default_factory=dict, kw_only=True)

  @property
  def params(self) -> Params:
    """The complete model: what is trained and what is frozen."""
    return merge_params(self.trained, self.frozen.get('params', {}))


def merge_params(first: Params, second: Params) -> Params:
  """Merges two trees of parameters; where both have a leaf, the first one's is taken."""
  # A copy, so that neither tree is changed; the arrays themselves are shared.
  merged = dict(second)
  for name, leaf in first.items():
    # Trainable and frozen leaves can lie side by side: a matrix (frozen) and its
    # adapters.
    both_are_trees = isinstance(leaf, dict) and name in second
    merged[name] = merge_params(leaf, second[name]) if both_are_trees else leaf
  return merged
