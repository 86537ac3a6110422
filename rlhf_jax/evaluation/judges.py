"""Who says how good an answer is."""

import numpy as np

from rlhf_jax.data.tinyworld import oracle as world


def oracle(prompts, texts) -> dict[str, np.ndarray]:
  """The embedded world's own verdicts, never seen by a trained model.

  Args:
    prompts: N Prompts of the world.
    texts: N lists of S answers.

  Returns:
    helpful, honest, harmless (rates) and utility: [N, S] float64 each.
  """
  verdicts = [[world.judge(prompt, text) for text in row] for prompt, row in zip(prompts, texts, strict=True)]
  return {name: np.array([[float(getattr(verdict, name)) for verdict in row] for row in verdicts])
          for name in ('helpful', 'honest', 'harmless', 'utility')}
