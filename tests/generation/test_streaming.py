import dataclasses

import jax
import numpy as np
import pytest

from rlhf_jax import testing
from rlhf_jax.data import encode
from rlhf_jax.errors import UserError
from rlhf_jax.generation import sampler, streaming
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.types import Prompts

STOP = (7,)
COUNT = 6


@pytest.fixture(scope='module')
def model():
  return testing.make_model(head=False, max_length=200)


@pytest.fixture(scope='module')
def streamer(model):
  layout = testing.make_layout()
  return streaming.build_streamer(model, testing.make_params(model), STOP, layout)


def prompt_of(length):
  return np.random.default_rng(length).integers(10, 40, length).tolist()


def test_tokens_are_those_of_the_sampler_and_nothing_compiles_again(model, streamer):
  """Whatever the prompt's length is in chunks: one token, full chunks, one more."""
  options = SamplingOptions(max_new_tokens=COUNT, temperature=0.0)
  layout = testing.make_layout()
  generate = sampler.build_sampler(model, options, STOP, 0, layout=layout)
  params = testing.make_params(model)
  for length in (1, 5, streaming.READ + 1, streaming.READ + 2, 150):
    prompt = prompt_of(length)
    row = encode.left_padded(prompt, 160, 0, 0)
    prompts = Prompts(row['tokens'][None], row['mask'][None], np.zeros(1, np.int32))
    samples = generate(params, layout.place(prompts), jax.random.key(0))
    wanted = samples.tokens[0][samples.mask[0]].tolist()
    got = list(streamer.stream(prompt, jax.random.key(0), 0.0, COUNT))
    assert got == wanted, length
  drawn = list(streamer.stream(prompt_of(9), jax.random.key(1), 1.5, 40))
  assert drawn == list(streamer.stream(prompt_of(9), jax.random.key(1), 1.5, 40))
  assert len(set(drawn)) > 3
  assert streamer.step._cache_size() == streamer.read._cache_size() == 1


def test_a_response_ends_at_its_end_or_where_there_is_no_room(streamer):
  first = next(streamer.stream(prompt_of(5), jax.random.key(0), 0.0, 9))
  stopping = dataclasses.replace(streamer, stop_ids=(first,))
  assert list(stopping.stream(prompt_of(5), jax.random.key(0), 0.0, 9)) == [first]
  assert len(list(streamer.stream(prompt_of(198), jax.random.key(0), 0.0, 9))) == 2
  with pytest.raises(UserError, match='has 200 tokens: expected 1 to 199'):
    next(streamer.stream(prompt_of(200), jax.random.key(0), 0.0, 9))


def test_longrope_ends_before_its_factors_change():
  config = dataclasses.replace(testing.MODEL_CONFIG, max_length=10**6)
  assert streaming.longest_conversation(config) == streaming.MAX_PLACES
  scaling = {'rope_type': 'longrope', 'original_max_position_embeddings': 32}
  assert streaming.longest_conversation(dataclasses.replace(config, rope_scaling=scaling)) == 32
