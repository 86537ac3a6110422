"""RLAIF beside RLHF on TinyWorld: the quickstart, then the same again with an AI's labels.

The labeller is the base model after further training on documents, a third of which compare two
responses: each recalls the relevant fact, names a fault of each response, and then says which one
is better. So that is what the labeller does when it judges. The stages differ from those with
simulated annotators only in `source='ai'` and in the choice of the judge. Lee et al. 2023,
arXiv:2309.00267; docs/rlaif.md.

  python -m rlhf_jax --config=experiments/rlaif.py --workdir=runs/rlaif

Expected: on seeds 0, 1 and 2 RLAIF wins 75.3% (71.5 – 79.0), 73.7% (70.0 – 77.4) and 72.7% (68.9 –
  76.5) against SFT, and 49.9% (46.4 – 53.3), 55.1% (51.5 – 59.0) and 55.3% (51.4 – 59.1) against
  PPO from the annotators' labels.
Time: about 22 minutes on two CPU cores: the quickstart's stages 8, the labeller 7, its labels 3.5,
  reward model and PPO 3. Estimated from six training steps (0.36 s each for the labeller) and from
  the first 968 of its 5,414 comparisons (35 s); a whole run was not timed.
Try: --config.ai_feedback.ai.labels=hard, which replaces probabilities by verdicts.
"""

from typing import Any

import ml_collections
import quickstart

LABELLER = dict(
  kind='pretrain',
  init='pretrain',
  batch_size=16,
  max_length=144,
  data=dict(variant='feedback'),
  optimizer=dict(learning_rate=4e-3),
  loop=dict(steps=1200, eval_every=400, save_every=400),
)


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  gate = dict(gate=dict(records=20, override=True)) if tiny else {}
  ai_rankings = dict(source='jsonl', path=('{workdir}/ai_feedback/{split}.jsonl',))
  config = quickstart.continue_with(
    'rlaif',
    tiny,
    ('pretrain', 'sft', 'feedback', 'reward', 'ppo'),
    labeller=LABELLER,
    ai_feedback=like_quickstart('feedback', source='ai', ai=ai_labels(pairs=6, **gate)),
    ai_reward=like_quickstart('reward', responses_per_row=12, data=ai_rankings),
    rlaif=like_quickstart('ppo', reward='ai_reward', value='ai_reward'),
  )
  config.evaluation.models.ppo = 'ppo'
  config.evaluation.versus = ('ppo',)
  return config


def like_quickstart(stage: str, **changes: Any) -> dict[str, Any]:
  """Returns the section of one of the quickstart's stages with some fields changed."""
  section = quickstart.get_config()[stage].to_dict()
  return {**section, 'kind': stage, **changes}


def ai_labels(
  template: str = '{question}\n(A) {first}\n(B) {second}\n',
  **changes: Any,
) -> dict[str, Any]:
  """Returns the section `ai` in which the labeller judges, asked as its documents are written.

  One verdict in ten of those documents is wrong, so the labeller doubts enough without a clamp.

  Args:
    template: the question, with the responses as {first} and {second}.
    changes: further fields of the section.
  """
  judge = dict(
    template=template,
    think='Thoughts:',
    thought=40,
    clamp=(0.0, 1.0),
    ending='The better answer is (',
    max_length=192,
    batch_size=64,
  )
  return dict(judges=('labeller',), judge=judge, **changes)
