"""Where parameters and optimizer state lie: sharded over all devices from their first moment on."""

import jax
import pytest

from rlhf_jax.experiment import config as configs
from rlhf_jax.experiment import pipeline
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.mesh_choice import MeshNeed
from rlhf_jax.stages import pretrain
from rlhf_jax.stages.shared import mesh_need, training
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.model_store import ModelStore


@pytest.fixture(scope='module')
def context(quickstart, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  config = pipeline.load_config(
    quickstart, ["stages=('pretrain','sft')", 'mesh.data=1', 'mesh.fsdp=8']
  )
  config = configs.resolve(config, workdir=workdir, data=config.data)
  layout = pipeline.make_layout(config, workdir)
  tokenizer = pipeline.open_tokenizer(config, workdir)
  return Context(config, 'pretrain', workdir, layout, tokenizer)


def unsharded(tree):
  """Names of the arrays with more than a scalar of which some device holds more than an eighth."""
  names = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    largest = max(shard.data.size for shard in leaf.addressable_shards)
    if leaf.size > 2 and largest > leaf.size // 8:
      names.append(jax.tree_util.keystr(path))
  return names


def test_no_array_is_whole_on_a_device(context):
  """In init, train step, restore and import."""
  stage = pretrain.build(context, context.read_options(pretrain.STAGE))
  state = stage.init()
  assert len(jax.tree.leaves(state)) > 30 and unsharded(state) == []
  state, _ = stage.step(state, next(stage.batches))
  assert unsharded(state) == []
  saver = checkpoint.Checkpoints(context.directory / 'checkpoints')
  saver.save(1, state, {}, {})
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  assert unsharded(saver.restore(abstract)[0]) == []
  saver.close()
  assert unsharded(ModelStore(context).open('pretrain').read()) == []
  training.export(context, state.params)
  exported = ModelStore(context).open(str(context.directory / 'export'))
  assert unsharded(exported.read()) == []


def test_what_the_models_need(quickstart):
  """PPO is the heaviest stage: policy and value model trained, reference and reward frozen."""
  overrides = ['tokenizer.vocab_size=512', 'ppo.batch_size=16']
  need = mesh_need.compute_mesh_need(pipeline.load_config(quickstart, overrides))
  # Two layers of norms, queries and output, keys and values, MLP.
  layers = 2 * (2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
  parameters = 512 * 32 + 32 + layers
  assert need == MeshNeed(
    parameters=parameters,
    state=40 * parameters,
    decoded=4 * parameters,
    rows=8,
    width=32,
    heads=1,
  )
