"""SFT → reward model → PPO at the size of Llama 3.2 1B, on a slice of TPUs or a host of GPUs.

  python -m rlhf_jax.plan --config=experiments/llama_1b_ppo.py --topology=v5e:16x16     # does it fit, how long is a step
  python -m rlhf_jax --config=experiments/llama_1b_ppo.py --workdir=DIR --config.data=DATA \
    --config.sft.init=LLAMA --config.tokenizer.init=LLAMA

LLAMA is a Hugging Face directory, DATA one with the files of the README's table; without them the plan takes the shape
below. Plans of this and the larger ones: docs/plan.md. Not trained at this size.
"""

import ml_collections


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """tiny: a small shape, short rows."""
  config = ml_collections.ConfigDict()
  config.stages = ('sft', 'reward', 'ppo')
  config.model = dict(embed=2048, layers=16, heads=32, kv_heads=8, head_dim=64, mlp=8192, rope_theta=500000.0,
                      max_length=8192, dtype='bfloat16', remat='full')
  config.tokenizer = dict(vocab_size=128256)
  config.mesh = dict(preset='auto')
  data = lambda name: dict(source='jsonl', path=('{data}/' + name + '.{split}.jsonl.gz',))
  config.data = '../shared/data'
  config.sft = dict(init='random', batch_size=256, max_length=1024, data=data('sft'), optimizer=dict(learning_rate=1e-5))
  config.reward = dict(batch_size=256, responses_per_row=4, max_length=1024, data=data('preferences'),
                       demonstrations=data('sft'), optimizer=dict(learning_rate=1e-5))
  config.ppo = dict(batch_size=512, max_length=512, data=data('prompts'), sampling=dict(max_new_tokens=512),
                    optimizer=dict(learning_rate=1e-6))
  if tiny:
    config.model = dict(embed=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=128, max_length=128)
    config.tokenizer = dict(vocab_size=256)
    config.sft.max_length = config.reward.max_length = 64
    config.ppo = dict(batch_size=32, max_length=32, data=data('prompts'), sampling=dict(max_new_tokens=32))
  return config
