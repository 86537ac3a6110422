"""Simulated people who rank responses to prompts of TinyWorld.

They feel the oracle's utility, with noise and habits of their own.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from rlhf_jax.data.records import Prompt
from rlhf_jax.data.tinyworld import oracle
from rlhf_jax.errors import UserError

_MARGIN = 0.05  # of felt utility; people call closer responses equal


@dataclasses.dataclass(frozen=True)
class Annotator:
  """A person who ranks."""

  # Of the Plackett–Luce noise, in units of utility: at 0 a person never errs, at 1
  # small differences are hardly seen.
  temperature: float
  length_bias: float = 0.0  # utility felt for every ten words
  # Utility felt for the response shown first; it falls evenly to 0 for the last one.
  order_bias: float = 0.0


def draw_annotators(count: int, seed: int) -> list[Annotator]:
  """Draws annotators of varied care and habits; one seed gives the same people."""
  rng = np.random.default_rng(seed)
  annotators = []
  for _ in range(count):
    annotator = Annotator(
      temperature=float(rng.uniform(0.1, 0.4)),
      length_bias=float(rng.normal(0.02, 0.05)),
      order_bias=float(rng.normal(0.05, 0.08)),
    )
    annotators.append(annotator)
  return annotators


def rank_responses(
  prompt: Prompt,
  responses: Sequence[str],
  annotator: Annotator,
  rng: np.random.Generator,
) -> list[int]:
  """Ranks responses as an annotator sees them.

  Gumbel noise on utilities makes the order a Plackett–Luce draw (Yellott 1977). The
  same text twice has one rank, and so do texts that feel equally good.

  Args:
    prompt: a prompt of TinyWorld.
    responses: K texts in the order shown.
    annotator: who ranks.
    rng: source of the noise.

  Returns:
    K ranks in the order of the responses, 1 = best, equal = tie.

  Raises:
    UserError: the prompt is not of TinyWorld, which alone has a known truth.
  """
  if 'kind' not in prompt.meta:
    raise UserError(f'prompt {prompt.id}: annotators need the meta of a TinyWorld prompt')
  utilities = _feel_utilities(prompt, responses, annotator, rng)
  ordered = sorted(utilities, key=lambda text: utilities[text], reverse=True)
  ranks = {}
  rank = 1
  better_texts = ordered[:1] + ordered  # the best one is compared with itself
  for better, text in zip(better_texts, ordered, strict=False):
    if utilities[better] - utilities[text] >= _MARGIN:
      rank += 1
    ranks[text] = rank
  return [ranks[text.strip()] for text in responses]


def _feel_utilities(
  prompt: Prompt,
  responses: Sequence[str],
  annotator: Annotator,
  rng: np.random.Generator,
) -> dict[str, float]:
  """Returns the felt utility of each different text."""
  last_place = max(1, len(responses) - 1)
  utilities: dict[str, float] = {}
  for place, text in enumerate(responses):
    # Drawn for every place, so that equal texts do not shift the noise of the rest.
    noise = annotator.temperature * float(rng.gumbel())
    length_habit = annotator.length_bias * len(text.split()) / 10
    order_habit = annotator.order_bias * (1 - place / last_place)
    habit = length_habit + order_habit
    utility = oracle.judge(prompt, text).utility + habit + noise
    utilities.setdefault(text.strip(), utility)
  return utilities
