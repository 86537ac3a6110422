"""What the commands share, and their help texts."""

import importlib
import subprocess
import sys

import pytest

from rlhf_jax.commands import arguments, chat, generate, plan, report, score, train
from rlhf_jax.errors import UserError
from rlhf_jax.models import model_config

COMMANDS = {
  'train': train,
  'generate': generate,
  'score': score,
  'plan': plan,
  'report': report,
  'chat': chat,
}
HEAVY = ('jax', 'flax', 'orbax', 'grain', 'matplotlib', 'transformers', 'numpy')


@pytest.mark.parametrize('name', COMMANDS)
def test_help_needs_nothing_heavy(name):
  """In a process of its own; so it comes at once, and defaults stand in it."""
  code = (
    f'import sys; from rlhf_jax.commands import {name}\n'
    'try:\n'
    f'  {name}.main(["--help"])\n'
    'finally:\n'
    f'  print("imported", sorted({{*sys.modules}} & {{*{HEAVY!r}}}))'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout.endswith('imported []\n')
  assert 'usage: python -m rlhf_jax' in done.stdout and 'Exit codes: 0' in done.stdout
  if name in ('generate', 'score'):
    assert '(default: 32)' in done.stdout and '(default: float32)' in done.stdout


@pytest.mark.parametrize('module', ['__main__', 'generate', 'score', 'plan', 'report', 'chat'])
def test_entry_points_are_the_commands(module):
  place = 'report.__main__' if module == 'report' else module  # a package of the same name
  entry = importlib.import_module(f'rlhf_jax.{place}')
  assert entry.main is COMMANDS['train' if module == '__main__' else module].main


def test_dtypes_are_those_of_the_models():
  (dtype,) = [action for action in score.make_parser()._actions if action.dest == 'dtype']
  assert tuple(dtype.choices) == model_config.DTYPES


def test_overrides_are_told_from_unknown_words(capsys):
  parser = arguments.make_parser('rlhf_jax', 'Runs.')
  arguments.add_config_argument(parser)
  words = ['--config=a.py:tiny', '--config.ppo.epochs=2', "--config.stages=('sft',)"]
  options, overrides = arguments.parse_with_overrides(parser, words)
  assert options.config == 'a.py:tiny'
  assert overrides == ['ppo.epochs=2', "stages=('sft',)"]
  for wrong in ('--conf=a', 'ppo.epochs=2', '--ppo.epochs=2'):
    with pytest.raises(SystemExit) as stop:
      arguments.parse_with_overrides(parser, [*words, wrong])
    assert stop.value.code == 2
    assert f'unknown argument {wrong}; overrides look like' in capsys.readouterr().err


@pytest.mark.parametrize('command', [generate, score])
def test_an_output_that_promises_to_be_compressed_is_refused(command, capsys):
  with pytest.raises(SystemExit) as stop:
    command.main(['--model=m', '--input=a.jsonl.gz', '--output=b.jsonl.gz'])
  assert stop.value.code == 2
  assert 'expected a name without .gz, got b.jsonl.gz' in capsys.readouterr().err


def test_exit_codes_and_messages(capsys):
  def fails(error):
    def command(options):
      raise error

    return command

  assert arguments.run_command(lambda options: None, None) == 0
  assert arguments.run_command(fails(UserError('a: b')), None) == 2
  assert capsys.readouterr().err == 'rlhf_jax: error: a: b\n'
  assert arguments.run_command(fails(KeyboardInterrupt()), None) == 130
  assert 'interrupted by SIGINT: what was finished is kept; repeat the' in capsys.readouterr().err
