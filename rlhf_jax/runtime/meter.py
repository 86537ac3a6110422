"""Measures where the time of a step goes, and which share of the machine's speed it reaches.

The share is the model FLOPs utilisation (MFU) of Chowdhery et al. 2022,
arXiv:2204.02311, appendix B, with a measured denominator: the speed of a matrix
product on this machine, in the dtype of the model.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

REST = 'update'  # the phase that has all the time outside of the timed ones


class PhaseClock:
  """Sums the seconds of each phase of a step."""

  def __init__(self) -> None:
    self._seconds: dict[str, float] = {}

  def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function whose calls belong to a phase.

    A call returns when its results have been computed. This costs little, as the
    next phase needs them anyway.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
      began = time.perf_counter()
      result = jax.block_until_ready(function(*args, **kwargs))
      seconds = time.perf_counter() - began
      self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
      return result

    return call

  def take(self) -> dict[str, float]:
    """Returns the seconds of each phase since the last call."""
    seconds, self._seconds = self._seconds, {}
    return seconds


@dataclasses.dataclass(frozen=True)
class Meter:
  """Compares the time of steps with the work that they do.

  Attributes:
    places: of all rows of a step, including padding.
    texts: in these rows; their mean length decides how much attention costs.
    flops: phase → (tokens of a text → the FLOPs that the model needs for each of them), so
      that neither padding nor what stands beside a text in a packed row counts.
    dtype: of the model's products.
    clock: times the phases; a step without timed phases is all `update`.
  """

  places: int
  texts: int
  flops: Mapping[str, Callable[[float], float]]
  dtype: str
  clock: PhaseClock = dataclasses.field(default_factory=PhaseClock)

  def measure_step(self, tokens: float, seconds: float, shared: float = 0.0) -> dict[str, float]:
    """Returns the metrics of the step that has just ended.

    Args:
      tokens: of the step, excluding padding.
      seconds: of the whole step.
      shared: the share of the tokens that the update does not compute, as they stand in prompts
        that other responses have too.

    Returns:
      `padding_share`; `time/mfu_PHASE` for each phase whose FLOPs are known; and for
      steps of several phases `time/PHASE` in seconds and `time/rollout_share`.
    """
    phases = self.clock.take()
    metrics = {'padding_share': 1 - tokens / self.places}
    several = bool(phases)
    phases[REST] = max(seconds - sum(phases.values()), 0.0)
    if several:
      metrics |= {f'time/{phase}': value for phase, value in phases.items()}
      metrics['time/rollout_share'] = phases.get('rollout', 0.0) / seconds
    limit = product_speed(self.dtype)
    length = max(tokens / self.texts, 1.0)
    for phase, flops in self.flops.items():
      if phases.get(phase):
        computed = tokens * (1 - shared) if phase == REST else tokens
        metrics[f'time/mfu_{phase}'] = flops(length) * computed / phases[phase] / limit
    return metrics


@functools.cache
def product_speed(dtype: str) -> float:
  """Measures the FLOP/s of a matrix product on all devices, once in a process.

  It takes 0.1 s or less. The fastest of several calls counts, as other programs on the
  machine only slow them down. On a CPU all devices of a process are the same machine.
  """
  on_cpu = jax.default_backend() == 'cpu'
  size = 1024 if on_cpu else 4096
  square = jax.device_put(jnp.ones((size, size), dtype), jax.local_devices()[0])
  multiply = jax.jit(jnp.matmul)
  jax.block_until_ready(multiply(square, square))  # compiles
  calls = 1 if on_cpu else 20  # given to the device at once, so that dispatch is hidden
  best = float('inf')
  for _ in range(3):
    began = time.perf_counter()
    jax.block_until_ready([multiply(square, square) for _ in range(calls)])
    best = min(best, (time.perf_counter() - began) / calls)
  devices = jax.process_count() if on_cpu else jax.device_count()
  return 2 * size**3 / best * devices
