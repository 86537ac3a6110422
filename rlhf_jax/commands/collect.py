"""Collects demonstrations and rankings from people: `python -m rlhf_jax.collect`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
import sys

from rlhf_jax.commands import arguments
from rlhf_jax.errors import UserError

_DESCRIPTION = """\
Serves the application in which people demonstrate, rank, edit and converse.

  python -m rlhf_jax.collect --workdir=DIR                      serve; prints the lead's link
  python -m rlhf_jax.collect add --workdir=DIR --input=FILE     bring items into the queue
  python -m rlhf_jax.collect sample --workdir=DIR --models=… --input=prompts.jsonl --samples=4
                                                                let models respond, and queue that
  python -m rlhf_jax.collect invite --workdir=DIR --places=20   print a link for annotators
  python -m rlhf_jax.collect status --workdir=DIR               progress and agreement
  python -m rlhf_jax.collect select --workdir=DIR --reward=DIR  ask first what it is least sure of
  python -m rlhf_jax.collect export --workdir=DIR --output=FILE write rankings or demonstrations

Needs the extra `collect`: pip install 'rlhf_jax[collect]'. docs/collect.md leads through it.
"""
_EPILOG = 'Exit codes: 0 done, 2 a mistake in the arguments or the input, 130 interrupted.'
_WORDS = ('serve', 'add', 'sample', 'invite', 'status', 'select', 'export')


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the command."""
  parser = arguments.make_parser('rlhf_jax.collect', _DESCRIPTION, _EPILOG)
  commands = parser.add_subparsers(dest='command', metavar='|'.join(_WORDS))
  _add_serve(commands.add_parser('serve', help='serve the pages (the default)'))
  _add_add(commands.add_parser('add', help='bring items into the queue'))
  _add_sample(commands.add_parser('sample', help='sample responses into the queue'))
  _add_invite(commands.add_parser('invite', help='print an invitation link'))
  _add_workdir(commands.add_parser('status', help='progress and agreement'))
  _add_select(commands.add_parser('select', help='set the priorities by reward models'))
  _add_export(commands.add_parser('export', help='write records'))
  return parser


def main(words: Sequence[str] | None = None) -> int:
  """Parses the words of the command, runs it, and returns the exit code.

  Args:
    words: as on the command line; None for those of this process.

  Returns:
    0 done, 2 a user's mistake, 130 interrupted.
  """
  words = list(sys.argv[1:] if words is None else words)
  asks_help = bool({'-h', '--help'} & set(words))
  if (not words or words[0] not in _WORDS) and not asks_help:
    words.insert(0, 'serve')  # what the command is for
  options = make_parser().parse_args(words)  # --help ends here
  return arguments.run_command(_run, options)


def _run(options: argparse.Namespace) -> None:
  """Imports what the command needs, and runs it."""
  try:
    from rlhf_jax.commands import collect_work
  except ModuleNotFoundError as error:
    if error.name and error.name.startswith('rlhf_jax'):
      raise  # a fault of ours, no missing extra
    raise UserError(
      f"{error.name} is missing; the application needs: pip install 'rlhf_jax[collect]'"
    ) from None
  getattr(collect_work, options.command)(options)


def _add_workdir(parser: argparse.ArgumentParser) -> None:
  """Adds what all commands share: the workdir and its database."""
  parser.add_argument(
    '--workdir', required=True, metavar='DIR', type=Path, help='of the collection'
  )
  parser.add_argument(
    '--database',
    default='',
    metavar='URL',
    help='such as postgresql+psycopg://user@host/name (default: SQLite in the workdir)',
  )


def _add_serve(parser: argparse.ArgumentParser) -> None:
  """Adds the words of `serve`."""
  _add_workdir(parser)
  parser.add_argument(
    '--host',
    default='127.0.0.1',
    metavar='HOST',
    help='address to listen at (default: %(default)s, this machine only)',
  )
  parser.add_argument(
    '--port', type=int, default=8321, metavar='N', help='default: %(default)s; 0 = any free one'
  )
  parser.add_argument(
    '--public_url',
    default='',
    metavar='URL',
    help='how people reach the server, where another one stands before it',
  )
  parser.add_argument(
    '--models',
    default='',
    metavar='DIR,…',
    help='models that reply in conversations; with --endpoint their names there',
  )
  parser.add_argument(
    '--endpoint',
    default='',
    metavar='URL',
    help='a server that speaks the OpenAI protocol, such as http://localhost:8000/v1',
  )
  parser.add_argument(
    '--max_new_tokens',
    type=int,
    default=256,
    metavar='N',
    help='of a reply (default: %(default)s)',
  )


def _add_add(parser: argparse.ArgumentParser) -> None:
  """Adds the words of `add`."""
  _add_workdir(parser)
  parser.add_argument(
    '--input',
    required=True,
    metavar='FILE',
    type=Path,
    help='JSON Lines: messages, and responses to rank; or an export of another tool',
  )
  parser.add_argument(
    '--task',
    default='',
    choices=('', 'rank', 'demonstrate', 'edit', 'converse'),
    help='default: rank where there are responses, else demonstrate',
  )
  parser.add_argument(
    '--batch', default='items', metavar='NAME', help='of these items (default: %(default)s)'
  )
  parser.add_argument(
    '--format',
    default='jsonl',
    choices=('jsonl', 'label_studio', 'argilla', 'potato'),
    help='layout of the file (default: %(default)s)',
  )


def _add_sample(parser: argparse.ArgumentParser) -> None:
  """Adds the words of `sample`."""
  _add_workdir(parser)
  parser.add_argument(
    '--models',
    required=True,
    metavar='DIR,…',
    help="Hugging Face directories, or stages' folders in a workdir",
  )
  parser.add_argument(
    '--input', required=True, metavar='FILE', type=Path, help='JSON Lines with `messages`'
  )
  parser.add_argument(
    '--samples',
    type=int,
    default=4,
    metavar='K',
    help='responses to each prompt, over all models (default: %(default)s)',
  )
  parser.add_argument('--max_new_tokens', type=int, default=256, metavar='N')
  arguments.add_temperature_argument(parser)
  parser.add_argument('--seed', type=int, default=0, metavar='N')
  parser.add_argument('--batch_size', type=int, default=32, metavar='N', help='prompts at once')
  parser.add_argument('--batch', default='items', metavar='NAME', help='of the new items')
  parser.add_argument(
    '--task', default='rank', choices=('rank', 'edit'), help='default: %(default)s'
  )


def _add_invite(parser: argparse.ArgumentParser) -> None:
  """Adds the words of `invite`."""
  _add_workdir(parser)
  parser.add_argument(
    '--role', default='annotator', metavar='ROLE', help='annotator, reviewer or lead'
  )
  parser.add_argument(
    '--places', type=int, default=1, metavar='N', help='people whom the link admits'
  )
  parser.add_argument('--days', type=float, default=14.0, metavar='N', help='until it expires')
  parser.add_argument('--label', default='', metavar='TEXT', help="for the lead's list")
  parser.add_argument(
    '--public_url', default='http://127.0.0.1:8321', metavar='URL', help='default: %(default)s'
  )


def _add_select(parser: argparse.ArgumentParser) -> None:
  """Adds the words of `select`."""
  _add_workdir(parser)
  parser.add_argument(
    '--reward',
    required=True,
    metavar='DIR,…',
    help='reward models; several are an ensemble',
  )
  parser.add_argument('--batch_size', type=int, default=32, metavar='N', help='responses at once')


def _add_export(parser: argparse.ArgumentParser) -> None:
  """Adds the words of `export`."""
  _add_workdir(parser)
  parser.add_argument('--output', required=True, metavar='FILE', type=Path)
  parser.add_argument(
    '--kind',
    default='rankings',
    metavar='KIND',
    help='rankings, demonstrations, prompts or raw (default: %(default)s)',
  )
  parser.add_argument(
    '--combination',
    default='all',
    metavar='HOW',
    help='of several people: all, majority or reliability (default: %(default)s)',
  )
  parser.add_argument('--batch', default='', metavar='NAME', help='only these items')
  parser.add_argument(
    '--format',
    default='jsonl',
    choices=('jsonl', 'label_studio', 'argilla', 'potato'),
    help='layout of the file (default: %(default)s)',
  )
