"""TinyWorld: an embedded world with a known truth, made from a seed without files.

A model can be capable in it without being aligned. One file for each idea:
  facts, harms, names: tables and wordings.
  world: what one seed draws from them, and what is held out.
  requests: what is asked: the prompts of every split.
  behaviours: how somebody may respond.
  corpus: documents to pre-train on.
  people: who demonstrates and who ranks.
  oracle, reading, phrases: how good a response is, by reading it.
  pairs: responses that differ in one kind only, to measure reward models with.
`records` makes documents, demonstrations, prompts and rankings of all that.
"""

import numpy as np

from rlhf_jax.data import records as records_lib
from rlhf_jax.data.tinyworld import corpus, oracle, pairs, people, requests
from rlhf_jax.data.tinyworld.behaviours import CONTENTS, draw_content, MANNERS, respond
from rlhf_jax.data.tinyworld.choices import draw_by_share
from rlhf_jax.data.tinyworld.people import DEMONSTRATED
from rlhf_jax.data.tinyworld.world import DEFAULT_PEOPLE, draw_world, World
from rlhf_jax.errors import UserError

__all__ = ['DEFAULT_PEOPLE', 'oracle', 'records', 'SPLITS', 'VARIANTS']

SPLITS = ('train', 'validation', 'test')

_NUM_RESPONSES = 4  # of a ranking
_MAX_HELD_OUT = 500  # documents of validation, of test
_NUM_ANNOTATORS = 5  # who made the rankings

# Kind of record → its variants.
VARIANTS: dict[str, tuple[str, ...]] = {
  'document': ('feedback',),  # most of them judge two responses, or criticise and revise one
  'demonstration': ('helpful_only',),  # harmful requests are obeyed
  'prompt': ('harmful', 'questions'),  # only these; benign twins are questions
  # Only about these; pairs of pairs.py; about facts, harms and names that no split asks about.
  'ranking': ('harmful', 'questions', 'by_kind', 'elsewhere'),
}

# Kind of record → how many there are for training; each other split has a tenth. 0 = all.
_DEFAULT_COUNTS = {
  'document': 20000,
  'demonstration': 500,
  'prompt': 0,
  'ranking': 2000,
}


def records(
  kind: str,
  split: str,
  seed: int = 0,
  count: int | None = None,
  variant: str = '',
  num_people: int = DEFAULT_PEOPLE,
) -> list:
  """Makes records of a world; the same arguments give the same records.

  Args:
    kind: 'document', 'demonstration', 'prompt' or 'ranking' (K = 4 scripted responses of all
      qualities, ranked by people of the world; or pairs that differ in one kind only).
    split: 'train', 'validation' or 'test'; world.py says what is held out for the last two.
    seed: of the world. Every seed draws its own world, corpus and people.
    count: how many; of prompts, the first ones of a random order; of rankings,
      before the variant leaves some out. None = 20000 documents, 500
      demonstrations, all prompts or 2000 rankings, and a tenth of that, 500
      documents at most, for validation and test.
    variant: '' or one of VARIANTS[kind].
    num_people: how many persons the world knows.

  Raises:
    UserError: there is no such kind, split or variant.
  """
  _check_names(kind, split, variant)
  world = draw_world(seed, num_people)
  if count is None:
    count = _DEFAULT_COUNTS[kind]
    if split != 'train':
      count = min(count // 10, _MAX_HELD_OUT)
  if kind == 'document':
    return corpus.documents(world, count, split, variant or 'web')
  prompts = requests.prompts(world, split)
  rng = np.random.default_rng([seed, 14, SPLITS.index(split), [*_DEFAULT_COUNTS].index(kind)])
  if kind == 'prompt':
    rows = [row for row in prompts if _is_about(row, variant)]
    return [rows[place] for place in rng.permutation(len(rows))][: count or None]
  if kind == 'demonstration':
    asked = _draw_rounds(prompts, rng, count)
    return people.demonstrate(asked, split, rng, obey=variant == 'helpful_only')
  if variant == 'by_kind':
    return pairs.pairs_by_kind(world, prompts, split, rng, count)
  if variant == 'elsewhere':
    prompts = requests.prompts_elsewhere(world, split)
    asked = _draw_rounds(prompts, rng, count)
    return [_rank(world, row, number, split, rng) for number, row in enumerate(asked)]
  asked = _draw_rounds(prompts, rng, count)
  rankings = [_rank(world, prompt, number, split, rng) for number, prompt in enumerate(asked)]
  kept = zip(asked, rankings, strict=True)
  return [ranking for prompt, ranking in kept if _is_about(prompt, variant)]


def _check_names(kind: str, split: str, variant: str) -> None:
  """Refuses names that the world does not have."""
  if split not in SPLITS:
    raise UserError(f'tinyworld: split: expected one of {", ".join(SPLITS)}, got {split!r}')
  if kind not in _DEFAULT_COUNTS:
    names = ', '.join(_DEFAULT_COUNTS)
    raise UserError(f'tinyworld: kind: expected one of {names}, got {kind!r}')
  if variant and variant not in VARIANTS[kind]:
    names = ', '.join(VARIANTS[kind])
    raise UserError(f'data.variant: of a {kind}: expected one of {names}, got {variant!r}')


def _is_about(prompt: records_lib.Prompt, variant: str) -> bool:
  """Says whether a prompt belongs to a variant."""
  if not variant:
    return True
  return (prompt.meta['kind'] == 'harmful') == (variant == 'harmful')


def _draw_rounds(
  rows: list[records_lib.Prompt],
  rng: np.random.Generator,
  count: int,
) -> list[records_lib.Prompt]:
  """Draws `count` prompts; each is drawn once before any is drawn again."""
  drawn: list[records_lib.Prompt] = []
  while len(drawn) < count:
    remaining = count - len(drawn)
    drawn += [rows[index] for index in rng.permutation(len(rows))[:remaining]]
  return drawn


def _rank(
  world: World, prompt: records_lib.Prompt, number: int, split: str, rng: np.random.Generator
) -> records_lib.Ranking:
  """Lets somebody rank responses of all qualities to a prompt."""
  responses = []
  for place in range(_NUM_RESPONSES):
    # Half of the responses are like the corpus, half like demonstrations.
    shares = (CONTENTS, DEMONSTRATED)[place % 2][prompt.meta['kind']]
    content = draw_content(prompt.meta, shares, rng)
    manner = draw_by_share(rng, MANNERS)
    responses.append(respond(world, prompt.meta, content, manner, rng))
  annotators = people.draw_annotators(_NUM_ANNOTATORS, world.seed)
  annotator = annotators[int(rng.integers(_NUM_ANNOTATORS))]
  return records_lib.Ranking(
    id=f'tinyworld-{world.seed}-{split}-ranking-{number}',
    source=requests.SOURCE,
    license=requests.LICENSE,
    domain='tinyworld',
    context='',
    messages=prompt.messages,
    responses=responses,
    ranks=people.rank_responses(prompt, responses, annotator, rng),
  )
