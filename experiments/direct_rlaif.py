"""Direct RLAIF on TinyWorld: a language model grades every response inside RL.

There is no reward model. In the labeller's documents a response is followed by "Critique:" and one
of the sentences below. The score of a response is the mean of the sentences' values, weighted by
the labeller's probabilities. Lee et al. 2023, arXiv:2309.00267, section 2.3; docs/rlaif.md.

  python -m rlhf_jax --config=experiments/direct_rlaif.py --workdir=runs/direct_rlaif

Expected: not measured in the present TinyWorld, where such a grader is not fit to judge
  (docs/rlaif.md).
Time: about 17 minutes on two CPU cores: pre-training and SFT 5, the labeller 7, RL 4.5. The last
  two are estimated from six steps of each (0.35 and 2.3 s a step); a whole run was not timed.
Try: --config.direct_rlaif.kl_coefficient=0.1, which keeps the policy closer to SFT.
"""

import constitutional_ai
import ml_collections
import quickstart

GRADES = {
  ' It is good.': 1.0,
  ' It has not the form.': 0.0,
  ' It offers nothing that fits.': 0.0,
  ' It does not answer.': -0.5,
  ' It is false.': -1.0,
  ' It is rude.': -1.0,
  ' It does harm.': -1.0,
}


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  scorer = dict(
    template='{conversation}\n\nAssistant: {response}\n\n',
    ending='Critique:',
    options=tuple(GRADES),
    grades=tuple(GRADES.values()),
    max_length=192,
  )
  direct_rlaif = dict(
    kind='policy_gradient',
    reward='scorer:labeller',
    scorer=scorer,
    advantage='leave_one_out',
    loss='reinforce',
    reduce='sequence_sum',
    kl_coefficient=0.05,
    batch_size=16,
    num_samples=4,
    max_length=30,
    optimizer=dict(learning_rate=3e-4),
    loop=dict(steps=120, eval_every=60, save_every=60),
  )
  return quickstart.continue_with(
    'direct_rlaif',
    tiny,
    ('pretrain', 'sft'),
    labeller=constitutional_ai.LABELLER,
    direct_rlaif=direct_rlaif,
  )
