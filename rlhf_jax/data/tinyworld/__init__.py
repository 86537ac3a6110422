"""TinyWorld: an embedded world with a known truth, made from a seed without files.

`records` makes its documents, demonstrations, prompts and rankings; `oracle.judge` says how good
a response is.
"""

import numpy as np

from rlhf_jax.data import records as records_lib
from rlhf_jax.data.tinyworld import conversations, corpus, oracle
from rlhf_jax.errors import UserError

_NUM_RESPONSES = 4  # of a ranking

# Kind of record → its other forms.
VARIANTS: dict[str, tuple[str, ...]] = {
  'document': ('feedback',),  # most of them judge two responses, or criticise and revise one
  'demonstration': ('helpful_only',),  # harmful requests are obeyed
  'prompt': ('harmful', 'questions'),  # only these
  'ranking': ('harmful', 'questions'),  # only about these
}

# Variant of prompts and rankings → the kinds of prompt it is about.
_PROMPT_KINDS = {
  'harmful': ('harmful',),
  'questions': ('question',),
  '': ('question', 'harmful'),
}

# Kind of record → how many there are in training; a tenth of it in validation. 0 = all.
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
) -> list:
  """Makes records of the world; the same arguments give the same records.

  Args:
    kind: 'document', 'demonstration', 'prompt' or 'ranking' (K = 4 scripted responses of all
      qualities, ranked without error).
    split: 'train' or 'validation', which holds out wordings, facts and harmful requests.
    seed: of the random choices.
    count: how many; of prompts, the first ones of a random order; of rankings, before the variant
      leaves some out. None = 20000 documents, 500 demonstrations, all prompts or 2000 rankings,
      and a tenth of that for validation.
    variant: '' or one of VARIANTS[kind].

  Raises:
    UserError: there is no such kind, split or variant.
  """
  _check_names(kind, split, variant)
  if count is None:
    count = _DEFAULT_COUNTS[kind]
    if split == 'validation':
      count //= 10
  if kind == 'prompt':
    return _shuffled_prompts(split, seed, count, _PROMPT_KINDS[variant])
  if kind == 'document':
    return corpus.documents(seed, count, split, variant or 'web')
  if kind == 'demonstration':
    obey = variant == 'helpful_only'
    return conversations.demonstrations(split, seed, count, obey=obey)
  return _rankings(split, seed, count, _PROMPT_KINDS[variant])


def _check_names(kind: str, split: str, variant: str) -> None:
  """Refuses names that the world does not have."""
  if split not in ('train', 'validation'):
    raise UserError(f'tinyworld: split: expected train or validation, got {split!r}')
  if kind not in _DEFAULT_COUNTS:
    names = ', '.join(_DEFAULT_COUNTS)
    raise UserError(f'tinyworld: kind: expected one of {names}, got {kind!r}')
  if variant and variant not in VARIANTS[kind]:
    names = ', '.join(VARIANTS[kind])
    raise UserError(f'tinyworld: variant of a {kind}: expected one of {names}, got {variant!r}')


def _shuffled_prompts(
  split: str,
  seed: int,
  count: int,
  kinds: tuple[str, ...],
) -> list[records_lib.Prompt]:
  """Gives the first `count` prompts of some kinds in a random order; 0 = all."""
  rows = [row for row in conversations.prompts(split) if row.meta['kind'] in kinds]
  order = np.random.default_rng([seed, split == 'train', 2]).permutation(len(rows))
  return [rows[index] for index in order][: count or None]


def _rankings(
  split: str,
  seed: int,
  count: int,
  kinds: tuple[str, ...],
) -> list[records_lib.Ranking]:
  """Ranks scripted responses by the oracle's utility, for drawn prompts of some kinds."""
  rng = np.random.default_rng([seed, split == 'train', 3])
  prompts = conversations.draw_prompts(conversations.prompts(split), rng, count)
  rows = []
  for number, prompt in enumerate(prompts):
    if prompt.meta['kind'] not in kinds:
      continue
    responses = _scripted_responses(prompt, rng)
    utilities = [oracle.judge(prompt, response).utility for response in responses]
    ranking = records_lib.Ranking(
      id=f'tinyworld-{split}-ranking-{number}',
      source=conversations.SOURCE,
      license=conversations.LICENSE,
      domain='tinyworld',
      context='',
      messages=prompt.messages,
      responses=responses,
      ranks=_dense_ranks(utilities),
    )
    rows.append(ranking)
  return rows


def _scripted_responses(prompt: records_lib.Prompt, rng: np.random.Generator) -> list[str]:
  """Writes responses of different qualities to a prompt."""
  qualities = list(conversations.QUALITIES[prompt.meta['kind']])
  chosen = rng.choice(len(qualities), size=_NUM_RESPONSES, replace=False)
  return [conversations.respond(prompt.meta, qualities[index], rng) for index in chosen]


def _dense_ranks(utilities: list[float]) -> list[int]:
  """Gives the rank of each value, 1 = highest; equal values share a rank, none is skipped."""
  levels = sorted(set(utilities), reverse=True)
  return [1 + levels.index(utility) for utility in utilities]
