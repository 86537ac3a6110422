"""Iterated DPO on TinyWorld: sample, order by the reward model, learn by DPO; two rounds.

The second round starts from the first round's policy. Xu et al. 2023, arXiv:2312.16682;
docs/methods/iterated_dpo.md.

  python -m rlhf_jax --config=experiments/iterated_dpo.py --workdir=runs/iterated_dpo

Expected: on the test split of seed 0 it wins against SFT by substance in 55.9% (53.6 – 58.5)
  sampled and 57.0% (53.2 – 61.6) greedy, at a KL of 0.16 nats. docs/methods.md has all methods.
Time: 134 s on one CPU core, after the quickstart's first four stages (6 minutes on two cores).
Try: --config.iterated_dpo.reference=sft, which keeps SFT as the reference of the second round too.
"""

from typing import Any

import ml_collections
import quickstart


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  return quickstart.continue_with(
    'iterated_dpo',
    tiny,
    ('pretrain', 'sft', 'feedback', 'reward'),
    rankings1=_collect('sft'),
    dpo1=_learn('sft', 'rankings1'),
    rankings2=_collect('dpo1'),
    iterated_dpo=_learn('dpo1', 'rankings2'),
  )


def _collect(policy: str) -> dict[str, Any]:
  """Returns a stage in which the reward model orders a policy's responses."""
  return dict(
    kind='feedback',
    source='reward',
    policies=(policy,),
    num_samples=4,
    max_length=30,
  )


def _learn(policy: str, rankings: str) -> dict[str, Any]:
  """Returns a stage that trains a policy on rankings; the policy is its own reference."""
  return dict(
    kind='preference',
    init=policy,
    reference=policy,
    loss='dpo',
    beta=0.1,
    batch_size=8,
    responses_per_row=4,
    max_length=62,
    packed_rows=8,  # half of the places would be padding
    data=dict(source='jsonl', path=(f'{{workdir}}/{rankings}/{{split}}.jsonl',)),
    optimizer=dict(learning_rate=1e-4),
    loop=dict(steps=50, eval_every=50, save_every=50),
  )
