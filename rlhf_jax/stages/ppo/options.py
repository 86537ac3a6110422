"""The settings of a PPO stage, and their checks."""

import dataclasses

from rlhf_jax.data.sources import DataOptions
from rlhf_jax.errors import UserError
from rlhf_jax.options import (
  Count,
  NonNegative,
  Positive,
  PositiveShare,
  Share,
)
from rlhf_jax.runtime.loop import LoopOptions
from rlhf_jax.runtime.optimizers import OptimizerOptions
from rlhf_jax.stages.shared import (
  off_policy,
  rollout,
)

PRETRAINING_KINDS = ('document', 'demonstration')


@dataclasses.dataclass(frozen=True)
class Options(off_policy.OffPolicyOptions):
  """The section of a PPO stage."""

  # The model whose trunk and head the value model begins with; '' = a new head on
  # the policy's own trunk.
  value: str = 'reward'
  epochs: Count = 2  # passes over the responses of a step
  kl_coefficient: NonNegative = 0.05  # β, in reward per nat; 0 = no KL and no reference
  kl_target: NonNegative = 0.0  # nats per response to which β is steered; 0 = it stays
  kl_horizon: Positive = 10000.0  # episodes over which a steered β changes by a fifth
  clip: PositiveShare = 0.2  # ε of the probability ratio
  value_clip: Positive = 0.2  # ε of the value's change
  value_coefficient: NonNegative = 0.1  # of the value loss beside the policy's
  discount: Share = 1.0  # γ of GAE
  gae_lambda: Share = 0.95  # λ of GAE
  whiten_rewards: bool = False  # to variance 1 over a rollout; the mean stays
  whiten_advantages: bool = True  # to mean 0 and variance 1 over a rollout
  score_place: str = 'eos'  # eos: at the end token; after_eos: behind it, as in TRL
  # Γ of PPO-ptx, of the loss on `pretraining` texts
  pretraining_coefficient: NonNegative = 0.0
  # What these are: document; or demonstration, of which the response is learned, as in SFT.
  pretraining_kind: str = 'document'
  pretraining_max_length: Count = 96  # tokens of a row of documents
  pretraining: DataOptions = DataOptions()
  optimizer: OptimizerOptions = OptimizerOptions(
    learning_rate=3e-5,
    schedule='linear',
    final_scale=0.0,
    eps=1e-5,
  )
  loop: LoopOptions = LoopOptions(eval_every=20, save_every=25, log_every=1)

  def unread(self) -> dict[str, str]:
    """Returns the settings that are not read with these values, and why."""
    unread = super().unread()
    if not self.kl_target:
      unread['kl_horizon'] = 'kl_target is 0'
    if not self.kl_coefficient:  # what is steered is multiplied, so it stays 0
      unread |= dict.fromkeys(('kl_target', 'kl_horizon'), 'kl_coefficient is 0')
    if not self.pretraining_coefficient:
      why = 'pretraining_coefficient is 0'
      unread |= dict.fromkeys(('pretraining', 'pretraining_kind', 'pretraining_max_length'), why)
    if self.epochs * self.minibatches == 1:
      why = 'a step makes one update, before which nothing has changed'
      unread |= dict.fromkeys(('clip', 'value_clip'), why)
    return unread

  @property
  def keeps_reference(self) -> bool:
    """Whether the KL counts."""
    return self.kl_coefficient > 0

  @property
  def document_places(self) -> int:
    """Places of a row of documents, of which a step reads one for each response; 0 = none."""
    return self.pretraining_max_length if self.pretraining_coefficient else 0


def check_options(options: Options, where: str) -> None:
  """Checks the options; raises UserError for an unknown name or biased sampling."""
  rollout.check_sampling(options, where)
  off_policy.check_options(options, where)
  if options.pretraining_kind not in PRETRAINING_KINDS:
    names = ' or '.join(PRETRAINING_KINDS)
    raise UserError(f'{where}.pretraining_kind: expected {names}, got {options.pretraining_kind!r}')
  if options.score_place not in ('eos', 'after_eos'):
    raise UserError(f'{where}.score_place: expected eos or after_eos, got {options.score_place!r}')
