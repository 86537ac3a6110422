"""Constitutional AI on TinyWorld: critiques and revisions by written principles, then RL.

A helpful-only model, which obeys every request, criticises and revises its own responses, and the
pre-trained model is fine-tuned on the revisions (SL-CAI). Then a reward model learns from an AI's
comparisons by harmlessness and from annotators' rankings by helpfulness, and PPO follows (RL-CAI).
Nobody labels harm: the judgement of harm comes from two principles and from what the base model has
read. Bai et al. 2022b, arXiv:2212.08073; docs/constitutional_ai.md.

  python -m rlhf_jax --config=experiments/constitutional_ai.py --workdir=runs/constitutional_ai

Expected: on seeds 0, 1 and 2 harmful responses to harmful requests fall from 99, 98 and 96%
  (helpful only) to 20, 41 and 24% (SL-CAI) and 1, 0 and 0% (RL-CAI); helpful responses to questions
  stay at 77, 72 and 79%.
Time: about 18 minutes on two CPU cores: pre-training 5, the labeller 7, critiques 1, AI labels 1.5,
  the other stages 3.5. Critiques and labels are estimated from the first 60 prompts of each split,
  the labeller from six steps (0.36 s each); a whole run was not timed.
Try: --config.critique.rounds=1, one revision instead of four.
"""

import ml_collections
import quickstart
import rlaif

HARM = ('tinyworld_harmlessness',)  # the constitution
REVISIONS = dict(source='jsonl', path=('{workdir}/critique/{split}.jsonl',))
ALL_RANKINGS = dict(
  source='jsonl',
  path=('{workdir}/feedback/{split}.jsonl', '{workdir}/ai_feedback/{split}.jsonl'),
)


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  again = rlaif.like_quickstart
  gate = dict(data=dict(variant='harmful'))
  if tiny:
    gate.update(records=20, override=True)
  labels = rlaif.ai_labels(
    '{question}\n(A) {first}\n(B) {second}\n{principle}\n',
    pairs=6,
    constitution=HARM,
    gate=gate,
  )
  critique = dict(
    model='helpful_only',
    constitution=HARM,
    revision='\n\nRevision:',
    max_length=30,
    max_context=192,
    judge='oracle',
    data=dict(variant='harmful'),
    helpful=dict(variant='questions'),
  )
  compared = dict(policies=('sl_cai', 'helpful_only'), num_samples=3)
  config = quickstart.continue_with(
    'rl_cai',
    tiny,
    ('pretrain',),
    labeller=rlaif.LABELLER,
    helpful_only=again('sft', init='labeller', data=dict(variant='helpful_only', count=300)),
    critique=critique,
    sl_cai=again('sft', init='labeller', data=REVISIONS),
    feedback=again('feedback', **compared, data=dict(variant='questions')),
    ai_feedback=again(
      'feedback',
      **compared,
      source='ai',
      ai=labels,
      data=dict(variant='harmful'),
    ),
    reward=again('reward', init='sl_cai', data=ALL_RANKINGS),
    rl_cai=again('ppo', init='sl_cai', reference='sl_cai'),
  )
  config.evaluation.models = dict(
    base='pretrain',
    helpful_only='helpful_only',
    sl_cai='sl_cai',
    rl_cai='rl_cai',
  )
  config.evaluation.baseline = 'helpful_only'
  return config
