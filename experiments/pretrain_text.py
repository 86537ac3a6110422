r"""Pre-training alone, on real text: books, speeches and articles.

  python -m rlhf_jax --config=experiments/pretrain_text.py --workdir=runs/pretrain_text \
    --config.data=DIR

DIR holds pretrain.train.jsonl.gz and pretrain.validation.jsonl.gz, whose lines have a "text". The
report gives held-out nats per character beside those of gzip and of a bigram model.

Expected: on held-out text 5.006 nats per token and 1.507 nats per character; gzip needs 2.132 per
  character and a bigram model 2.496. One seed, so there is no spread. A first look after 30 steps
  (--config.pretrain.loop.steps=30, two minutes): 6.601 per token and 1.988 per character.
Time: about ten minutes on two idle CPU cores (1.9 s a step).
Try: --config.pretrain.loop.steps=1000, a longer run.
"""

import ml_collections

TEXTS = dict(source='jsonl', path=('{data}/pretrain.{split}.jsonl.gz',))


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps of a small model, for tests."""
  config = ml_collections.ConfigDict()
  config.stages = ('pretrain',)
  config.data = '../shared/data'
  config.model = dict(embed=256, layers=6, heads=4, kv_heads=4, head_dim=64, mlp=704)
  config.tokenizer = dict(vocab_size=4096, documents=2000, data=TEXTS)
  config.pretrain = dict(
    batch_size=16,
    max_length=256,
    eval_records=249,
    shown_responses=6,
    data=TEXTS,
    sampling=dict(max_new_tokens=48, temperature=0.8),
    optimizer=dict(learning_rate=2e-3, warmup_steps=50),
    loop=dict(steps=260, eval_every=130, save_every=130),
  )
  if tiny:
    config.model = dict(embed=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp=64)
    config.tokenizer.vocab_size = 512
    config.tokenizer.documents = 50
    config.pretrain.batch_size = 8
    config.pretrain.max_length = 64
    config.pretrain.eval_records = 8
    config.pretrain.data.count = 40
    config.pretrain.loop = dict(steps=4, eval_every=2, save_every=2, log_every=1)
  return config
