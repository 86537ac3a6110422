"""Where parameters and optimizer state lie: cut over all devices from their first moment on."""

import jax
import pytest

from rlhf_jax import config as configs
from rlhf_jax import pipeline
from rlhf_jax.runtime import checkpoint, mesh
from rlhf_jax.stages import pretrain
from rlhf_jax.stages.shared import common, model_sources


@pytest.fixture(scope='module')
def context(tiny, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  config = pipeline.load_config(tiny.EXPERIMENT, ["stages=('pretrain','sft')", 'mesh.data=1', 'mesh.fsdp=8'])
  config = configs.resolve(config, workdir=workdir, data=config.data)
  return common.Context(config, 'pretrain', workdir, mesh.make_layout(config.mesh), pipeline.open_tokenizer(config, workdir))


def whole(tree):
  """Names of the arrays with more than a scalar of which some device holds more than an eighth."""
  return [jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if leaf.size > 2 and max(
      shard.data.size for shard in leaf.addressable_shards) > leaf.size // 8]


def test_no_array_is_whole_on_a_device(context):
  """In init, train step, restore and import."""
  stage = pretrain.build(context)
  state = stage.init()
  assert len(jax.tree.leaves(state)) > 30 and whole(state) == []
  state, _ = stage.step(state, next(stage.batches))
  assert whole(state) == []
  saver = checkpoint.Checkpoints(context.directory / 'checkpoints')
  saver.save(1, state, {}, {})
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
  assert whole(saver.restore(abstract)[0]) == []
  saver.close()
  _, read = common.open_model(context, 'pretrain')
  assert whole(read()) == []
  common.export(context, state.params)
  _, read = common.open_model(context, str(context.directory / 'export'))
  assert whole(read()) == []


def test_what_the_models_need(tiny):
  """PPO is the heaviest stage: policy and value model trained, reference and reward frozen, all of one shape."""
  need = model_sources.mesh_need(pipeline.load_config(tiny.EXPERIMENT, ['tokenizer.vocab_size=512', 'ppo.batch_size=16']))
  layers = 2 * (2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)  # norms, queries and output, keys and values, MLP
  assert need == mesh.MeshNeed(parameters=512 * 32 + 32 + layers, state=40 * (512 * 32 + 32 + layers),
                           decoded=4 * (512 * 32 + 32 + layers), rows=8, width=32, heads=1)
