"""RLAIF with a real model: SmolLM2's answers, compared by an AI in place of people, then reward model and PPO.

  python -m rlhf_jax --config=experiments/smollm2_rlaif.py --workdir=runs/smollm2_rlaif --config.data=DIR \\
      --config.feedback.ai.judges=http://localhost:8000/v1 --config.feedback.ai.endpoint.model=NAME

The judge is a server (docs/judges.md; a key only from the environment); unless said it is SmolLM2 itself, by the principles of
helpfulness and honesty. Either way it is first measured on people's preferences and rankings of DIR, source by source, and a
judge that is not fit stops the run: SmolLM2-135M does not pass. DIR as for smollm2_human_feedback.py.
"""

import smollm2_human_feedback


def get_config(tiny: bool = False):
  """tiny: three steps of each stage, and any judge will do."""
  config = smollm2_human_feedback.get_config(tiny)
  config.stages = ('sft', 'feedback', 'reward', 'ppo')
  people = config.reward.data.to_dict()
  config.feedback = dict(
      source='ai', policies=('sft',), num_samples=3, batch_size=16, max_length=28, data=config.ppo.data.to_dict(),
      sampling=config.ppo.sampling.to_dict(),
      ai=dict(judges=('smollm2',), constitution=('helpfulness', 'honesty'), pairs=2, gate=dict(data=people),
              judge=dict(chat=True, ending='(', batch_size=8, max_length=512)))
  config.reward.data = dict(source='jsonl', path=('{workdir}/feedback/{split}.jsonl',))
  if tiny:
    config.feedback.data.count = 8
    config.feedback.ai.gate.records = 8
    config.feedback.ai.gate.override = True
  return config
