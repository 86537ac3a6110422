"""Defines the values that the parts of the package exchange: batches, rollouts and train states.

Shape letters: B rows of a batch, T length of a row, P length of a prompt, R
length of a response, K responses to one prompt; all lengths are in tokens.
Padding is never inferred from token values, as a real token may have the id of
PAD: `segment_ids` are 0 at padding, and masks are False.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array  # batches hold numpy arrays until they are placed on a mesh
Params = Any  # a plain nested dict of arrays
# Matrix of a layer → the number of its input axes and of its output axes.
MATRIX_AXES = {
  'query': (1, 2),
  'key': (1, 2),
  'value': (1, 2),
  'output': (2, 1),
  'gate': (1, 1),
  'up': (1, 1),
  'down': (1, 1),
}


# PyTreeNode makes each class a frozen dataclass and a pytree; unlike with
# flax.struct.dataclass, type checkers know the method `replace`.
class Sequences(flax.struct.PyTreeNode):
  """Token sequences, several of which may be packed into one row, with a loss mask.

  Attributes:
    tokens: [B, T] int32.
    positions: [B, T] int32, which start at 0 in each segment.
    segment_ids: [B, T] int32, 0 = padding; a token attends only to tokens of its own
      segment.
    loss_mask: [B, T] float32, 1 where `tokens[b, t]` is a target of the loss, to
      be predicted from the tokens before it in its segment; the first token of a
      segment is never a target.
  """

  tokens: Array
  positions: Array
  segment_ids: Array
  loss_mask: Array


class Rankings(flax.struct.PyTreeNode):
  """Ranked responses, in rows of K slots.

  Several rankings of any size may be packed into one row; `group` says which
  slots belong to the same ranking, that is, to the same prompt. A ranking is
  never split over rows. In this class K is the number of slots of a row.

  Attributes:
    tokens: [B, K, T] int32, right-padded: prompt, response, end of turn.
    positions: [B, K, T] int32, from 0 at the first token of the prompt.
    segment_ids: [B, K, T] int32, 1 = a token, 0 = padding.
    group: [B, K] int32, 0 = an empty slot; equal numbers in a row = the same ranking.
    ranks: [B, K] int32, 1 = best; equal ranks are ties.
    index: [B, K] int32, the index of the record in its data set; -1 in an empty slot.
    begins: [B, K] int32, the position of the response's first token.
    confidence: [B, K] float32, the probability that the order of the ranking is right.
    reference_logprobs: [B, K] float32, log π_ref(y|x) if it was computed beforehand,
      else 0.
  """

  tokens: Array
  positions: Array
  segment_ids: Array
  group: Array
  ranks: Array
  index: Array  # the record may have more than the tokens, such as the right answer
  begins: Array
  confidence: Array  # below 1 for soft labels, such as those of an AI judge
  reference_logprobs: Array

  @property
  def token_count(self) -> Array:
    """The tokens of all responses, each with its prompt, [] float32."""
    return jnp.sum(self.segment_ids > 0, dtype=jnp.float32)


class Prompts(flax.struct.PyTreeNode):
  """Prompts to respond to, left-padded.

  Attributes:
    tokens: [B, P] int32.
    mask: [B, P] bool, True = a token of the prompt, False = padding.
    index: [B] int32, the index of the record in its data set; -1 for an empty row, which
      only completes the batch.
  """

  tokens: Array
  mask: Array
  index: Array


class Samples(flax.struct.PyTreeNode):
  """Generated responses; row b * K + k is response k to prompt b.

  Attributes:
    tokens: [B * K, R] int32, PAD after the end of the response.
    mask: [B * K, R] bool, True up to and including the stop token.
    logprobs: [B * K, R] float32, the log-probabilities of the sampled tokens under
      softmax(logits / temperature) over the whole vocabulary: top-k and top-p restrict
      what is sampled, but the probabilities are not renormalised. 0 outside the mask.
    ended: [B * K] bool, True where the response ends with a stop token; False
      where it was cut at the maximum length.
  """

  tokens: Array
  mask: Array
  logprobs: Array
  ended: Array


class TrainState(flax.struct.PyTreeNode):
  """The state of a training run between two steps.

  Attributes:
    step: [] int32, the number of steps made.
    trained: the parameters that are trained, float32.
    opt_state: the state of the optimizer.
    key: [] the root random key; step n uses fold_in(key, n).
    frozen: parameters that are not trained, such as the base of adapters, and may be
      shared with other models. They are neither donated nor checkpointed. A dict, name →
      tree; 'params' is the tree that belongs to `trained`.
  """

  step: Array  # an update that is not finite is not made, and does not count
  trained: Params  # donated to the next step, as are opt_state and key
  opt_state: Any  # of optax; sharded like `trained`
  key: Array  # never replaced: a resumed run derives the same keys
  # Keyword-only, as it has a default and subclasses add fields without one.
  frozen: dict = flax.struct.field(default_factory=dict, kw_only=True)

  @property
  def params(self) -> Params:
    """The parameters of the complete model: the trained ones merged with the frozen ones."""
    return merge_params(self.trained, self.frozen.get('params', {}))


def merge_params(first: Params, second: Params) -> Params:
  """Merges two trees of parameters; a leaf that both have is taken from the first one."""
  # A copy, so that neither tree is changed; the arrays themselves are shared.
  merged = dict(second)
  for name, leaf in first.items():
    # One subtree may have trained and frozen leaves: a frozen matrix and its adapters.
    both_are_trees = isinstance(leaf, dict) and name in second
    merged[name] = merge_params(leaf, second[name]) if both_are_trees else leaf
  return merged
