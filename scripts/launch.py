r"""Starts an experiment on several processes, GPUs, hosts or pods.

The arguments after -- are passed to python -m rlhf_jax unchanged:

  python scripts/launch.py local --processes=2 --devices=2 -- \
      --config=experiments/quickstart.py:tiny --workdir=runs/two
  python scripts/launch.py gpus -- \
      --config=experiments/quickstart.py --workdir=runs/quickstart
  python scripts/launch.py slurm --nodes=2 --gpus-per-node=8 --time=04:00:00 -- \
      --config=… --workdir=/shared/runs/a
  python scripts/launch.py tpu --name=my-pod --zone=us-east5-a -- \
      --config=… --workdir=/mnt/shared/runs/a
  python scripts/launch.py gke --cluster=my-cluster --tpu-type=v5litepod-16 -- \
      --config=… --workdir=/mnt/shared/runs/a

--dry-run prints the commands without running them. All hosts share the workdir, which may be
a URL such as gs://BUCKET/RUN. See docs/hosts.md.
"""

import argparse
from collections.abc import Callable, Sequence
import os
from pathlib import Path
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

ROOT = Path(__file__).resolve().parents[1]
PEER_DIED = 3  # exit code of a process that ended because another one died
PEER_SILENT = 128 + signal.SIGABRT  # of one that jax ended, as another one was silent too long
QUICK = 15  # seconds that the others have then, as they cannot go on
EXTRAS = {'gs': 'gcs', 's3': 's3'}  # what serves a workdir behind such a URL
NOT_COPIED = ('.git', '.venv', 'runs', '__pycache__')  # parts of the checkout


class Mistake(Exception):
  """A mistake of the user; its message is printed as one line, and the exit code is 2."""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a sub-command; returns its exit code, or 2 for a mistake."""
  argv = sys.argv[1:] if argv is None else list(argv)
  split = len(argv)
  if '--' in argv:
    split = argv.index('--')
  options = parse(argv[:split])
  arguments = argv[split + 1 :]  # of python -m rlhf_jax
  try:
    for name in ('config', 'workdir'):
      if find_value(arguments, name) is None:
        raise Mistake(
          f'expected -- and then the arguments of python -m rlhf_jax; --{name} is missing'
        )
    return options.run(options, arguments)
  except Mistake as error:
    print(f'launch: error: {error}', file=sys.stderr)
    return 2


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """Parses the options of a sub-command; the attribute `run` is the function that runs it."""
  parser = argparse.ArgumentParser(
    prog='scripts/launch.py',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(
    required=True,
    metavar='local | gpus | slurm | tpu | gke',
  )

  add = add_command(commands, local, sys.executable)
  add('--processes', type=count, default=2, metavar='N')
  add('--devices', type=count, default=1, metavar='M', help='CPU devices of each process')
  add(
    '--grace',
    type=count,
    default=45,
    metavar='SECONDS',
    help='how long the others may go on when one has failed; default 45',
  )

  add = add_command(commands, gpus, sys.executable)
  add('--gpus', metavar='0,1,…', help='use only these GPUs; default: all')

  add = add_command(commands, slurm, sys.executable)
  add('--nodes', type=count, default=1)
  add('--gpus-per-node', type=count, default=1)
  for name in ('time', 'partition', 'account', 'qos', 'cpus-per-task', 'mem'):
    add(f'--{name}', help='passed to sbatch')

  add = add_command(commands, tpu, 'python3')
  add('--name', required=True, help='the name of an existing TPU VM')
  for name in ('zone', 'project'):
    add(f'--{name}', help="default: gcloud's")
  add(
    '--folder',
    default='rlhf_jax',
    help='the folder for the checkout, in the home folder; default %(default)s',
  )

  add = add_command(commands, gke, 'python3')
  add('--cluster', required=True, help='the name of a cluster made by xpk cluster create')
  add('--workload', help='the name of the workload; default: made from the workdir')
  add('--tpu-type', help='for TPUs, for example v5litepod-16')
  add('--device-type', help='for GPUs, for example h100-80gb-8')
  add('--num-slices', type=count, help='the number of TPU slices')
  add('--num-nodes', type=count, help='the number of GPU nodes')
  for name in ('zone', 'project'):
    add(f'--{name}', help="default: gcloud's")
  add(
    '--base-docker-image',
    help='an image with the packages that rlhf_jax needs; the checkout is added to it',
  )
  add(
    '--docker-image',
    help='instead: an image that also has the checkout, in its working directory',
  )
  return parser.parse_args(argv)


def add_command(
  commands: argparse._SubParsersAction,
  run: Callable[..., int],
  python: str | None,
) -> Callable[..., argparse.Action]:
  """Adds a sub-command, whose description is the docstring of its function.

  Args:
    commands: to which it is added.
    run: the function (options, arguments) → exit code; the sub-command has its name.
    python: the default of the option --python; None = the option does not exist.

  Returns:
    The new parser's method `add_argument`.
  """
  text = run.__doc__ or ''
  parser = commands.add_parser(
    run.__name__,
    help=text.splitlines()[0],
    description=text,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.set_defaults(run=run)
  parser.add_argument(
    '--dry-run',
    action='store_true',
    help='print the commands without running them',
  )
  if python:
    parser.add_argument(
      '--python',
      default=python,
      help='the Python interpreter; default %(default)s',
    )
  return parser.add_argument


def count(text: str) -> int:
  """Parses a positive integer; used as an argument type by argparse."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f'expected a number from 1, got {text!r}')
  return int(text)


def local(options: argparse.Namespace, arguments: list[str]) -> int:
  """Runs several processes on this machine's CPU, which communicate over gloo.

  Process 0 writes to the terminal, the others to WORKDIR/logs/process-I.txt (for the URL of
  a workdir to runs/logs/NAME). When one fails, the others are terminated after --grace
  seconds; the exit code is that of the first that failed. Ctrl-C and SIGTERM are passed on to
  all processes.
  """
  logs = log_folder(arguments)
  address = f'127.0.0.1:{free_port()}'
  command = [options.python, '-m', 'rlhf_jax', *arguments]
  flags = os.environ.get('XLA_FLAGS', '').split()
  flags.append(f'--xla_force_host_platform_device_count={options.devices}')
  processes = []
  for number in range(options.processes):
    env = environment()
    env['JAX_PLATFORMS'] = 'cpu'
    env['XLA_FLAGS'] = ' '.join(flags)
    env['JAX_COORDINATOR_BIND_ADDRESS'] = address  # else it would listen on all interfaces
    env['RLHF_JAX_COORDINATOR'] = address
    env['RLHF_JAX_PROCESSES'] = str(options.processes)
    env['RLHF_JAX_PROCESS'] = str(number)
    log = logs / f'process-{number}.txt' if number else None
    if options.dry_run:
      target = f' >> {shlex.quote(str(log))} 2>&1' if log else ''
      print(f'{format_command(command, env)}{target} &')
    else:
      processes.append(start(command, env, log))
  if options.dry_run:
    return 0
  return watch(processes, options.grace)


def gpus(options: argparse.Namespace, arguments: list[str]) -> int:
  """Runs one process that drives all GPUs of this host.

  It does not connect to other processes, even inside a Slurm job.
  """
  env = environment()
  env['JAX_PLATFORMS'] = 'cuda,cpu'
  env['RLHF_JAX_PROCESSES'] = '1'
  env.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.9')  # JAX's default is 0.75
  if options.gpus:
    if not re.fullmatch(r'\d+(,\d+)*', options.gpus):
      raise Mistake(f'--gpus: expected numbers with commas, such as 0,1, got {options.gpus!r}')
    env['CUDA_VISIBLE_DEVICES'] = options.gpus
  command = [options.python, '-m', 'rlhf_jax', *arguments]
  if options.dry_run:
    print(format_command(command, env))
    return 0
  require('nvidia-smi', 'the driver of an NVIDIA GPU')
  return watch([start(command, env)], grace=0)


def slurm(options: argparse.Namespace, arguments: list[str]) -> int:
  """Submits a Slurm job with one process on each node, which drives all its GPUs.

  Two minutes before its time limit the job saves a checkpoint and stops; submit the same
  command again to continue. The job's script and output are in WORKDIR/logs. The nodes
  must share this machine's folders.
  """
  logs = log_folder(arguments).absolute()
  settings = {
    'job-name': 'rlhf_jax',
    'nodes': options.nodes,
    'ntasks-per-node': 1,
    'gpus-per-node': options.gpus_per_node,
    'output': f'{logs}/slurm-%j.txt',
    'signal': 'TERM@120',  # 120 s before the time limit; the training loop saves and stops
    'time': options.time,
    'partition': options.partition,
    'account': options.account,
    'qos': options.qos,
    'cpus-per-task': options.cpus_per_task,
    'mem': options.mem,
  }
  command = shlex.join([options.python, '-m', 'rlhf_jax', *arguments])
  lines = ['#!/bin/bash']
  for name, value in settings.items():
    if value is not None:
      lines.append(f'#SBATCH --{name}={shlex.quote(str(value))}')
  lines.append(f'cd {shlex.quote(os.getcwd())} || exit 1')
  lines.append(f'export PYTHONPATH={shlex.quote(environment()["PYTHONPATH"])}')
  # exec, so that srun gets the signals in place of the shell
  lines.append(f'exec srun --kill-on-bad-exit=1 {command}')
  script = '\n'.join([*lines, ''])
  path = logs / 'job.sbatch'
  if options.dry_run:
    print(f'# {path}\n{script}')
  else:
    require('sbatch', 'a login node of a Slurm cluster')
    write(path, script)
  return run([['sbatch', str(path)]], options.dry_run)


def tpu(options: argparse.Namespace, arguments: list[str]) -> int:
  """Copies the checkout to every host of a TPU VM or pod, installs it and runs it there.

  The workdir is a URL such as gs://BUCKET/RUN, or on a disk that all hosts share. Paths are
  paths on the hosts. --python must be 3.11 or newer there; some images of TPU VMs have an
  older python3.
  """
  where = []
  for name in ('zone', 'project'):
    if getattr(options, name):
      where.append(f'--{name}={getattr(options, name)}')
  gcloud = ['gcloud', 'compute', 'tpus', 'tpu-vm']
  every_host = ['--worker=all', *where]
  folder = shlex.quote(options.folder)
  python = '.venv/bin/python'
  scheme = str(find_value(arguments, 'workdir')).partition('://')[0]
  extras = ','.join(['tpu', *([EXTRAS[scheme]] if scheme in EXTRAS else [])])
  remote = ' && '.join(
    [
      f'mkdir -p {folder}',
      f'tar -xzf rlhf_jax.tar.gz -C {folder}',
      f'cd {folder}',
      f'(test -x {python} || {shlex.quote(options.python)} -m venv .venv)',
      f"{python} -m pip install --quiet -e '.[{extras}]'",
      shlex.join([python, '-m', 'rlhf_jax', *arguments]),
    ]
  )
  require('gcloud', 'the Google Cloud CLI', options.dry_run)
  with tempfile.TemporaryDirectory() as temporary:
    folder_here = '/tmp' if options.dry_run else temporary
    archive = f'{folder_here}/rlhf_jax.tar.gz'
    excluded = [f'--exclude={name}' for name in NOT_COPIED]
    pack = ['tar', *excluded, '-czf', archive, '-C', str(ROOT), '.']
    copy = [*gcloud, 'scp', archive, f'{options.name}:rlhf_jax.tar.gz', *every_host]
    execute = [*gcloud, 'ssh', options.name, *every_host, f'--command={remote}']
    return run([pack, copy, execute], options.dry_run)


def gke(options: argparse.Namespace, arguments: list[str]) -> int:
  """Runs on TPUs or GPUs of a Kubernetes cluster on Google Cloud, by xpk.

  The workdir is a URL such as gs://BUCKET/RUN, or on storage that is mounted in all pods.
  Paths are paths in the pods.
  """
  if bool(options.tpu_type) == bool(options.device_type):
    raise Mistake('expected --tpu-type or --device-type, and not both')
  if options.docker_image and options.base_docker_image:
    raise Mistake('expected --docker-image or --base-docker-image, not both')
  remote = shlex.join([options.python, '-m', 'rlhf_jax', *arguments])
  name = options.workload
  if not name:
    name = make_workload_name(str(find_value(arguments, 'workdir')))
  if not re.fullmatch('[a-z]([-a-z0-9]{0,38}[a-z0-9])?', name):
    raise Mistake(
      f'--workload: expected up to 40 of a-z, 0-9 and -, beginning with a letter, got {name!r}'
    )
  if '"' in remote or '$' in remote:
    raise Mistake(
      f'xpk puts the command between double quotes: expected no \', " or $ in values, got {remote}'
    )
  settings = {
    'cluster': options.cluster,
    'workload': name,
    'command': remote,
    'tpu-type': options.tpu_type,
    'device-type': options.device_type,
    'num-slices': options.num_slices,
    'num-nodes': options.num_nodes,
    'zone': options.zone,
    'project': options.project,
    'base-docker-image': options.base_docker_image,
    'docker-image': options.docker_image,
    'script-dir': None if options.docker_image else ROOT,  # xpk adds it to the base image
  }
  require('xpk', 'an installation of it (pip install xpk)', options.dry_run)
  command = ['xpk', 'workload', 'create']
  for key, value in settings.items():
    if value is not None:
      command.append(f'--{key}={value}')
  return run([command], options.dry_run)


def make_workload_name(workdir: str) -> str:
  """Makes a name that Kubernetes accepts from the last part of the workdir's path."""
  text = Path(workdir).name.lower()
  return re.sub('[^a-z0-9]+', '-', text).strip('-')[:38]


def find_value(arguments: Sequence[str], name: str) -> str | None:
  """Returns the value of the last --name=VALUE or --name VALUE; None if there is none."""
  value = None
  for word, following in zip(arguments, [*arguments[1:], None]):
    if word == f'--{name}':
      value = following
    elif word.startswith(f'--{name}='):
      value = word.partition('=')[2]
  return value


def log_folder(arguments: Sequence[str]) -> Path:
  """Returns the folder WORKDIR/logs; for a workdir behind a URL, one of its name in runs/logs."""
  workdir = str(find_value(arguments, 'workdir'))
  if '://' in workdir:
    return Path('runs', 'logs', make_workload_name(workdir))
  return Path(workdir, 'logs')


def environment() -> dict[str, str]:
  """Returns a copy of the environment, with this checkout added to PYTHONPATH."""
  paths = [str(ROOT)]
  if os.environ.get('PYTHONPATH'):
    paths.append(os.environ['PYTHONPATH'])
  return {**os.environ, 'PYTHONPATH': os.pathsep.join(paths)}


def format_command(command: Sequence[str], env: dict[str, str]) -> str:
  """Formats a command line, with the environment variables that differ from this process's."""
  words = []
  for name, text in env.items():
    if os.environ.get(name) != text:
      words.append(f'{name}={shlex.quote(text)}')
  return ' '.join([*words, shlex.join(command)])


def free_port() -> int:
  """Returns a free TCP port of this machine."""
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    return listener.getsockname()[1]


def require(program: str, text: str, dry_run: bool = False) -> None:
  """Raises a Mistake if a program is missing; `text` says what is expected to provide it."""
  if not dry_run and shutil.which(program) is None:
    raise Mistake(f'{program}: not found on this machine; expected {text}')


def write(path: Path, text: str) -> None:
  """Writes a text file, and creates its folder if it is missing."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  except OSError as error:
    raise Mistake(f'{path}: cannot write: {error.strerror}') from None


def run(commands: Sequence[Sequence[str]], dry_run: bool) -> int:
  """Runs commands one after the other until one fails; returns the exit code of the last."""
  for command in commands:
    print(shlex.join(command), flush=True)
    code = 0
    if not dry_run:
      code = watch([start(command, None)], grace=0)
    if code:
      return code
  return 0


def start(
  command: Sequence[str],
  env: dict[str, str] | None,
  log: Path | None = None,
) -> subprocess.Popen:
  """Starts a process in its own session.

  Otherwise Ctrl-C in the terminal would reach it twice: from the terminal, and passed on
  by this process.

  Args:
    command: the program and its arguments.
    env: its environment; None = that of this process.
    log: the file for its output; None = the terminal.
  """
  try:
    if log is None:
      return subprocess.Popen(command, env=env, start_new_session=True)
    write(log, '')
    with open(log, 'ab') as file:
      return subprocess.Popen(
        command,
        env=env,
        start_new_session=True,
        stdout=file,
        stderr=subprocess.STDOUT,
      )
  except OSError as error:
    raise Mistake(f'{command[0]}: {error.strerror}') from None


def watch(processes: Sequence[subprocess.Popen], grace: int) -> int:
  """Waits for all processes, and passes SIGTERM and Ctrl-C on to them.

  Args:
    processes: from `start`.
    grace: seconds after the first failure until the other processes are terminated.

  Returns:
    The exit code of the first process that failed (128 + n if signal n ended it), or 0.
  """

  def pass_on(signum, _=None):
    for process in processes:
      if process.poll() is None:
        process.send_signal(signum)

  for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, pass_on)
  first_code = 0
  deadline = None  # of the other processes, once one has failed
  while True:
    running = any([process.poll() is None for process in processes])  # a list, to poll them all
    failed = find_first_failed(processes)
    if failed is not None and deadline is None:
      first_code = exit_code(processes[failed])
      seconds = grace
      reason = ''
      if first_code == PEER_SILENT and len(processes) > 1:
        seconds = min(grace, QUICK)
        reason = ', as jax does where another process dies or is silent'
      deadline = time.monotonic() + seconds
      stopped = first_code in (128 + signal.SIGINT, 128 + signal.SIGTERM)
      if len(processes) > 1 and not stopped:
        print(
          f'launch: process {failed} ended with exit code {first_code}{reason}; the others have '
          f'{seconds} s',
          file=sys.stderr,
        )
    if not running:
      return first_code
    if deadline is not None and time.monotonic() > deadline:
      late = time.monotonic() > deadline + 10
      pass_on(signal.SIGKILL if late else signal.SIGTERM)
      time.sleep(1)
    time.sleep(0.1)


def find_first_failed(processes: Sequence[subprocess.Popen]) -> int | None:
  """Returns the number of a failed process, or None if there is none.

  A process that failed by itself is preferred to one that ended because a peer died.
  """
  failed = [number for number, process in enumerate(processes) if process.returncode]
  for number in failed:
    if processes[number].returncode != PEER_DIED:
      return number
  return failed[0] if failed else None


def exit_code(process: subprocess.Popen) -> int:
  """Returns the exit code of a process as a shell would: 128 + n if signal n ended it."""
  if process.returncode < 0:
    return 128 - process.returncode
  return process.returncode


if __name__ == '__main__':
  sys.exit(main())
