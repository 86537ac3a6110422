"""Every family beside what transformers computed for it: scripts/record_references.py."""

import dataclasses

from interop_cases import (
  batch,
  CASES,
  compiled_apply,
  DATA,
  layout,
  LENGTHS,
  MASK,
  pad_left,
  shardings,
  TOKENS,
)
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.generation import sampler
from rlhf_jax.interop import pretrained
from rlhf_jax.models import experts, heads, transformer
from rlhf_jax.types import Prompts


@pytest.mark.parametrize('case', CASES)
def test_logits_of_padded_and_packed_texts_and_of_a_cache(case):
  config = pretrained.read_config(DATA / case)
  params = pretrained.load_parameters(DATA / case, config)
  reference = np.load(DATA / case / 'logits.npz')
  right = reference['right']
  model = transformer.build_model(config)
  tokens, positions, segments = batch()
  apply = compiled_apply(config)
  hidden = apply(params, tokens, positions, segments)[0]
  logits = np.asarray(heads.next_token_logits(model, params, hidden))
  left = np.asarray(segments[3:6]).astype(bool)
  np.testing.assert_allclose(logits[:3][MASK], right[MASK], atol=1e-4, rtol=1e-5)
  np.testing.assert_allclose(logits[3:6][left], reference['left'][left], atol=1e-4, rtol=1e-5)
  packed = [right[0, :7], right[1, :5]]
  if case == 'phi3_long':  # short texts, other than the whole ones
    inputs = [jnp.repeat(values[6:], 2, axis=0) for values in (tokens, positions, segments)]
    only = inputs[2] == jnp.asarray([[1], [2]])
    alone = apply(params, *inputs[:2], inputs[2] * only)[0]
    logits_alone = heads.next_token_logits(model, params, alone)
    packed = [logits_alone[0, :7], logits_alone[1, 7:]]
  np.testing.assert_allclose(logits[6, :7], packed[0], atol=1e-4, rtol=1e-5)
  np.testing.assert_allclose(logits[6, 7:], packed[1], atol=1e-4, rtol=1e-5)

  weights = transformer.unstack_layers(params)
  cache = transformer.empty_cache(config, 7, 12, stacked=False)
  if case == 'phi3_long':  # what is read in pieces must be known to be long, from nine tokens on
    cache = cache.replace(is_long=jnp.asarray([True, True, False, True, True, False, False]))
  parts = []
  for start in range(0, 12, 4):
    part = slice(start, start + 4)
    inputs = (tokens[:, part], positions[:, part], segments[:, part])
    hidden_part, cache = apply(weights, *inputs, cache)
    parts.append(hidden_part)
  seen = np.asarray(segments).astype(bool)
  cached = np.concatenate(parts, axis=1)
  np.testing.assert_allclose(cached[seen], np.asarray(hidden)[seen], atol=2e-5)


def test_windows_shorter_and_longer_than_the_text():
  """Local and global layers, scanned and unrolled, without and with a cache."""
  config = dataclasses.replace(pretrained.read_config(DATA / 'gemma3'), rope_local_theta=0.0)
  params = pretrained.load_parameters(DATA / 'gemma3', config)
  inputs = batch()
  seen = np.asarray(inputs[2]).astype(bool)

  def run(windows, weights=params, cache=None):
    apply = compiled_apply(dataclasses.replace(config, windows=windows))
    size = 6 if cache else 12
    parts = []
    for start in range(0, 12, size):
      part = [values[:, start : start + size] for values in inputs]
      hidden, cache = apply(weights, *part, cache)
      parts.append(hidden)
    return np.concatenate(parts, axis=1)[seen]

  everything = run(())
  short = run((11, 0))
  np.testing.assert_allclose(run((12, 0)), everything, atol=1e-6)
  assert np.abs(short - everything).max() > 1e-3  # the twelfth token no longer sees the first
  for stacked in (True, False):
    weights = params if stacked else transformer.unstack_layers(params)
    cache = transformer.empty_cache(config, 7, 20, stacked)  # has room for more than the text
    np.testing.assert_allclose(run((11, 0), weights, cache), short, atol=2e-5)


def test_bfloat16_computes_while_parameters_stay_float32():
  config = pretrained.read_config(DATA / 'llama')
  params = pretrained.load_parameters(DATA / 'llama', config)
  inputs = batch()
  half_config = dataclasses.replace(config, dtype='bfloat16')
  half = transformer.build_model(half_config)
  got = compiled_apply(half_config)(params, *inputs)[0]
  want = compiled_apply(config)(params, *inputs)[0]
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(got[0], want[0], atol=0.1, rtol=0.05)

  def logprobs(params):
    hidden = half.apply(params, *inputs)[0]
    return heads.token_logprobs(half, params, hidden, inputs[0])[0]

  assert jax.eval_shape(logprobs, params).dtype == jnp.float32
  grads = jax.eval_shape(jax.grad(lambda params: logprobs(params).sum()), params)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))


def test_experts_sorted_and_one_after_the_other():
  keys = jax.random.split(jax.random.key(0), 5)
  x = jax.random.normal(keys[0], (19, 8))
  router = jax.random.normal(keys[1], (8, 5))
  shapes = ((5, 8, 6), (5, 8, 6), (5, 6, 8))
  matrices = [jax.random.normal(key, shape) for key, shape in zip(keys[2:], shapes)]

  def run(x, matrices, ragged):
    weights, chosen = experts.route(x, router, 2, renormalise=True)
    return experts.mix(x, weights, chosen, *matrices, jax.nn.silu, ragged)

  def loss(x, matrices, ragged):
    output = run(x, matrices, ragged)
    return jnp.sum(output**2), output

  want = np.zeros((19, 8))
  for i, row in enumerate(np.asarray(x, np.float64)):  # by hand, token by token
    odds = np.exp(row @ np.asarray(router))
    for e in np.argsort(-odds)[:2]:
      gate, up, down = (np.asarray(matrix[e], np.float64) for matrix in matrices)
      inner = row @ gate
      activated = inner / (1 + np.exp(-inner)) * (row @ up)
      want[i] += odds[e] / np.sort(odds)[-2:].sum() * (activated @ down)
  compute = jax.jit(
    jax.value_and_grad(loss, argnums=(0, 1), has_aux=True),
    static_argnums=2,
  )
  (plain_loss, plain), plain_grads = compute(x, matrices, False)
  (ragged_loss, ragged), ragged_grads = compute(x, matrices, True)
  np.testing.assert_allclose(plain, want, atol=1e-4)
  np.testing.assert_allclose(ragged, want, atol=1e-4)
  np.testing.assert_allclose(plain_loss, ragged_loss, rtol=1e-4, atol=1e-3)
  for left, right in zip(jax.tree.leaves(plain_grads), jax.tree.leaves(ragged_grads), strict=True):
    np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-3)


def test_experts_take_no_memory_for_all_experts_at_once():
  E, M, D, F = 32, 1024, 32, 64
  gate = jnp.zeros((E, D, F))
  down = jnp.zeros((E, F, D))
  x = jnp.zeros((M, D))

  def loss(gate, x):
    weights, chosen = experts.route(x, jnp.zeros((D, E)), 2, True)
    return experts.mix(x, weights, chosen, gate, gate, down, jax.nn.silu, False).sum()

  memory = jax.jit(jax.grad(loss)).lower(gate, x).compile().memory_analysis()
  # One array of [experts, tokens, mlp] would be twice that.
  assert memory.temp_size_in_bytes < E * M * F * 4 / 2


@pytest.mark.parametrize(
  'case, axes',
  [
    ('mixtral', dict(expert=2, fsdp=2)),
    ('gemma2', dict(tensor=2, fsdp=2)),
  ],
)
def test_sharded_equals_one_device(case, axes):
  on = layout(**axes)
  config = pretrained.read_config(DATA / case)
  inputs = [jnp.concatenate([x, x[:1]]) for x in batch()]
  plain_params = pretrained.load_parameters(DATA / case, config)
  want = compiled_apply(config)(plain_params, *inputs)[0]
  params = pretrained.load_parameters(DATA / case, config, shardings(config, on))
  sharded = transformer.build_model(config, on)
  got = jax.jit(sharded.apply)(params, *on.place(inputs))[0]
  np.testing.assert_allclose(got, want, atol=2e-4)
  if 'expert' in axes:
    gate = params['layers']['gate']
    assert gate.addressable_shards[0].data.shape == (2, 2, 16, 24)


def test_a_long_text_changes_no_other_text_of_its_batch():
  """With longrope each text has the factors of its own length, alone, packed and generated."""
  config = pretrained.read_config(DATA / 'phi3_long')  # long from nine tokens
  params = pretrained.load_parameters(DATA / 'phi3_long', config)
  model = transformer.build_model(config)
  options = sampler.SamplingOptions(max_new_tokens=6, temperature=0.0)
  generate = sampler.build_sampler(model, options, (-1,), pad_id=0)
  key = jax.random.key(0)
  mask = pad_left(MASK)
  prompts = Prompts(
    tokens=jnp.asarray(pad_left(TOKENS)), mask=jnp.asarray(mask), index=jnp.arange(3)
  )
  together = generate(params, prompts, key)
  for row, length in enumerate(LENGTHS):
    one = jax.tree.map(lambda values, row=row: values[row : row + 1], prompts)
    alone = generate(params, one, key)
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
    np.testing.assert_allclose(alone.logprobs[0], together.logprobs[row], atol=1e-5)
    # Each token as a whole reading of the text up to it has it, also where the text becomes long.
    text = list(TOKENS[row, :length])
    for token, logprob in zip(np.asarray(alone.tokens[0]), np.asarray(alone.logprobs[0])):
      padded = jnp.asarray([text + [0] * (18 - len(text))])
      positions = jnp.arange(18)[None]
      segments = (positions < len(text)).astype(jnp.int32)
      hidden = compiled_apply(config)(params, padded, positions, segments)[0]
      logits = heads.next_token_logits(model, params, hidden[0, len(text) - 1])
      assert np.argmax(logits) == token
      np.testing.assert_allclose(jax.nn.log_softmax(logits)[token], logprob, atol=1e-4)
      text.append(int(token))
