"""Mistakes through the real command line.

Each gives one line that names the place and exit code 2, and leaves nothing half-written.
"""

import json
from pathlib import Path
import re
import shutil

import pytest

from rlhf_jax import fingerprints
from rlhf_jax.commands.train import main

EXPERIMENT = """
import ml_collections

def get_config(tiny=False):
  c = ml_collections.ConfigDict()
  c.stages = ('pretrain', 'sft')
  c.model = dict(embed=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp=16)
  c.tokenizer = dict(vocab_size=300, documents=50, data=dict(count=50))
  loop = dict(steps=2, log_every=1, save_every=1, tensorboard=False)
  c.pretrain = dict(batch_size=8, eval_records=4, shown_responses=0, data=dict(count=50), loop=loop)
  c.sft = dict(
    batch_size=8, max_length=128, eval_records=4, shown_responses=0, data=dict(count=20), loop=loop
  )
  return c
"""


@pytest.fixture(scope='module')
def experiment(tmp_path_factory):
  path = tmp_path_factory.mktemp('experiment') / 'small.py'
  path.write_text(EXPERIMENT)
  return path


@pytest.fixture(scope='module')
def trained(experiment, tmp_path_factory):
  """A workdir that is done."""
  workdir = tmp_path_factory.mktemp('trained') / 'run'
  assert main([f'--config={experiment}', f'--workdir={workdir}']) == 0
  return workdir


def refuse(capsys, *arguments):
  """The one line the user gets."""
  assert main([str(argument) for argument in arguments]) == 2
  lines = [
    line for line in capsys.readouterr().err.splitlines() if line.startswith('rlhf_jax: error: ')
  ]
  assert len(lines) == 1
  return lines[0]


LINE = json.dumps({'messages': [{'role': 'user', 'content': 'Why?'}], 'response': 'No.'})


@pytest.mark.parametrize(
  'override,message',
  [
    (
      'pretrain.batchsize=8',
      "config.pretrain.batchsize is no known key; did you mean 'batch_size'?",
    ),
    ('pretrain.batch_size=many', "config.pretrain.batch_size must be int, got str 'many'"),
    ('mesh.tensor=3', 'config.mesh: data -1 × tensor 3 does not fit 8 device(s)'),
    (
      'pretrain.batch_size=12',
      'a batch of 12 rows in 1 parts does not divide over the 8 device(s)',
    ),
    ('pretrain.microbatches=3', 'a batch of 8 rows in 3 parts does not divide'),
    ('pretrain.init=nowhere', "nowhere: not found; expected 'smollm2'"),
    (
      'pretrain.data.source=web',
      "data.source: expected one of jsonl, tfds, tinyworld, or 'module:function', got 'web'",
    ),
    ('pretrain.loop.steps=0', 'config.pretrain.loop.steps: expected a number from 1, got 0'),
    ('pretrain.max_length=1', 'length: expected 2 tokens or more, got 1'),
    ('pretrain.microbatches=0', 'pretrain.microbatches: expected a number from 1, got 0'),
    ('pretrain.eval_records=0', 'pretrain.eval_records: expected a number from 1, got 0'),
    ('pretrain.data.count=-1', 'data.count: expected a number from 0, got -1'),
    (
      'pretrain.optimizer.schedule=step',
      "optimizer.schedule: expected one of constant, linear, cosine, got 'step'",
    ),
    ('pretrain.kind=sft', 'the kind of a stage can be given in the experiment only'),
    (
      'model.dtype=float99',
      "model.dtype: expected one of 'float32', 'bfloat16', 'float16', got 'float99'",
    ),
    ('model.remat=all', "model.remat: expected one of 'none', 'dots', 'full', got 'all'"),
    ('model.kv_heads=3', 'heads a multiple of kv_heads'),
    ('model.head_dim=7', 'an even head_dim'),
    (
      'tokenizer.vocab_size=10',
      'tokenizer.vocab_size: expected 258 (bytes and special tokens) or more, got 10',
    ),
    ('stages=ppo', "config.stages: the experiment has no stage 'ppo'"),
    ('stages=sft,pretrain', "several are written as \"--config.stages=('pretrain', 'sft')\""),
    ('sft.pack=false', "config.sft.pack must be bool, True or False, got str 'false'"),
    (
      'sft.data={"source": "json", "path": ("a.{split}.jsonl",)}',
      "data.source: expected one of jsonl, tfds, tinyworld, or 'module:function', got 'json'",
    ),
    (
      'evaluation.models={"a": "ppo"}',
      "config.evaluation.models.a: 'ppo' is no stage of the experiment",
    ),
    (
      'evaluation.models={"a": "pretrain"}',
      "config.evaluation.models: expected a row for the baseline 'sft'",
    ),
  ],
)
def test_mistakes_in_the_config(experiment, tmp_path, capsys, override, message):
  assert message in refuse(
    capsys, f'--config={experiment}', f'--workdir={tmp_path}/run', f'--config.{override}'
  )
  assert not list(tmp_path.glob('run/*/checkpoints/*'))


@pytest.mark.parametrize(
  'lines,overrides,message',
  [
    (None, (), 'sft.jsonl: no such file'),
    ([LINE, '{"messages": '], (), 'sft.jsonl:2: not JSON'),
    ([LINE, '{"response": "No."}'], (), 'sft.jsonl:2: a demonstration needs the field "messages"'),
    ([''], (), 'holds no demonstration for'),
    ([LINE], ('sft.max_length=8',), 'no demonstration fits 8 tokens'),
    ([LINE], ('sft.max_length=8', 'sft.overlong=error'), 'tokens do not fit the limit of 8'),
  ],
)
def test_mistakes_in_the_data(experiment, trained, tmp_path, capsys, lines, overrides, message):
  shutil.copytree(trained, tmp_path / 'run')
  shutil.rmtree(tmp_path / 'run' / 'sft')
  (tmp_path / 'run' / 'results.json').unlink()
  if lines is not None:
    (tmp_path / 'sft.jsonl').write_text('\n'.join(lines) + '\n')
  said = [
    f'--config.{override}'
    for override in ('sft.data.source=jsonl', f'sft.data.path={tmp_path}/sft.jsonl', *overrides)
  ]
  assert message in refuse(capsys, f'--config={experiment}', f'--workdir={tmp_path}/run', *said)
  assert not list(tmp_path.glob('run/sft/checkpoints/*'))


def test_a_run_is_not_a_model(experiment, trained, tmp_path, capsys):
  for name, message in (
    (trained, f'{trained}: is the folder of a whole run; the stages with a model are'),
    (trained / 'stf', f'{trained}/stf: holds no model; the stages with a model are'),
  ):
    command = [f'--config={experiment}', '--check', f'--config.pretrain.init={name}']
    assert message in refuse(capsys, *command)
  assert main([f'--config={experiment}', '--check', f'--config.pretrain.init={trained}:sft']) == 0


def test_files_that_are_not_there(experiment, tmp_path, capsys):
  assert 'nowhere.py: no such file' in refuse(
    capsys, '--config=nowhere.py', f'--workdir={tmp_path}'
  )
  (tmp_path / 'file').write_text('')
  assert 'cannot write: Not a directory' in refuse(
    capsys, f'--config={experiment}', f'--workdir={tmp_path}/file/run'
  )


def test_after_a_mistake_the_corrected_command_runs(experiment, tmp_path, capsys):
  command = [f'--config={experiment}', f'--workdir={tmp_path}/run', "--config.stages=('pretrain',)"]
  refuse(
    capsys,
    *command,
    '--config.pretrain.data.source=jsonl',
    '--config.pretrain.data.path=nowhere.jsonl',
  )
  refuse(
    capsys, *command, '--config.mesh.data=1', '--config.mesh.fsdp=8', '--config.model.embed=12'
  )  # seen late
  assert main([*command, '--config.pretrain.loop.steps=1']) == 0


def test_a_later_stage_can_be_corrected_and_the_earlier_ones_stay(
  experiment, trained, tmp_path, capsys
):
  run = shutil.copytree(trained, tmp_path / 'run')
  shutil.rmtree(run / 'sft')
  (run / 'results.json').unlink()
  long = json.dumps({'messages': [{'role': 'user', 'content': 'W' * 90}], 'response': 'No.'})
  for split in ('train', 'validation'):
    (tmp_path / f'{split}.jsonl').write_text(f'{LINE}\n{long}\n')
  command = [
    f'--config={experiment}',
    f'--workdir={run}',
    '--config.sft.data.source=jsonl',
    f'--config.sft.data.path={tmp_path}/{{split}}.jsonl',
    '--config.sft.max_length=64',
    '--config.sft.overlong=',
  ]
  assert re.search(
    'demonstration .*n.jsonl:2: .* tokens do not fit the limit of 64',
    refuse(capsys, *command[:-1], command[-1] + 'error'),
  )
  before = (run / 'pretrain/export/model.safetensors').stat().st_mtime_ns
  assert main([*command[:-1], command[-1] + 'drop']) == 0
  assert (
    '1 of 2 demonstrations are longer than 64 tokens and were left out' in capsys.readouterr().err
  )
  assert (run / 'pretrain/export/model.safetensors').stat().st_mtime_ns == before
  assert 'config.sft.overlong' in refuse(capsys, *command[:-1], command[-1] + 'truncate_left')
  shutil.rmtree(run / 'sft')
  (run / 'results.json').unlink()
  assert main([*command[:-1], command[-1] + 'truncate_left']) == 0
  assert 'left out' not in capsys.readouterr().err


def test_a_workdir_of_another_config_is_refused(experiment, trained, capsys):
  line = refuse(
    capsys, f'--config={experiment}', f'--workdir={trained}', '--config.sft.batch_size=16'
  )
  assert 'begun with another config: config.sft.batch_size: 8 → 16' in line


def test_what_a_run_reads_back_is_verified(experiment, trained, tmp_path, capsys):
  """A lost config, a changed model of a finished stage, data that are others at the resume."""
  run = shutil.copytree(trained, tmp_path / 'run')
  command = [f'--config={experiment}', f'--workdir={run}']
  (run / 'config.json').rename(tmp_path / 'config.json')
  assert 'config.json: is gone, but a run has begun' in refuse(capsys, *command)
  (tmp_path / 'config.json').rename(run / 'config.json')
  template = run / 'tokenizer/chat_template.jinja'
  text = template.read_text()
  template.write_text(text + ' ')
  assert 'chat_template.jinja: changed or damaged' in refuse(capsys, *command)
  template.write_text(text)
  shutil.rmtree(run / 'sft')
  (run / 'results.json').unlink()
  shutil.rmtree(run / 'pretrain/checkpoints/2')  # the one before it is not what was finished with
  assert 'checkpoints/2: this checkpoint is gone; the stage finished with it' in refuse(
    capsys, *command
  )


def test_a_checkpoint_of_another_shape_is_named(experiment, trained, tmp_path, capsys):
  stage = shutil.copytree(trained / 'pretrain', tmp_path / 'pretrain')
  shape = fingerprints.read_json(stage / 'model.json')
  fingerprints.write_json(stage / 'model.json', {**shape, 'mlp': 32})
  line = refuse(
    capsys,
    f'--config={experiment}',
    f'--workdir={tmp_path}/run',
    "--config.stages=('sft',)",
    f'--config.sft.init={stage}',
  )
  assert (
    'params of another shape' in line
    and 'layers.down expected float32[1,32,16], found float32[1,16,16]' in line
  )
  line = refuse(
    capsys,
    f'--config={experiment}',
    f'--workdir={tmp_path}/other',
    "--config.stages=('sft',)",
    f'--config.sft.init={trained}/pretrain',
    '--config.tokenizer.vocab_size=310',
  )
  assert 'knows 300 tokens, but the tokenizer of the run has 310' in line


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
  experiment, trained, tmp_path, capsys, caplog
):
  run = shutil.copytree(trained, tmp_path / 'run')
  for name in ('finished.json', 'done.json'):
    (run / 'sft' / name).unlink()
  want = (run / 'sft' / 'export' / 'model.safetensors').read_bytes()
  biggest = max(
    (path for path in (run / 'sft/checkpoints/2/params').rglob('*') if path.is_file()),
    key=lambda path: path.stat().st_size,
  )
  data = bytearray(biggest.read_bytes())
  middle = len(data) // 2
  data[middle : middle + 64] = bytes(255 - byte for byte in data[middle : middle + 64])
  biggest.write_bytes(data)
  assert main([f'--config={experiment}', f'--workdir={run}']) == 0
  assert (
    'checkpoints/2: damaged checkpoint' in caplog.text and 'falling back to step 1' in caplog.text
  )
  assert (run / 'sft' / 'export' / 'model.safetensors').read_bytes() == want


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(
  experiment, tmp_path, capsys
):
  command = [f'--config={experiment}', f'--workdir={tmp_path}/run', "--config.stages=('pretrain',)"]
  line = refuse(
    capsys,
    *command,
    '--config.pretrain.optimizer.learning_rate=1e30',
    '--config.pretrain.loop.steps=8',
    '--config.pretrain.optimizer.clip_norm=0',
  )
  assert re.search(r'pretrain: step \d+: (loss|norm/\w+) is (nan|inf)', line)
  kept = sorted(
    int(path.name)
    for path in Path(tmp_path, 'run/pretrain/checkpoints').iterdir()
    if path.name.isdigit()
  )
  assert kept and f'the state of step {kept[-1]} is kept' in line
