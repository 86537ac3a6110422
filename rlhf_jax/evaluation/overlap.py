"""Counts the prompts of an evaluation that its models may have been trained on.

Texts are compared as words, without case and punctuation. A prompt is a
copy if a training text is the same, and contained if a run of its words
of the length of a window stands in a training text (as Brown et al.
2020, arXiv:2005.14165, appendix C, do with thirteen words). A prompt
shorter than the window is contained where the whole of it is.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import re

WINDOW = 13  # words
_WORD = re.compile(r"[\w']+")


@dataclasses.dataclass(frozen=True)
class Overlap:
  """What training and evaluation have in common.

  Attributes:
    prompts: how many were checked.
    copies: the numbers of those that equal a training text.
    contained: the numbers of those that share a run of words with one;
      copies are among them.
  """

  prompts: int
  copies: list[int]
  contained: list[int]


def find_overlap(prompts: Sequence[str], training: Iterable[str], window: int = WINDOW) -> Overlap:
  """Compares prompts with training texts.

  Args:
    prompts: the texts of the evaluation.
    training: the texts that models were trained on; read once, so it
      may be a generator.
    window: the words of a run.
  """
  # prompts are few and are kept; training texts stream by
  words_of = [tuple(split_words(prompt)) for prompt in prompts]
  # Runs of the prompts' words; those of the training texts need not be kept.
  places: dict[tuple[str, ...], set[int]] = {}
  lengths = set()
  for number, words in enumerate(words_of):
    length = min(window, len(words))
    if not length:
      continue  # nothing to compare
    lengths.add(length)
    for run in _runs(words, length):
      places.setdefault(run, set()).add(number)
  copies: set[int] = set()
  contained: set[int] = set()
  # prompts that are equal count each
  whole: dict[tuple[str, ...], list[int]] = {}
  for number, words in enumerate(words_of):
    whole.setdefault(words, []).append(number)
  for text in training:
    words = tuple(split_words(text))
    if words:
      copies.update(whole.get(words, ()))
    # short prompts are looked for by their whole length
    for length in lengths:
      for run in _runs(words, length):
        contained.update(places.get(run, ()))
  return Overlap(len(prompts), sorted(copies), sorted(contained | copies))


def split_words(text: str) -> list[str]:
  """Returns the words of a text in lower case.

  >>> split_words('What is it, Mira?')
  ['what', 'is', 'it', 'mira']
  """
  return _WORD.findall(text.lower())


def _runs(words: tuple[str, ...], length: int) -> Iterable[tuple[str, ...]]:
  """Yields all runs of so many words."""
  for begin in range(len(words) - length + 1):
    yield words[begin : begin + length]
