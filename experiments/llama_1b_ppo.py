r"""SFT → reward model → PPO at the size of Llama 3.2 1B, on a slice of TPUs or a host of GPUs.

  python -m rlhf_jax.plan --config=experiments/llama_1b_ppo.py --topology=v5e:16x16
  python -m rlhf_jax --config=experiments/llama_1b_ppo.py --workdir=WORKDIR \
    --config.data=DATA --config.sft.init=LLAMA --config.tokenizer.init=LLAMA

The first command says whether it fits and how long a step is. LLAMA is a Hugging Face directory,
DATA a directory with the files of docs/data.md. Without them the plan takes the shape below.

Expected: a model of this size was never trained here. By the plan, on 256 v5e the program of PPO
  that needs most memory takes 8.8 of 15.75 GiB on each device (docs/plan.md).
Time: a PPO step of 512 prompts takes 2.4 s on 256 v5e at best, by the same plan.
Try: --config.ppo.microbatches=2, for less memory.
"""

from typing import Any

import ml_collections


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny is a small shape with short rows, on TinyWorld."""
  config = ml_collections.ConfigDict()
  config.stages = ('sft', 'reward', 'ppo')
  config.model = dict(
    embed=2048,
    layers=16,
    heads=32,
    kv_heads=8,
    head_dim=64,
    mlp=8192,
    rope_theta=500000.0,
    max_length=8192,
    dtype='bfloat16',
    remat='full',
  )
  config.tokenizer = dict(vocab_size=128256)
  config.mesh = dict(preset='auto')
  config.data = '../shared/data'
  config.sft = dict(
    init='random',
    batch_size=256,
    max_length=1024,
    data=_files('sft'),
    optimizer=dict(learning_rate=1e-5),
  )
  config.reward = dict(
    batch_size=256,
    responses_per_row=4,
    max_length=1024,
    data=_files('preferences'),
    demonstrations=_files('sft'),
    optimizer=dict(learning_rate=1e-5),
  )
  config.ppo = dict(
    batch_size=512,
    max_length=512,
    data=_files('prompts'),
    sampling=dict(max_new_tokens=512),
    optimizer=dict(learning_rate=1e-6),
  )
  if tiny:
    config.model = dict(
      embed=64,
      layers=2,
      heads=4,
      kv_heads=2,
      head_dim=16,
      mlp=128,
      max_length=128,
    )
    config.tokenizer = dict(vocab_size=300, documents=400)
    config.data = ''
    loop = dict(steps=4, eval_every=2, save_every=2, log_every=1)
    small = dict(batch_size=16, max_length=128, data=dict(count=100), loop=loop)
    config.sft = dict(init='random', **small)
    config.reward = dict(demonstrations=dict(count=100), **small)
    config.ppo = dict(small, max_length=96, sampling=dict(max_new_tokens=32))
  return config


def _files(name: str) -> dict[str, Any]:
  """Returns the data section of one kind of files."""
  return dict(source='jsonl', path=(f'{{data}}/{name}.{{split}}.jsonl.gz',))
