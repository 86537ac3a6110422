"""The launcher's commands, and runs of two processes beside runs of one."""

import importlib.util
import json
import os
from pathlib import Path
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.runtime import hosts

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location('launch', ROOT / 'scripts/launch.py')
launch = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launch)

GIVEN = ['--config=my file.py', '--workdir=/runs/it is', "--config.stages=('sft',)"]
QUOTED = shlex.join(['-m', 'rlhf_jax', *GIVEN])


def dry(capsys, *words, given=GIVEN):
  """The lines of a dry run."""
  assert launch.main([*words, '--dry-run', '--', *given]) == 0
  return capsys.readouterr().out.splitlines()


def test_local(capsys):
  first, second = dry(capsys, 'local', '--processes=2', '--devices=3')
  assert first.endswith(f'{QUOTED} &')
  assert second.endswith(f"{QUOTED} >> '/runs/it is/logs/process-1.txt' 2>&1 &")
  for number, line in enumerate((first, second)):
    words = shlex.split(line)
    env = dict(word.split('=', 1) for word in words[: words.index(sys.executable)])
    assert env['RLHF_JAX_PROCESSES'] == '2' and env['RLHF_JAX_PROCESS'] == str(number)
    assert env['RLHF_JAX_COORDINATOR'].startswith('127.0.0.1:') and str(ROOT) in env['PYTHONPATH']
    assert env['XLA_FLAGS'].endswith('--xla_force_host_platform_device_count=3')
  assert (
    first.split('RLHF_JAX_COORDINATOR=')[1].split()[0]
    == second.split('RLHF_JAX_COORDINATOR=')[1].split()[0]
  )


def test_gpus(capsys):
  (line,) = dry(capsys, 'gpus', '--gpus=0,3')
  assert (
    'CUDA_VISIBLE_DEVICES=0,3' in line and 'RLHF_JAX_PROCESSES=1' in line and line.endswith(QUOTED)
  )


def test_slurm(capsys):
  script = dry(
    capsys, 'slurm', '--nodes=2', '--gpus-per-node=8', '--time=04:00:00', '--partition=big one'
  )
  for line in (
    '#SBATCH --nodes=2',
    '#SBATCH --ntasks-per-node=1',
    '#SBATCH --gpus-per-node=8',
    '#SBATCH --time=04:00:00',
    "#SBATCH --partition='big one'",
    "#SBATCH --output='/runs/it is/logs/slurm-%j.txt'",
  ):
    assert line in script
  assert not any('account' in line for line in script)
  assert f'exec srun --kill-on-bad-exit=1 {sys.executable} {QUOTED}' in script
  assert script[-1] == "sbatch '/runs/it is/logs/job.sbatch'"


def test_tpu(capsys):
  pack, copy, start = map(
    shlex.split, dry(capsys, 'tpu', '--name=pod', '--zone=z', '--project=p', '--folder=my code')
  )
  assert pack[0] == 'tar' and '--exclude=.git' in pack and pack[-3:] == ['-C', str(ROOT), '.']
  assert (
    copy[:5] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'scp'] and 'pod:rlhf_jax.tar.gz' in copy
  )
  assert start[:6] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', 'pod']
  assert {'--worker=all', '--zone=z', '--project=p'} <= {*copy} & {*start}
  remote = start[-1].removeprefix('--command=')
  assert "cd 'my code'" in remote and remote.endswith(f'.venv/bin/python {QUOTED}')


def test_a_workdir_behind_a_url(capsys):
  given = ['--config=a.py', '--workdir=gs://bucket/Run_3']
  remote = dry(capsys, 'tpu', '--name=pod', '--python=python3.12', given=given)[-1]
  assert '.[tpu,gcs]' in remote and 'python3.12 -m venv' in remote
  assert 'runs/logs/run-3/process-1.txt' in '\n'.join(dry(capsys, 'local', given=given))


def test_gke(capsys):
  given = ['--config=my file.py', '--workdir=/mnt/Run_3']
  (line,) = dry(
    capsys,
    'gke',
    '--cluster=c',
    '--device-type=h100-80gb-8',
    '--num-nodes=2',
    '--docker-image=me/it',
    given=given,
  )
  words = shlex.split(line)
  assert words[:3] == ['xpk', 'workload', 'create'] and not any(
    word.startswith('--script-dir') for word in words
  )
  assert {
    '--cluster=c',
    '--workload=run-3',
    '--device-type=h100-80gb-8',
    '--num-nodes=2',
    '--docker-image=me/it',
    '--command=python3 ' + shlex.join(['-m', 'rlhf_jax', *given]),
  } <= {*words}
  assert f'--script-dir={ROOT}' in shlex.split(
    dry(capsys, 'gke', '--cluster=c', '--tpu-type=v5litepod-16', given=given)[0]
  )


@pytest.mark.parametrize(
  'words,message',
  [
    (['local', '--', '--config=a.py'], '--workdir is missing'),
    (['local'], 'expected -- and then the arguments'),
    (
      ['gpus', '--gpus=all', '--', *GIVEN],
      "--gpus: expected numbers with commas, such as 0,1, got 'all'",
    ),
    (['gke', '--cluster=c', '--', *GIVEN], 'expected --tpu-type or --device-type'),
    (
      ['gke', '--cluster=c', '--tpu-type=a', '--workload=Mine', '--', *GIVEN],
      '--workload: expected up to 40',
    ),
    (['gke', '--cluster=c', '--tpu-type=a', '--', *GIVEN], 'no \', " or $ in values'),
    (['slurm', '--', *GIVEN], 'sbatch: not found on this machine'),
    (['tpu', '--name=pod', '--', *GIVEN], 'gcloud: not found on this machine'),
    (
      ['gke', '--cluster=c', '--tpu-type=a', '--', '--config=a', '--workdir=b'],
      'xpk: not found on this machine',
    ),
  ],
)
def test_mistakes_are_one_line(words, message, capsys, monkeypatch):
  monkeypatch.setattr(launch.shutil, 'which', lambda program: None)
  assert launch.main(words) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('launch: error: ') and message in line


def test_numbers_are_checked(capsys):
  with pytest.raises(SystemExit):
    launch.main(['local', '--processes=0', '--', *GIVEN])
  assert "expected a number from 1, got '0'" in capsys.readouterr().err


CLUSTERS = (
  'RLHF_JAX_',
  'SLURM_',
  'OMPI_',
  'TPU_',
  'MEGASCALE_',
  'KUBERNETES_',
  'NODE_RANK',
  'NNODES',
  'CUDA_VISIBLE',
)


@pytest.fixture
def joined(monkeypatch):
  """join(*flags, **environment) → arguments of jax.distributed.initialize but for time limits.

  None where it is not called.
  """

  def join(*flags, **env):
    for name in [*os.environ]:
      if name.startswith(CLUSTERS):
        monkeypatch.delenv(name)
    for name, text in env.items():
      monkeypatch.setenv(name, text)
    called = []
    monkeypatch.setattr(hosts.jax.distributed, 'initialize', lambda **said: called.append(said))
    monkeypatch.setattr(hosts.jax.config, 'update', lambda *_: None)
    monkeypatch.setattr(hosts.glob, 'glob', lambda _: [])
    assert hosts.initialize(*flags) == bool(called)
    limits = ('timeout', 'seconds')
    return (
      {key: said for key, said in called[0].items() if not key.endswith(limits)} if called else None
    )

  return join


EXPLICIT = dict(
  coordinator_address='a:1', num_processes=2, process_id=1, cluster_detection_method='deactivate'
)


@pytest.mark.parametrize(
  'flags,env,expected',
  [
    ((), {}, None),
    (('a:1', '2', '1'), {}, EXPLICIT),
    ((), dict(RLHF_JAX_COORDINATOR='a:1', RLHF_JAX_PROCESSES='2', RLHF_JAX_PROCESS='1'), EXPLICIT),
    (
      (None, None, '1'),
      dict(RLHF_JAX_COORDINATOR='a:1', RLHF_JAX_PROCESSES='2', RLHF_JAX_PROCESS='0'),
      EXPLICIT,
    ),
    ((None, '1'), dict(SLURM_STEP_NODELIST='n', SLURM_NTASKS='4'), None),
    (
      (),
      dict(SLURM_JOB_ID='1', SLURM_STEP_NODELIST='n1', SLURM_NTASKS='1', SLURM_PROCID='0'),
      None,
    ),
    (
      (),
      dict(SLURM_JOB_ID='1', SLURM_NTASKS='4', SLURM_PROCID='0'),
      None,
    ),  # the batch script itself
    (
      (),
      dict(SLURM_STEP_NODELIST='n', SLURM_NTASKS='4', SLURM_STEP_NUM_TASKS='1'),
      None,
    ),  # a shell within a job
    (
      (),
      dict(
        SLURM_STEP_NODELIST='n[1-2]',
        SLURM_STEP_NUM_TASKS='2',
        SLURM_STEP_NUM_NODES='2',
        CUDA_VISIBLE_DEVICES='0,1,2',
      ),
      dict(local_device_ids=[0, 1, 2], num_processes=2),
    ),
    (
      (),
      dict(
        SLURM_STEP_NODELIST='n',
        SLURM_NTASKS='2',
        SLURM_STEP_NUM_NODES='1',
        CUDA_VISIBLE_DEVICES='0,1',
      ),
      dict(num_processes=2),
    ),  # one GPU a process, as jax has it
    ((), dict(OMPI_COMM_WORLD_SIZE='2'), {}),
    ((), dict(OMPI_COMM_WORLD_SIZE='1'), None),
    ((), dict(TPU_WORKER_HOSTNAMES='a,b'), {}),
    ((), dict(TPU_WORKER_HOSTNAMES='a'), None),
    ((), dict(TPU_WORKER_HOSTNAMES='a', MEGASCALE_NUM_SLICES='2'), {}),
    (
      (),
      dict(JAX_COORDINATOR_ADDRESS='a', JAX_COORDINATOR_PORT='1', NNODES='2', NODE_RANK='1'),
      EXPLICIT,
    ),
    ((), dict(KUBERNETES_SERVICE_HOST='a'), None),
  ],
)
def test_join_only_where_there_are_several(joined, flags, env, expected):
  assert joined(*flags, **env) == expected


@pytest.mark.parametrize(
  'flags,message',
  [
    (('a:1', '2'), 'expected --coordinator=HOST:PORT, --processes=N and --process=I'),
    (('a', '2', '0'), "--coordinator: expected HOST:PORT, got 'a'"),
    (('a:b', '2', '0'), "--coordinator: expected HOST:PORT, got 'a:b'"),
    (('a:1', 'two', '0'), "--processes: expected a number from 1, got 'two'"),
    (('a:1', '0', '0'), "--processes: expected a number from 1, got '0'"),
    (('a:1', '2', '-1'), "--process: expected a number from 0, got '-1'"),
    (('a:1', '2', '2'), '--process: expected 0 to 1, as there are 2 processes, got 2'),
  ],
)
def test_wrong_flags(joined, flags, message):
  with pytest.raises(UserError, match=re.escape(message)):
    joined(*flags)


def test_what_jax_does_not_find_is_one_line(joined, monkeypatch):
  def fail(**_):
    raise RuntimeError('no\nservice')

  joined()
  monkeypatch.setattr(hosts.jax.distributed, 'initialize', fail)
  with pytest.raises(
    UserError, match='did not find each other: RuntimeError: no service; name them with --coord'
  ):
    hosts.initialize('a:1', '2', '1')


EXPERIMENT = f'--config={ROOT}/experiments/quickstart.py:tiny'


def two(workdir, devices, *overrides):
  """A run of two processes, begun."""
  return subprocess.Popen(
    [
      sys.executable,
      ROOT / 'scripts/launch.py',
      'local',
      '--processes=2',
      f'--devices={devices}',
      '--',
      EXPERIMENT,
      f'--workdir={workdir}',
      *overrides,
    ],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def alone(workdir, devices, *overrides):
  """The same run in one process."""
  env = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(ROOT),
    'XLA_FLAGS': os.environ.get('XLA_FLAGS', '')
    + f' --xla_force_host_platform_device_count={devices}',
  }
  return subprocess.run(
    [sys.executable, '-m', 'rlhf_jax', EXPERIMENT, f'--workdir={workdir}', *overrides],
    env=env,
    check=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  ).stdout


def metrics(workdir, stage):
  """(step, name) → value, of what a stage measured, times left out."""
  lines = map(json.loads, (workdir / stage / 'metrics.jsonl').read_text().splitlines())
  return {
    (line['step'], name): value
    for line in lines
    for name, value in line.items()
    if not name.startswith('time/')
  }


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
  """The tiny quickstart whole: packed and plain rows, rankings, rollouts, the last table."""
  run = two(tmp_path / 'two', 2)
  output, _ = run.communicate(timeout=600)
  assert run.returncode == 0, output
  alone(tmp_path / 'one', 4)
  for stage in ('pretrain', 'sft', 'reward', 'ppo'):
    one, both = (metrics(tmp_path / name, stage) for name in ('one', 'two'))
    first = {key: value for key, value in one.items() if key[0] <= 1}
    assert {key: both[key] for key in first} == pytest.approx(first, rel=1e-4, abs=1e-5), stage
    assert both == pytest.approx(one, rel=1e-3, abs=1e-3), stage
  one, both = (
    json.loads((tmp_path / name / 'results.json').read_text()) for name in ('one', 'two')
  )
  assert both['models'].keys() == one['models'].keys()
  for name, row in one['models'].items():
    for key in ('helpful', 'harmless', 'utility', 'kl_to_sft'):
      want = row['sampled'][key]
      assert both['models'][name]['sampled'][key] == pytest.approx(want, abs=1e-3), (name, key)
  assert (tmp_path / 'two/sft/export/model.safetensors').exists()


@pytest.mark.slow
@pytest.mark.parametrize(
  'victim,devices,message',
  [
    (1, 1, 'rlhf_jax: error: another process of this run ended'),
    (
      1,
      2,
      'another task died',
    ),  # some devices wait on: jax's own words, after HEARTBEAT at the latest
    (0, 2, 'another task died'),
  ],
)
def test_a_killed_process_ends_the_other_and_the_command_goes_on(
  tmp_path, victim, devices, message
):
  loop = dict(steps=300, save_every=50, eval_every=0, log_every=10)
  overrides = [
    "--config.stages=('pretrain',)",
    *(f'--config.pretrain.loop.{key}={said}' for key, said in loop.items()),
  ]
  run = two(tmp_path / 'run', devices, *overrides)
  saved = tmp_path / 'run/pretrain/checkpoints/50'
  began = time.monotonic()
  while not saved.exists():
    assert run.poll() is None and time.monotonic() < began + 200, run.communicate()[0]
    time.sleep(0.05)
  os.kill(process(run.pid, victim), signal.SIGKILL)
  output, _ = run.communicate(timeout=60)
  assert run.returncode == 137 and f'launch: process {victim} ended with exit code 137' in output
  said = output if victim else (tmp_path / 'run/logs/process-1.txt').read_text()
  assert message in said or 'another process of this run ended' in said
  assert not (tmp_path / 'run/results.json').exists()
  if victim and devices == 1:  # another number of processes goes on too, with the same batches
    output = alone(tmp_path / 'run', 2, *overrides)
  else:
    run = two(tmp_path / 'run', devices, *overrides)
    output, _ = run.communicate(timeout=200)
    assert run.returncode == 0, output
  assert 'step 300/300' in output and 'step 0: ' not in output, output
  alone(tmp_path / 'whole', 2 * devices, *overrides)
  whole = metrics(tmp_path / 'whole', 'pretrain')
  assert metrics(tmp_path / 'run', 'pretrain') == pytest.approx(whole, rel=1e-3, abs=1e-3)


def process(launcher, number):
  """The process id of one that a launcher has started."""
  children = Path(f'/proc/{launcher}/task/{launcher}/children').read_text().split()
  return next(
    int(child)
    for child in children
    if f'RLHF_JAX_PROCESS={number}\0' in Path(f'/proc/{child}/environ').read_text()
  )
