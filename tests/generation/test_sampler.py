import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rlhf_jax import options
from rlhf_jax.errors import UserError
from rlhf_jax.generation import sampler
from rlhf_jax.models import attention, column_blocks, heads, transformer
from rlhf_jax.runtime import mesh
from rlhf_jax.types import Prompts

CONFIG = transformer.ModelConfig(
  vocab_size=48, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=48
)
MODEL = transformer.build_model(CONFIG)
STOPS, PAD = (1, 5, 6), 0


@pytest.fixture(scope='module')
def params():
  return jax.tree.map(lambda x: 3 * x, MODEL.init(jax.random.key(0)))


def prompts(width=6, lengths=(6, 3, 1)):
  tokens = np.asarray(jax.random.randint(jax.random.key(1), (len(lengths), 6), 2, 48))
  wide = np.zeros((len(lengths), width), np.int32)
  mask = np.zeros((len(lengths), width), bool)
  for row, length in enumerate(lengths):
    wide[row, width - length :], mask[row, width - length :] = tokens[row, :length], True
  return Prompts(jnp.asarray(wide), jnp.asarray(mask), jnp.arange(len(lengths)))


def sampling(**changes):
  return sampler.SamplingOptions(**{'max_new_tokens': 12, **changes})


def recomputed(params, asked, samples, temperature):
  sequences = sampler.join_sequences(asked, samples)
  hidden, _ = MODEL.apply(params, sequences.tokens, sequences.positions, sequences.segment_ids)
  R = samples.tokens.shape[1]
  return heads.token_logprobs(MODEL, params, hidden[:, -R - 1 : -1], samples.tokens, temperature)[0]


@pytest.mark.parametrize('unroll', [True, False])
@pytest.mark.parametrize(
  'changes',
  [
    {},
    dict(temperature=0.6),
    dict(temperature=1.7),
    dict(top_k=4),
    dict(top_p=0.7),
    dict(temperature=0.8, top_k=9, top_p=0.9),
    dict(temperature=0.0),
  ],
)
def test_logprobs_are_those_of_the_training_forward(params, changes, unroll):
  config = sampling(**changes)
  samples = sampler.build_sampler(MODEL, config, STOPS, PAD, num_samples=5, unroll=unroll)(
    params, prompts(), jax.random.key(2)
  )
  assert samples.tokens.shape == (15, 12)
  lengths = samples.mask.sum(1)
  if config.temperature:
    assert lengths.min() < 12 and len(set(lengths.tolist())) > 2  # some end early
  again = recomputed(params, prompts(), samples, config.temperature)
  np.testing.assert_allclose(jnp.where(samples.mask, again, 0), samples.logprobs, atol=1e-5)


@pytest.mark.parametrize('unroll', [True, False])
@pytest.mark.parametrize('slots', [1, 4])
def test_slots_change_nothing(params, monkeypatch, slots, unroll):
  """Fewer slots than responses, which end at different lengths; and a cache of segments."""
  monkeypatch.setattr(attention, 'LEAST_READ', 2)

  def generate(slots):
    options = sampling(slots=slots)
    run = sampler.build_sampler(MODEL, options, STOPS, PAD, num_samples=5, unroll=unroll)
    return run(params, prompts(), jax.random.key(2))

  got, want = generate(slots), generate(0)
  assert len(set(want.mask.sum(1).tolist())) > 4
  for name in ('tokens', 'mask', 'ended'):
    np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
  np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)


@pytest.mark.parametrize('changes', [{}, dict(slots=4), dict(temperature=0.0)])
def test_blocks_of_columns_change_nothing(monkeypatch, changes):
  """Few rows on a CPU: all matrices but keys' and values' divide into blocks of 64 columns."""
  config = transformer.ModelConfig(
    vocab_size=192,
    embed=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    mlp=128,
    qkv_bias=True,
    tied=False,
  )
  model = transformer.build_model(config)
  params = jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0)))
  cut = []
  cut_matrices = column_blocks.cut_matrices

  def cut_and_count(params, unembedding):
    result = cut_matrices(params, unembedding)
    cut.extend([*result['layers'][0][column_blocks.KEY], *result[column_blocks.KEY]])
    return result

  monkeypatch.setattr(column_blocks, 'cut_matrices', cut_and_count)

  def generate():
    run = sampler.build_sampler(model, sampling(**changes), STOPS, PAD, num_samples=2)
    return run(params, prompts(), jax.random.key(2))

  got = generate()
  assert cut == ['query', 'output', 'gate', 'up', 'down', 'unembedding']
  monkeypatch.setattr(column_blocks, 'FEW_ROWS', ())
  want = generate()
  for name in ('tokens', 'mask', 'ended'):
    np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
  np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)


def test_a_cache_of_slots_is_kept_once(params):
  """The whole program needs less than two caches of four rows, where all rows would need 15."""
  options = sampler.SamplingOptions(max_new_tokens=1000, slots=4)
  made = definition(options=options, num_samples=5, unroll=True)
  prepared = sampler.prepare_params(made, params)
  generate = jax.jit(functools.partial(sampler.generate, made))
  compiled = generate.lower(prepared, prompts(), jax.random.key(0)).compile()
  row = 2 * 4 * 2 * 1006 * CONFIG.kv_heads * CONFIG.head_dim  # bytes of keys and values
  assert compiled.memory_analysis().temp_size_in_bytes < 8 * row


def test_slots_that_cannot_be_are_refused():
  on = mesh.make_layout(mesh.MeshOptions(data=1, fsdp=8))
  with pytest.raises(UserError, match='slots 4: expected 0 on a mesh of 8 devices'):
    sampler.build_sampler(MODEL, sampling(slots=4), STOPS, PAD, layout=on)


def test_after_the_end_token_there_is_only_padding(params):
  samples = sampler.build_sampler(MODEL, sampling(), STOPS, PAD, num_samples=8)(
    params, prompts(), jax.random.key(3)
  )
  for tokens, mask, ended in zip(*jax.device_get((samples.tokens, samples.mask, samples.ended))):
    stops = np.flatnonzero(np.isin(tokens, STOPS) & mask)
    length = stops[0] + 1 if len(stops) else 12
    assert ended == bool(len(stops))
    np.testing.assert_array_equal(mask, np.arange(12) < length)
    assert (tokens[length:] == PAD).all()


def test_amount_of_left_padding_changes_nothing(params):
  generate = sampler.build_sampler(MODEL, sampling(), STOPS, PAD)
  near, far = (generate(params, prompts(width), jax.random.key(4)) for width in (6, 11))
  np.testing.assert_array_equal(near.tokens, far.tokens)
  np.testing.assert_allclose(near.logprobs, far.logprobs, atol=1e-5)


def test_greedy_is_the_best_token_of_the_full_forward(params):
  samples = sampler.build_sampler(MODEL, sampling(temperature=0.0), (), PAD)(
    params, prompts(), jax.random.key(0)
  )
  text = np.concatenate([prompts().tokens[1, 3:], samples.tokens[1]])[None]
  hidden, _ = MODEL.apply(params, text, jnp.arange(15)[None], jnp.ones_like(text))
  np.testing.assert_array_equal(
    jnp.argmax(heads.next_token_logits(MODEL, params, hidden[0, 2:-1]), axis=-1), samples.tokens[1]
  )


def test_top_k_and_top_p_choose_among_the_likeliest():
  logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))

  def draw(temperature=1.0, **limits):
    options = sampler.SamplingOptions(temperature=temperature, **limits)
    made = definition(options=options)
    uniforms = jax.random.uniform(jax.random.key(0), (2000, 2))
    rows = jnp.repeat(logits, 2000, axis=0)
    tokens, logprobs = sampler.draw(made, uniforms, rows, jnp.zeros(2000, bool))
    want = jax.nn.log_softmax(logits[0] / temperature)[tokens]
    np.testing.assert_allclose(logprobs, want, atol=1e-6)  # of the whole vocabulary
    return np.bincount(tokens, minlength=4) / 2000

  np.testing.assert_allclose(draw(), [0.5, 0.3, 0.15, 0.05], atol=0.04)
  np.testing.assert_allclose(draw(top_k=2), [0.625, 0.375, 0, 0], atol=0.04)
  np.testing.assert_allclose(draw(top_p=0.75), [0.625, 0.375, 0, 0], atol=0.04)
  np.testing.assert_allclose(draw(top_p=0.4), [1, 0, 0, 0])
  np.testing.assert_allclose(
    draw(temperature=0.5), np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365, atol=0.04
  )


@pytest.mark.parametrize('vocabulary', [3, 48, 257])  # of whole blocks and of others
def test_drawn_tokens_are_distributed_as_their_weights(vocabulary):
  rows = 40_000
  weights = jax.random.exponential(jax.random.key(1), (vocabulary,)) ** 2
  weights = weights.at[::5].set(0.0).at[-1].set(1.0)  # whole blocks may be impossible too
  uniforms = sampler.draw_uniforms(jax.random.key(2), 1, rows)[0]
  tokens = sampler.choose_tokens(uniforms, jnp.tile(weights, (rows, 1)))
  counts = np.bincount(tokens, minlength=vocabulary)
  possible = np.asarray(weights) > 0
  assert counts.shape == (vocabulary,) and not counts[~possible].any()
  expected = np.asarray(weights, np.float64)[possible]
  expected *= rows / expected.sum()
  # the seed is fixed, so that this holds or fails once and for all
  assert stats.chisquare(counts[possible], expected).pvalue > 1e-3


def test_the_ends_of_the_random_numbers_draw_possible_tokens():
  weights = jnp.array([[0.0, 0.0, 3.0, 0.0, 1e-30, 0.0, 0.0]])
  least, most = 0.0, np.nextafter(np.float32(1), np.float32(0))
  for uniforms in ([least, least], [least, most], [most, least], [most, most]):
    token = sampler.choose_tokens(jnp.array([uniforms]), weights)
    assert token[0] in (2, 4)


def test_samples_of_a_prompt_differ_and_stand_together(params):
  samples = sampler.build_sampler(MODEL, sampling(), (), PAD, num_samples=4)(
    params, prompts(), jax.random.key(5)
  )
  rows = {tuple(row) for row in samples.tokens.tolist()}
  assert len(rows) == 12


@pytest.mark.parametrize(
  'said',
  [
    dict(max_new_tokens=0),
    dict(slots=-1),
    dict(temperature=-1.0),
    dict(top_k=-1),
    dict(top_p=0.0),
    dict(top_p=1.5),
  ],
)
def test_sampling_options_out_of_range_are_refused(said):
  (name,) = said
  with pytest.raises(UserError, match=rf'sampling.{name}: expected a number (from|above) '):
    sampler.build_sampler(MODEL, sampling(**said), STOPS, PAD)


@pytest.mark.parametrize(
  'axes',
  [
    dict(data=1, fsdp=8),
    dict(data=1, fsdp=8, rollout_tensor=2),
    dict(fsdp=4, rollout_tensor=1),
    dict(data=1, fsdp=2, context=2, tensor=2, rollout_tensor=2),
  ],
)
@pytest.mark.parametrize('unroll', [True, False])
def test_layouts_of_decoding_change_nothing(params, axes, unroll):
  def run(on):
    model = transformer.build_model(CONFIG, on)
    asked = on.place(prompts(lengths=(6, 3, 1, 2, 4, 6, 5, 1)))
    generate = sampler.build_sampler(
      model, sampling(), STOPS, PAD, num_samples=2, unroll=unroll, layout=on
    )
    return generate(
      jax.device_put(params, on.shardings(model.axes, params)), asked, jax.random.key(7)
    )

  on = mesh.make_layout(mesh.MeshOptions(**axes))
  got, want = run(on), run(mesh.make_layout(mesh.MeshOptions(), jax.devices()[:1]))
  for name in ('tokens', 'mask', 'ended'):
    np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
  np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)
  assert got.tokens.sharding.is_equivalent_to(on.sharding(('batch', None)), 2)


def definition(**changes):
  values = dict(
    model=MODEL,
    axes=MODEL.axes,
    options=sampler.SamplingOptions(max_new_tokens=4),
    stop_ids=STOPS,
    pad_id=PAD,
    num_samples=2,
    layout=None,
    unroll=False,
  )
  return sampler.Definition(**{**values, **changes})


def test_drawn_tokens_are_padding_after_the_end():
  logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]]))
  uniforms, done = jnp.full((2, 2), 0.5), jnp.array([True, False])
  tokens, logprobs = sampler.draw(definition(), uniforms, logits, done)
  np.testing.assert_array_equal(tokens, [PAD, 2])
  np.testing.assert_allclose(logprobs, [0.0, 0.0])


def test_the_parts_of_the_sampler_are_functions_of_values(params):
  """Prefill, the first token and one step, by hand; they are `generate`'s first two tokens."""
  made, key = definition(options=sampler.SamplingOptions(2)), jax.random.key(3)
  prefill, begin, step, generate = (
    jax.jit(functools.partial(part, made))
    for part in (sampler.prefill, sampler.begin_decoding, sampler.decode_step, sampler.generate)
  )
  hidden, cache, lengths = prefill(params, prompts())
  assert hidden.shape == (6, 32) and cache.segment_ids.shape == (6, 8)
  np.testing.assert_array_equal(lengths, [6, 6, 3, 3, 1, 1])
  uniforms = sampler.draw_uniforms(key, 2, 6)
  state = begin(params, hidden, cache, uniforms)
  np.testing.assert_array_equal(state.done, np.isin(state.token, STOPS))
  state = step(params, lengths, uniforms, state)
  samples = generate(params, prompts(), key)
  np.testing.assert_array_equal(state.tokens, samples.tokens)
  np.testing.assert_allclose(state.logprobs, samples.logprobs, atol=1e-6)
  np.testing.assert_array_equal(state.mask, samples.mask)
  assert state.place == 2


def test_options_and_their_defaults():
  assert sampler.SamplingOptions() == sampler.SamplingOptions(32, 1.0, 0, 1.0)
  options.check_ranges(sampler.SamplingOptions(), 'sampling')
