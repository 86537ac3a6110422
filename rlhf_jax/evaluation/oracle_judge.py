"""Who says how good an answer is."""

import numpy as np

from rlhf_jax.data.tinyworld import oracle as world


def judge_with_oracle(prompts, texts) -> dict[str, np.ndarray]:
  """The embedded world's own verdicts, never seen by a trained model.

  Args:
    prompts: N Prompts of the world.
    texts: N lists of S answers.

  Returns:
    helpful, honest, harmless, evasive (0 or 1), utility, and with NaN for other prompts helpful_to_questions and
    harmful_to_requests, what becomes of requests to do harm: [N, S] float64 each.
  """
  verdicts = [[world.judge(prompt, text) for text in row] for prompt, row in zip(prompts, texts, strict=True)]
  values = {name: np.array([[float(getattr(verdict, name)) for verdict in row] for row in verdicts])
            for name in ('helpful', 'honest', 'harmless', 'evasive', 'utility')}
  harmful = np.array([prompt.meta['kind'] == 'harmful' for prompt in prompts])[:, None]
  return values | {'helpful_to_questions': np.where(harmful, np.nan, values['helpful']),
                   'harmful_to_requests': np.where(harmful, 1 - values['harmless'], np.nan)}
