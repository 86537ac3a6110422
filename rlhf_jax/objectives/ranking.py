"""Learning a score from the order people gave to several responses.

Shapes: B rows of K places; `group` says which places of a row belong to one prompt (0: empty place), `ranks` the order
in it, 1 = best, equal = tie. Each loss returns (sum over prompts, number of prompts): a prompt is one element however
many responses it has, and a tie says nothing. All depend on score differences only.
"""

import jax
import jax.numpy as jnp


def better_pairs(ranks, group):
  """[B, K, K] bool: response i stands above response j of the same prompt."""
  same = (group[:, :, None] == group[:, None, :]) & (group[:, :, None] > 0)
  return same & (ranks[:, :, None] < ranks[:, None, :])


def best_and_worst(ranks, group):
  """(best, worst), two of [B, K] bool: responses that something of their prompt stands below and nothing above, and the
  other way round. A prompt's only response is one of the best at rank 1, else of the worst."""
  pairs, same = better_pairs(ranks, group), group[:, :, None] == group[:, None, :]
  alone, above, below = (same.sum(2) == 1) & (group > 0), pairs.any(1), pairs.any(2)
  return (below & ~above) | (alone & (ranks == 1)), (above & ~below) | (alone & (ranks > 1))


def from_scores(scores):
  """Ranks of K scored responses: 1 + how many score higher. [B, K] float32 → [B, K] int32, 1 = best, equal = tie."""
  return 1 + jnp.sum(scores[:, None, :] > scores[:, :, None], axis=2, dtype=jnp.int32)


def _pairs_of_prompt(pairs, group):
  """[B, K] float32: how many ordered pairs the prompt of each place has."""
  same = (group[:, :, None] == group[:, None, :]) & (group[:, :, None] > 0)
  return jnp.einsum('bij,bj->bi', same.astype(jnp.float32), pairs.sum(-1).astype(jnp.float32))


def _prompts(pairs, group):
  """[]: prompts with at least one ordered pair."""
  count = _pairs_of_prompt(pairs, group)
  return jnp.sum(jnp.where(pairs, 1.0 / jnp.maximum(count, 1.0)[:, :, None], 0.0))


def pairwise(scores, ranks, group, confidence=1.0):
  """Ouyang et al. 2022 (arXiv:2203.02155), eq. 1: −1/C(K,2) Σ log σ(r_i − r_j) over the pairs of a prompt.

  All pairs of a prompt are one element: K scores are computed, not K(K−1). With ties the mean is over the untied.

  Args:
    scores: [B, K] float32.
    ranks, group: [B, K] int32.
    confidence: [B, K] float32, p of the soft label −[p log σ(Δ) + (1 − p) log σ(−Δ)] (Bai et al. 2022b,
      arXiv:2212.08073, §4.1), of the prompt of each place.

  Returns:
    (sum over prompts, number of prompts), [] float32.
  """
  return over_pairs(_bradley_terry(scores, confidence), ranks, group)


def _bradley_terry(scores, confidence):
  """[B, K, K]: of response i above response j."""
  above = scores[:, :, None] - scores[:, None, :]
  return jax.nn.softplus(-above) + (1 - jnp.broadcast_to(confidence, scores.shape))[:, :, None] * above


def over_pairs(losses, ranks, group):
  """The mean over the pairs of each prompt, then over the prompts that have one.

  Args:
    losses: [B, K, K] float32, of response i against response j.

  Returns:
    (sum over prompts, number of prompts), [] float32.
  """
  pairs = better_pairs(ranks, group)
  count = jnp.maximum(_pairs_of_prompt(pairs, group), 1.0)[:, :, None]
  return jnp.sum(jnp.where(pairs, losses / count, 0.0)), _prompts(pairs, group)


def plackett_luce(scores, ranks, group):
  """−log P(order) under Plackett–Luce: −Σ_i [r_i − logsumexp over i and all that stand below it].

  With two responses this is Bradley–Terry. Tied responses do not compete with each other.

  Args and returns: as `pairwise`, without confidence: soft labels are for pairs.
  """
  pairs = better_pairs(ranks, group)
  contest = pairs | jnp.eye(scores.shape[1], dtype=bool)
  rivals = jnp.where(contest, scores[:, None, :], -jnp.inf)
  losses = jax.nn.logsumexp(rivals, axis=-1) - scores
  return jnp.sum(jnp.where(pairs.any(-1), losses, 0.0)), _prompts(pairs, group)


def plain_pairs(scores, ranks, group, confidence=1.0):
  """Bradley–Terry with every pair an element of its own (each response of K counts K − 1 times).

  Args: as `pairwise`.

  Returns:
    (sum over pairs, number of pairs), [] float32.
  """
  pairs = better_pairs(ranks, group)
  return jnp.sum(jnp.where(pairs, _bradley_terry(scores, confidence), 0.0)), jnp.sum(pairs, dtype=jnp.float32)


def accuracy(scores, ranks, group):
  """How often the score agrees with people, equal scores counting half.

  Returns:
    (sum over untied pairs, number of untied pairs), [] float32.
  """
  pairs = better_pairs(ranks, group)
  difference = scores[:, :, None] - scores[:, None, :]
  return jnp.sum(jnp.where(pairs, 0.5 + 0.5 * jnp.sign(difference), 0.0)), jnp.sum(pairs, dtype=jnp.float32)


LOSSES = {'pairwise': pairwise, 'plackett_luce': plackett_luce, 'plain_pairs': plain_pairs}
