"""Plans, beside the programs and arrays that they are about."""

import importlib.util
import json
import os
from pathlib import Path
import subprocess
import sys

import jax
import pytest

from rlhf_jax import config as configs
from rlhf_jax import pipeline
from rlhf_jax.commands import plan
from rlhf_jax.errors import UserError
from rlhf_jax import planner
from rlhf_jax.planning import chips
from rlhf_jax.runtime import mesh
from rlhf_jax.stages.shared import common

ROOT = Path(__file__).parents[2]
BATCH = 'ppo.batch_size=16'
QUICKSTART = str(ROOT / 'experiments/quickstart.py:tiny')


def quiet(path, *overrides, topology='cpu:8', stage=None, analytic=True, sweep=False):
  return planner.plan(path, overrides, topology, stage, analytic, sweep, say=lambda text: None)


def stages(*given, **options):
  return {one['stage']: one for one in quiet(*given, **options)['plans'][0]['stages']}


@pytest.mark.parametrize('name, sizes, count', [
    ('v5p:4x4x8', ('v5p', (4, 4, 8), 1), 128), ('2*v5e:16x16', ('v5e', (16, 16), 2), 512),
    ('gpu:8xh100', ('h100', (1, 8), 1), 8), ('gpu:4x8xa100', ('a100', (4, 8), 1), 32), ('cpu:8', ('cpu', (8,), 1), 8)])
def test_names_of_topologies(name, sizes, count):
  assert chips.parse(name) == sizes


@pytest.mark.parametrize('name', ['v5p', 'v9:2x2', 'gpu:8xv5e', 'h100:8', 'gpu:8', 'cpu:', 'v5e:4x', 'cpu:0', 'gpu:8xcpu'])
def test_no_such_topology(name):
  with pytest.raises(UserError, match='expected TPU:SHAPE as v5p:4x4x8'):
    chips.parse(name)


def test_what_lies_on_a_device_is_what_a_plan_says(tmp_path):
  """Every stage of the four steps: bytes of the real state on the first device, without the moments' counters."""
  overrides = ['mesh.data=2', 'mesh.fsdp=4', 'tokenizer.vocab_size=384', BATCH]
  config = pipeline.load_config(QUICKSTART, overrides)
  config = configs.resolve(config, workdir=tmp_path, data=config.data)
  said = stages(QUICKSTART, *overrides)
  on = mesh.make_layout(config.mesh)
  context = common.Context(config, 'pretrain', tmp_path, on, pipeline.open_tokenizer(config, tmp_path))
  _, _, init = common.open_trainable(context)
  state = init()
  here = lambda tree: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
  memory = said['pretrain']['memory']
  assert memory['parameters'] == here(state.trained)
  assert memory['optimizer'] == here(state.opt_state) == pytest.approx(2 * memory['parameters'], rel=0.01)
  ppo = said['ppo']['memory']  # four models, two of them trained
  assert ppo['reference'] == memory['parameters'] and ppo['parameters'] == memory['parameters'] + ppo['reward']


def test_shapes_say_what_the_compiler_says():
  """FLOPs of every program within a twentieth, arguments exactly what lies there; in one that cuts rows, places, parameters."""
  found = stages(QUICKSTART, BATCH, 'mesh.data=2', 'mesh.fsdp=2', 'mesh.tensor=2', 'model.kv_heads=2', stage='ppo', analytic=False)
  programs = {row['name']: row for row in found['ppo']['programs']}
  assert list(programs) == ['rollout', 'score', 'update']
  for row in programs.values():
    assert row['compiled']['flops'] == pytest.approx(row['flops'], rel=0.05), row['name']
    assert row['total'] == found['ppo']['resident'] + row['compiled']['temporary']
    assert row['seconds'] == max(row['times'].values()) == row['times'][row['bound']]
  held = sum(found['ppo']['memory'].values())
  batch = programs['update']['compiled']['arguments'] - (held - found['ppo']['memory']['reward'])
  assert 0 < batch < 8 * 58 * 8 * 8  # tokens, positions, segments, masks, logprobs of the rows of a device
  assert any(kind.startswith('all-gather of 2') for kind in programs['update']['compiled']['collectives'])


@pytest.mark.parametrize('path', sorted((ROOT / 'experiments').glob('*.py')), ids=lambda path: path.stem)
def test_every_experiment_can_be_planned(path):
  if path.stem.startswith('smollm2'):
    pytest.skip('reads a real model to know its shape, which takes long')
  found = stages(f'{path}:tiny', topology='cpu:1')
  config = pipeline.load_config(f'{path}:tiny')
  assert list(found) == list(config.stages)
  assert all(row['flops'] > 0 and row['held'] > 0 for one in found.values() for row in one['programs'])


def test_adapters_share_a_base_that_counts_once():
  base = str(ROOT / 'tests/interop/data/llama')
  lora = [f'{name}.lora.{key}' for name in ('sft', 'reward', 'ppo') for key in ('rank=2', 'base=bfloat16')]
  common_ = (QUICKSTART, "stages=('sft','reward','ppo')", f'sft.init={base}', 'tokenizer.vocab_size=64')
  plain, adapted = (stages(*common_, *extra, topology='cpu:1')['ppo']['memory'] for extra in ((), lora))
  assert adapted['frozen base'] == pytest.approx(plain['reference'] / 2, rel=0.05)
  assert adapted['reference'] < 0.2 * plain['reference'] and adapted['optimizer'] < 0.2 * plain['optimizer']


def test_what_does_not_fit_is_said_with_what_to_change(monkeypatch):
  monkeypatch.setattr(chips.mesh, 'device_memory', lambda device: 2e6)
  found = stages(QUICKSTART, BATCH, topology='cpu:8', stage='ppo')['ppo']
  assert not found['fits'] and found['peak'] > found['capacity'] == 2e6
  assert any('mesh.fsdp=8' in line for line in found['advice']) and any('lora.rank=16' in line for line in found['advice'])


def test_a_sweep_puts_what_fits_and_is_fastest_first():
  found = quiet(QUICKSTART, topology='cpu:8', stage='sft', sweep=True)['plans']
  seconds = [one['stages'][0]['seconds'] for one in found]
  assert len(found) > 3 and seconds == sorted(seconds) and len({one['mesh'] for one in found}) == len(found)
  sizes = planner.candidates(8)
  assert all(one['data'] * one['fsdp'] * one['tensor'] == 8 for one in sizes)


def test_the_command(capsys, tmp_path):
  arguments = [f'--config={QUICKSTART}', '--topology=cpu:8', '--analytic', '--stage=ppo', '--config.mesh.fsdp=4',
               f'--config.{BATCH}']
  assert plan.main([*arguments, f'--json={tmp_path}/plan.json']) == 0
  text = capsys.readouterr().out
  assert 'mesh: data 2 × fsdp 4' in text and 'ppo: fits:' in text and 'rollout' in text
  assert json.loads((tmp_path / 'plan.json').read_text())['plans'][0]['stages'][0]['fits']
  for extra, message in ((['--stage=nothing'], '--stage=nothing: the experiment has pretrain, sft'),
                         (['--config.mesh.fsdp=3'], 'does not fit 8 device'),
                         (['--topology=v7:1'], 'expected TPU:SHAPE'), (['--config.ppo.batchsize=1'], "'batch_size'")):
    assert plan.main([*arguments, *extra]) == 2
    assert message in capsys.readouterr().err


def test_without_the_compiler_shapes_still_answer():
  """In a process of its own, which has 16 devices in place of a TPU's; the environment of the tests has no libtpu."""
  if importlib.util.find_spec('libtpu'):
    pytest.skip('libtpu is here')
  environment = {key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'}
  done = subprocess.run(
      [sys.executable, '-m', 'rlhf_jax.plan', f'--config={ROOT}/experiments/llama_1b_ppo.py', '--topology=v5e:4x4',
       '--stage=ppo', '--config.ppo.batch_size=64'], capture_output=True, text=True, env=environment, cwd=ROOT)
  assert done.returncode == 0, done.stderr
  assert "the compiler for these devices is missing (pip install 'rlhf_jax[tpu]')" in done.stdout
  assert 'ppo: fits' in done.stdout and 'v5e:4x4: 16 devices of 15.8 GiB' in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x2', 'gpu:4xh100'])
def test_real_compilers(topology):
  """Both compile what they have no hardware for, and count the same products."""
  if not importlib.util.find_spec('libtpu' if topology.startswith('v5e') else 'jax_plugins'):
    pytest.skip('needs the extra tpu or cuda-plan')
  done = subprocess.run(
      [sys.executable, '-m', 'rlhf_jax.plan', f'--config={QUICKSTART}', f'--topology={topology}', '--stage=ppo',
       '--json=/dev/stderr'], capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0 and 'ppo: fits' in done.stdout, done.stderr
