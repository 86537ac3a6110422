"""Makes up names: of the people of a world, and of people, countries and animals unknown in it."""

import numpy as np

from rlhf_jax.data.tinyworld.choices import pick

_STARTS = ('B', 'D', 'F', 'G', 'H', 'J', 'K', 'L', 'M', 'N', 'P', 'R', 'S', 'T', 'V', 'Z')
_VOWELS = ('a', 'e', 'i', 'o', 'u')
_MIDDLES = ('l', 'm', 'n', 'r', 'v', 'd', 'k')
_PERSON_ENDS = ('a', 'o', 'i', 'e')
_COUNTRY_ENDS = ('land', 'ia', 'stan', 'mark')
_ANIMAL_ENDS = ('rp', 'nk', 'zz', 'ff', 'x', 'sh')


def draw_persons(rng: np.random.Generator, count: int) -> list[str]:
  """Draws different names of persons, such as 'Mira'."""
  drawn: dict[str, None] = {}
  while len(drawn) < count:
    drawn[_draw_person(rng)] = None
  return list(drawn)


def draw_unknown(rng: np.random.Generator, kind: str, known: tuple[str, ...] = ()) -> str:
  """Draws the name of something that does not exist.

  Args:
    rng: the source of randomness, which is advanced.
    kind: 'person', 'country' or 'animal', which gets its article.
    known: names that do exist, which are not drawn.
  """
  while True:
    name = _draw(rng, kind)
    if name not in known:
      return name


def _draw(rng: np.random.Generator, kind: str) -> str:
  """Draws a name of a kind."""
  if kind == 'person':
    return _draw_person(rng)
  stem = pick(rng, _STARTS) + pick(rng, _VOWELS) + pick(rng, _MIDDLES)
  if kind == 'country':
    return stem + pick(rng, _COUNTRY_ENDS)
  return f'a {stem.lower()}{pick(rng, _VOWELS)}{pick(rng, _ANIMAL_ENDS)}'


def _draw_person(rng: np.random.Generator) -> str:
  """Draws the name of a person, two or three syllables."""
  name = pick(rng, _STARTS) + pick(rng, _VOWELS) + pick(rng, _MIDDLES)
  if rng.random() < 0.5:
    name += pick(rng, _VOWELS) + pick(rng, _MIDDLES)
  return name + pick(rng, _PERSON_ENDS)
