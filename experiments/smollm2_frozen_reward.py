"""Reward models of real people's words within an hour: a head on SmolLM2-135M, which stays frozen.

  python -m rlhf_jax --config=experiments/smollm2_frozen_reward.py --workdir=runs/frozen_reward \
    --config.data=DIR

DIR is that of smollm2_human_feedback.py, whose weights it uses too. Every text is read once. Then
heads are fitted to four fifths of the conversations and measured on the last, each source beside
the length of a response and a bag of bigrams. folds.json in the stage's folder has the table.

Expected: the table of docs/people_data.md.
Time: about 10 minutes on two CPU cores, estimated: about 130,000 tokens are read.
Try: --config.frozen_reward.likelihood=True, a head that also sees how likely a response is.
"""

import ml_collections
from smollm2_human_feedback import files, TEMPLATE


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny reads a few short texts."""
  config = ml_collections.ConfigDict()
  config.stages = ('frozen_reward',)
  config.data = '../shared/data'
  config.tokenizer = dict(init='smollm2', chat_template=TEMPLATE)
  config.frozen_reward = dict(
    init='smollm2',
    batch_size=16,
    max_length=96,
    data=files('preferences', 'rankings'),
  )
  if tiny:
    config.frozen_reward.max_length = 64
    config.frozen_reward.measured_pairs = 5
    config.frozen_reward.data.count = 60
  return config
