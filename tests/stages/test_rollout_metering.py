"""What the logged speed of an iteration counts as work."""

import pytest

from rlhf_jax import testing
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.planning import model_flops
from rlhf_jax.stages import policy_gradient
from rlhf_jax.stages.shared import rollout_metering


@pytest.mark.parametrize(
  'changes, is_one_pass',
  [
    ({}, True),
    ({'minibatches': 2}, False),
    ({'microbatches': 2}, False),
    ({'epochs': 2}, False),
    ({'packed_rows': 8}, True),  # all responses in one chunk, which is updated at once
    ({'packed_rows': 8, 'minibatches': 2}, False),
    ({'packed_rows': 1}, False),
  ],
)
def test_the_policy_before_the_update_counts_where_it_is_run(changes, is_one_pass):
  definitions = testing.make_rollout_definitions()
  options = policy_gradient.Options(
    batch_size=2,
    num_samples=4,
    max_length=10,
    sampling=SamplingOptions(max_new_tokens=10),
    **changes,
  )
  assert policy_gradient.takes_one_pass(definitions, options) == is_one_pass
  flops = {}
  for assessed_before in (False, True):
    meter = rollout_metering.meter_rollout(
      definitions, options, options.epochs, assessed_before=assessed_before
    )
    flops[assessed_before] = meter.flops['update'](20)  # for each of the 20 tokens of a text
  # Ten tokens of a prompt, ten of a response, of which each is predicted by a state.
  forward = model_flops.needed_flops(definitions.model.config, 20, 10, 10)
  assert flops[True] - flops[False] == pytest.approx(forward / 20)
  # The reference, and forward and twice backward of every pass.
  assert flops[False] == pytest.approx((1 + 3 * options.epochs) * forward / 20)
