"""Online DPO on TinyWorld: at every step the policy responds, the reward model orders, DPO learns.

Guo et al. 2024, arXiv:2402.04792; docs/methods/online_dpo.md.

  python -m rlhf_jax --config=experiments/online_dpo.py --workdir=runs/online_dpo

Expected: on the test split of seed 0 it wins against SFT by substance in 56.9% (54.4 – 60.0)
  sampled and 57.6% (53.4 – 62.5) greedy, at a KL of 0.30 nats. docs/methods.md has all methods.
Time: 130 s on one CPU core, after the quickstart's first four stages (6 minutes on two cores).
Try: --config.online_dpo.num_samples=4, six pairs for each prompt instead of one.
"""

import ml_collections
import quickstart


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  online_dpo = dict(
    kind='online_preference',
    loss='dpo',
    beta=0.1,
    batch_size=32,
    num_samples=2,
    max_length=30,
    packed_rows=8,  # half of the places would be padding
    optimizer=dict(learning_rate=2e-4),
    loop=dict(steps=60, eval_every=30, save_every=30),
  )
  stages = ('pretrain', 'sft', 'feedback', 'reward')
  return quickstart.continue_with('online_dpo', tiny, stages, online_dpo=online_dpo)
