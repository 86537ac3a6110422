"""Online DPO on the embedded world: the policy answers twice, the reward model orders, DPO learns, at every step
(arXiv:2402.04792).

  python -m rlhf_jax --config=experiments/online_dpo.py --workdir=runs/online_dpo

What to expect: docs/methods.md.
"""

import quickstart


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  return quickstart.then('online_dpo', tiny, ('pretrain', 'sft', 'feedback', 'reward'), online_dpo=dict(
      kind='online_preference', loss='dpo', beta=0.1, batch_size=32, num_samples=2, max_length=26,
      optimizer=dict(learning_rate=2e-4), loop=dict(steps=60, eval_every=30, save_every=30)))
