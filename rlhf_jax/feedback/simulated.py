"""Simulated annotators, who rank responses to prompts of TinyWorld.

An annotator ranks by a perceived utility: the oracle's, plus personal biases and noise.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from rlhf_jax.data.records import Prompt
from rlhf_jax.data.tinyworld import oracle
from rlhf_jax.errors import UserError

_MARGIN = 0.05  # responses whose perceived utilities differ by less are ranked as equal


@dataclasses.dataclass(frozen=True)
class Annotator:
  """The noise and the biases of one simulated annotator."""

  # Scale of the Gumbel noise, in units of utility: with 0 the ranking has no errors, with 1
  # small differences are hardly noticed.
  temperature: float
  length_bias: float = 0.0  # utility added for every ten words
  # Utility added for the response shown first; it decreases linearly to 0 for the last one.
  order_bias: float = 0.0


def draw_annotators(count: int, seed: int) -> list[Annotator]:
  """Draws annotators with varied noise and biases; the same seed gives the same annotators."""
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
  """Ranks responses by an annotator's perceived utilities.

  With Gumbel noise on the utilities, the order is a sample of the Plackett–Luce model
  (Yellott 1977). Equal texts get the same rank, and so do texts of nearly equal
  perceived utility.

  Args:
    prompt: a prompt of TinyWorld.
    responses: K texts in the order in which they are shown.
    annotator: who ranks.
    rng: the source of the noise.

  Returns:
    K ranks in the order of `responses`, 1 = best; equal ranks are ties.

  Raises:
    UserError: the prompt is not one of TinyWorld's: for others there is no oracle.
  """
  if 'kind' not in prompt.meta:
    raise UserError(
      f'prompt {prompt.id}: simulated annotators need a TinyWorld prompt; its meta has no "kind"'
    )
  utilities = _perceive_utilities(prompt, responses, annotator, rng)
  ordered = sorted(utilities, key=lambda text: utilities[text], reverse=True)
  ranks = {}
  rank = 1
  better_texts = ordered[:1] + ordered  # the first text is compared with itself
  for better, text in zip(better_texts, ordered, strict=False):
    if utilities[better] - utilities[text] >= _MARGIN:
      rank += 1
    ranks[text] = rank
  return [ranks[text.strip()] for text in responses]


def _perceive_utilities(
  prompt: Prompt,
  responses: Sequence[str],
  annotator: Annotator,
  rng: np.random.Generator,
) -> dict[str, float]:
  """Returns the perceived utility of each distinct text."""
  last_index = max(1, len(responses) - 1)
  utilities: dict[str, float] = {}
  for index, text in enumerate(responses):
    # Noise is drawn for duplicates too, so that they do not change that of later texts.
    noise = annotator.temperature * float(rng.gumbel())
    length_effect = annotator.length_bias * len(text.split()) / 10
    order_effect = annotator.order_bias * (1 - index / last_index)
    bias = length_effect + order_effect
    utility = oracle.judge(prompt, text).utility + bias + noise
    utilities.setdefault(text.strip(), utility)
  return utilities
