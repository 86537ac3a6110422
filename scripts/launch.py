"""Starts an experiment on several processes, GPUs, hosts or pods; what follows -- goes to python -m rlhf_jax unchanged.

  python scripts/launch.py local --processes=2 --devices=2 -- --config=experiments/quickstart.py:tiny --workdir=runs/two
  python scripts/launch.py gpus -- --config=experiments/quickstart.py --workdir=runs/quickstart
  python scripts/launch.py slurm --nodes=2 --gpus-per-node=8 --time=04:00:00 -- --config=… --workdir=/shared/runs/a
  python scripts/launch.py tpu --name=my-pod --zone=us-east5-a -- --config=… --workdir=/mnt/shared/runs/a
  python scripts/launch.py gke --cluster=my-cluster --tpu-type=v5litepod-16 -- --config=… --workdir=/mnt/shared/runs/a

--dry-run prints what would run. Every host must see the same workdir. docs/hosts.md says more.
"""

import argparse
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
LOST = 3  # exit code of a process that ended because another one had
LEFT_OUT = ('.git', '.venv', 'runs', '__pycache__')  # of the checkout, when it is copied


class Mistake(Exception):
  """Of the user: shown as one line, exit code 2."""


def main(words=None) -> int:
  """The exit code: of what was run, 2 for a mistake."""
  words = sys.argv[1:] if words is None else list(words)
  split = words.index('--') if '--' in words else len(words)
  options = parse(words[:split])
  try:
    arguments = words[split + 1:]
    for needed in ('config', 'workdir'):
      if value(arguments, needed) is None:
        raise Mistake(f'expected -- and then the arguments of python -m rlhf_jax; --{needed} is missing')
    return options.run(options, arguments)
  except Mistake as error:
    print(f'launch: error: {error}', file=sys.stderr)
    return 2


def parse(words):
  """The options of a sub-command; `run` is its function."""
  raw = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser(prog='scripts/launch.py', description=__doc__, formatter_class=raw)
  commands = parser.add_subparsers(required=True, metavar='local | gpus | slurm | tpu | gke')

  def command(run, python):
    name, text = run.__name__, run.__doc__
    sub = commands.add_parser(name, help=text.splitlines()[0], description=text, formatter_class=raw,
                              allow_abbrev=False)
    sub.set_defaults(run=run)
    sub.add_argument('--dry-run', action='store_true', help='print what would run, and run nothing')
    if python:
      sub.add_argument('--python', default=python, help='the interpreter there; default %(default)s')
    return sub.add_argument

  add = command(local, sys.executable)
  add('--processes', type=count, default=2, metavar='N')
  add('--devices', type=count, default=1, metavar='M', help='of each process')
  add('--grace', type=count, default=45, metavar='SECONDS', help='that the others have when one failed; default 45')

  add = command(gpus, sys.executable)
  add('--gpus', metavar='0,1,…', help='only these; default all')

  add = command(slurm, sys.executable)
  add('--nodes', type=count, default=1)
  add('--gpus-per-node', type=count, default=1)
  for name in ('time', 'partition', 'account', 'qos', 'cpus-per-task', 'mem'):
    add(f'--{name}', help='as sbatch takes it')

  add = command(tpu, None)
  add('--name', required=True, help='of the TPU VM, which exists')
  for name in ('zone', 'project'):
    add(f'--{name}', help='default: of gcloud')
  add('--folder', default='rlhf_jax', help='where the checkout is put, below the home folder; default %(default)s')

  add = command(gke, 'python3')
  add('--cluster', required=True, help='made by xpk cluster create')
  add('--workload', help='its name; default: made of the workdir')
  add('--tpu-type', help='for example v5litepod-16')
  add('--device-type', help='in place of it, for example h100-80gb-8')
  add('--num-slices', type=count, help='of TPUs')
  add('--num-nodes', type=count, help='of GPUs')
  for name in ('zone', 'project'):
    add(f'--{name}', help='default: of gcloud')
  add('--base-docker-image', help='with rlhf_jax\'s packages; the checkout is added to it')
  add('--docker-image', help='in place of it: holds the checkout in its working folder too')
  return parser.parse_args(words)


def count(text) -> int:
  """argparse type: 1 or more."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f'expected a number from 1, got {text!r}')
  return int(text)


def local(options, arguments) -> int:
  """Several processes on this machine's CPU, over gloo: a pod in small.

  Process 0 writes to the terminal, the others to WORKDIR/logs/process-I.txt. Where one fails the others are ended after
  the grace time; the exit code is that of the first that failed. Ctrl-C and SIGTERM are passed on to all."""
  logs = Path(value(arguments, 'workdir'), 'logs')
  address = f'127.0.0.1:{free_port()}'
  command = [options.python, '-m', 'rlhf_jax', *arguments]
  flags = os.environ.get('XLA_FLAGS', '').split() + [f'--xla_force_host_platform_device_count={options.devices}']
  started = []
  for number in range(options.processes):
    env = here() | dict(JAX_PLATFORMS='cpu', XLA_FLAGS=' '.join(flags), JAX_COORDINATOR_BIND_ADDRESS=address,
                        RLHF_JAX_COORDINATOR=address, RLHF_JAX_PROCESSES=str(options.processes),
                        RLHF_JAX_PROCESS=str(number))
    log = logs / f'process-{number}.txt' if number else None
    if options.dry_run:
      print(shown(command, env) + (f' >> {shlex.quote(str(log))} 2>&1 &' if log else ' &'))
    else:
      started.append(start(command, env, log))
  return watch(started, options.grace) if started else 0


def gpus(options, arguments) -> int:
  """All GPUs of this host: one process drives them, and nothing is joined even inside a job of Slurm."""
  env = here() | dict(JAX_PLATFORMS='cuda,cpu', RLHF_JAX_PROCESSES='1')
  env.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.9')
  if options.gpus:
    if not re.fullmatch(r'\d+(,\d+)*', options.gpus):
      raise Mistake(f'--gpus: expected numbers with commas, such as 0,1, got {options.gpus!r}')
    env['CUDA_VISIBLE_DEVICES'] = options.gpus
  command = [options.python, '-m', 'rlhf_jax', *arguments]
  if options.dry_run:
    print(shown(command, env))
    return 0
  need('nvidia-smi', 'the driver of an NVIDIA GPU')
  return watch([start(command, env)], 0)


def slurm(options, arguments) -> int:
  """A job of Slurm: one process a node drives all its GPUs.

  Two minutes before the time is over it saves; submit the same again to go on. The job's script and output are kept in
  WORKDIR/logs. Nodes need the same folders as this machine."""
  logs = Path(value(arguments, 'workdir')).absolute() / 'logs'
  asked = {name: getattr(options, name.replace('-', '_'))
           for name in ('time', 'partition', 'account', 'qos', 'cpus-per-task', 'mem')}
  asked = {'job-name': 'rlhf_jax', 'nodes': options.nodes, 'ntasks-per-node': 1, 'gpus-per-node': options.gpus_per_node,
           'output': f'{logs}/slurm-%j.txt', 'signal': 'TERM@120', **asked}
  script = '\n'.join([
      '#!/bin/bash', *(f'#SBATCH --{key}={shlex.quote(str(said))}' for key, said in asked.items() if said is not None),
      f'cd {shlex.quote(os.getcwd())} || exit 1', f'export PYTHONPATH={shlex.quote(here()["PYTHONPATH"])}',
      'exec srun --kill-on-bad-exit=1 ' + shlex.join([options.python, '-m', 'rlhf_jax', *arguments]), ''])
  path = logs / 'job.sbatch'
  if options.dry_run:
    print(f'# {path}\n{script}')
  else:
    need('sbatch', 'a login node of a Slurm cluster')
    write(path, script)
  return run([['sbatch', str(path)]], options.dry_run)


def tpu(options, arguments) -> int:
  """A TPU VM or pod: the checkout is copied to every host, installed, and run there.

  The workdir must lie on a disk that all hosts share. Paths are those of the hosts."""
  where = [f'--{name}={getattr(options, name)}' for name in ('zone', 'project') if getattr(options, name)]
  gcloud = ['gcloud', 'compute', 'tpus', 'tpu-vm']
  folder, python = shlex.quote(options.folder), '.venv/bin/python'
  remote = ' && '.join([
      f'mkdir -p {folder}', f'tar -xzf rlhf_jax.tar.gz -C {folder}', f'cd {folder}',
      f'(test -x {python} || python3 -m venv .venv)', f"{python} -m pip install --quiet -e '.[tpu]'",
      shlex.join([python, '-m', 'rlhf_jax', *arguments])])
  need('gcloud', 'the Google Cloud CLI', options.dry_run)
  with tempfile.TemporaryDirectory() as temporary:
    packed = '/tmp/rlhf_jax.tar.gz' if options.dry_run else f'{temporary}/rlhf_jax.tar.gz'
    return run([
        ['tar', *(f'--exclude={name}' for name in LEFT_OUT), '-czf', packed, '-C', str(ROOT), '.'],
        [*gcloud, 'scp', packed, f'{options.name}:rlhf_jax.tar.gz', '--worker=all', *where],
        [*gcloud, 'ssh', options.name, '--worker=all', *where, f'--command={remote}']], options.dry_run)


def gke(options, arguments) -> int:
  """TPUs or GPUs of a Kubernetes cluster on Google Cloud, through xpk.

  The workdir must lie on storage that is mounted in all pods. Paths are those of the pods."""
  if bool(options.tpu_type) == bool(options.device_type):
    raise Mistake('expected --tpu-type or --device-type, one of them')
  if options.docker_image and options.base_docker_image:
    raise Mistake('expected --docker-image or --base-docker-image, not both')
  name = options.workload or re.sub('[^a-z0-9]+', '-', Path(value(arguments, 'workdir')).name.lower()).strip('-')[:38]
  if not re.fullmatch('[a-z]([-a-z0-9]{0,38}[a-z0-9])?', name):
    raise Mistake(f'--workload: expected up to 40 of a-z, 0-9 and -, beginning with a letter, got {name!r}')
  remote = shlex.join([options.python, '-m', 'rlhf_jax', *arguments])
  if '"' in remote or '$' in remote:
    raise Mistake(f'xpk puts the command between double quotes: no \', " or $ in values, got {remote}')
  said = {key: getattr(options, key.replace('-', '_')) for key in (
      'tpu-type', 'device-type', 'num-slices', 'num-nodes', 'zone', 'project', 'base-docker-image', 'docker-image')}
  said['script-dir'] = None if options.docker_image else ROOT
  need('xpk', 'it installed (pip install xpk)', options.dry_run)
  return run([['xpk', 'workload', 'create', f'--cluster={options.cluster}', f'--workload={name}', f'--command={remote}',
               *(f'--{key}={text}' for key, text in said.items() if text is not None)]], options.dry_run)


def value(arguments, name):
  """What --name=VALUE or --name VALUE says last, or None."""
  found = None
  for word, following in zip(arguments, [*arguments[1:], None]):
    found = following if word == f'--{name}' else word.partition('=')[2] if word.startswith(f'--{name}=') else found
  return found


def here() -> dict:
  """The environment, with this checkout on Python's path."""
  return {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))}


def shown(command, env) -> str:
  """A command line with what the environment has beyond ours."""
  new = [f'{name}={shlex.quote(text)}' for name, text in env.items() if os.environ.get(name) != text]
  return ' '.join([*new, shlex.join(command)])


def free_port() -> int:
  with socket.socket() as one:
    one.bind(('127.0.0.1', 0))
    return one.getsockname()[1]


def need(program, text, dry=False) -> None:
  if not dry and shutil.which(program) is None:
    raise Mistake(f'{program}: not found on this machine; expected {text}')


def write(path, text) -> None:
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  except OSError as error:
    raise Mistake(f'{path}: cannot write: {error.strerror}') from None


def run(commands, dry: bool) -> int:
  """Runs one after the other until one fails; the exit code of the last."""
  for command in commands:
    print(shlex.join(command), flush=True)
    code = 0 if dry else watch([start(command, None)], 0)
    if code:
      return code
  return 0


def start(command, env, log=None):
  """A process in a session of its own, so that Ctrl-C reaches it through us alone, and once."""
  if log:
    write(log, '')
  try:
    with open(log or os.devnull, 'ab') as file:
      output = dict(stdout=file, stderr=subprocess.STDOUT) if log else {}
      return subprocess.Popen(command, env=env, start_new_session=True, **output)
  except OSError as error:
    raise Mistake(f'{command[0]}: {error.strerror}') from None


def watch(processes, grace: int) -> int:
  """Waits for all; where one fails the others are ended `grace` seconds later. The exit code of the first that failed,
  128 + n where signal n ended it. SIGTERM and Ctrl-C are passed on."""
  def pass_on(signum, _):
    for process in processes:
      if process.poll() is None:
        process.send_signal(signum)

  for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, pass_on)
  first, until, running = 0, None, True
  while running:
    running = None in [process.poll() for process in processes]
    failed = [number for number, process in enumerate(processes) if process.returncode]
    if failed and until is None:
      failed.sort(key=lambda number: processes[number].returncode == LOST)
      first, until = code(processes[failed[0]]), time.monotonic() + grace
      if len(processes) > 1 and first not in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        print(f'launch: process {failed[0]} ended with exit code {first}; the others have {grace} s', file=sys.stderr)
    if running and until and time.monotonic() > until:
      pass_on(signal.SIGTERM if time.monotonic() < until + 10 else signal.SIGKILL, None)
      time.sleep(1)
    time.sleep(0.1)
  return first


def code(process) -> int:
  return process.returncode if process.returncode >= 0 else 128 - process.returncode


if __name__ == '__main__':
  sys.exit(main())
