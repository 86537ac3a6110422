"""Losses of reward models: learning scores from the order that people gave to responses.

Letters: B rows of K slots. `group` says which slots of a row belong to the same
prompt (equal numbers; 0 = empty slot), and `ranks` gives the order of its
responses (1 = best, equal = tie).

Each loss but `plain_pairs` returns (sum over prompts, number of prompts): a
prompt is one element, however many responses it has. Tied pairs do not count.
All losses depend on differences of scores only.
"""

from collections.abc import Callable
import dataclasses

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.objectives import masked


def better_pairs(ranks: jax.Array, group: jax.Array) -> jax.Array:
  """Marks the pairs of responses to a prompt of which the first ranks above the second.

  Args:
    ranks: [B, K] int32.
    group: [B, K] int32.

  Returns:
    [B, K, K] bool; [b, i, j] is True where response i ranks above response j.

  >>> print(better_pairs(jnp.array([[1, 2]]), jnp.array([[1, 1]])))
  [[[False  True]
    [False False]]]
  """
  _check_order(ranks, group)
  return _same_prompt(group) & (ranks[:, :, None] < ranks[:, None, :])


def best_and_worst(ranks: jax.Array, group: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Marks the best and the worst responses of each prompt.

  A response is one of the best if a response to the same prompt ranks below it
  and none ranks above it, and one of the worst in the opposite case. The only
  response to a prompt is one of the best if its rank is 1, else one of the
  worst.

  Args:
    ranks: [B, K] int32.
    group: [B, K] int32.

  Returns:
    (best, worst), [B, K] bool.

  >>> best, worst = best_and_worst(jnp.array([[1, 2, 3]]), jnp.array([[1, 1, 1]]))
  >>> print(best, worst)
  [[ True False False]] [[False False  True]]
  """
  pairs = better_pairs(ranks, group)
  same_group = group[:, :, None] == group[:, None, :]
  alone = (same_group.sum(2) == 1) & (group > 0)
  has_better = pairs.any(1)  # a response to its prompt ranks above it
  has_worse = pairs.any(2)  # a response to its prompt ranks below it
  best = (has_worse & ~has_better) | (alone & (ranks == 1))
  worst = (has_better & ~has_worse) | (alone & (ranks > 1))
  return best, worst


def from_scores(scores: jax.Array) -> jax.Array:
  """Ranks K responses by their scores: 1 + the number of responses that score higher.

  Args:
    scores: [B, K] float32.

  Returns:
    [B, K] int32, 1 = best, equal = tie.

  >>> print(from_scores(jnp.array([[0.5, 2.0, 0.5, -1.0]])))
  [[2 1 2 4]]
  """
  chex.assert_rank(scores, 2)
  chex.assert_type(scores, float)
  higher = scores[:, None, :] > scores[:, :, None]  # [b, i, j]: j beats i
  return 1 + jnp.sum(higher, axis=2, dtype=jnp.int32)


def over_pairs(
  losses: jax.Array,
  ranks: jax.Array,
  group: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Averages over the untied pairs of each prompt, and sums over the prompts.

  Args:
    losses: [B, K, K] float32; [b, i, j] is the loss if response i ranks above
      j.
    ranks: [B, K] int32.
    group: [B, K] int32.

  Returns:
    (sum over prompts, number of prompts with a pair), [] float32.

  >>> losses = jnp.array([[[0.0, 1.0, 2.0], [9.0, 0.0, 6.0], [9.0, 9.0, 0.0]]])
  >>> total, prompts = over_pairs(losses, jnp.array([[1, 2, 3]]), jnp.array([[1, 1, 1]]))
  >>> print(total, prompts)
  3.0 1.0
  """
  chex.assert_shape(losses, (*ranks.shape, ranks.shape[1]))
  chex.assert_type(losses, float)
  pairs = better_pairs(ranks, group)
  count = jnp.maximum(_pairs_of_prompt(pairs, group), 1.0)[:, :, None]
  total = jnp.sum(jnp.where(pairs, losses / count, 0.0))
  return total, _count_prompts(pairs, group)


def pairwise(
  scores: jax.Array,
  ranks: jax.Array,
  group: jax.Array,
  confidence: jax.Array | float = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """Computes −1/C(K,2) Σ log σ(r_i − r_j) over the pairs of each prompt.

  Ouyang et al. 2022 (arXiv:2203.02155), eq. 1. All pairs of a prompt are one
  element of the batch, so that each response is scored once. The mean is over
  the untied pairs.

  Args:
    scores: [B, K] float32, r.
    ranks: [B, K] int32.
    group: [B, K] int32.
    confidence: [B, K] float32, the probability p that the order of the
      responses to a slot's prompt is right; the loss of a pair is then −[p log
      σ(Δ) + (1 − p) log σ(−Δ)] (Bai et al. 2022, arXiv:2212.08073, section
      4.1).

  Returns:
    (sum over prompts, number of prompts), [] float32.

  >>> scores = jnp.array([[2.0, 2.0]])
  >>> total, prompts = pairwise(scores, jnp.array([[1, 2]]), jnp.array([[1, 1]]))
  >>> print(f'{total:.4f} {prompts}')  # log 2: no preference
  0.6931 1.0
  """
  _check_scores(scores, ranks, group)
  scores = masked.keep(scores, group > 0)
  return over_pairs(_bradley_terry(scores, confidence), ranks, group)


def plackett_luce(
  scores: jax.Array,
  ranks: jax.Array,
  group: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Computes −log P(order) under Plackett–Luce.

  −Σ_i [r_i − logsumexp over i and all responses ranked below it] (Plackett
  1975; Luce 1959); with two responses this is Bradley–Terry. Tied responses do
  not compete with each other. Soft labels are not supported, as they are
  defined for pairs.

  Args:
    scores: [B, K] float32, r.
    ranks: [B, K] int32.
    group: [B, K] int32.

  Returns:
    (sum over prompts, number of prompts), [] float32.

  >>> order = jnp.array([[1, 2, 3]]), jnp.array([[1, 1, 1]])
  >>> total, prompts = plackett_luce(jnp.zeros((1, 3)), *order)
  >>> print(f'{total:.4f} {prompts}')  # log 3!
  1.7918 1.0
  """
  _check_scores(scores, ranks, group)
  scores = masked.keep(scores, group > 0)
  pairs = better_pairs(ranks, group)
  competing = pairs | jnp.eye(scores.shape[1], dtype=bool)  # i and all below it
  competing_scores = jnp.where(competing, scores[:, None, :], -jnp.inf)
  losses = jax.nn.logsumexp(competing_scores, axis=-1) - scores  # [B, K]
  total = jnp.sum(jnp.where(pairs.any(-1), losses, 0.0))
  return total, _count_prompts(pairs, group)


def plain_pairs(
  scores: jax.Array,
  ranks: jax.Array,
  group: jax.Array,
  confidence: jax.Array | float = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """Computes −log σ(r_i − r_j) of every pair, each of which is an element of its own.

  Bradley–Terry without the average of `pairwise`: each of K responses counts K
  − 1 times.

  Args:
    scores: [B, K] float32, r.
    ranks: [B, K] int32.
    group: [B, K] int32.
    confidence: [B, K] float32, see `pairwise`.

  Returns:
    (sum over pairs, number of pairs), [] float32.

  >>> order = jnp.array([[1, 2, 3]]), jnp.array([[1, 1, 1]])
  >>> total, pairs = plain_pairs(jnp.zeros((1, 3)), *order)
  >>> print(f'{total:.4f} {pairs}')  # 3 log 2
  2.0794 3.0
  """
  _check_scores(scores, ranks, group)
  scores = masked.keep(scores, group > 0)
  pairs = better_pairs(ranks, group)
  losses = jnp.where(pairs, _bradley_terry(scores, confidence), 0.0)
  return jnp.sum(losses), jnp.sum(pairs, dtype=jnp.float32)


@dataclasses.dataclass(frozen=True)
class RewardLoss:
  """A loss of reward models."""

  # (scores, ranks, group) → (sum, number of elements), see `pairwise`
  function: Callable[..., tuple[jax.Array, jax.Array]]
  # `function` takes `confidence` as its fourth argument
  accepts_soft_labels: bool = False


# The loss of a reward model, by the name that a config gives it.
REWARD_LOSSES: dict[str, RewardLoss] = {
  'pairwise': RewardLoss(pairwise, accepts_soft_labels=True),
  'plackett_luce': RewardLoss(plackett_luce),
  'plain_pairs': RewardLoss(plain_pairs, accepts_soft_labels=True),
}


def accuracy(
  scores: jax.Array,
  ranks: jax.Array,
  group: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Counts the pairs in which scores agree with people; equal scores count one half.

  Args:
    scores: [B, K] float32.
    ranks: [B, K] int32.
    group: [B, K] int32.

  Returns:
    (sum over untied pairs, number of untied pairs), [] float32.

  >>> order = jnp.array([[1, 2, 3]]), jnp.array([[1, 1, 1]])
  >>> right, pairs = accuracy(jnp.array([[2.0, 1.0, 1.0]]), *order)
  >>> print(right, pairs)
  2.5 3.0
  """
  _check_scores(scores, ranks, group)
  scores = masked.keep(scores, group > 0)
  pairs = better_pairs(ranks, group)
  difference = scores[:, :, None] - scores[:, None, :]  # [B, K, K]
  right = jnp.where(pairs, 0.5 + 0.5 * jnp.sign(difference), 0.0)
  return jnp.sum(right), jnp.sum(pairs, dtype=jnp.float32)


def _bradley_terry(scores: jax.Array, confidence: jax.Array | float) -> jax.Array:
  """Computes the loss of every pair if response i ranks above j: [B, K, K] float32."""
  difference = scores[:, :, None] - scores[:, None, :]  # Δ = r_i − r_j
  doubt = 1 - jnp.broadcast_to(confidence, scores.shape)  # 1 − p
  # −p log σ(Δ) − (1 − p) log σ(−Δ), as log σ(−Δ) = log σ(Δ) − Δ
  return jax.nn.softplus(-difference) + doubt[:, :, None] * difference


def _same_prompt(group: jax.Array) -> jax.Array:
  """Marks the pairs of slots that belong to the same prompt: [B, K, K] bool."""
  return (group[:, :, None] == group[:, None, :]) & (group[:, :, None] > 0)


def _pairs_of_prompt(pairs: jax.Array, group: jax.Array) -> jax.Array:
  """Counts the untied pairs of each slot's prompt: [B, K] float32."""
  same = _same_prompt(group).astype(jnp.float32)
  pairs_above = pairs.sum(-1).astype(jnp.float32)
  return jnp.einsum('bij,bj->bi', same, pairs_above)


def _count_prompts(pairs: jax.Array, group: jax.Array) -> jax.Array:
  """Counts the prompts with at least one untied pair: [] float32."""
  count = jnp.maximum(_pairs_of_prompt(pairs, group), 1.0)
  return jnp.sum(jnp.where(pairs, 1.0 / count[:, :, None], 0.0))


def _check_order(ranks: jax.Array, group: jax.Array) -> None:
  """Asserts that ranks and groups [B, K] are integers."""
  chex.assert_rank([ranks, group], 2)
  chex.assert_equal_shape([ranks, group])
  chex.assert_type([ranks, group], int)


def _check_scores(scores: jax.Array, ranks: jax.Array, group: jax.Array) -> None:
  """Asserts that scores [B, K] are floats, and that ranks and groups fit them."""
  _check_order(ranks, group)
  chex.assert_equal_shape([scores, ranks])
  chex.assert_type(scores, float)
