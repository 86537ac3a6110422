"""Says what work an iteration with a rollout is, for the metrics of speed (runtime/meter.py)."""

from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.planning.model_flops import needed_flops, sequence_flops
from rlhf_jax.runtime.meter import Meter
from rlhf_jax.stages.shared.metering import training_passes
from rlhf_jax.stages.shared.rollout import RolloutDefinitions, RolloutOptions, RolloutParts
from rlhf_jax.stages.shared.scores import Score


def meter_rollout(
  definitions: RolloutDefinitions,
  options: RolloutOptions,
  passes: int = 1,
  assessed_before: bool = True,
  value_config: ModelConfig | None = None,
  document_places: int = 0,
  trusts_sampler: bool = False,
) -> Meter:
  """Makes the meter of a stage whose step is a rollout, its scores and an update from them.

  Counted in the update are its own passes, the reference, and policy and value model before it.

  Args:
    definitions: of policy and reference.
    options: the stage's.
    passes: of the update over the responses (epochs).
    assessed_before: whether policy and value model are run before the update, too; else the only
      update takes what was before it from its own forward pass.
    value_config: the shape of a value model with a trunk of its own.
    document_places: of a row of documents, of which the update reads one for each response;
      attention is counted as if it were one text.
    trusts_sampler: whether the sampler's log-probabilities are taken for those of the policy
      before the update, so that it is not run there.
  """
  config = definitions.model.config
  longest = options.max_length + options.sampling.max_new_tokens  # P + R
  # Only whole texts are counted, whose prompts are taken to have their share of the places.
  share = options.sampling.max_new_tokens / longest

  def rollout(length: float) -> float:
    """Counts the FLOPs for each token of prompts with responses of a mean length."""
    # A prompt is read once for all its responses.
    repeated = 1 - 1 / options.num_samples
    prompt = needed_flops(config, (1 - share) * length, 0, 0)
    response = share * length
    return (needed_flops(config, length, response, response) - repeated * prompt) / length

  def update(length: float) -> float:
    """Counts likewise for the passes of the update and before it."""
    response = share * length
    policy = needed_flops(config, length, response, response)
    flops = passes * training_passes(config) * policy
    if definitions.reference_model is not None:
      flops += needed_flops(definitions.reference_model.config, length, response, response)
    if assessed_before and not trusts_sampler:
      flops += policy
    if value_config is not None:
      value = needed_flops(value_config, length, response, 0)
      flops += (assessed_before + passes * training_passes(value_config)) * value
    if document_places:
      documents = sequence_flops(config, document_places, document_places)
      flops += passes * training_passes(config) * documents
    return flops / length

  rows = options.batch_size * options.num_samples
  return Meter(rows * longest, rows, {'rollout': rollout, 'update': update}, config.dtype)


def time_phases(meter: Meter, parts: RolloutParts, score: Score) -> tuple[RolloutParts, Score]:
  """Returns the parts of an iteration and its score, timed as phases of the meter.

  Args:
    meter: of the stage.
    parts: of which `generate` is timed; the rest of a step is the update.
    score: of training prompts.
  """
  timed_parts = parts._replace(generate=meter.clock.timed('rollout', parts.generate))
  return timed_parts, meter.clock.timed('scoring', score)
