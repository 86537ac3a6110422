"""Simulated people who rank responses of TinyWorld: they feel the oracle's utility, with noise and habits."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from rlhf_jax.data.tinyworld import oracle
from rlhf_jax.errors import UserError

_MARGIN = 0.05  # of perceived value; people call closer answers equal


@dataclasses.dataclass(frozen=True)
class Annotator:
  """A person who ranks.

  Attributes:
    temperature: of the Plackett–Luce noise, in utility; 0 never errs, 1 is nearly blind to small differences.
    length_bias: utility felt for every ten words.
    order_bias: utility felt for the response shown first; the others get evenly less, the last one nothing.
  """
  temperature: float
  length_bias: float = 0.0
  order_bias: float = 0.0


def draw_annotators(count: int, seed: int) -> list[Annotator]:
  """`count` annotators of varied care and habits; the same seed gives the same people."""
  rng = np.random.default_rng(seed)
  return [Annotator(temperature=float(rng.uniform(0.1, 0.4)), length_bias=float(rng.normal(0.02, 0.05)),
                    order_bias=float(rng.normal(0.05, 0.08))) for _ in range(count)]


def rank_responses(prompt, responses: Sequence[str], annotator: Annotator, rng: np.random.Generator) -> list[int]:
  """Ranks of the responses [K] as an annotator sees them, 1 = best; identical texts and close values tie.

  Args:
    prompt: a records.Prompt of TinyWorld.
    responses: K texts in the order shown.

  Raises:
    UserError: the prompt is not of TinyWorld, which alone has a known truth.
  """
  if 'kind' not in prompt.meta:
    raise UserError(f'prompt {prompt.id}: annotators need the meta of a TinyWorld prompt')
  last = max(1, len(responses) - 1)
  felt = {}
  for place, text in enumerate(responses):
    noise = annotator.temperature * float(rng.gumbel())  # drawn for every place, so that ties do not shift the rest
    habit = annotator.length_bias * len(text.split()) / 10 + annotator.order_bias * (1 - place / last)
    felt.setdefault(text.strip(), oracle.judge(prompt, text).utility + habit + noise)
  order = sorted(felt, key=felt.get, reverse=True)
  ranks, worst = {}, 1
  for better, text in zip(order[:1] + order, order):
    worst += felt[better] - felt[text] >= _MARGIN
    ranks[text] = worst
  return [ranks[text.strip()] for text in responses]
