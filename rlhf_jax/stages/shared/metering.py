"""Says what work a step is that learns from rows, for the metrics of speed (runtime/meter.py)."""

from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.planning.model_flops import sequence_flops
from rlhf_jax.runtime.meter import Meter


def meter_rows(
  config: ModelConfig, rows: int, length: int, head: bool = True, one_text: bool = False
) -> Meter:
  """Makes the meter of a stage whose step is an update from rows of a data set.

  Args:
    config: the trained model's shape.
    rows: of a batch, over all devices.
    length: places of a row.
    head: the loss reads log-probabilities, not scores.
    one_text: a row has one text. If not, it is full of texts whose lengths are not known,
      and attention is counted as if it were one, so that a little too much is counted.
  """

  def update(tokens: float) -> float:
    """Counts the FLOPs for each token of a text."""
    text = tokens if one_text else length
    flops = sequence_flops(config, text, text if head else 0)
    return training_passes(config) * flops / text

  return Meter(rows * length, rows, {'update': update}, config.dtype)


def training_passes(config: ModelConfig) -> int:
  """Counts a forward and a backward pass, in forward passes: frozen matrices need no slopes."""
  return 2 if config.lora_rank else 3
