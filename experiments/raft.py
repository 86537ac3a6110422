"""Rejection-sampling fine-tuning on the embedded world: sample, keep the answer the reward model likes best, SFT on it;
twice (RAFT: arXiv:2304.06767; expert iteration).

  python -m rlhf_jax --config=experiments/raft.py --workdir=runs/raft

What to expect: docs/methods.md.
"""

import quickstart


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  collect = lambda policy: dict(kind='feedback', source='reward', policies=(policy,), num_samples=8, max_length=26)
  learn = lambda policy, rankings: dict(
      kind='sft', init=policy, batch_size=16, max_length=96, optimizer=dict(learning_rate=3e-4),
      data=dict(source='jsonl', path=(f'{{workdir}}/{rankings}/{{split}}.jsonl',)),
      loop=dict(steps=40, eval_every=40, save_every=40))
  return quickstart.then(
      'raft', tiny, ('pretrain', 'sft', 'feedback', 'reward'), samples1=collect('sft'), raft1=learn('sft', 'samples1'),
      samples2=collect('raft1'), raft=learn('raft1', 'samples2'))
