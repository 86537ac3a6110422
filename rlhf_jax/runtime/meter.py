"""Measures where the time of a step goes, and which share of the machine's speed it reaches.

The share is the model FLOPs utilisation (MFU) of Chowdhery et al. 2022,
arXiv:2204.02311, appendix B, with a measured denominator: the speed of a matrix product
on this machine, in the dtype of the model.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

REST = 'update'  # the phase of a step that is not timed by itself


@dataclasses.dataclass
class Meter:
  """Times the phases of steps, and compares them with the work that they do.

  Attributes:
    places: of all rows of a step, padding included.
    flops: phase → the FLOPs that the model needs for each token, padding excluded.
    dtype: of the model's products.
  """

  places: int
  flops: Mapping[str, float]
  dtype: str
  _seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # of this step

  def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function whose calls are a phase, or a part of one.

    The phase ends when its results are there, so a call waits for them. What follows
    needs them at once in any case.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
      began = time.perf_counter()
      result = jax.block_until_ready(function(*args, **kwargs))
      seconds = time.perf_counter() - began
      self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
      return result

    return call

  def measure_step(self, tokens: float, seconds: float) -> dict[str, float]:
    """Returns the metrics of a step that is over; the next step begins with this call.

    Args:
      tokens: of the step, padding excluded.
      seconds: that the whole step took.

    Returns:
      `padding_share`; `time/mfu_PHASE` of each phase with known FLOPs; and of steps with
      several phases `time/PHASE` in seconds and `time/rollout_share`.
    """
    phases, self._seconds = self._seconds, {}
    metrics = {'padding_share': 1 - tokens / self.places}
    several = bool(phases)
    phases[REST] = max(seconds - sum(phases.values()), 0.0)
    if several:
      metrics |= {f'time/{phase}': value for phase, value in phases.items()}
      metrics['time/rollout_share'] = phases.get('rollout', 0.0) / seconds
    limit = product_speed(self.dtype)
    for phase, flops in self.flops.items():
      if phases.get(phase):
        metrics[f'time/mfu_{phase}'] = flops * tokens / phases[phase] / limit
    return metrics


@functools.cache
def product_speed(dtype: str) -> float:
  """Measures the FLOP/s of a matrix product on all devices, once in a process.

  It takes 0.1 s or less, and is the best of several calls, as other work on the machine
  only slows them. On a CPU all devices of a process are one machine.
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
