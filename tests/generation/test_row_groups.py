"""Responses of rows in groups are those of all rows at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import testing
from rlhf_jax.generation import row_groups, sampler
from rlhf_jax.types import Prompts

B, P, R = 6, 5, 12
SAMPLING = sampler.SamplingOptions(max_new_tokens=R)
STOPS = (5, 6, 25)


def make_prompts(count: int = B) -> Prompts:
  tokens = jax.random.randint(jax.random.key(1), (count, P), 3, 60)
  mask = np.arange(P) >= np.arange(count)[:, None] % P  # of different lengths
  return Prompts(jnp.where(mask, tokens, 0), jnp.asarray(mask), jnp.arange(count))


@pytest.mark.parametrize(
  'num_prompts, num_samples, groups',
  [
    (6, 1, 2),  # three prompts each
    (6, 3, 3),  # two prompts each
    (5, 4, 2),  # all prompts, two responses each
    (1, 8, 4),  # the prompt, two responses each
  ],
)
@pytest.mark.parametrize('numerics', ['fast', 'exact'])
def test_responses_are_the_same(monkeypatch, num_prompts, num_samples, groups, numerics):
  model = testing.make_model(numerics=numerics)
  params = jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0)))
  prompts = make_prompts(num_prompts)
  counts = []

  def respond(count: int) -> sampler.Samples:
    monkeypatch.setattr(row_groups, 'count_groups', lambda *_: counts.append(count) or count)
    generate = sampler.build_sampler(model, SAMPLING, STOPS, testing.PAD_ID, num_samples)
    return generate(params, prompts, jax.random.key(2))

  want, got = respond(1), respond(groups)
  assert counts == [1, groups]
  assert len({*want.mask.sum(1).tolist()}) > 2  # they end at different tokens
  for name in ('tokens', 'mask', 'ended'):
    np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
  if numerics == 'exact':
    np.testing.assert_array_equal(got.logprobs, want.logprobs)
  else:
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)


@pytest.mark.parametrize(
  'parameters, num_prompts, num_samples, cores, groups',
  [
    (100, 8, 1, 2, 2),
    (100, 8, 1, 1, 1),
    (100, 7, 1, 2, 1),  # neither prompts nor responses can be divided
    (100, 1, 8, 2, 2),
    (100, 3, 8, 16, 4),  # at least four rows each, and 5 and 6 divide neither
    (100, 4, 1, 2, 1),
    (2**24 + 1, 8, 1, 2, 1),
  ],
)
def test_how_many_groups(parameters, num_prompts, num_samples, cores, groups):
  params = {'a': jax.ShapeDtypeStruct((parameters,), jnp.float32)}
  assert row_groups.count_groups(params, num_prompts, num_samples, cores) == groups
