import functools

import jax
import numpy as np
import pytest

from rlhf_jax import testing
from rlhf_jax.data import batches
from rlhf_jax.models import heads
from rlhf_jax.stages import sft
from rlhf_jax.stages.shared import supervised, training
from rlhf_jax.types import Sequences


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
  names = ('tokens', 'positions', 'segment_ids')
  fields = {name: np.zeros((len(rows), length), np.int32) for name in names}
  mask = np.zeros((len(rows), length), np.float32)
  for b, row in enumerate(rows):
    start = 0
    for number, example in enumerate(row, 1):
      end = start + len(example['tokens'])
      fields['tokens'][b, start:end] = example['tokens']
      fields['positions'][b, start:end] = np.arange(end - start)
      fields['segment_ids'][b, start:end] = number
      mask[b, start:end] = example['targets']
      start = end
  return Sequences(**fields, loss_mask=mask)


def alone(rows, length=12):
  return packed([[example] for example in rows], length)


@functools.cache
def compiled(mesh, parts):
  definitions = testing.make_definitions(testing.make_layout(mesh))
  options = sft.Options(microbatches=parts)
  return definitions, training.compile_train_step(sft.train_step, definitions, options)


def train(batch, mesh='one device', parts=1, count=1):
  """(parameters, metrics of each step) after some steps on one batch."""
  definitions, step = compiled(mesh, parts)
  state = testing.make_state(definitions)
  history = []
  for _ in range(count):
    state, metrics = step(state, batch)
    history.append(jax.device_get(metrics))
  return jax.device_get(state.params), history


@pytest.fixture(scope='module')
def first():
  return train(alone(examples()))


def test_loss_is_the_mean_nll_of_the_targets():
  model = testing.make_model()
  params = testing.make_params(model)
  rows = examples(4)
  total, count = 0.0, 0
  for row in rows:  # each text alone, without padding, over all logits
    tokens = row['tokens'][None]
    positions = np.arange(tokens.shape[1])[None]
    hidden, _ = model.apply(params, tokens, positions, np.ones_like(tokens))
    logits = heads.next_token_logits(model, params, hidden[0, :-1])
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    for place in np.flatnonzero(row['targets']):
      total -= logprobs[place - 1, row['tokens'][place]]
      count += 1
  metrics = train(alone(rows))[1][0]
  np.testing.assert_allclose(metrics['loss'], total / count, rtol=1e-5)
  assert metrics['tokens'] == sum(len(row['tokens']) for row in rows)


def test_loss_falls():
  _, history = train(alone(examples()), count=8)
  assert history[-1]['loss'] < 0.8 * history[0]['loss']


@pytest.mark.parametrize(
  'mesh', ['fsdp 8', 'data 4, tensor 2', 'data 2, context 4', 'data 2, fsdp 2, tensor 2']
)
def test_same_numbers_on_every_mesh(first, mesh):
  testing.assert_trees_close(train(alone(examples()), mesh, 2), first, mesh)


def test_muon_trains_alike_on_every_mesh():
  trained = {}
  for mesh in ('one device', 'data 2, fsdp 2, tensor 2'):
    layout = testing.make_layout(mesh)
    optimizer = testing.make_optimizer(name='muon', weight_decay=0.1)
    definitions = training.Definitions(testing.make_model(layout), optimizer, layout)
    step = training.compile_train_step(sft.train_step, definitions, sft.Options())
    state = testing.make_state(definitions)
    for _ in range(3):
      state, metrics = step(state, alone(examples()))
    trained[mesh] = jax.device_get((state.params, metrics))
  testing.assert_trees_close(*trained.values(), 'muon')


def test_microbatches_padding_and_order_change_nothing(first):
  rows = examples()
  testing.assert_trees_close(train(alone(rows), parts=4), first, 'micro-batches')
  shuffled = [rows[i] for i in np.random.default_rng(1).permutation(32)]
  testing.assert_trees_close(train(alone(shuffled)), first, 'order')
  testing.assert_trees_close(train(alone(rows, 19)), first, 'more padding')
  left = jax.tree.map(lambda x: np.pad(x, ((0, 0), (5, 2))), alone(rows))
  testing.assert_trees_close(train(left), first, 'padding on the left')
  other = alone(rows)
  other = other.replace(tokens=np.where(other.segment_ids > 0, other.tokens, 63))
  testing.assert_trees_close(train(other), first, 'what the padding holds')


def test_packed_is_unpacked(first):
  rows = examples()
  four_in_a_row = [rows[i : i + 4] for i in range(0, 32, 4)]
  testing.assert_trees_close(train(packed(four_in_a_row, 48)), first, 'packed')


def test_evaluation_is_over_every_target_once():
  rows = examples(27)
  layout = testing.make_layout('data 8')
  model = testing.make_model(layout)
  params = testing.make_params(model, layout)
  measure = supervised.build_evaluation(model, layout, rows, 8, 12)
  loss, count = measure(params)
  batch = layout.place(next(batches.sequences_once(rows, 32, 12)))
  value = supervised.loss(params, batch, model)
  assert count == sum(row['targets'].sum() for row in rows)
  np.testing.assert_allclose(loss, value.total / value.weight, rtol=1e-5)


def test_sft_learns_the_response_and_its_end_only(context):
  made = context('sft')
  stage = sft.build(made, made.read_options(sft.STAGE))
  batch = next(stage.batches)
  targets = batch.loss_mask > 0
  assert targets.any() and not targets[batch.positions == 0].any()
  ends = (batch.tokens == made.tokenizer.eos_id) & (batch.segment_ids > 0)
  assert ends.any() and targets[ends].all()
  ids = batch.tokens[0][targets[0]].tolist()
  text = made.tokenizer.core.decode(ids, skip_special_tokens=False)
  assert 'Human:' not in text and 'Assistant:' not in text
