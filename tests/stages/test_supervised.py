import functools

import jax
import ml_collections
import numpy as np
import pytest

from rlhf_jax.data import batches
from rlhf_jax.models import heads
from rlhf_jax.runtime import step as steps
from rlhf_jax.stages.shared import supervised
from rlhf_jax.types import Sequences

OPTIMIZER = ml_collections.ConfigDict({**steps.OPTIMIZER, 'learning_rate': 1e-2, 'eps': 1e-5})  # not all noise


def examples(count=32, seed=0):
  """Random texts of 3 to 12 tokens; the first third of each is a prompt."""
  rng = np.random.default_rng(seed)
  made = []
  for length in rng.integers(3, 13, count):
    targets = (np.arange(length) >= max(1, length // 3)).astype(np.float32)
    made.append({'tokens': rng.integers(2, 64, length).astype(np.int32), 'targets': targets})
  return made


def packed(rows, length):
  """Lists of examples → a batch with a list in each row."""
  fields = {name: np.zeros((len(rows), length), np.int32) for name in ('tokens', 'positions', 'segment_ids')}
  mask = np.zeros((len(rows), length), np.float32)
  for b, row in enumerate(rows):
    start = 0
    for number, example in enumerate(row, 1):
      place = slice(start, start := start + len(example['tokens']))
      fields['tokens'][b, place], mask[b, place] = example['tokens'], example['targets']
      fields['positions'][b, place], fields['segment_ids'][b, place] = np.arange(len(example['tokens'])), number
  return Sequences(**fields, loss_mask=mask)


def alone(rows, length=12):
  return packed([[example] for example in rows], length)


@functools.cache
def build(tiny, mesh, parts):
  on = tiny.layout(mesh)
  model, optimizer = tiny.model(on), steps.make_optimizer(OPTIMIZER, 10)
  init = lambda: steps.create_train_state(tiny.params(model, on), optimizer, jax.random.key(1), on)
  return init, steps.build(supervised.build_loss(model), optimizer, on, parts)


def train(tiny, batch, mesh='one device', parts=1, count=1):
  """(parameters, metrics of each step) after some steps on one batch."""
  init, step = build(tiny, mesh, parts)
  state, history = init(), []
  for _ in range(count):
    state, metrics = step(state, batch)
    history.append(jax.device_get(metrics))
  return jax.device_get(state.params), history


@pytest.fixture(scope='module')
def first(tiny):
  return train(tiny, alone(examples()))


def test_loss_is_the_mean_nll_of_the_targets(tiny):
  on = tiny.layout()
  model, rows = tiny.model(on), examples(4)
  params = tiny.params(model, on)
  total, count = 0.0, 0
  for row in rows:  # each text alone, without padding, over all logits
    tokens = row['tokens'][None]
    hidden, _ = model.apply(params, tokens, np.arange(tokens.shape[1])[None], np.ones_like(tokens))
    logprobs = np.asarray(jax.nn.log_softmax(heads.next_token_logits(model, params, hidden[0, :-1])))
    for place in np.flatnonzero(row['targets']):
      total, count = total - logprobs[place - 1, row['tokens'][place]], count + 1
  metrics = train(tiny, alone(rows))[1][0]
  np.testing.assert_allclose(metrics['loss'], total / count, rtol=1e-5)
  assert metrics['tokens'] == sum(len(row['tokens']) for row in rows)


def test_loss_falls(tiny):
  _, history = train(tiny, alone(examples()), count=8)
  assert history[-1]['loss'] < 0.8 * history[0]['loss']


@pytest.mark.parametrize('mesh', ['fsdp 8', 'data 4, tensor 2', 'data 2, context 4', 'data 2, fsdp 2, tensor 2'])
def test_same_numbers_on_every_mesh(tiny, first, mesh):
  tiny.close(train(tiny, alone(examples()), mesh, 2), first, mesh)


def test_microbatches_padding_and_order_change_nothing(tiny, first):
  rows = examples()
  tiny.close(train(tiny, alone(rows), parts=4), first, 'micro-batches')
  tiny.close(train(tiny, alone([rows[i] for i in np.random.default_rng(1).permutation(32)])), first, 'order')
  tiny.close(train(tiny, alone(rows, 19)), first, 'more padding')
  left = jax.tree.map(lambda x: np.pad(x, ((0, 0), (5, 0))), alone(rows))
  tiny.close(train(tiny, left), first, 'padding on the left')
  other = alone(rows)
  other = other.replace(tokens=np.where(other.segment_ids > 0, other.tokens, 63))
  tiny.close(train(tiny, other), first, 'what the padding holds')


def test_packed_is_unpacked(tiny, first):
  rows = examples()
  tiny.close(train(tiny, packed([rows[i:i + 4] for i in range(0, 32, 4)], 48)), first, 'packed')


def test_evaluation_is_over_every_target_once(tiny, first):
  rows = examples(27)
  on = tiny.layout('data 8')
  model = tiny.model(on)
  measure = supervised.build_evaluation(model, on, rows, 8, 12)
  loss, count = measure(tiny.params(model, on))
  batch = on.place(next(batches.sequences_once(rows, 32, 12)))
  value = supervised.build_loss(model)(tiny.params(model, on), batch, None)
  assert count == sum(row['targets'].sum() for row in rows)
  np.testing.assert_allclose(loss, value.total / value.weight, rtol=1e-5)


def test_sft_learns_the_response_and_its_end_only(context):
  from rlhf_jax.stages import sft
  made = context('sft')
  batch = next(sft.build(made).batches)
  targets = batch.loss_mask > 0
  assert targets.any() and not targets[batch.positions == 0].any()
  ends = (batch.tokens == made.tokenizer.eos_id) & (batch.segment_ids > 0)
  assert ends.any() and targets[ends].all()
  text = made.tokenizer.core.decode(batch.tokens[0][targets[0]].tolist(), skip_special_tokens=False)
  assert 'Human:' not in text and 'Assistant:' not in text
