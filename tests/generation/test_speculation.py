import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rlhf_jax.errors import UserError
from rlhf_jax.generation import sampler, speculation
from rlhf_jax.models import transformer
from rlhf_jax.types import Prompts

CONFIG = transformer.ModelConfig(
  vocab_size=12, embed=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=24
)
STOPS, PAD, R, K = (1,), 0, 12, 2


@functools.cache
def compiled(numerics, drafts, temperature=1.0):
  model = transformer.build_model(dataclasses.replace(CONFIG, numerics=numerics))
  options = sampler.SamplingOptions(max_new_tokens=R, temperature=temperature, drafts=drafts)
  return sampler.build_sampler(model, options, STOPS, PAD, K)


@pytest.fixture(scope='module')
def params():
  model = transformer.build_model(CONFIG)
  return jax.tree.map(lambda x: 6 * x, model.init(jax.random.key(0)))


def prompts(count=3):
  tokens = np.random.default_rng(0).integers(2, 12, (count, 4))
  mask = np.arange(4) >= np.arange(count)[:, None] % 4
  return Prompts(jnp.asarray(tokens * mask, jnp.int32), jnp.asarray(mask), jnp.arange(count))


def test_drafts_follow_the_longest_match():
  earlier = jnp.array([[2, 3, 4, 5, 6, 1, 9, 3, 7, 8, 1, 0]])
  # 'said', place: after 2 3 comes 4 5; after 9 3 comes 7 8; the first token alone is at place 0
  for said, want in [((2, 3), (4, 5)), ((9, 3), (7, 8)), ((9,), (3, 7)), ((5, 2, 3), (4, 5))]:
    tokens = jnp.zeros((1, 6), jnp.int32).at[0, : len(said)].set(jnp.array(said))
    drafts = speculation.find_drafts(tokens, jnp.array([len(said)]), earlier, 2)
    assert drafts[0].tolist() == list(want), said


def test_drafts_are_accepted_up_to_the_first_that_was_not_drawn():
  drafts = jnp.array([[3, 4, 5], [3, 9, 5], [9, 4, 5]])
  drawn = jnp.tile(jnp.array([[3, 4, 5, 6]]), (3, 1))
  assert speculation.count_accepted(drafts, drawn).tolist() == [3, 1, 0]


@pytest.mark.parametrize('temperature', [1.0, 0.0])
def test_exact_responses_are_the_same_to_the_bit(params, temperature):
  asked, key = prompts(), jax.random.key(3)
  plain = compiled('exact', 0, temperature)(params, asked, key)
  generate = compiled('exact', 3, temperature)
  # of the same responses, of other ones, and of nothing that was ever said
  other = compiled('exact', 0, temperature)(params, asked, jax.random.key(4))
  for earlier in (plain.tokens, other.tokens, jnp.full_like(plain.tokens, 7)):
    drafted = generate(params, asked, key, earlier.reshape(3, K * R))
    jax.tree.map(np.testing.assert_array_equal, drafted, plain)


def test_the_distribution_is_that_of_the_sampler(params):
  asked = jax.tree.map(lambda x: jnp.repeat(x[:1], 1500, axis=0), prompts())
  once = compiled('fast', 0)(params, asked, jax.random.key(5))
  earlier = once.tokens.reshape(1500, K * R)
  drafted = compiled('fast', 3)(params, asked, jax.random.key(6), earlier)

  def count(samples):  # of the third and fourth token, which are mostly drafted
    pairs = np.asarray(samples.tokens[:, 2] * 12 + samples.tokens[:, 3])
    return np.bincount(pairs, minlength=144)

  table = np.stack([count(once), count(drafted)])
  table = table[:, table.sum(0) >= 10]
  assert table.shape[1] > 10 and stats.chi2_contingency(table).pvalue > 0.001


def test_prompts_are_recalled_by_their_index():
  asked, seen = prompts(), []

  def generate(params, prompts, key, earlier):
    seen.append(earlier)
    tokens = jnp.arange(6 * R, dtype=jnp.int32).reshape(6, R)
    return sampler.Samples(tokens, tokens > 0, tokens, tokens[:, 0] > 0)

  recall = speculation.RecallingSampler(generate, K * R, PAD)
  recall(None, asked, None)
  recall(None, asked.replace(index=jnp.array([2, -1, 7])), None)
  assert (seen[0] == PAD).all() and (seen[1][1:] == PAD).all()
  assert seen[1][0].tolist() == list(range(4 * R, 6 * R))
  # and come back from a checkpoint
  for known in (recall, speculation.RecallingSampler(generate, K * R, PAD)):
    resumed = speculation.RecallingSampler(generate, K * R, PAD)
    resumed.set_state(json.loads(json.dumps(known.get_state())))
    assert resumed.memory.keys() == known.memory.keys()
    for index, row in known.memory.items():
      np.testing.assert_array_equal(resumed.memory[index], row)
      assert resumed.memory[index].dtype == np.int32


def test_drafts_are_refused_beside_slots():
  options = sampler.SamplingOptions(slots=2, drafts=2)
  with pytest.raises(UserError, match='drafts 2: expected 0 beside slots'):
    sampler.build_sampler(transformer.build_model(CONFIG), options, STOPS, PAD)
