"""Proximal policy optimisation from a reward (step 4 of the four).

  maximise E_{x ~ prompts, y ~ π}[ r(x, y) − β log π(y|x) / π_ref(y|x) ]
           ( + γ E_{x ~ documents}[ log π(x) ] )

One iteration: the policy responds to prompts, the reward scores the responses,
GAE turns the scores and the KL of each token into advantages, and several epochs
of minibatches update policy and value model. The term in brackets is PPO-ptx.
Sources: Ouyang et al. 2022, section 3.5; Stiennon et al. 2020; details of Huang
et al. 2024, arXiv:2403.17031.

Choices where implementations differ (docs/ppo.md):
  1. The score is placed at the end token, or after it (`score_place`); a response
     without an end token scores `missing_eos_score`.
  2. The probability ratio is relative to logprobs that the training forward pass
     recomputes, so it begins at exactly 1.
  3. GAE skips masked tokens; whitening is over the whole rollout, with the population
     variance.
  4. Value and policy are updated together, with one clipped gradient and one
     optimizer.
  5. Importance weights correct for a sampler that is older (`sampler_every`) or computes
     otherwise than the training forward pass (shared/off_policy.py).
Left out: dropout, an entropy bonus, several rollouts in flight.

The path of a step: `stage.build` → `stage.iterate` → `update.train_step` →
`update_once` or `update_in_minibatches` → `assessment.assess_rollout` → `update.loss`.
The settings are in `options`, what a step is made of in `state`.
"""

from rlhf_jax.stages.ppo.assessment import (
  assess_rollout,
  assess_tokens,
  evaluate_responses,
  explained_variance,
  forward,
  value_loss_weight,
)
from rlhf_jax.stages.ppo.options import check_options, Options
from rlhf_jax.stages.ppo.stage import build, define, iterate, list_data, plan, run, STAGE
from rlhf_jax.stages.ppo.state import (
  AssessedRollout,
  create_state,
  Definitions,
  Documents,
  Evaluated,
  Forward,
  PPOState,
)
from rlhf_jax.stages.ppo.update import (
  document_loss,
  loss,
  next_kl_coefficient,
  part_loss,
  pretraining_nll,
  train_step,
  update_in_minibatches,
  update_minibatch,
  update_once,
  weigh_documents,
)

__all__ = [
  'STAGE',
  'AssessedRollout',
  'Definitions',
  'Documents',
  'Evaluated',
  'Forward',
  'Options',
  'PPOState',
  'assess_rollout',
  'assess_tokens',
  'build',
  'check_options',
  'create_state',
  'define',
  'document_loss',
  'evaluate_responses',
  'explained_variance',
  'forward',
  'iterate',
  'list_data',
  'loss',
  'next_kl_coefficient',
  'part_loss',
  'plan',
  'pretraining_nll',
  'run',
  'train_step',
  'update_in_minibatches',
  'update_minibatch',
  'update_once',
  'value_loss_weight',
  'weigh_documents',
]
