"""A server of the application in a process of its own, and programs that use it over HTTP."""

import json
import os
from pathlib import Path
import re
import subprocess
import sys

import httpx

ROOT = Path(__file__).parents[2]


def command(workdir, *words, **options):
  """Runs a word of the command to its end, and returns what it prints."""
  done = subprocess.run(
    [sys.executable, '-m', 'rlhf_jax.collect', words[0], f'--workdir={workdir}', *words[1:]],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    **options,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


class Server:
  """A server at a free port of loopback."""

  def __init__(self, workdir, *words):
    self.workdir = workdir
    self.words = words
    self.start()

  def start(self):
    self.process = subprocess.Popen(
      [
        sys.executable,
        '-m',
        'rlhf_jax.collect',
        f'--workdir={self.workdir}',
        '--port=0',
        *self.words,
      ],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | {'PYTHONPATH': str(ROOT)},
    )
    self.lead = self.process.stdout.readline().split()[1]
    self.base = self.lead.split('/join/')[0]
    for _ in range(200):
      try:
        if httpx.get(f'{self.base}/health').text == 'ok':
          return
      except httpx.TransportError:
        continue  # not yet
    raise AssertionError('the server does not answer')

  def kill(self):
    self.process.kill()
    self.process.wait()

  def stop(self):
    self.process.terminate()
    self.process.wait(timeout=20)


def write_lines(path, lines):
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return path


LETTERS = re.compile(r'name="overall\.([A-I])"')
TOKEN = re.compile(r'name="form_token" value="([0-9a-f]+)"')
GUIDELINES = re.compile(r'name="guidelines" value="(\w+)"')


def rank_fields(page):
  """Fields of a page's form, with a rank for each response in the order of the page."""
  letters = list(dict.fromkeys(LETTERS.findall(page)))
  fields = {f'overall.{letter}': str(rank) for rank, letter in enumerate(letters, 1)}
  fields['form_token'] = TOKEN.search(page).group(1)
  fields['guidelines'] = GUIDELINES.search(page).group(1)
  return fields
