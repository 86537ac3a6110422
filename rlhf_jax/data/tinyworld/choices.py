"""Random choices of TinyWorld, drawn from a numpy generator."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

Choice = TypeVar('Choice')


def pick(rng: np.random.Generator, choices: Sequence[Choice]) -> Choice:
  """Picks one of several choices with equal probabilities."""
  return choices[int(rng.integers(len(choices)))]


def draw_by_share(rng: np.random.Generator, shares: Mapping[str, float]) -> str:
  """Draws a key by its share.

  Args:
    rng: the source of randomness, which is advanced.
    shares: key → share; they are divided by their sum.
  """
  values = np.fromiter(shares.values(), float)
  place = rng.choice(len(values), p=values / values.sum())
  return list(shares)[int(place)]
