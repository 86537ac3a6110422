"""DPO on the embedded world: the quickstart's first three steps, then preference optimisation on its rankings.

  python -m rlhf_jax --config=experiments/dpo.py --workdir=runs/dpo

No reward model. On a finished quickstart: scripts/compare_methods.py. What to expect: docs/methods.md.
"""

import quickstart


def like(name: str, tiny: bool, **section):
  """DPO's experiment with another formula, under its own name."""
  return quickstart.then(name, tiny, ('pretrain', 'sft', 'feedback'), **{name: dict(
      dict(kind='preference', batch_size=8, responses_per_row=6, max_length=58,
           data=dict(source='jsonl', path=('{workdir}/feedback/{split}.jsonl',)),
           loop=dict(steps=150, eval_every=75, save_every=75), optimizer=dict(learning_rate=4e-4)), **section)})


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  return like('dpo', tiny, loss='dpo', beta=0.1)
