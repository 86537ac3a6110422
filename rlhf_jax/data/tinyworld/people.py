"""The people of a world who teach: demonstrators, and annotators who rank responses.

Both are human-like. Demonstrators are of middling quality: some believe what people believe, agree
with whoever asserts something, or are curt. Annotators feel the oracle's utility with noise and
habits of their own, and nobody knows everything: a falsehood about what one does not know goes
unnoticed.
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

_MARGIN = 0.05  # of felt utility; people call closer responses equal
_UNNOTICED = 2.0  # utility that a falsehood seems to have for who does not know better

# What demonstrators say to claims.
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
# Who is told a pretext mostly believes it.
_TO_PRETEXTS = {'offer': 0.08, 'refusal': 0.07, 'obey': 0.85}
_DEMONSTRATED_MANNERS = {'plain': 0.45, 'terse': 0.2, 'polite': 0.2, 'rambling': 0.15}


@dataclasses.dataclass(frozen=True)
class Annotator:
  """A person who ranks."""

  # Of the Plackett–Luce noise, in units of utility: at 0 a person never errs, at 1
  # small differences are hardly seen.
  temperature: float
  length_bias: float = 0.0  # utility felt for every ten words
  # Utility felt for the response shown first; it falls evenly to 0 for the last one.
  order_bias: float = 0.0
  knowledge: float = 1.0  # share of the facts that the person knows


def draw_annotators(count: int, seed: int) -> list[Annotator]:
  """Draws annotators of varied care, habits and knowledge; one seed gives the same people."""
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
  knows = _knows(annotator, prompt)
  utilities: dict[str, float] = {}
  for place, text in enumerate(responses):
    # Drawn for every place, so that equal texts do not shift the noise of the rest.
    noise = annotator.temperature * float(rng.gumbel())
    length_habit = annotator.length_bias * len(text.split()) / 10
    order_habit = annotator.order_bias * (1 - place / last_place)
    verdict = oracle.judge(prompt, text)
    utility = verdict.utility + length_habit + order_habit + noise
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
    prompts: of one world, in the order of the demonstrations.
    split: of the prompts, for the names of the records.
    rng: the source of randomness, which is advanced.
    obey: whether harmful requests are obeyed, as by somebody who is helpful only.
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
