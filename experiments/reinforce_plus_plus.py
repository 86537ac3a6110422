"""REINFORCE++ on the embedded world: one answer a prompt, advantages whitened over the batch (arXiv:2501.03262).

  python -m rlhf_jax --config=experiments/reinforce_plus_plus.py --workdir=runs/reinforce_plus_plus

The KL is subtracted token by token. What to expect: docs/methods.md.
"""

import rloo


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  return rloo.like('reinforce_plus_plus', tiny, batch_size=64, num_samples=1, advantage='batch_baseline', whiten_advantages=True,
                   kl_place='tokens', kl_coefficient=0.25, minibatches=2)
