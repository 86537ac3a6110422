"""Adapters in the stages: one frozen base for all models, state and files of what is trained alone."""

import dataclasses
import importlib
import json
import shutil

import jax
import numpy as np
import pytest

from rlhf_jax import pipeline
from rlhf_jax.errors import UserError
from rlhf_jax.interop import peft_io, pretrained
from rlhf_jax.models import lora, quantised, transformer
from rlhf_jax.runtime import checkpoint, mesh
from rlhf_jax.stages import sft
from rlhf_jax.stages.shared import common, model_sources

SHAPE = transformer.ModelConfig(vocab_size=384, embed=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=128,
                                max_length=256)


@pytest.fixture(scope='module')
def base(tmp_path_factory, tokenizer):
  """A random model at rest, of a size that says something."""
  directory = tmp_path_factory.mktemp('models') / 'base'
  params = transformer.build_model(SHAPE).init(jax.random.key(0))
  pretrained.export_model(directory, SHAPE, jax.tree.map(lambda x: 2 * x if x.ndim > 2 else x, params), tokenizer)
  return str(directory)


def size(tree):
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def overrides(*stages, rank=2):
  return [f'{stage}.lora.rank={rank}' for stage in stages]


def test_only_adapters_are_trained(context, base):
  """State and optimizer are of the adapters' size; the base stays as it is; the loss falls."""
  stage = sft.build(context('sft', f'sft.init={base}', *overrides('sft'), 'sft.optimizer.learning_rate=1e-2',
                            'sft.optimizer.warmup_steps=0'))
  state, batch, losses = stage.init(), next(stage.batches), []
  adapters = SHAPE.layers * 2 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 128))  # rank 2, of seven matrices
  assert size(state.trained) == 4 * adapters
  assert size(state.opt_state) == pytest.approx(2 * size(state.trained), abs=64)  # two moments and counts
  frozen = jax.device_get(state.frozen)
  assert size(frozen) > 5 * size(state.trained)
  for _ in range(8):
    state, metrics = stage.step(state, batch)
    losses.append(float(metrics['loss']))
  assert losses[-1] < losses[0] - 0.1
  jax.tree.map(np.testing.assert_array_equal, frozen, jax.device_get(state.frozen))


@pytest.mark.parametrize('kind', ['float32', 'int8'])
def test_same_numbers_on_every_mesh(context, base, tiny, kind):
  if kind in quantised.SMALL:
    pytest.importorskip('qwix')
  def train(on):
    stage = sft.build(context('sft', f'sft.init={base}', *overrides('sft'), f'sft.lora.base={kind}',
                              'sft.optimizer.eps=1e-5', on=on))
    state = stage.init()
    for _ in range(2):
      state, metrics = stage.step(state, next(stage.batches))
    return jax.device_get((state.trained, metrics['loss']))
  tiny.close(train(tiny.layout('data 2, fsdp 2, tensor 2')), train(tiny.layout()), kind)


def test_models_of_a_stage_share_their_base(context, base):
  made = context('ppo', *overrides('ppo'))
  trees = [common.open_model(made, base, **how)[1]() for how in (
      dict(trained=True), dict(), dict(head=True, trained=True), dict(head=True))]
  places = [{path: leaf.unsafe_buffer_pointer() for path, leaf in jax.tree_util.tree_leaves_with_path(lora.split_trainable(tree)[1] or tree)
             if 'score' not in jax.tree_util.keystr(path)} for tree in trees]
  assert places[0] == places[1] == places[2] == places[3]
  trained = [{leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(lora.split_trainable(tree)[0])} for tree in (trees[0], trees[2])]
  assert not trained[0] & trained[1]  # each is given up by a step


def test_what_does_not_fit_is_refused(context, base, tmp_path, tiny):
  with pytest.raises(UserError, match='config.sft.lora: adapters stand on a model that stays, but init is random'):
    common.open_model(context('sft', *overrides('sft')), 'random', trained=True)
  with pytest.raises(UserError, match='targets: expected some of query, .*, got querry'):
    common.open_model(context('sft', *overrides('sft'), 'sft.lora.targets=("querry",)'), base, trained=True)
  with pytest.raises(UserError, match='config.mesh.rollout_tensor: expected 0 where lora.base is int8'):
    on = dataclasses.replace(mesh.make_layout({**mesh.DEFAULTS, 'data': 1, 'fsdp': 8}), rollout_tensor=2)
    common.open_model(context('sft', *overrides('sft'), 'sft.lora.base=int8', on=on), base, trained=True)
  config = dataclasses.replace(SHAPE, lora_rank=4, lora_targets=('query',))
  peft_io.save_adapters(tmp_path / 'adapter', config, transformer.build_model(config).init(jax.random.key(0)), base)
  with pytest.raises(UserError, match="adapters of .*'lora_rank': 4.*expected .*'lora_rank': 2"):
    common.open_model(context('sft', *overrides('sft')), str(tmp_path / 'adapter'), trained=True)


def test_adapters_keep_the_template_they_were_trained_with(base, tokenizer, tmp_path):
  config = dataclasses.replace(SHAPE, lora_rank=4, lora_targets=SHAPE.matrices)
  params, other = transformer.build_model(config).init(jax.random.key(0)), tokenizer.with_template('{{ eos_token }}')
  for made, template in ((None, tokenizer.template), (other, other.template)):
    peft_io.save_adapters(tmp_path / 'adapter', config, params, base, tokenizer=made)
    assert model_sources.find_model(str(tmp_path / 'adapter')).tokenizer().template == template


def test_a_model_with_adapters_is_trained_whole_after_they_are_added(context, base, tmp_path):
  config = dataclasses.replace(SHAPE, lora_rank=4, lora_targets=SHAPE.matrices)
  params = transformer.build_model(config).init(jax.random.key(0))
  new = lora.split_trainable(jax.tree.map(lambda x: x + 0.1, params))[0]
  peft_io.save_adapters(tmp_path / 'adapter', config, new, base)
  made = context('sft')
  model, read = common.open_model(made, str(tmp_path / 'adapter'), trained=True)
  assert model.config.lora_rank == 0
  whole = model_sources.read_parameters(model_sources.find_model(str(tmp_path / 'adapter')), made.layout, 'float32', {})
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), read(), lora.merge_adapters(config, whole))


@pytest.mark.slow
@pytest.mark.parametrize('name, experiment', [
    ('pretrain', 'quickstart'), ('sft', 'quickstart'), ('ppo', 'quickstart'), ('dpo', 'dpo'), ('reward', 'quickstart'),
    ('rloo', 'rloo'), ('online_dpo', 'online_dpo')])
def test_a_step_of_every_stage_moves_adapters_only(context, base, tmp_path, name, experiment):
  pair = json.dumps(dict(messages=[dict(role='user', content='Hi?')], chosen='Hello.', rejected='No.')) + '\n'
  for split in ('train', 'validation'):
    (tmp_path / f'{split}.jsonl').write_text(pair * 16)
  own = {'dpo': [f'dpo.reference={base}'], 'pretrain': [], 'sft': [], 'reward': []}.get(name, [
      f'{name}.reward=("rlhf_jax.rewards.builtin.text:matches(pattern=\'.*e.*\')",)', f'{name}.reference={base}'])
  if name in ('dpo', 'reward'):
    own += [f'{name}.data.source=jsonl', f'{name}.data.path=("{tmp_path}/{{split}}.jsonl",)']
  made = context(name, f'{name}.init={base}', f'tokenizer.init={base}', *overrides(name), *own, experiment=experiment)
  kind = made.section.get('kind', name)
  stage = importlib.import_module(f'rlhf_jax.stages.{kind}').build(made)
  state = stage.init()
  trained, frozen = jax.device_get((state.trained, state.frozen))
  assert size(state.opt_state) == pytest.approx(2 * size(trained), rel=0.5)  # PPO has the value model's too
  for _ in range(2):  # the first rate is 0
    state, _ = stage.step(state, next(stage.batches))
  jax.tree.map(np.testing.assert_array_equal, frozen, jax.device_get(state.frozen))
  moved = jax.tree.map(lambda x, y: bool((x != y).any()), trained, jax.device_get(state.trained))
  assert any(jax.tree.leaves(moved))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['float32', 'nf4'])
def test_every_step_with_adapters(tiny, base, tmp_path, own_cache, kind):
  """SFT → reward → PPO on one base, eight devices; a cut run goes on; adapters and merged exports are one model."""
  trained = ('sft', 'reward', 'ppo')
  config = pipeline.load_config(tiny.EXPERIMENT, [
      f'sft.init={base}', f'tokenizer.init={base}', 'ppo.batch_size=16', f"stages={('sft', 'feedback', 'reward', 'ppo')}",
      'feedback.policies=("sft",)', *overrides(*trained), *(f'{stage}.lora.base={kind}' for stage in trained)])
  results = pipeline.run(config, tmp_path)
  assert set(results['models']) == {'sft', 'ppo'}
  saved = lambda: jax.device_get(dict(checkpoint.restore_params(tmp_path / 'ppo/checkpoints', shapes)))
  source = model_sources.find_model('ppo', tmp_path, config.stages)
  on = tiny.layout()
  model = transformer.build_model(source.config)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  shapes = lora.split_trainable(jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes,
                                   on.shardings(model.axes, shapes)))[0]
  last = saved()
  for name in ('finished.json', 'done.json', 'checkpoints/4'):
    place = tmp_path / 'ppo' / name
    shutil.rmtree(place) if place.is_dir() else place.unlink()
  (tmp_path / 'results.json').unlink()
  assert pipeline.run(config, tmp_path)['models'] == results['models']
  jax.tree.map(np.testing.assert_array_equal, saved(), last)

  for stage in trained:
    params = model_sources.read_parameters(model_sources.find_model(stage, tmp_path, config.stages), on, 'float32', {})
    adapter = model_sources.find_model(str(tmp_path / stage / 'adapter'))
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((model_sources.read_parameters(adapter, on, 'float32', {}), params)))
    export = model_sources.find_model(str(tmp_path / stage / 'export'))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
                 *jax.device_get((model_sources.read_parameters(export, on, 'float32', {}), lora.merge_adapters(
                     adapter.config, model_sources.read_parameters(adapter, on, kind, {})))))  # onto the base as it was kept
