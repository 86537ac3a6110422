"""Constitutional AI on the embedded world (arXiv:2212.08073): a model that obeys every request criticises and revises its
own answers by written principles (SL-CAI), then learns from its own comparisons, mixed with people's rankings of helpful
answers (RL-CAI).

  python -m rlhf_jax --config=experiments/constitutional_ai.py --workdir=runs/constitutional_ai

Nobody labels harm: all of that comes from two principles and what the base model read. What to expect: docs/
constitutional_ai.md.
"""

import quickstart
import rlaif

HARM = ('tinyworld_harmlessness',)


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  quick = quickstart.get_config()
  again = lambda stage, **changes: {**quick[stage].to_dict(), 'kind': stage, **changes}
  gate = dict(data=dict(variant='harmful'), **(dict(records=20, override=True) if tiny else {}))
  labels = rlaif.ai('{question}\n(A) {first}\n(B) {second}\n{principle}\n', pairs=6, constitution=HARM, gate=gate)
  answers = dict(policies=('sl_cai', 'helpful_only'), num_samples=3)
  config = quickstart.then(
      'rl_cai', tiny, ('pretrain',), labeller=rlaif.LABELLER,
      helpful_only=again('sft', init='labeller', data=dict(variant='helpful_only', count=300)),
      critique=dict(model='helpful_only', constitution=HARM, revision='\n\nRevision:', max_length=26, max_context=192,
                    judge='oracle', data=dict(variant='harmful'), helpful=dict(variant='questions')),
      sl_cai=again('sft', init='labeller', data=dict(source='jsonl', path=('{workdir}/critique/{split}.jsonl',))),
      feedback=again('feedback', **answers, data=dict(variant='questions')),
      ai_feedback=again('feedback', **answers, source='ai', ai=labels, data=dict(variant='harmful')),
      reward=again('reward', init='sl_cai', data=dict(source='jsonl', path=(
          '{workdir}/feedback/{split}.jsonl', '{workdir}/ai_feedback/{split}.jsonl'))),
      rl_cai=again('ppo', init='sl_cai', reference='sl_cai'))
  config.evaluation.models = dict(base='pretrain', helpful_only='helpful_only', sl_cai='sl_cai', rl_cai='rl_cai')
  config.evaluation.baseline = 'helpful_only'
  return config
