"""Says what work a step is that learns from rows, for the metrics of speed (runtime/meter.py)."""

from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.planning.model_flops import sequence_flops
from rlhf_jax.runtime.meter import Meter


def meter_rows(config: ModelConfig, rows: int, length: int, head: bool = True) -> Meter:
  """Makes the meter of a stage whose step is an update from rows of a data set.

  Attention is counted as if each row were one sequence; packed rows need less.

  Args:
    config: the trained model's shape.
    rows: of a batch, over all devices.
    length: places of a row.
    head: the loss reads log-probabilities, not scores.
  """
  flops = sequence_flops(config, length, length if head else 0)
  per_token = training_passes(config) * flops / length
  return Meter(rows * length, {'update': per_token}, config.dtype)


def training_passes(config: ModelConfig) -> int:
  """Counts a forward and a backward pass, in forward passes: frozen matrices need no slopes."""
  return 2 if config.lora_rank else 3
