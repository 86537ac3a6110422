"""Adapters in the stages: one frozen base for all models.

Their state and files hold only what is trained.
"""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from rlhf_jax import stages, testing
from rlhf_jax.errors import UserError
from rlhf_jax.experiment import pipeline
from rlhf_jax.interop import peft_io, pretrained
from rlhf_jax.models import lora, quantised, transformer
from rlhf_jax.models.lora import LoraOptions
from rlhf_jax.runtime import checkpoint
from rlhf_jax.stages.shared import model_sources, model_store
from rlhf_jax.stages.shared.model_store import ModelStore

SHAPE = transformer.ModelConfig(
  vocab_size=384,
  embed=64,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=16,
  mlp=128,
  max_length=256,
)
ADAPTERS = LoraOptions(rank=2)


@pytest.fixture(scope='module')
def base(tmp_path_factory, tokenizer):
  """A random model at rest, of a size that says something."""
  directory = tmp_path_factory.mktemp('models') / 'base'
  params = transformer.build_model(SHAPE).init(jax.random.key(0))
  params = jax.tree.map(lambda x: 2 * x if x.ndim > 2 else x, params)
  pretrained.export_model(directory, SHAPE, params, tokenizer)
  return str(directory)


def size(tree):
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def ranks(*names):
  return [f'{name}.lora.rank=2' for name in names]


def build(made):
  stage = stages.find(made.section.kind)
  module = __import__(stage.run.__module__, fromlist=['build'])
  return module.build(made, made.read_options(stage))


def read(name, layout, workdir=None, names=(), kind='float32'):
  source = model_sources.find_model(name, workdir, names)
  return model_store.read_parameters(source, layout, kind, {})


def test_only_adapters_are_trained(context, base):
  """State and optimizer are of the adapters' size; the base stays as it is; the loss falls."""
  stage = build(
    context(
      'sft',
      f'sft.init={base}',
      *ranks('sft'),
      'sft.optimizer.learning_rate=1e-2',
      'sft.optimizer.warmup_steps=0',
    )
  )
  state = stage.init()
  batch = next(stage.batches)
  # Rank 2, of seven matrices.
  adapters = SHAPE.layers * 2 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 128))
  assert size(state.trained) == 4 * adapters
  # Two moments and counts.
  assert size(state.opt_state) == pytest.approx(2 * size(state.trained), abs=64)
  frozen = jax.device_get(state.frozen)
  assert size(frozen) > 5 * size(state.trained)
  losses = []
  for _ in range(8):
    state, metrics = stage.step(state, batch)
    losses.append(float(metrics['loss']))
  assert losses[-1] < losses[0] - 0.1
  jax.tree.map(np.testing.assert_array_equal, frozen, jax.device_get(state.frozen))


@pytest.mark.parametrize('kind', ['float32', 'int8'])
def test_same_numbers_on_every_mesh(context, base, kind):
  if kind in quantised.QUANTISED_KINDS:
    pytest.importorskip('qwix')

  def train(mesh):
    made = context(
      'sft',
      f'sft.init={base}',
      *ranks('sft'),
      f'sft.lora.base={kind}',
      'sft.optimizer.eps=1e-5',
      layout=testing.make_layout(mesh),
    )
    stage = build(made)
    state = stage.init()
    for _ in range(2):
      state, metrics = stage.step(state, next(stage.batches))
    return jax.device_get((state.trained, metrics['loss']))

  want = train('one device')
  testing.assert_trees_close(train('data 2, fsdp 2, tensor 2'), want, kind)


def test_models_of_a_stage_share_their_base(context, base):
  store = ModelStore(context('ppo', *ranks('ppo')), ADAPTERS)
  ways = (dict(trained=True), dict(), dict(head=True, trained=True))
  trees = [store.open(base, **how).read() for how in ways]

  def frozen_places(tree):
    leaves = jax.tree_util.tree_leaves_with_path(lora.split_trainable(tree)[1] or tree)
    return {
      path: leaf.unsafe_buffer_pointer()
      for path, leaf in leaves
      if 'score' not in jax.tree_util.keystr(path)
    }

  def trained_places(tree):
    leaves = jax.tree.leaves(lora.split_trainable(tree)[0])
    return {leaf.unsafe_buffer_pointer() for leaf in leaves}

  places = [frozen_places(tree) for tree in trees]
  assert places[0] == places[1] == places[2]
  # Each is donated by a step.
  assert not trained_places(trees[0]) & trained_places(trees[2])


def test_what_does_not_fit_is_refused(context, base, tmp_path):
  def open_trained(name, adapters=ADAPTERS, **how):
    return ModelStore(context('sft', **how), adapters).open(name, trained=True)

  message = 'config.sft.lora: adapters need a trained model to stand on, but init is random'
  with pytest.raises(UserError, match=message):
    open_trained('random')
  with pytest.raises(UserError, match='targets: expected some of query, .*, got querry'):
    open_trained(base, LoraOptions(rank=2, targets=('querry',)))
  layout = dataclasses.replace(testing.make_layout('fsdp 8'), rollout_tensor=2)
  message = 'config.mesh.rollout_tensor: expected 0 where lora.base is int8'
  with pytest.raises(UserError, match=message):
    open_trained(base, LoraOptions(rank=2, base='int8'), layout=layout)
  config = dataclasses.replace(SHAPE, lora_rank=4, lora_targets=('query',))
  params = transformer.build_model(config).init(jax.random.key(0))
  peft_io.save_adapters(tmp_path / 'adapter', config, params, base)
  message = "adapters of .*'lora_rank': 4.*expected .*'lora_rank': 2"
  with pytest.raises(UserError, match=message):
    open_trained(str(tmp_path / 'adapter'))


def test_adapters_keep_the_template_they_were_trained_with(base, tokenizer, tmp_path):
  config = dataclasses.replace(SHAPE, lora_rank=4, lora_targets=SHAPE.matrices)
  params = transformer.build_model(config).init(jax.random.key(0))
  other = tokenizer.with_template('{{ eos_token }}')
  for saved, template in ((None, tokenizer.template), (other, other.template)):
    peft_io.save_adapters(tmp_path / 'adapter', config, params, base, tokenizer=saved)
    source = model_sources.find_model(str(tmp_path / 'adapter'))
    assert source.tokenizer().template == template


def test_a_model_with_adapters_is_trained_whole_after_they_are_merged(context, base, tmp_path):
  config = dataclasses.replace(SHAPE, lora_rank=4, lora_targets=SHAPE.matrices)
  params = transformer.build_model(config).init(jax.random.key(0))
  new, _ = lora.split_trainable(jax.tree.map(lambda x: x + 0.1, params))
  adapter = str(tmp_path / 'adapter')
  peft_io.save_adapters(tmp_path / 'adapter', config, new, base)
  made = context('sft')
  opened = ModelStore(made).open(adapter, trained=True)
  assert opened.model.config.lora_rank == 0
  want = lora.merge_adapters(config, read(adapter, made.layout))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), opened.read(), want)


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, experiment',
  [
    ('pretrain', 'quickstart'),
    ('sft', 'quickstart'),
    ('ppo', 'quickstart'),
    ('dpo', 'dpo'),
    ('reward', 'quickstart'),
    ('rloo', 'rloo'),
    ('online_dpo', 'online_dpo'),
  ],
)
def test_a_step_of_every_stage_moves_adapters_only(context, base, tmp_path, name, experiment):
  messages = [dict(role='user', content='Hi?')]
  pair = json.dumps(dict(messages=messages, chosen='Hello.', rejected='No.')) + '\n'
  for split in ('train', 'validation'):
    (tmp_path / f'{split}.jsonl').write_text(pair * 16)
  own = []
  if name in ('ppo', 'rloo', 'online_dpo'):
    has_an_e = "rlhf_jax.rewards.builtin.text:matches(pattern='.*e.*')"
    own = [f'{name}.reward=("{has_an_e}",)', f'{name}.reference={base}']
  if name == 'dpo':
    own = [f'dpo.reference={base}']
  if name in ('dpo', 'reward'):
    own += [f'{name}.data.source=jsonl', f'{name}.data.path=("{tmp_path}/{{split}}.jsonl",)']
  made = context(
    name,
    f'{name}.init={base}',
    f'tokenizer.init={base}',
    *ranks(name),
    *own,
    experiment=experiment,
  )
  stage = build(made)
  state = stage.init()
  trained, frozen = jax.device_get((state.trained, state.frozen))
  # PPO has the value model's too.
  assert size(state.opt_state) == pytest.approx(2 * size(trained), rel=0.5)
  for _ in range(2):  # the first learning rate is 0
    state, _ = stage.step(state, next(stage.batches))
  jax.tree.map(np.testing.assert_array_equal, frozen, jax.device_get(state.frozen))
  after = jax.device_get(state.trained)
  moved = jax.tree.map(lambda x, y: bool((x != y).any()), trained, after)
  assert any(jax.tree.leaves(moved))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['float32', 'nf4'])
def test_every_step_with_adapters(quickstart, base, tmp_path, own_cache, kind):
  """SFT → reward → PPO on one base, eight devices; a cut run goes on; exports are one model."""
  trained = ('sft', 'reward', 'ppo')
  config = pipeline.load_config(
    quickstart,
    [
      f'sft.init={base}',
      f'tokenizer.init={base}',
      'ppo.batch_size=16',
      f'stages={("sft", "feedback", "reward", "ppo")}',
      'feedback.policies=("sft",)',
      'reward.likelihood=False',  # such a head has no export
      'evaluation.num_samples=2',
      *ranks(*trained),
      *(f'{stage}.lora.base={kind}' for stage in trained),
    ],
  )
  results = pipeline.run(config, tmp_path)
  assert set(results['models']) == {'sft', 'ppo'}
  source = model_sources.find_model('ppo', tmp_path, config.stages)
  layout = testing.make_layout()
  model = transformer.build_model(source.config)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  abstract = jax.tree.map(
    lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
    shapes,
    layout.shardings(model.axes, shapes),
  )
  adapters, _ = lora.split_trainable(abstract)

  def saved():
    restored = checkpoint.restore_params(tmp_path / 'ppo/checkpoints', adapters)
    return jax.device_get(dict(restored))

  last = saved()
  for name in ('finished.json', 'done.json', 'checkpoints/4'):
    place = tmp_path / 'ppo' / name
    shutil.rmtree(place) if place.is_dir() else place.unlink()
  (tmp_path / 'results.json').unlink()
  assert pipeline.run(config, tmp_path)['models'] == results['models']
  jax.tree.map(np.testing.assert_array_equal, saved(), last)

  for stage in trained:
    params = read(stage, layout, tmp_path, config.stages)
    adapter = str(tmp_path / stage / 'adapter')
    of_adapter = read(adapter, layout)
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((of_adapter, params)))
    export = read(str(tmp_path / stage / 'export'), layout)
    # Merged into the base as it was kept.
    config_of_adapter = model_sources.find_model(adapter).config
    merged = lora.merge_adapters(config_of_adapter, read(adapter, layout, kind=kind))
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
      *jax.device_get((export, merged)),
    )
