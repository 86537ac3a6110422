"""Iterated DPO on the embedded world: sample, order by the reward model, DPO; twice, the second time from the first's
policy (Xu et al. 2023, arXiv:2312.16682).

  python -m rlhf_jax --config=experiments/iterated_dpo.py --workdir=runs/iterated_dpo

What to expect: docs/methods.md.
"""

import quickstart


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  collect = lambda policy: dict(kind='feedback', source='reward', policies=(policy,), num_samples=4, max_length=26)
  learn = lambda policy, rankings: dict(
      kind='preference', init=policy, reference=policy, loss='dpo', beta=0.1, batch_size=8, responses_per_row=4, max_length=58,
      data=dict(source='jsonl', path=(f'{{workdir}}/{rankings}/{{split}}.jsonl',)),
      optimizer=dict(learning_rate=1e-4), loop=dict(steps=50, eval_every=50, save_every=50))
  return quickstart.then(
      'iterated_dpo', tiny, ('pretrain', 'sft', 'feedback', 'reward'), rankings1=collect('sft'),
      dpo1=learn('sft', 'rankings1'), rankings2=collect('dpo1'), iterated_dpo=learn('dpo1', 'rankings2'))
