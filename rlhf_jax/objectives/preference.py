"""Learning from preferences without a reward model: DPO and what grew around it.

Each loss compares a better response with a worse one, element by element; the caller says which pairs count and takes
the mean. A response is what `Response` holds of it; in the formulas below

  h = log π(y)/π_ref(y),  Δ = h_better − h_worse,  |y| the number of response tokens, end token included,

log-probabilities being summed over the response unless said otherwise. `c` is the Settings.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Settings(NamedTuple):
  """What the formulas call β, ε, γ and λ. A test or a stage may pass anything with these names."""
  beta: float
  label_smoothing: float | jax.Array = 0.0
  margin: float = 0.0
  nll_coefficient: float = 0.0


class Response(NamedTuple):
  """What the losses need of responses; arrays of one shape, float32.

  Attributes:
    logprobs: log π(y|x), summed over the response's tokens, nats.
    reference_logprobs: the same of the reference; unused by the losses in WITHOUT_REFERENCE.
    lengths: |y|, at least 1.
  """
  logprobs: jax.Array
  reference_logprobs: jax.Array
  lengths: jax.Array

  @property
  def ratio(self):
    """h."""
    return self.logprobs - self.reference_logprobs

  @property
  def mean(self):
    """log π(y|x) / |y|."""
    return self.logprobs / self.lengths


def _logistic(logits, smoothing):
  """−(1 − ε) log σ(z) − ε log σ(−z)."""
  return (1 - smoothing) * jax.nn.softplus(-logits) + smoothing * jax.nn.softplus(logits)


def dpo(better: Response, worse: Response, c):
  """−(1 − ε) log σ(βΔ) − ε log σ(−βΔ) (Rafailov et al. 2023, arXiv:2305.18290, eq. 7; ε > 0: cDPO, Mitchell 2023).

  ε is `smoothing`, or, for labels with probabilities, one minus the probability that the order is right.
  """
  return _logistic(c.beta * (better.ratio - worse.ratio), c.label_smoothing)


def robust(better: Response, worse: Response, c):
  """[−(1 − ε) log σ(βΔ) + ε log σ(−βΔ)] / (1 − 2ε) (Chowdhury et al. 2024, arXiv:2403.00409, eq. 12): unbiased where
  a share ε < ½ of the labels is flipped."""
  logits = c.beta * (better.ratio - worse.ratio)
  return ((1 - c.label_smoothing) * jax.nn.softplus(-logits) - c.label_smoothing * jax.nn.softplus(logits)) / (1 - 2 * c.label_smoothing)


def ipo(better: Response, worse: Response, c):
  """(δ − 1/(2β))², δ the difference of h/|y| (Azar et al. 2023, arXiv:2310.12036, eq. 17; per token, as its authors
  confirmed)."""
  return (better.ratio / better.lengths - worse.ratio / worse.lengths - 0.5 / c.beta) ** 2


def ipo_sum(better: Response, worse: Response, c):
  """(Δ − 1/(2β))²: `ipo` on sums, as the paper is written."""
  return (better.ratio - worse.ratio - 0.5 / c.beta) ** 2


def hinge(better: Response, worse: Response, c):
  """max(0, 1 − βΔ) (SLiC: Zhao et al. 2023, arXiv:2305.10425, on DPO's margin as in Liu et al. 2024,
  arXiv:2309.06657)."""
  return jax.nn.relu(1 - c.beta * (better.ratio - worse.ratio))


def length_normalised(better: Response, worse: Response, c):
  """DPO on h/|y| (Lambert et al. 2024, arXiv:2411.15124, eq. 6)."""
  return _logistic(c.beta * (better.ratio / better.lengths - worse.ratio / worse.lengths), c.label_smoothing)


def dpop(better: Response, worse: Response, c):
  """−log σ(β(Δ − λ max(0, −h_better))) (Pal et al. 2024, arXiv:2402.13228, eq. 3): the better response may not become
  less likely than under the reference. λ is `nll_coefficient`."""
  penalty = jax.nn.relu(-better.ratio)
  return _logistic(c.beta * (better.ratio - worse.ratio - c.nll_coefficient * penalty), c.label_smoothing)


def cpo(better: Response, worse: Response, c):
  """−log σ(β log π(y_w)/π(y_l)) − λ log π(y_w)/|y_w| (Xu et al. 2024, arXiv:2401.08417, eq. 5; the second term per
  token)."""
  return _logistic(c.beta * (better.logprobs - worse.logprobs), c.label_smoothing) - c.nll_coefficient * better.mean


def simpo(better: Response, worse: Response, c):
  """−log σ(β (log π(y_w)/|y_w| − log π(y_l)/|y_l|) − γ) (Meng et al. 2024, arXiv:2405.14734, eq. 6). γ is `margin`."""
  return _logistic(c.beta * (better.mean - worse.mean) - c.margin, c.label_smoothing)


def orpo(better: Response, worse: Response, c):
  """−log π(y_w)/|y_w| − λ log σ(log odds_w − log odds_l), odds = p/(1 − p), p the mean token's probability (Hong et
  al. 2024, arXiv:2403.07691, eqs. 6 – 7). λ is `beta`."""
  odds = lambda mean: mean - _log1mexp(mean)
  return -better.mean + c.beta * jax.nn.softplus(odds(worse.mean) - odds(better.mean))


def _log1mexp(x):
  """log(1 − exp(x)) for x < 0, without cancellation (Mächler 2012); finite at 0."""
  x = jnp.minimum(x, -1e-7)
  small = x > -0.6931472
  return jnp.where(small, jnp.log(-jnp.expm1(jnp.where(small, x, -1.0))), jnp.log1p(-jnp.exp(jnp.where(small, -1.0, x))))


def kto(response: Response, desirable, anchor, c):
  """Unpaired: 1 − σ(β(h − z)) of a desirable response, 1 − σ(β(z − h)) of another (Ethayarajh et al. 2024,
  arXiv:2402.01306, eq. 8, λ = 1), z the `kto_anchor`.

  Args:
    desirable: bool, the shape of the responses.
    anchor: [] float32.
  """
  return jax.nn.sigmoid(jnp.where(desirable, -1.0, 1.0) * c.beta * (response.ratio - anchor))


def kto_anchor(ratios, mask):
  """z = max(0, mean h over answers to another prompt), without gradient: an estimate of KL(π ‖ π_ref)."""
  count = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
  return jax.lax.stop_gradient(jax.nn.relu(jnp.sum(jnp.where(mask, ratios, 0.0)) / count))


PAIRS = {'dpo': dpo, 'robust': robust, 'ipo': ipo, 'ipo_sum': ipo_sum, 'hinge': hinge,
         'length_normalised': length_normalised, 'dpop': dpop, 'cpo': cpo, 'simpo': simpo, 'orpo': orpo}
WITHOUT_REFERENCE = ('cpo', 'simpo', 'orpo')
