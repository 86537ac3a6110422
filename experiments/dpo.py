"""Direct preference optimisation on the embedded world: the quickstart's first three steps, then DPO on its rankings.

  python -m rlhf_jax --config=experiments/dpo.py --workdir=runs/dpo

To begin with the models of a quickstart: copy its workdir without ppo/, reward/ and results.json, and run there.
Another loss: --config.dpo.loss=ipo (hinge, simpo, kto, plackett_luce …: docs/preference.md).
"""

import quickstart


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  config = quickstart.get_config(tiny)
  sampling = config.ppo.sampling
  config.stages = ('pretrain', 'sft', 'feedback', 'dpo')
  config.dpo = dict(
      kind='preference', beta=0.1, batch_size=8, responses_per_row=6, length=58, sampling=sampling,
      data=dict(source='jsonl', path=('{workdir}/feedback/{split}.jsonl',)),
      loop=dict(steps=100, eval_every=50, save_every=50), optimizer=dict(learning_rate=1e-4))
  config.evaluation.models = dict(base='pretrain', sft='sft', dpo='dpo')
  if tiny:
    config.dpo.length = 128
    config.dpo.loop = dict(steps=4, eval_every=2, save_every=2, log_every=1)
  del config.reward, config.ppo
  return config
