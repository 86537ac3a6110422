"""TinyWorld: an embedded world with a known truth, made from a seed without files.

`records` gives its documents, demonstrations, prompts and rankings; `oracle.judge` says how good an answer is.
"""

import numpy as np

from rlhf_jax.data import records as _types
from rlhf_jax.data.tinyworld import conversations, corpus, oracle
from rlhf_jax.errors import UserError

_RESPONSES = 4  # of a ranking
VARIANTS = {  # kind of record → its other forms
    'document': ('feedback',),  # half of them judge two answers, or criticise and revise one by a principle
    'demonstration': ('helpful_only',),  # harmful requests are obeyed
    'prompt': ('harmful', 'questions'), 'ranking': ('harmful', 'questions')}  # about these alone
_PROMPT_KINDS = {'harmful': ('harmful',), 'questions': ('question',), '': ('question', 'harmful')}


def records(kind: str, split: str, seed: int = 0, count: int | None = None, variant: str = '') -> list:
  """Records of the world; the same arguments give the same records.

  Args:
    kind: 'document' (20000 unless told), 'demonstration' (500), 'prompt' (all) or 'ranking' (2000; K = 4 scripted
      answers of all qualities, ranked without error). A tenth of these counts for validation.
    split: 'train' or 'validation', which holds out wordings, facts and harmful requests.
    count: how many; of prompts, the first so many of a random order; of rankings, before the variant leaves some out.
    variant: '' or one of VARIANTS[kind].

  Raises:
    UserError: another kind, split or variant.
  """
  if split not in ('train', 'validation'):
    raise UserError(f'tinyworld: split: expected train or validation, got {split!r}')
  if kind not in _DEFAULTS:
    raise UserError(f'tinyworld: kind: expected one of {", ".join(_DEFAULTS)}, got {kind!r}')
  if variant and variant not in VARIANTS.get(kind, ()):
    raise UserError(f'tinyworld: variant of a {kind}: expected one of {", ".join(VARIANTS.get(kind, ())) or "none"}, got '
                    f'{variant!r}')
  if count is None:
    count = _DEFAULTS[kind] // (1 if split == 'train' else 10)
  if kind == 'prompt':
    rows = [row for row in conversations.prompts(split) if row.meta['kind'] in _PROMPT_KINDS[variant]]
    order = np.random.default_rng([seed, split == 'train', 2]).permutation(len(rows))
    return [rows[i] for i in order][:count or None]
  if kind == 'document':
    return corpus.documents(seed, count, split, variant or 'web')
  if kind == 'demonstration':
    return conversations.demonstrations(split, seed, count, obey=variant == 'helpful_only')
  return _rankings(split, seed, count, _PROMPT_KINDS[variant])


_DEFAULTS = {'document': 20000, 'demonstration': 500, 'prompt': 0, 'ranking': 2000}


def _rankings(split, seed, count, kinds):
  rng = np.random.default_rng([seed, split == 'train', 3])
  rows = []
  for number, prompt in enumerate(conversations.draw(conversations.prompts(split), rng, count)):
    if prompt.meta['kind'] not in kinds:
      continue
    qualities = list(conversations.QUALITIES[prompt.meta['kind']])
    chosen = rng.choice(len(qualities), size=_RESPONSES, replace=False)
    responses = [conversations.respond(prompt.meta, qualities[i], rng) for i in chosen]
    utilities = [oracle.judge(prompt, response).utility for response in responses]
    ranks = [1 + sum(other > utility for other in set(utilities)) for utility in utilities]
    rows.append(_types.Ranking(f'tinyworld-{split}-ranking-{number}', conversations.SOURCE, conversations.LICENSE,
                               'tinyworld', '', prompt.messages, responses, ranks))
  return rows
