"""The four steps of RLHF on the embedded world, on a laptop's CPU, from nothing to a table.

  python -m rlhf_jax --config=experiments/quickstart.py --workdir=runs/quickstart

Two cores, seven minutes; seeds 0, 1 and 2: base 21 – 24% helpful and 59 – 62% harmless, SFT 42 – 49% and 92 – 93%, PPO
52 – 62% and 99 – 100%; PPO wins 70 – 75% against SFT at 1.6 – 2.0 nats. Another seed: --config.seed=1.
"""

import ml_collections


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """tiny: every stage in a few seconds, for tests; its table means nothing."""
  config = ml_collections.ConfigDict()
  config.stages = ('pretrain', 'sft', 'feedback', 'reward', 'ppo')
  config.model = dict(embed=128, layers=4, heads=4, kv_heads=4, head_dim=32, mlp=384)
  sampling = dict(max_new_tokens=32)
  config.pretrain = dict(batch_size=16, max_length=96, loop=dict(steps=1400, eval_every=700, save_every=350),
                         optimizer=dict(learning_rate=5e-3), sampling=sampling)
  config.sft = dict(batch_size=16, max_length=96, loop=dict(steps=70, eval_every=35, save_every=70),
                    optimizer=dict(learning_rate=3e-4), sampling=sampling, data=dict(count=300))
  config.feedback = dict(policies=('sft', 'pretrain'), num_samples=3, max_length=26, sampling=sampling)
  config.reward = dict(batch_size=8, responses_per_row=6, max_length=58, loop=dict(steps=120, eval_every=60, save_every=60),
                       data=dict(source='jsonl', path=('{workdir}/feedback/{split}.jsonl',)),
                       optimizer=dict(learning_rate=5e-4, warmup_steps=10))
  config.ppo = dict(batch_size=64, max_length=26, epochs=1, minibatches=2, kl_coefficient=0.25, sampling=sampling,
                    loop=dict(steps=80, eval_every=40, save_every=40), optimizer=dict(learning_rate=4e-4))
  config.evaluation = dict(models=dict(base='pretrain', sft='sft', ppo='ppo'), num_samples=2, max_length=26,
                           sampling=sampling)
  if tiny:
    config.model = dict(embed=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp=64)
    for name in ('pretrain', 'sft', 'reward', 'ppo'):
      config[name].loop = dict(steps=4, eval_every=2, save_every=2, log_every=1)
      config[name].batch_size = 8
    for name in ('pretrain', 'sft', 'ppo'):
      config[name].eval_records = 8
    config.pretrain.data = dict(count=400)
    config.tokenizer = dict(documents=400)
    config.reward.max_length = 128  # an untrained model's answers are longer when read again
    config.feedback.data = dict(count=16)
    config.feedback.batch_size = 16
    config.evaluation.data = dict(count=16)
    config.evaluation.batch_size = 16
  return config


_TINY = dict(  # of the stages after the quickstart's
    feedback=dict(data=dict(count=16), batch_size=16), sft=dict(batch_size=8, eval_records=8),
    pretrain=dict(batch_size=8, eval_records=8), reward=dict(batch_size=8, max_length=128),
    ppo=dict(batch_size=8, eval_records=8), critique=dict(batch_size=16, data=dict(count=16), helpful=dict(count=16)),
    preference=dict(batch_size=8, max_length=128, eval_records=8),
    policy_gradient=dict(batch_size=8, eval_records=8), online_preference=dict(batch_size=8, eval_records=8))


def then(name: str, tiny: bool, before, **sections) -> ml_collections.ConfigDict:
  """Another method on the quickstart's models: its stages `before`, then others.

  Args:
    name: the stage whose model the last table shows beside base and sft.
    sections: stage → its section, in order.
  """
  config = get_config(tiny)
  for stage in {*config.stages} - {*before}:
    del config[stage]
  config.stages = (*before, *sections)
  config.evaluation.models = {'base': 'pretrain', 'sft': 'sft', name: name}
  for stage, section in sections.items():
    kind = section.get('kind', stage)
    changes = {} if kind == 'reward' else dict(sampling=dict(max_new_tokens=32))
    if tiny:
      changes |= _TINY[kind] | ({} if kind in ('feedback', 'critique') else dict(
          loop=dict(steps=4, eval_every=2, save_every=2, log_every=1)))
    config[stage] = section | {key: {**section.get(key, {}), **value} if isinstance(value, dict) else value
                               for key, value in changes.items()}
  return config
