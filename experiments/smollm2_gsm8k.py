"""Arithmetic with a reward function: SFT on worked answers, then GRPO against the right number.

SmolLM2-135M-Instruct on GSM8K. The reward is 1 for the right number, plus 0.1 for any number in the
form "#### N".

  python -m rlhf_jax --config=experiments/smollm2_gsm8k.py --workdir=runs/gsm8k --config.data=DIR

DIR holds math.train.jsonl.gz and math.validation.jsonl.gz, whose lines have question, answer (which
ends with "#### N") and final. In the final table, utility is the share of exercises solved.

Expected: a model of this size solves few exercises and mostly learns the form. Measured in a short
  run, one seed: 24 steps of SFT take the held-out loss from 1.46 to 0.86 nats per token; of the 128
  responses of the next four steps of GRPO, 5% had the right number and 59% the form. Further steps
  of GRPO were not run, as they take an hour here; for a GPU there is the plan below.
Time: over an hour on two CPU cores: a step of GRPO took 140 to 185 seconds beside other work. On
  one H100 a step with the override below takes 0.45 s at best and 58.6 of 79.1 GiB, by the plan
  (rlhf_jax.plan with this file, --topology=gpu:1xh100 --analytic and the override).
Try, on a GPU: --config.model.dtype=bfloat16 --config.grpo.batch_size=64
  --config.grpo.num_samples=16, and more steps.
"""

import ml_collections
import smollm2_human_feedback

FINAL = 'rlhf_jax.rewards.builtin.math:final_number'
FORM = r"rlhf_jax.rewards.builtin.text:matches(pattern='[^#]*#### -?[0-9][0-9,.]*')"


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes two steps of each stage."""
  data = smollm2_human_feedback.files('math')
  sampling = dict(max_new_tokens=96, temperature=0.7)
  config = ml_collections.ConfigDict()
  config.stages = ('sft', 'grpo')
  config.data = '../shared/data'
  config.tokenizer = dict(init='smollm2', chat_template=smollm2_human_feedback.TEMPLATE)
  config.sft = dict(
    init='smollm2',
    batch_size=8,
    max_length=256,
    eval_records=64,
    data=data,
    sampling=sampling,
    shown_responses=2,
    optimizer=dict(learning_rate=5e-5, warmup_steps=5),
    loop=dict(steps=60, eval_every=30, save_every=30, log_every=1),
  )
  config.grpo = dict(
    kind='policy_gradient',
    advantage='standardised',
    reduce='sequence_mean',
    kl_place='loss',
    kl_coefficient=0.04,
    reward=(FINAL, FORM),
    reward_weights=(1.0, 0.1),
    missing_eos=False,
    batch_size=4,
    num_samples=8,
    max_length=96,
    microbatches=4,  # in one part an update takes 20 GB
    eval_records=32,
    data=data,
    sampling=sampling,
    optimizer=dict(learning_rate=1e-5, warmup_steps=2),
    loop=dict(steps=20, eval_every=20, save_every=10, log_every=1),
  )
  config.evaluation = dict(
    models=dict(sft='sft', grpo='grpo'),
    judge=FINAL,
    batch_size=16,
    max_length=96,
    data=dict(data, count=160),
    sampling=sampling,
  )
  if tiny:
    for name in config.stages:
      config[name].loop = dict(steps=2, eval_every=2, save_every=2, log_every=1)
      config[name].eval_records = 8
      config[name].sampling.max_new_tokens = 8
    config.evaluation.data.count = 16
    config.evaluation.sampling.max_new_tokens = 8
  return config
