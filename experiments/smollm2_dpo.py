r"""SFT → DPO with a real model and real people's preferences: SmolLM2-135M-Instruct on CPU.

There is no reward model. DIR and the weights: experiments/smollm2_human_feedback.py, whose SFT
stage this shares. There is no final table, because it would need a reward model as judge; instead
`eval/accuracy` says how often people's choice has the higher implicit reward on held-out pairs.

  python -m rlhf_jax --config=experiments/smollm2_dpo.py --workdir=runs/smollm2_dpo \
    --config.data=DIR

Expected: measured in a short form only: 16 steps, from SmolLM2 itself without SFT, one seed.
  Accuracy on held-out pairs 59 of 83 (71%; 95% interval 61 – 80%) and margin 0.03; the
  log-probability of the better responses goes from −156.0 to −155.3 nats.
Time: that short form took 22 minutes on two CPU cores with other work on them.
Try: --config.dpo.init=smollm2 --config.dpo.reference=smollm2, without SFT.
"""

import ml_collections
import smollm2_human_feedback


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes three steps of each stage."""
  config = smollm2_human_feedback.get_config(tiny)
  config.stages = ('sft', 'dpo')
  config.dpo = dict(
    kind='preference',
    loss='dpo',
    beta=0.1,
    batch_size=2,
    responses_per_row=9,
    max_length=128,
    eval_records=240,
    data=config.reward.data,
    reference_logprobs='live',  # 40 steps read a tenth of the data
    sampling=dict(max_new_tokens=40),
    optimizer=dict(learning_rate=5e-6, warmup_steps=5),
    loop=dict(steps=40, eval_every=40, save_every=20, log_every=1),
  )
  if tiny:
    config.dpo.eval_records = 8
    config.dpo.loop = dict(steps=3, eval_every=3, save_every=3, log_every=1)
  del config.reward
  del config.ppo
  del config.evaluation
  return config
