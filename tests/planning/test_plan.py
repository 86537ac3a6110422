"""Plans, beside the programs and arrays that they are about."""

import dataclasses
import importlib.util
import json
import math
import os
from pathlib import Path
import subprocess
import sys

import jax
import pytest

from rlhf_jax import options, testing
from rlhf_jax.commands import plan
from rlhf_jax.errors import UserError
from rlhf_jax.experiment import config as configs
from rlhf_jax.experiment import pipeline, planner
from rlhf_jax.feedback.language_judge import ScorerOptions
from rlhf_jax.models import heads
from rlhf_jax.planning import chips, programs, work
from rlhf_jax.runtime import mesh
from rlhf_jax.stages import pretrain
from rlhf_jax.stages.shared import training
from rlhf_jax.stages.shared.context import Context

ROOT = Path(__file__).parents[2]
BATCH = 'ppo.batch_size=16'
QUICKSTART = str(ROOT / 'experiments/quickstart.py:tiny')
jax.devices()  # JAX starts with all eight, not with the one of a plan for cpu:1 that came first
HAS_LIBTPU = importlib.util.find_spec('libtpu') is not None


def ignore(text):
  pass


def plan_quietly(path, *overrides, topology='cpu:8', stage=None, analytic=True, sweep=False):
  return planner.plan_experiment(
    path,
    overrides,
    topology,
    stage=stage,
    analytic=analytic,
    sweep=sweep,
    say=ignore,
  )


def plan_stages(path, *overrides, **options):
  """Name of a stage → its cost."""
  planned = plan_quietly(path, *overrides, **options)
  return {cost.stage: cost for cost in planned.plans[0].stages}


def run_plan(*words, **options):
  return subprocess.run(
    [sys.executable, '-m', 'rlhf_jax.plan', *words],
    capture_output=True,
    text=True,
    cwd=ROOT,
    **options,
  )


@pytest.mark.parametrize(
  'name, sizes, count',
  [
    ('v5p:4x4x8', ('v5p', (4, 4, 8), 1), 128),
    ('2*v5e:16x16', ('v5e', (16, 16), 2), 512),
    ('gpu:8xh100', ('h100', (1, 8), 1), 8),
    ('gpu:4x8xa100', ('a100', (4, 8), 1), 32),
    ('cpu:8', ('cpu', (8,), 1), 8),
  ],
)
def test_names_of_topologies(name, sizes, count):
  parsed = chips.parse_topology(name)
  assert parsed == sizes
  assert math.prod(parsed.sizes) * parsed.slices == count


@pytest.mark.parametrize(
  'name',
  ['v5p', 'v9:2x2', 'gpu:8xv5e', 'h100:8', 'gpu:8', 'cpu:', 'v5e:4x', 'cpu:0', 'gpu:8xcpu'],
)
def test_no_such_topology(name):
  with pytest.raises(UserError, match='expected TPU:SHAPE as v5p:4x4x8'):
    chips.parse_topology(name)


@pytest.mark.parametrize(
  'installed, topology, command',
  [
    ('jax_plugins.xla_cuda12', 'gpu:8xh100', ''),
    ('jax_plugins.xla_cuda13', 'gpu:8xh100', ''),
    ('libtpu', 'gpu:8xh100', "pip install 'rlhf_jax[cuda-plan]'"),
    ('jax_plugins.xla_cuda13', 'v5e:2x2', "pip install 'rlhf_jax[tpu]'"),
  ],
)
def test_either_cuda_plugin_compiles(monkeypatch, installed, topology, command):
  monkeypatch.setattr(chips, '_is_installed', lambda module: module == installed)
  monkeypatch.setattr(chips, '_describe_gpu', lambda parsed: ['a GPU'])
  monkeypatch.setattr(chips, '_cpu_devices', lambda count, name: ['a CPU'])
  opened = chips.open_topology(topology)
  assert opened.missing == command
  assert opened.devices == (['a CPU'] if command else ['a GPU'])


def test_no_plugin_at_all_is_not_installed():
  assert not chips._is_installed('no_such_package.plugin')
  assert chips._is_installed('jax')


def test_only_without_remat_attention_weights_are_kept():
  """Saved under `none`; `dots` saves no products with batch axes, so length counts once."""
  layout = mesh.make_layout(mesh.MeshOptions(), jax.devices()[:1])
  trained = jax.ShapeDtypeStruct((1,), 'float32', sharding=layout.sharding())

  def saved(remat, length):
    config = dataclasses.replace(testing.MODEL_CONFIG, remat=remat, attention='plain')
    update = work.training(config, layout, 8, length, 0, 1, trained)
    return update.saved - work.bytes_on_device(trained)

  assert saved('dots', 64) == 2 * saved('dots', 32)
  assert saved('full', 64) == 2 * saved('full', 32)
  assert saved('none', 64) > 2 * saved('none', 32)


def test_abstract_batches_are_sharded_along_their_rows():
  layout = mesh.make_layout(mesh.MeshOptions(data=4, tensor=2))
  sequences = programs.abstract_sequences(layout, 8, 6)
  rankings = programs.abstract_rankings(layout, 8, 3, 6)
  prompts = programs.abstract_prompts(layout, 8, 5)
  assert sequences.tokens.shape == (8, 6) and sequences.loss_mask.dtype == 'float32'
  assert rankings.tokens.shape == (8, 3, 6) and rankings.ranks.shape == (8, 3)
  assert prompts.tokens.shape == (8, 5) and prompts.mask.dtype == bool
  for leaf in jax.tree.leaves((sequences, rankings, prompts)):
    assert leaf.sharding.shard_shape(leaf.shape) == (2, *leaf.shape[1:])
  key = programs.abstract_key(layout)
  assert key.shape == () and work.bytes_on_device(key) == 8
  # [8, 6] int32 ×3 and float32, two rows on a device; a leaf that appears twice counts once
  assert work.bytes_on_device(sequences) == 4 * 2 * 6 * 4
  assert work.bytes_on_device([sequences, sequences]) == work.bytes_on_device(sequences)


def test_what_lies_on_a_device_is_what_a_plan_says(tmp_path):
  """Bytes of the real state on the first device, but for the moments' counters."""
  overrides = ['mesh.data=2', 'mesh.fsdp=4', 'tokenizer.vocab_size=384', BATCH]
  config = pipeline.load_config(QUICKSTART, overrides)
  config = configs.resolve(config, workdir=tmp_path, data=config.data)
  costs = plan_stages(QUICKSTART, *overrides)
  layout = pipeline.make_layout(config, tmp_path)
  tokenizer = pipeline.open_tokenizer(config, tmp_path)
  context = Context(config, 'pretrain', tmp_path, layout, tokenizer)
  state = training.open_trainable(context, context.read_options(pretrain.STAGE)).init()

  def bytes_here(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

  memory = costs['pretrain'].memory
  assert memory['parameters'] == bytes_here(state.trained)
  assert memory['optimizer'] == bytes_here(state.opt_state)
  assert memory['optimizer'] == pytest.approx(2 * memory['parameters'], rel=0.01)
  ppo = costs['ppo'].memory  # four models, two of them trained
  assert ppo['reference'] == memory['parameters']
  likelihood = 4 * heads.NUM_LIKELIHOODS  # bytes of the part that the value model leaves out
  assert ppo['parameters'] == memory['parameters'] + ppo['reward'] - likelihood


def test_shapes_say_what_the_compiler_says():
  """FLOPs of every program within a twentieth, arguments exactly what lies there.

  The mesh cuts rows, places and parameters.
  """
  cost = plan_stages(
    QUICKSTART,
    BATCH,
    'mesh.data=2',
    'mesh.fsdp=2',
    'mesh.tensor=2',
    'model.kv_heads=2',
    stage='ppo',
    analytic=False,
  )['ppo']
  compiled = {program.name: program.compiled for program in cost.programs}
  assert list(compiled) == ['rollout', 'score', 'update']
  for program in cost.programs:
    assert program.compiled.flops == pytest.approx(program.flops, rel=0.05), program.name
    assert program.total == cost.resident + program.compiled.temporary
    assert program.seconds == max(program.times.values()) == program.times[program.bound]
  held = sum(cost.memory.values())
  batch = compiled['update'].arguments - (held - cost.memory['reward'])
  # tokens, positions, segments, masks, logprobs of the rows of a device
  assert 0 < batch < 8 * 58 * 8 * 8
  assert any(kind.startswith('all-gather of 2') for kind in compiled['update'].collectives)


@pytest.mark.parametrize(
  'path',
  sorted((ROOT / 'experiments').glob('*.py')),
  ids=lambda path: path.stem,
)
def test_every_experiment_can_be_planned(path):
  if path.stem.startswith('smollm2'):
    pytest.skip('reads a real model to know its shape, which takes long')
  costs = plan_stages(f'{path}:tiny', topology='cpu:1')
  config = pipeline.load_config(f'{path}:tiny')
  assert list(costs) == list(config.stages)
  for cost in costs.values():
    assert all(program.flops > 0 and program.temporary > 0 for program in cost.programs)


def test_adapters_share_a_base_that_counts_once():
  base = str(ROOT / 'tests/interop/data/llama')
  lora = []
  for name in ('sft', 'reward', 'ppo'):
    lora += [f'{name}.lora.rank=2', f'{name}.lora.base=bfloat16']
  overrides = ["stages=('sft','reward','ppo')", f'sft.init={base}', 'tokenizer.vocab_size=64']
  plain = plan_stages(QUICKSTART, *overrides, topology='cpu:1')['ppo'].memory
  adapted = plan_stages(QUICKSTART, *overrides, *lora, topology='cpu:1')['ppo'].memory
  assert adapted['frozen base'] == pytest.approx(plain['reference'] / 2, rel=0.05)
  assert adapted['reference'] < 0.2 * plain['reference']
  assert adapted['optimizer'] < 0.2 * plain['optimizer']


def test_a_scorer_counts_and_functions_do_not():
  path = str(ROOT / 'experiments/direct_rlaif.py:tiny')
  batch = 'direct_rlaif.scorer.batch_size=8'
  # without a scorer its settings would have no effect, and are refused
  usual = [
    f'direct_rlaif.scorer.{name}={value!r}'
    for name, value in options.defaults(ScorerOptions).items()
    if not isinstance(value, dict)
  ]
  plain = plan_stages(path, *usual, 'direct_rlaif.reward=mine:reward', stage='direct_rlaif')
  scored = plan_stages(path, batch, stage='direct_rlaif')
  plain, scored = plain['direct_rlaif'], scored['direct_rlaif']
  assert [program.name for program in plain.programs] == ['rollout', 'update']
  assert plain.notes == ['mine:reward runs on the hosts']
  assert [program.name for program in scored.programs] == ['rollout', 'grade', 'update']
  assert scored.memory['scorer'] == scored.memory['reference']  # a model of the same shape
  assert scored.resident == plain.resident + scored.memory['scorer']
  grade = scored.programs[1]
  assert grade.total > scored.resident
  # 16 responses at once are half as many calls as 8, each of twice the work
  fewer = plan_stages(path, 'direct_rlaif.scorer.batch_size=16', stage='direct_rlaif')
  assert fewer['direct_rlaif'].programs[1].flops == pytest.approx(grade.flops)


def test_packed_rows_count_with_their_own_memory():
  """All responses of full length: as many rows, a few at a time, with logits at all places."""
  cpu = dict(topology='cpu:1', stage='ppo')
  padded = plan_stages(QUICKSTART, BATCH, 'ppo.minibatches=1', **cpu)['ppo'].programs
  packed = plan_stages(QUICKSTART, BATCH, 'ppo.minibatches=1', 'ppo.packed_rows=4', **cpu)
  for before, after in zip(padded[1:], packed['ppo'].programs[1:], strict=True):
    assert before.flops <= after.flops < 1.6 * before.flops, before.name
    assert after.temporary < 0.6 * before.temporary, before.name


def test_several_rewards_all_count():
  costs = plan_stages(
    QUICKSTART,
    BATCH,
    "ppo.reward=('reward','reward','scorer:sft','mine:reward','https://here')",
    'ppo.reward_weights=(1,1,1,1,1)',
  )
  cost = costs['ppo']
  names = [program.name for program in cost.programs]
  assert names == ['rollout', 'score', 'score', 'grade', 'update']
  assert cost.memory['reward'] == cost.memory['reward reward'] > 0
  assert cost.memory['scorer'] == cost.memory['reference']
  assert cost.notes[1:] == ['mine:reward runs on the hosts', 'https://here runs on a server']


def test_what_does_not_fit_is_said_with_what_to_change(monkeypatch):
  monkeypatch.setattr(chips.mesh, 'device_memory', lambda device: 2e6)
  cost = plan_stages(QUICKSTART, BATCH, topology='cpu:8', stage='ppo')['ppo']
  assert not cost.fits and cost.peak > cost.capacity == 2e6
  assert any('mesh.fsdp=8' in line for line in cost.advice)
  assert any('lora.rank=16' in line for line in cost.advice)


def test_a_sweep_puts_what_fits_and_is_fastest_first():
  plans = plan_quietly(QUICKSTART, topology='cpu:8', stage='sft', sweep=True).plans
  seconds = [planned.stages[0].seconds for planned in plans]
  assert len(plans) > 3 and seconds == sorted(seconds)
  assert len({planned.mesh for planned in plans}) == len(plans)
  for sizes in planner.candidate_meshes(8):
    assert sizes['data'] * sizes['fsdp'] * sizes['tensor'] == 8


def test_the_command(capsys, tmp_path):
  words = [
    f'--config={QUICKSTART}',
    '--topology=cpu:8',
    '--analytic',
    '--stage=ppo',
    '--config.mesh.fsdp=4',
    f'--config.{BATCH}',
  ]
  assert plan.main([*words, f'--json={tmp_path}/plan.json']) == 0
  text = capsys.readouterr().out
  assert 'mesh: data 2 × fsdp 4' in text and 'ppo: fits:' in text and 'rollout' in text
  stage = json.loads((tmp_path / 'plan.json').read_text())['plans'][0]['stages'][0]
  assert stage['fits'] and 'compiled' not in stage['programs'][0]
  mistakes = (
    ('--stage=nothing', '--stage=nothing: the experiment has pretrain, sft'),
    ('--config.mesh.fsdp=3', 'does not fit 8 device'),
    ('--topology=v7:1', 'expected TPU:SHAPE'),
    ('--config.ppo.batchsize=1', "'batch_size'"),
    (f'--json={tmp_path}/none/plan.json', 'plan.json: cannot write: No such file'),
  )
  for word, message in mistakes:
    assert plan.main([*words, word]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(HAS_LIBTPU, reason='libtpu is here')
def test_without_the_compiler_shapes_still_answer():
  """In a process of its own, which has 16 devices in place of a TPU's."""
  environment = {key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'}
  done = run_plan(
    f'--config={ROOT}/experiments/llama_1b_ppo.py',
    '--topology=v5e:4x4',
    '--stage=ppo',
    '--config.ppo.batch_size=64',
    env=environment,
  )
  assert done.returncode == 0, done.stderr
  missing = "the compiler for these devices is missing (pip install 'rlhf_jax[tpu]')"
  assert missing in done.stdout
  assert 'ppo: fits' in done.stdout and 'v5e:4x4: 16 devices of 15.8 GiB' in done.stdout


@pytest.mark.slow
def test_a_plan_traces_cudnn_on_a_machine_without_it():
  query = jax.ShapeDtypeStruct((1, 8, 2, 8), 'bfloat16')

  def attend(query):
    return jax.nn.dot_product_attention(query, query, query, implementation='cudnn')

  with chips.assume_cudnn() as has_cudnn:
    assert has_cudnn  # if not, plans for GPUs compile plain attention, and say so
    assert jax.eval_shape(attend, query).shape == query.shape
  jax.clear_caches()  # else JAX would return the shape that it found above
  with pytest.raises(RuntimeError, match='cuDNN is not detected'):
    jax.eval_shape(attend, query)


@pytest.mark.parametrize('topology', ['v5e:2x2', 'gpu:4xh100'])
def test_real_compilers(topology):
  """Both compile what they have no hardware for, and count the same products."""
  if not importlib.util.find_spec('libtpu' if topology.startswith('v5e') else 'jax_plugins'):
    pytest.skip('needs the extra tpu or cuda-plan')
  done = run_plan(
    f'--config={QUICKSTART}',
    f'--topology={topology}',
    '--stage=ppo',
    '--json=/dev/stderr',
  )
  assert done.returncode == 0 and 'ppo: fits' in done.stdout, done.stderr
