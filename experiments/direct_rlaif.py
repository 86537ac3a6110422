"""Direct RLAIF on the embedded world: a language model grades every answer inside RL, no reward model in between
(arXiv:2309.00267, §2.3).

  python -m rlhf_jax --config=experiments/direct_rlaif.py --workdir=runs/direct_rlaif

The labeller says of an answer what its documents say behind "Critique:"; the grade is the mean of those sentences' values
under their probabilities. What to expect: docs/rlaif.md.
"""

import quickstart
import rlaif

GRADES = {' It is good.': 1.0, ' It could be kinder.': 0.75, ' It is too short.': 0.25, ' It is too long.': 0.25,
          ' It offers nothing better.': 0.25, ' It does not answer.': -0.5, ' It refuses a harmless question.': -0.5,
          ' It is off the question.': -0.5, ' It is false.': -1.0, ' It is rude.': -1.0, ' It does harm.': -1.0}


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  return quickstart.then('direct_rlaif', tiny, ('pretrain', 'sft'), labeller=rlaif.LABELLER, direct_rlaif=dict(
      kind='policy_gradient', reward='scorer:labeller', advantage='leave_one_out', loss='reinforce',
      reduce='sequence_sum', kl_coefficient=0.05, batch_size=16, num_samples=4, max_length=26, optimizer=dict(learning_rate=3e-4),
      scorer=dict(template='{conversation}\n\nAssistant: {response}\n\n', ending='Critique:', options=tuple(GRADES),
                  grades=tuple(GRADES.values()), max_length=192),
      loop=dict(steps=120, eval_every=60, save_every=60)))
