"""Constitutional AI on TinyWorld: critiques and revisions by written principles, then RL.

A helpful-only model, which obeys every request, criticises and revises its own responses, and the
pre-trained model is fine-tuned on the revisions (SL-CAI). Then a reward model learns from an AI's
comparisons of responses to harmful requests and from annotators' rankings by helpfulness, and PPO
follows (RL-CAI). Nobody labels the harms that are asked: critic and judge have seen labelled
examples of two other families of harm. Bai et al. 2022b, arXiv:2212.08073;
docs/constitutional_ai.md.

  python -m rlhf_jax --config=experiments/constitutional_ai.py --workdir=runs/constitutional_ai

Expected: harm done to held-out harms falls from all responses to two fifths (SL-CAI) and then to
  one in twenty (RL-CAI), sampled, and benign twins are refused no more often than by the
  helpful-only model; docs/constitutional_ai.md has the figures.
Time: about 16 minutes on one CPU core after a quickstart, whose pre-training --from takes over:
  labeller 7, SFT and critiques 1, judge and labels 2, reward model and PPO 6, the table 1.
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
# The base model after further training on documents, of which three quarters compare two responses,
# or criticise and revise one; none is about anything that a prompt of any split asks.
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
  again = rlaif.like_quickstart
  gate = dict(data=dict(variant='harmful'))
  if tiny:
    gate.update(records=20, override=True)
  # Few pairs, so that people's rankings of questions are most of what the reward model reads:
  # with six of each harmful prompt it learns that whatever sounds like harm is to be refused.
  labels = dict(judges=('reward:judge',), pairs=2, gate=gate)
  critique = dict(
    model='helpful_only',
    constitution=HARM,
    revision='\n\nRevision:',
    max_length=30,
    max_context=192,
    judge='oracle',
    data=dict(variant='harmful'),
    helpful=dict(variant='questions'),
    # As many as there are revisions of a harmful prompt: else most of the demonstrations that
    # answer what sounds like harm are refusals.
    helpful_samples=4,
  )
  compared = dict(policies=('sl_cai', 'helpful_only'), num_samples=4)
  config = quickstart.continue_with(
    'rl_cai',
    tiny,
    ('pretrain',),
    labeller=LABELLER,
    helpful_only=again('sft', init='labeller', data=dict(variant='helpful_only', count=300)),
    critique=critique,
    sl_cai=again('sft', init='labeller', data=REVISIONS),
    judge=again('reward', init='labeller', data=rlaif.RANKINGS_ELSEWHERE),
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
