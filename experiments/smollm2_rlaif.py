r"""RLAIF with a real model: an AI compares SmolLM2's responses, then reward model and PPO.

  python -m rlhf_jax --config=experiments/smollm2_rlaif.py --workdir=runs/smollm2_rlaif \
    --config.data=DIR --config.feedback.ai.judges=http://localhost:8000/v1 \
    --config.feedback.ai.endpoint.model=NAME

The judge is a server (docs/judges.md; its key comes from the environment only). Without the last
two options the judge is SmolLM2 itself. Both judge by the principles of helpfulness and honesty.
First the judge is tested on people's preferences and rankings in DIR, source by source; if it is
not fit, the run stops. DIR: as for experiments/smollm2_human_feedback.py.

Expected: SmolLM2-135M agrees with people on 57.1% (49.8 – 64.0) of 184 comparisons, gives the same
  verdict on 25% of them when the responses are swapped, and is refused. No server was at hand, so
  there are no results with one. Its test takes 400 requests: 200 comparisons, each in both orders.
Time: 5 minutes on one CPU core for SmolLM2's test.
Try: --config.feedback.ai.gate.override=True, which goes on with a judge that is not fit.
"""

import ml_collections
import smollm2_human_feedback


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes three steps of each stage and accepts any judge."""
  config = smollm2_human_feedback.get_config(tiny)
  config.stages = ('sft', 'feedback', 'reward', 'ppo')
  ai = dict(
    judges=('smollm2',),
    constitution=('helpfulness', 'honesty'),
    pairs=2,
    gate=dict(data=config.reward.data.to_dict()),  # people's preferences and rankings
    judge=dict(chat=True, ending='(', batch_size=8, max_length=512),
  )
  config.feedback = dict(
    source='ai',
    policies=('sft',),
    num_samples=3,
    batch_size=16,
    max_length=28,
    data=config.ppo.data.to_dict(),
    sampling=config.ppo.sampling.to_dict(),
    ai=ai,
  )
  config.reward.data = dict(source='jsonl', path=('{workdir}/feedback/{split}.jsonl',))
  if tiny:
    config.feedback.data.count = 8
    config.feedback.ai.gate.records = 8
    config.feedback.ai.gate.override = True
  return config
