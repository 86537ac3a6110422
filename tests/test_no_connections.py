"""Importing the package opens no connection (SECURITY.md)."""

import subprocess
import sys

IMPORT_ALL = """
import importlib, pkgutil, sys

def refuse(event, arguments):
  if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto', 'urllib.Request'):
    raise SystemExit(f'{event}{arguments}')

sys.addaudithook(refuse)
import rlhf_jax
for module in pkgutil.walk_packages(rlhf_jax.__path__, 'rlhf_jax.'):
  if not module.name.endswith('__main__'):
    importlib.import_module(module.name)
    print(module.name)
"""


def test_importing_every_module_opens_no_connection():
  done = subprocess.run([sys.executable, '-c', IMPORT_ALL], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert 'rlhf_jax.stages.ppo.update' in done.stdout.split()
