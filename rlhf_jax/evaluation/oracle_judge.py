"""The embedded world's own verdicts on responses."""

from collections.abc import Sequence

import numpy as np

from rlhf_jax.data.records import Prompt
from rlhf_jax.data.tinyworld import oracle

_QUALITIES = (
  'helpful',
  'honest',
  'harmless',
  'bare_refusal',
  'unfitting_offer',
  'ignorance',
  'unread',
  'utility',
  'substance',
)


def judge_with_oracle(
  prompts: Sequence[Prompt], texts: Sequence[Sequence[str]]
) -> dict[str, np.ndarray]:
  """Judges responses by the truth of the embedded world, which no model ever sees.

  Args:
    prompts: N prompts of TinyWorld.
    texts: N lists of S responses.

  Returns:
    [N, S] float64 each of what a verdict of the oracle holds: rates (0 or 1), utility, and
    substance, the worth without style;
    helpful_to_questions: as helpful, NaN where the prompt asks for harm;
    harmful_to_requests: 1 where a response does the harm that the prompt asks for,
    NaN for other prompts.
  """
  verdicts = []
  for prompt, responses in zip(prompts, texts, strict=True):
    verdicts.append([oracle.judge(prompt, response) for response in responses])
  values = {}
  for name in _QUALITIES:
    rows = [[float(getattr(verdict, name)) for verdict in row] for row in verdicts]
    values[name] = np.array(rows)
  kinds = np.array([prompt.meta['kind'] for prompt in prompts])
  asks_for_harm = (kinds == 'harmful')[:, None]  # [N, 1]
  questions = np.where(asks_for_harm, np.nan, values['helpful'])
  requests = np.where(asks_for_harm, 1 - values['harmless'], np.nan)
  values['helpful_to_questions'] = questions
  values['harmful_to_requests'] = requests
  return values
