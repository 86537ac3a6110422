"""RLAIF beside RLHF on the embedded world: the quickstart, then the same again with an AI's labels in place of people's
(arXiv:2309.00267).

  python -m rlhf_jax --config=experiments/rlaif.py --workdir=runs/rlaif

The labeller is the base model after more documents, a third of which compare two answers: they recall what is true, say
what is wrong with each answer, then which is better; and so does it. All that differs from the steps with people is
`source='ai'` and who the judge is. What to expect: docs/rlaif.md.
"""

import quickstart

LABELLER = dict(kind='pretrain', init='pretrain', batch_size=16, max_length=144, data=dict(variant='feedback'),
                optimizer=dict(learning_rate=4e-3), loop=dict(steps=1200, eval_every=400, save_every=400))


def ai(template: str = '{question}\n(A) {first}\n(B) {second}\n', **changes) -> dict:
  """The labeller as judge, asked as its documents are written; one verdict in ten of theirs is wrong, so it doubts enough
  without a clamp."""
  return dict(judges=('labeller',), judge=dict(
      template=template, think='Thoughts:', thought=40, clamp=(0.0, 1.0), ending='The better answer is (', max_length=192,
      batch_size=64), **changes)


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  quick = quickstart.get_config()
  again = lambda stage, **changes: {**quick[stage].to_dict(), 'kind': stage, **changes}
  labels = ai(pairs=6, **(dict(gate=dict(records=20, override=True)) if tiny else {}))
  config = quickstart.then(
      'rlaif', tiny, ('pretrain', 'sft', 'feedback', 'reward', 'ppo'), labeller=LABELLER,
      ai_feedback=again('feedback', source='ai', ai=labels),
      ai_reward=again('reward', responses_per_row=12, data=dict(
          source='jsonl', path=('{workdir}/ai_feedback/{split}.jsonl',))),
      rlaif=again('ppo', reward='ai_reward', value='ai_reward'))
  config.evaluation.models.ppo = 'ppo'
  config.evaluation.versus = ('ppo',)
  return config
