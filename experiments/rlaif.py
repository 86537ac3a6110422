"""RLAIF beside RLHF on TinyWorld: the quickstart, then the same again with an AI's labels.

The judge is the SFT model after training on what people say of responses about other things: facts,
harms and names that no prompt of any split asks about. So nobody has labelled anything that it
judges. The stages differ from those with simulated annotators only in `source='ai'` and in the
choice of the judge. Lee et al. 2023, arXiv:2309.00267; docs/rlaif.md.

  python -m rlhf_jax --config=experiments/rlaif.py --workdir=runs/rlaif

Expected: RLAIF beats SFT by substance, and by utility it wins about half of the comparisons with
  PPO from people's labels. docs/rlaif.md has the figures.
Time: about 18 minutes on two CPU cores, estimated from a run beside other work: the quickstart's
  stages 9, judge 2.5, labels 2, reward model and PPO 4, the table 1.
Try: --config.ai_feedback.ai.labels=hard, which replaces probabilities by verdicts.
"""

from typing import Any

import ml_collections
import quickstart

RANKINGS_ELSEWHERE = dict(variant='elsewhere', count=4000)  # about what no split asks about


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  gate = dict(data=quickstart.RANKINGS)  # the annotators' own, of the same responses
  if tiny:
    gate.update(records=20, override=True)
  labels = dict(judges=('reward:judge',), pairs=12, gate=gate)
  ai_rankings = dict(source='jsonl', path=('{workdir}/ai_feedback/{split}.jsonl',))
  config = quickstart.continue_with(
    'rlaif',
    tiny,
    ('pretrain', 'sft', 'feedback', 'reward', 'ppo'),
    judge=like_quickstart('reward', data=RANKINGS_ELSEWHERE),
    ai_feedback=like_quickstart('feedback', source='ai', ai=labels),
    # Both responses of twelve pairs in a row of a batch, and room for all of them in packed rows.
    ai_reward=like_quickstart('reward', responses_per_row=24, packed_rows=24, data=ai_rankings),
    rlaif=like_quickstart('ppo', reward='ai_reward', value='ai_reward'),
  )
  config.evaluation.models.ppo = 'ppo'
  config.evaluation.versus = ('ppo',)
  return config


def like_quickstart(stage: str, **changes: Any) -> dict[str, Any]:
  """Returns the section of one of the quickstart's stages with some fields changed."""
  section = quickstart.get_config()[stage].to_dict()
  return {**section, 'kind': stage, **changes}
