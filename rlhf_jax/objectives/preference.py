"""Preference losses that need no reward model: DPO and related methods.

Each loss is one row of PREFERENCE_LOSSES near the end of this file, with its
formula, its settings and what it needs. Most formulas compare a better response
with a worse one, element by element. In them

  h = log π(y)/π_ref(y),  Δ = h_better − h_worse,  |y| the number of response tokens,

the end token included. Log-probabilities are summed over the response unless
said otherwise.

Letters: B rows of K slots, each for one response; ranking.py says how `ranks`
and `group` describe the order that people gave.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.objectives import masked, ranking
from rlhf_jax.options import NonNegative, Positive, ShareBelowHalf


class Response(NamedTuple):
  """What the losses need to know of responses: three arrays of the same shape.

  Attributes:
    logprobs: [...] float32, log π(y|x) summed over the response's tokens, nats.
    reference_logprobs: [...] float32, the same under the reference; not used by
      losses that need no reference.
    lengths: [...] numeric, |y|, at least 1.
  """

  logprobs: jax.Array
  reference_logprobs: jax.Array
  lengths: jax.Array

  @property
  def ratio(self) -> jax.Array:
    """Returns h, the log-ratio of policy and reference: [...] float32, nats."""
    return self.logprobs - self.reference_logprobs

  @property
  def mean(self) -> jax.Array:
    """Returns log π(y|x) / |y|: [...] float32, nats per token."""
    return self.logprobs / self.lengths


class Labels(NamedTuple):
  """How people ordered the responses of a batch."""

  ranks: jax.Array  # [B, K] int32, 1 = best, equal = tie
  group: jax.Array  # [B, K] int32, equal numbers = same prompt, 0 = empty slot
  # [B, K] float32, the probability that the order of the responses to the slot's
  # prompt is right
  confidence: jax.Array
  # [] float32, see `kto_anchor`, for losses of single responses
  anchor: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class DPOSettings:
  """Settings of `dpo`, `robust` and `length_normalised`."""

  beta: Positive = 0.1  # β; the larger, the closer the policy stays to the reference
  label_smoothing: ShareBelowHalf = 0.0  # ε, the share of labels that are wrong


@dataclasses.dataclass(frozen=True)
class IPOSettings:
  """Settings of `ipo` and `ipo_sum`."""

  beta: Positive = 0.1  # β, the paper's τ; the target of the margin is 1/(2β)


@dataclasses.dataclass(frozen=True)
class HingeSettings:
  """Settings of `hinge`."""

  beta: Positive = 0.1  # β; the target of the margin Δ is 1/β


@dataclasses.dataclass(frozen=True)
class DPOPSettings:
  """Settings of `dpop`."""

  beta: Positive = 0.1  # β
  dpop_lambda: NonNegative = 1.0  # λ; 0 = DPO
  label_smoothing: ShareBelowHalf = 0.0  # ε, the share of labels that are wrong


@dataclasses.dataclass(frozen=True)
class CPOSettings:
  """Settings of `cpo`."""

  beta: Positive = 0.1  # β
  nll_coefficient: NonNegative = 1.0  # λ of the better response's negative log-likelihood
  label_smoothing: ShareBelowHalf = 0.0  # ε, the share of labels that are wrong


@dataclasses.dataclass(frozen=True)
class SimPOSettings:
  """Settings of `simpo`."""

  beta: Positive = 0.1  # β; the paper uses 2 to 10, as its rewards are per token
  margin: NonNegative = 0.5  # γ, the target of the margin between the rewards
  label_smoothing: ShareBelowHalf = 0.0  # ε, the share of labels that are wrong


@dataclasses.dataclass(frozen=True)
class ORPOSettings:
  """Settings of `orpo`."""

  beta: Positive = 0.1  # the paper's λ, the weight of the odds ratio


@dataclasses.dataclass(frozen=True)
class PlackettLuceSettings:
  """Settings of `plackett_luce`."""

  beta: Positive = 0.1  # β


@dataclasses.dataclass(frozen=True)
class KTOSettings:
  """Settings of `kto`."""

  beta: Positive = 0.1  # β


def dpo(better: Response, worse: Response, settings: DPOSettings) -> jax.Array:
  """Computes −(1 − ε) log σ(βΔ) − ε log σ(−βΔ).

  DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7); with ε > 0 conservative
  DPO (Mitchell 2023, "A note on DPO with noisy preferences", eq. 4). ε is the
  settings' label_smoothing; for soft labels `over_pairs` adds the probability
  that the label is wrong.

  Args:
    better: Response of [...], which people prefer.
    worse: Response whose arrays broadcast against those of `better`.
    settings: β and ε.

  Returns:
    [...] float32.

  >>> better = Response(jnp.array([-4.0]), jnp.array([-9.0]), jnp.array([5]))
  >>> worse = Response(jnp.array([-9.0]), jnp.array([-4.0]), jnp.array([5]))
  >>> print(f'{dpo(better, worse, DPOSettings(beta=0.1))[0]:.4f}')  # −log σ(1)
  0.3133
  """
  _check_pair(better, worse)
  logits = settings.beta * (better.ratio - worse.ratio)  # βΔ
  return _logistic(logits, settings.label_smoothing)


def robust(better: Response, worse: Response, settings: DPOSettings) -> jax.Array:
  """Computes [−(1 − ε) log σ(βΔ) + ε log σ(−βΔ)] / (1 − 2ε).

  Unbiased where a share ε < ½ of the labels is flipped (Chowdhury et al. 2024,
  arXiv:2403.00409, eq. 12).

  Args:
    better: Response of [...].
    worse: Response whose arrays broadcast against those of `better`.
    settings: β and ε.

  Returns:
    [...] float32, may be negative.

  >>> better = Response(jnp.array([-4.0]), jnp.array([-9.0]), jnp.array([5]))
  >>> worse = Response(jnp.array([-9.0]), jnp.array([-4.0]), jnp.array([5]))
  >>> print(f'{robust(better, worse, DPOSettings(0.1, label_smoothing=0.25))[0]:.4f}')
  -0.1867
  """
  _check_pair(better, worse)
  logits = settings.beta * (better.ratio - worse.ratio)  # βΔ
  smoothing = settings.label_smoothing
  right = (1 - smoothing) * jax.nn.softplus(-logits)
  flipped = smoothing * jax.nn.softplus(logits)
  return (right - flipped) / (1 - 2 * smoothing)


def ipo(better: Response, worse: Response, settings: IPOSettings) -> jax.Array:
  """Computes (δ − 1/(2β))², δ the difference of h/|y|.

  IPO (Azar et al. 2023, arXiv:2310.12036, eq. 17). Log-ratios are averaged over
  tokens, as its authors confirmed to be the intention.

  Args:
    better: Response of [...].
    worse: Response whose arrays broadcast against those of `better`.
    settings: β.

  Returns:
    [...] float32.

  >>> better = Response(jnp.array([-4.0]), jnp.array([-9.0]), jnp.array([5]))
  >>> worse = Response(jnp.array([-9.0]), jnp.array([-4.0]), jnp.array([5]))
  >>> print(ipo(better, worse, IPOSettings(beta=0.5)))  # δ = 2
  [1.]
  """
  _check_pair(better, worse)
  difference = better.ratio / better.lengths - worse.ratio / worse.lengths  # δ
  return (difference - 0.5 / settings.beta) ** 2


def ipo_sum(better: Response, worse: Response, settings: IPOSettings) -> jax.Array:
  """Computes (Δ − 1/(2β))²: `ipo` with sums over tokens, as written in the paper.

  Args:
    better: Response of [...].
    worse: Response whose arrays broadcast against those of `better`.
    settings: β.

  Returns:
    [...] float32.

  >>> better = Response(jnp.array([-4.0]), jnp.array([-9.0]), jnp.array([5]))
  >>> worse = Response(jnp.array([-9.0]), jnp.array([-4.0]), jnp.array([5]))
  >>> print(ipo_sum(better, worse, IPOSettings(beta=0.0625)))  # Δ = 10
  [4.]
  """
  _check_pair(better, worse)
  return (better.ratio - worse.ratio - 0.5 / settings.beta) ** 2


def hinge(better: Response, worse: Response, settings: HingeSettings) -> jax.Array:
  """Computes max(0, 1 − βΔ).

  SLiC (Zhao et al. 2023, arXiv:2305.10425) on DPO's margin, as in Liu et al.
  2024 (arXiv:2309.06657).

  Args:
    better: Response of [...].
    worse: Response whose arrays broadcast against those of `better`.
    settings: β.

  Returns:
    [...] float32.

  >>> better = Response(jnp.array([-4.0]), jnp.array([-9.0]), jnp.array([5]))
  >>> worse = Response(jnp.array([-9.0]), jnp.array([-4.0]), jnp.array([5]))
  >>> print(hinge(better, worse, HingeSettings(beta=0.0625)))  # Δ = 10
  [0.375]
  """
  _check_pair(better, worse)
  return jax.nn.relu(1 - settings.beta * (better.ratio - worse.ratio))


def length_normalised(
  better: Response,
  worse: Response,
  settings: DPOSettings,
) -> jax.Array:
  """Computes `dpo` on h/|y| (Tülu 3: Lambert et al. 2024, arXiv:2411.15124, eq. 6).

  Args:
    better: Response of [...].
    worse: Response whose arrays broadcast against those of `better`.
    settings: β and ε.

  Returns:
    [...] float32.

  >>> better = Response(jnp.array([-4.0]), jnp.array([-9.0]), jnp.array([5]))
  >>> worse = Response(jnp.array([-9.0]), jnp.array([-4.0]), jnp.array([5]))
  >>> print(f'{length_normalised(better, worse, DPOSettings(beta=0.5))[0]:.4f}')
  0.3133
  """
  _check_pair(better, worse)
  difference = better.ratio / better.lengths - worse.ratio / worse.lengths  # δ
  return _logistic(settings.beta * difference, settings.label_smoothing)


def dpop(better: Response, worse: Response, settings: DPOPSettings) -> jax.Array:
  """Computes −log σ(β(Δ − λ max(0, −h_better))).

  DPO-Positive (Pal et al. 2024, arXiv:2402.13228, eq. 3): the better response
  may not become less likely than under the reference. With ε > 0 the loss is
  the mean over both orders of the pair, with weights 1 − ε and ε.

  Args:
    better: Response of [...].
    worse: Response whose arrays broadcast against those of `better`.
    settings: β, λ and ε.

  Returns:
    [...] float32.

  >>> better = Response(jnp.array([-9.0]), jnp.array([-4.0]), jnp.array([5]))
  >>> worse = Response(jnp.array([-9.0]), jnp.array([-4.0]), jnp.array([5]))
  >>> print(f'{dpop(better, worse, DPOPSettings(0.1, dpop_lambda=2.0))[0]:.4f}')
  1.3133
  """
  _check_pair(better, worse)
  difference = better.ratio - worse.ratio  # Δ
  right = difference - settings.dpop_lambda * jax.nn.relu(-better.ratio)
  # If the label is wrong, the other response is the better one, and may not
  # become less likely.
  wrong = -difference - settings.dpop_lambda * jax.nn.relu(-worse.ratio)
  smoothing = settings.label_smoothing
  losses = (1 - smoothing) * jax.nn.softplus(-settings.beta * right)
  return losses + smoothing * jax.nn.softplus(-settings.beta * wrong)


def cpo(better: Response, worse: Response, settings: CPOSettings) -> jax.Array:
  """Computes −log σ(β log π(y_w)/π(y_l)) − λ log π(y_w)/|y_w|.

  CPO (Xu et al. 2024, arXiv:2401.08417, eq. 5), the second term per token.

  Args:
    better: Response of [...], y_w; no reference is needed.
    worse: Response whose arrays broadcast against those of `better`, y_l.
    settings: β, λ and ε.

  Returns:
    [...] float32.

  >>> better = Response(jnp.array([-4.0]), jnp.array([0.0]), jnp.array([4]))
  >>> worse = Response(jnp.array([-4.0]), jnp.array([0.0]), jnp.array([4]))
  >>> print(f'{cpo(better, worse, CPOSettings(nll_coefficient=1.0))[0]:.4f}')  # log 2 + 1
  1.6931
  """
  _check_pair(better, worse)
  logits = settings.beta * (better.logprobs - worse.logprobs)
  losses = _logistic(logits, settings.label_smoothing)
  return losses - settings.nll_coefficient * better.mean


def simpo(better: Response, worse: Response, settings: SimPOSettings) -> jax.Array:
  """Computes −log σ(β (log π(y_w)/|y_w| − log π(y_l)/|y_l|) − γ).

  SimPO (Meng et al. 2024, arXiv:2405.14734, eq. 6); γ is `margin`.

  Args:
    better: Response of [...], y_w; no reference is needed.
    worse: Response whose arrays broadcast against those of `better`, y_l.
    settings: β, γ and ε.

  Returns:
    [...] float32.

  >>> better = Response(jnp.array([-4.0]), jnp.array([0.0]), jnp.array([4]))
  >>> worse = Response(jnp.array([-8.0]), jnp.array([0.0]), jnp.array([4]))
  >>> print(f'{simpo(better, worse, SimPOSettings(beta=2.0, margin=1.0))[0]:.4f}')
  0.3133
  """
  _check_pair(better, worse)
  logits = settings.beta * (better.mean - worse.mean) - settings.margin
  return _logistic(logits, settings.label_smoothing)


def orpo(better: Response, worse: Response, settings: ORPOSettings) -> jax.Array:
  """Computes −log π(y_w)/|y_w| − λ log σ(log odds_w − log odds_l).

  ORPO (Hong et al. 2024, arXiv:2403.07691, eqs. 6 – 7): odds = p/(1 − p), p the
  geometric mean of the probabilities of a response's tokens; λ is `beta`.

  Args:
    better: Response of [...], y_w; no reference is needed.
    worse: Response whose arrays broadcast against those of `better`, y_l.
    settings: λ.

  Returns:
    [...] float32.

  >>> better = Response(jnp.array([-4.0]), jnp.array([0.0]), jnp.array([4]))
  >>> worse = Response(jnp.array([-4.0]), jnp.array([0.0]), jnp.array([4]))
  >>> print(f'{orpo(better, worse, ORPOSettings(beta=1.0))[0]:.4f}')  # 1 + log 2
  1.6931
  """
  _check_pair(better, worse)
  log_odds_ratio = _log_odds(worse.mean) - _log_odds(better.mean)
  return -better.mean + settings.beta * jax.nn.softplus(log_odds_ratio)


def plackett_luce(
  responses: Response,
  labels: Labels,
  settings: PlackettLuceSettings,
) -> tuple[jax.Array, jax.Array]:
  """Computes −log P(order) under Plackett–Luce with scores βh.

  DPO for whole orders (Rafailov et al. 2023, arXiv:2305.18290, appendix A.3,
  eq. 20).

  Args:
    responses: Response of [B, K].
    labels: their order.
    settings: β.

  Returns:
    (sum over prompts, number of prompts), [] float32.

  >>> responses = Response(jnp.zeros((1, 3)), jnp.zeros((1, 3)), jnp.ones((1, 3)))
  >>> ones = jnp.ones((1, 3), int)
  >>> labels = Labels(jnp.array([[1, 2, 3]]), ones, jnp.ones((1, 3)))
  >>> total, prompts = plackett_luce(responses, labels, PlackettLuceSettings())
  >>> print(f'{total:.4f} {prompts}')  # log 3!
  1.7918 1.0
  """
  _check_response(responses)
  scores = settings.beta * responses.ratio  # the reward that the policy implies
  return ranking.plackett_luce(scores, labels.ranks, labels.group)


def kto(
  response: Response,
  desirable: jax.Array,
  anchor: jax.Array,
  settings: KTOSettings,
) -> jax.Array:
  """Computes 1 − σ(β(h − z)) for desirable responses, 1 − σ(β(z − h)) for undesirable.

  KTO (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8 with λ = 1). Responses
  are not paired; z is the `kto_anchor`.

  Args:
    response: Response of [...].
    desirable: [...] bool.
    anchor: [] float32, z.
    settings: β.

  Returns:
    [...] float32.

  >>> response = Response(jnp.array([-4.0]), jnp.array([-5.0]), jnp.array([5]))
  >>> print(kto(response, jnp.array([True]), jnp.float32(1.0), KTOSettings()))
  [0.5]
  """
  _check_response(response)
  chex.assert_equal_shape([response.logprobs, desirable])
  chex.assert_type([desirable, anchor], [bool, float])
  chex.assert_rank(anchor, 0)
  sign = jnp.where(desirable, -1.0, 1.0)  # 1 − σ(x) = σ(−x)
  return jax.nn.sigmoid(sign * settings.beta * (response.ratio - anchor))


def kto_anchor(ratios: jax.Array, mask: jax.Array) -> jax.Array:
  """Computes z = max(0, mean of h over responses to other prompts), without gradient.

  An estimate of KL(π ‖ π_ref) (Ethayarajh et al. 2024, arXiv:2402.01306,
  section 4.1).

  Args:
    ratios: [...] float32, h of each prompt paired with a response to another
      prompt.
    mask: [...] bool, True where there is such a pair.

  Returns:
    [] float32, nats.

  >>> mask = jnp.array([True, True, False])
  >>> print(kto_anchor(jnp.array([1.0, 3.0, 9.0]), mask))
  2.0
  >>> print(kto_anchor(jnp.array([-1.0, -3.0, 9.0]), mask))
  0.0
  """
  chex.assert_equal_shape([ratios, mask])
  chex.assert_type(ratios, float)
  count = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
  mean = jnp.sum(jnp.where(mask, ratios, 0.0)) / count
  return jax.lax.stop_gradient(jax.nn.relu(mean))


def over_pairs(
  pair_loss: Callable[..., jax.Array],
  responses: Response,
  labels: Labels,
  settings: Any,
) -> tuple[jax.Array, jax.Array]:
  """Averages a loss of pairs over the untied pairs of each prompt.

  Args:
    pair_loss: (better, worse, settings) → losses, such as `dpo`.
    responses: Response of [B, K].
    labels: their order.
    settings: the settings of the loss.

  Returns:
    (sum over prompts, number of prompts with a pair), [] float32.

  >>> responses = Response(jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.ones((1, 2)))
  >>> labels = Labels(jnp.array([[1, 2]]), jnp.ones((1, 2), int), jnp.ones((1, 2)))
  >>> total, prompts = over_pairs(dpo, responses, labels, DPOSettings())
  >>> print(f'{total:.4f} {prompts}')  # log 2
  0.6931 1.0
  """
  _check_response(responses)
  chex.assert_equal_shape([responses.logprobs, *labels[:3]])
  better = jax.tree.map(lambda x: x[:, :, None], responses)  # [B, K, 1]
  worse = jax.tree.map(lambda x: x[:, None, :], responses)  # [B, 1, K]
  if hasattr(settings, 'label_smoothing'):
    settings = _with_confidence(settings, labels.confidence)
  losses = pair_loss(better, worse, settings)  # [B, K, K]
  return ranking.over_pairs(losses, labels.ranks, labels.group)


def over_orders(
  order_loss: Callable[..., tuple[jax.Array, jax.Array]],
  responses: Response,
  labels: Labels,
  settings: Any,
) -> tuple[jax.Array, jax.Array]:
  """Applies a loss of whole orders, such as `plackett_luce`, which sums over prompts itself.

  Args:
    order_loss: (responses, labels, settings) → (sum, number of prompts).
    responses: Response of [B, K].
    labels: their order.
    settings: the settings of the loss.

  Returns:
    (sum over prompts, number of prompts), [] float32.
  """
  return order_loss(responses, labels, settings)


def over_best_and_worst(
  single_loss: Callable[..., jax.Array],
  responses: Response,
  labels: Labels,
  settings: Any,
) -> tuple[jax.Array, jax.Array]:
  """Sums a loss of single responses over the best and the worst of each prompt.

  The best responses count as desirable and the worst as undesirable; all others
  are ignored.

  Args:
    single_loss: (responses, desirable, anchor, settings) → losses, such as
      `kto`.
    responses: Response of [B, K].
    labels: their order, with an anchor.
    settings: the settings of the loss.

  Returns:
    (sum over responses, number of responses), [] float32.
  """
  best, worst = ranking.best_and_worst(labels.ranks, labels.group)
  losses = single_loss(responses, best, labels.anchor, settings)
  counted = best | worst  # [B, K]
  return masked.total(losses, counted), masked.count(counted)


@dataclasses.dataclass(frozen=True)
class PreferenceLoss:
  """A loss, and all that a stage must know about it."""

  function: Callable[..., Any]  # the formula, called with what `reduction` passes
  # a frozen dataclass of its settings, whose annotations are their ranges
  settings_class: type
  # how the formula is applied to a batch of rankings: `over_pairs`, `over_orders`
  # or `over_best_and_worst`
  reduction: Callable[..., tuple[jax.Array, jax.Array]] = over_pairs
  needs_reference: bool = True  # it compares with a reference model
  # it can learn from labels with a confidence below 1
  accepts_soft_labels: bool = False
  # it can learn from prompts with a single response, and needs the labels' `anchor`
  single_responses: bool = False

  def apply(
    self,
    responses: Response,
    labels: Labels,
    settings: Any,
  ) -> tuple[jax.Array, jax.Array]:
    """Computes the loss of a batch.

    Args:
      responses: Response of [B, K].
      labels: their order.
      settings: an instance of `settings_class`.

    Returns:
      (sum, number of summed elements: prompts or responses), [] float32.
    """
    present = labels.group > 0
    responses = responses._replace(
      logprobs=masked.keep(responses.logprobs, present),
      reference_logprobs=masked.keep(responses.reference_logprobs, present),
    )
    return self.reduction(self.function, responses, labels, settings)


# The losses, by the name that a config gives them.
PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {
  'dpo': PreferenceLoss(dpo, DPOSettings, accepts_soft_labels=True),
  'robust': PreferenceLoss(robust, DPOSettings),
  'ipo': PreferenceLoss(ipo, IPOSettings),
  'ipo_sum': PreferenceLoss(ipo_sum, IPOSettings),
  'hinge': PreferenceLoss(hinge, HingeSettings),
  'length_normalised': PreferenceLoss(
    length_normalised,
    DPOSettings,
    accepts_soft_labels=True,
  ),
  'dpop': PreferenceLoss(dpop, DPOPSettings, accepts_soft_labels=True),
  'cpo': PreferenceLoss(
    cpo,
    CPOSettings,
    needs_reference=False,
    accepts_soft_labels=True,
  ),
  'simpo': PreferenceLoss(
    simpo,
    SimPOSettings,
    needs_reference=False,
    accepts_soft_labels=True,
  ),
  'orpo': PreferenceLoss(orpo, ORPOSettings, needs_reference=False),
  'plackett_luce': PreferenceLoss(
    plackett_luce,
    PlackettLuceSettings,
    reduction=over_orders,
  ),
  'kto': PreferenceLoss(
    kto,
    KTOSettings,
    reduction=over_best_and_worst,
    single_responses=True,
  ),
}


def _with_confidence(settings: Any, confidence: jax.Array) -> Any:
  """Combines label smoothing with the probability that each label is wrong.

  A label that is right with probability p and then flipped with probability ε
  is wrong with probability ε + (1 − 2ε)(1 − p).

  Args:
    settings: with `label_smoothing`, ε.
    confidence: [B, K] float32, p.

  Returns:
    The settings with `label_smoothing` [B, K, 1] float32.
  """
  smoothing = settings.label_smoothing
  doubt = 1 - confidence[:, :, None]  # of the better response's prompt: [B, K, 1]
  wrong = smoothing + (1 - 2 * smoothing) * doubt
  return dataclasses.replace(settings, label_smoothing=wrong)


def _logistic(logits: jax.Array, smoothing: float | jax.Array) -> jax.Array:
  """Computes −(1 − ε) log σ(z) − ε log σ(−z)."""
  right = (1 - smoothing) * jax.nn.softplus(-logits)
  return right + smoothing * jax.nn.softplus(logits)


def _log_odds(mean: jax.Array) -> jax.Array:
  """Computes the log-odds log p/(1 − p) of p = exp(mean)."""
  return mean - _log1mexp(mean)


def _log1mexp(x: jax.Array) -> jax.Array:
  """Computes log(1 − exp(x)) for x ≤ 0 without cancellation; finite at 0.

  Mächler 2012, "Accurately computing log(1 − exp(−|a|))", eq. 7.
  """
  x = jnp.minimum(x, -1e-7)
  near_zero = x > -0.6931472  # −log 2, where the more accurate form changes
  # each form gets a harmless x where the other is used; otherwise its gradient is NaN
  with_expm1 = jnp.log(-jnp.expm1(jnp.where(near_zero, x, -1.0)))
  with_log1p = jnp.log1p(-jnp.exp(jnp.where(near_zero, -1.0, x)))
  return jnp.where(near_zero, with_expm1, with_log1p)


def _check_response(response: Response) -> None:
  """Asserts that the arrays have the same shape and log-probabilities are floats."""
  chex.assert_equal_shape(list(response))
  chex.assert_type([response.logprobs, response.reference_logprobs], float)


def _check_pair(better: Response, worse: Response) -> None:
  """Asserts that the responses' arrays have the same rank; their shapes may broadcast."""
  _check_response(better)
  _check_response(worse)
  chex.assert_equal_rank([better.logprobs, worse.logprobs])
