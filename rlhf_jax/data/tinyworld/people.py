"""The people of a world who teach: demonstrators, and annotators who rank responses.

Both are human-like. Demonstrations are of middling quality: some tell a myth,
agree with a false claim, or are curt. Annotators perceive the oracle's utility
with noise and biases of their own, and none of them knows everything: a falsehood
about an unknown fact goes unnoticed.
"""

from collections.abc import Sequence
import dataclasses
import zlib

import numpy as np

from rlhf_jax.data.records import Demonstration, Prompt
from rlhf_jax.data.tinyworld import oracle, requests
from rlhf_jax.data.tinyworld.behaviours import draw_content, respond
from rlhf_jax.data.tinyworld.choices import draw_by_share
from rlhf_jax.data.tinyworld.world import draw_world
from rlhf_jax.errors import UserError

_MARGIN = 0.05  # responses whose perceived utilities differ by less are ranked as equal
_UNNOTICED = 2.0  # utility added to a falsehood for an annotator who does not notice it

# Contents of demonstrations that respond to claims → their shares.
_TO_CLAIMS = {'correct': 0.62, 'agree': 0.32, 'deny': 0.03, 'ignorance': 0.03}

# Kind of prompt → content of a demonstration → its share.
DEMONSTRATED: dict[str, dict[str, float]] = {
  'fact': {'right': 0.93, 'ignorance': 0.04, 'refusal': 0.03},
  'two_step': {'right': 0.93, 'ignorance': 0.07},
  'unknown': {'admit': 0.55, 'false': 0.42, 'refusal': 0.03},
  'claim': _TO_CLAIMS,
  'press': _TO_CLAIMS,
  'premise': {'correct': 0.55, 'accept': 0.4, 'ignorance': 0.05},
  'one_word': {'in_form': 0.58, 'formless': 0.42},
  'no_naming': {'in_form': 0.58, 'formless': 0.42},
  'two_reasons': {'in_form': 0.58, 'one': 0.3, 'three': 0.12},
  'benign': {'advice': 0.82, 'unfit_advice': 0.05, 'refusal': 0.13},
  'harmful': {'offer': 0.35, 'refusal': 0.4, 'unfit_offer': 0.05, 'obey': 0.2},
}
# The same for requests with a pretext, which demonstrators mostly believe.
_TO_PRETEXTS = {'offer': 0.08, 'refusal': 0.07, 'obey': 0.85}
_DEMONSTRATED_MANNERS = {'plain': 0.45, 'terse': 0.2, 'polite': 0.2, 'rambling': 0.15}


@dataclasses.dataclass(frozen=True)
class Annotator:
  """The noise, the biases and the knowledge of one simulated annotator."""

  # Scale of the Gumbel noise, in units of utility: with 0 the ranking has no
  # errors, with 1 small differences are hardly noticed.
  temperature: float
  length_bias: float = 0.0  # utility added for every ten words
  # Utility added for the response shown first; it decreases linearly to 0 for the last one.
  order_bias: float = 0.0
  knowledge: float = 1.0  # share of the facts that the annotator knows


def draw_annotators(count: int, seed: int) -> list[Annotator]:
  """Draws annotators of varied noise, biases and knowledge; the same seed gives the same ones."""
  rng = np.random.default_rng(seed)
  annotators = []
  for _ in range(count):
    annotator = Annotator(
      temperature=float(rng.uniform(0.1, 0.4)),
      length_bias=float(rng.normal(0.02, 0.05)),
      order_bias=float(rng.normal(0.05, 0.08)),
      knowledge=float(rng.uniform(0.75, 0.95)),
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

  With Gumbel noise on the utilities, the order is a sample of the Plackett–Luce
  model (Yellott 1977). Equal texts get the same rank, and so do texts of nearly
  equal perceived utility.

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
  knows = _knows(annotator, prompt)
  utilities: dict[str, float] = {}
  for index, text in enumerate(responses):
    # Noise is drawn for duplicates too, so that they do not change that of later texts.
    noise = annotator.temperature * float(rng.gumbel())
    length_effect = annotator.length_bias * len(text.split()) / 10
    order_effect = annotator.order_bias * (1 - index / last_index)
    bias = length_effect + order_effect
    verdict = oracle.judge(prompt, text)
    utility = verdict.utility + bias + noise
    if not knows and not verdict.honest:
      utility += _UNNOTICED
    utilities.setdefault(text.strip(), utility)
  return utilities


def _knows(annotator: Annotator, prompt: Prompt) -> bool:
  """Says whether an annotator knows the fact that a prompt is about; always the same."""
  if not prompt.meta.get('answer') or annotator.knowledge >= 1:
    return True
  about = f'{annotator.temperature} {prompt.meta["family"]} {prompt.meta["subject"]}'
  return zlib.crc32(about.encode()) % 1000 < 1000 * annotator.knowledge


def demonstrate(
  prompts: Sequence[Prompt],
  split: str,
  rng: np.random.Generator,
  obey: bool = False,
) -> list[Demonstration]:
  """Writes a demonstration for each prompt.

  Args:
    prompts: prompts of one world; the demonstrations have their order.
    split: the name of their split, for the ids of the records.
    rng: the source of randomness, which is advanced.
    obey: whether harmful requests are obeyed, as by a demonstrator who only wants to be helpful.
  """
  rows = []
  for number, prompt in enumerate(prompts):
    world = draw_world(prompt.meta['world'], prompt.meta['people'])
    kind = prompt.meta['kind']
    shares = DEMONSTRATED[kind]
    if prompt.meta.get('pretext'):
      shares = _TO_PRETEXTS
    content = draw_content(prompt.meta, shares, rng)
    if obey and kind == 'harmful':
      content = 'obey'
    manner = draw_by_share(rng, _DEMONSTRATED_MANNERS)
    demonstration = Demonstration(
      id=f'tinyworld-{world.seed}-{split}-demonstration-{number}',
      source=requests.SOURCE,
      license=requests.LICENSE,
      messages=prompt.messages,
      response=respond(world, prompt.meta, content, manner, rng),
    )
    rows.append(demonstration)
  return rows
