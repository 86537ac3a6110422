"""Kills a run whose workdir is behind a URL, and resumes it on an empty disk.

  pip install s3fs "moto[server]"
  python scripts/remote_kill_test.py --folder=runs/remote --processes=2 --kills=3

A simulated S3 server is started on this machine, unless --url names a store. Each process has a
disk of its own, as on machines that share none. After each kill -9 of all processes the same
command starts again with empty disks, as on new machines. At the end, all that the run left behind
the URL is compared with an uninterrupted run in a local folder, bit for bit. Further arguments,
such as --config.ppo.microbatches=2, are passed to both runs. The exit code is 1 if anything
differs.
"""

import argparse
from collections.abc import Sequence
import os
from pathlib import Path
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import kill_test

ROOT = Path(__file__).resolve().parents[1]
STEPS = kill_test.STEPS


def main() -> int:
  """Makes both runs and compares them; returns the exit code."""
  options, overrides = parse()
  sys.path.insert(0, str(ROOT))
  from rlhf_jax.experiment import pipeline

  bare_overrides = [override.removeprefix('--config.') for override in overrides]
  config = pipeline.load_config(options.config, bare_overrides)
  trained = [name for name in config.stages if 'loop' in config[name]]
  command = [f'--config={options.config}', *overrides, *kill_test.shorten(trained)]
  folder = Path(options.folder).absolute()
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(folder / 'compiled'))
  server = None
  url = options.url
  if not url:
    server, url = start_s3(folder)
  try:
    say('the uninterrupted run, in a local folder …')
    finish(start(command, str(folder / 'alone'), options.processes, folder / 'cache'), folder)
    kill_often(command, url, options, folder, trained)
    os.environ['XDG_CACHE_HOME'] = str(folder / 'reader')
    from rlhf_jax.experiment import remote_workdir

    found = remote_workdir.fetch(url, '--url')
    kill_test.read_arrays = read_fingerprints
    return kill_test.compare(folder / 'alone', found, config.stages, trained)
  finally:
    if server:
      server.kill()


def parse() -> tuple[argparse.Namespace, list[str]]:
  """Parses the command line; returns the options, and the overrides --config.section.key=value."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument('--config', default=str(ROOT / 'experiments/quickstart.py:tiny'))
  parser.add_argument('--folder', required=True, help='for everything local; it is emptied first')
  parser.add_argument('--url', default='', help="the run's workdir; '' = on a simulated S3")
  parser.add_argument('--processes', type=int, default=2)
  parser.add_argument('--kills', type=int, default=3)
  parser.add_argument('--seed', type=int, default=0)
  return parser.parse_known_args()


def start_s3(folder: Path) -> tuple[subprocess.Popen, str]:
  """Starts a simulated S3 server with an empty bucket; returns it and the URL of a workdir."""
  port = free_port()
  environment = {
    'AWS_ENDPOINT_URL': f'http://127.0.0.1:{port}',
    'AWS_ACCESS_KEY_ID': 'key',
    'AWS_SECRET_ACCESS_KEY': 'secret',
    'AWS_DEFAULT_REGION': 'us-east-1',
  }
  os.environ.update(environment)
  with (folder / 's3.txt').open('w') as log:
    server = subprocess.Popen(
      [sys.executable, '-m', 'moto.server', '-p', str(port)], stdout=log, stderr=log
    )
  import s3fs

  for _ in range(60):
    time.sleep(0.5)
    try:
      s3fs.S3FileSystem().mkdir('bucket')
      return server, 's3://bucket/run'
    except OSError:
      continue
  sys.exit('the simulated S3 server did not start')


def free_port() -> int:
  """Returns a port of this machine that nothing listens to."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def start(
  command: Sequence[str], workdir: str, processes: int, cache: Path
) -> list[subprocess.Popen]:
  """Starts all processes of a run; each keeps its files in a folder of its own of `cache`."""
  paths = [str(ROOT), os.environ.get('PYTHONPATH', '')]
  cache.mkdir(parents=True, exist_ok=True)
  port = free_port()
  started = []
  for number in range(processes):
    environment = {
      **os.environ,
      'PYTHONPATH': os.pathsep.join(paths),
      'XDG_CACHE_HOME': str(cache / f'process-{number}'),
    }
    peers: list[str] = []
    if processes > 1:
      peers = [
        f'--coordinator=127.0.0.1:{port}',
        f'--processes={processes}',
        f'--process={number}',
      ]
    with (cache / f'log-{number}.txt').open('w') as log:
      process = subprocess.Popen(
        [sys.executable, '-m', 'rlhf_jax', *command, f'--workdir={workdir}', *peers],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
      )
    started.append(process)
  return started


def kill_often(
  command: Sequence[str],
  url: str,
  options: argparse.Namespace,
  folder: Path,
  trained: Sequence[str],
) -> None:
  """Runs with the workdir behind the URL to the end; kills it at random steps before."""
  rng = random.Random(options.seed)
  places = [(name, step) for name in trained for step in range(1, STEPS)]
  moments = sorted(rng.sample(range(len(places)), min(options.kills, len(places))))
  for number, moment in enumerate(moments):
    stage, step = places[moment]
    cache = folder / f'disk-{number}'
    processes = start(command, url, options.processes, cache)
    while processes[0].poll() is None and not reached(cache, stage, step):
      time.sleep(0.01)
    for process in processes:
      process.send_signal(signal.SIGKILL)
      process.wait()
    say(f'killed in {stage} at step {step} or later')
  finish(start(command, url, options.processes, folder / 'last'), folder)


def reached(cache: Path, stage: str, step: int) -> bool:
  """Tells whether a run with this cache has made a step of a stage."""
  paths = list(cache.glob(f'process-0/rlhf_jax/workdirs/*/{stage}/metrics.jsonl'))
  return bool(paths) and kill_test.last_step(paths[0]) >= step


def finish(processes: list[subprocess.Popen], folder: Path) -> None:
  """Waits for the end of a run; exits if it failed."""
  if any([process.wait() for process in processes]):
    logs = sorted(folder.glob('*/log-*.txt'), key=lambda path: path.stat().st_mtime)
    sys.exit(f'the run failed: {logs[-1].read_text()[-3000:]}')


def read_fingerprints(directory: Path) -> dict[str, Any]:
  """Returns shape and fingerprint of every array of the newest checkpoint, and its data.

  The arrays themselves lie on as many devices as the run had processes.
  """
  import orbax.checkpoint as ocp

  options = ocp.CheckpointManagerOptions(read_only=True, create=False)
  with ocp.CheckpointManager(directory, options=options) as manager:
    step = manager.latest_step()
    wanted = ocp.args.Composite(meta=ocp.args.JsonRestore())
    body = manager.restore(step, args=wanted).meta['body']
  return {'step': step, 'data': body['data'], **body['arrays']['params'], **body['arrays']['rest']}


def say(text: str) -> None:
  """Prints a line at once."""
  print(text, flush=True)


if __name__ == '__main__':
  sys.exit(main())
