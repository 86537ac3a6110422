"""Keeps the responses of models until all of a comparison is done, so that it can be repeated.

A file for each model stands in a folder beside the output. It holds what was
asked of which model; if any of it differs, the model responds anew.
"""

import argparse
from collections.abc import Sequence
import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
import shutil
from typing import Any

from rlhf_jax import fingerprints
from rlhf_jax.commands import contestants
from rlhf_jax.commands.contestants import Answers, Contestant
from rlhf_jax.data.records import conversation, Prompt
from rlhf_jax.errors import UserError

_SETTINGS = ('samples', 'max_new_tokens', 'temperature', 'batch_size', 'seed')


def respond_once(
  models: Sequence[Contestant],
  options: argparse.Namespace,
  prompts: Sequence[Prompt],
) -> list[Answers]:
  """Lets each model respond that has not done so in an interrupted command.

  Args:
    models: M models, each of which is read, responds and is dropped before the next.
    options: the command's words, as of `contestants.respond`, and `output`.
    prompts: N prompts.

  Returns:
    M times N lists of texts.
  """
  said = [conversation(prompt) for prompt in prompts]
  digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()
  settings = {name: getattr(options, name) for name in _SETTINGS}
  answers = []
  for number, model in enumerate(models):
    path = _folder(options) / f'{number}.json'
    asked = {
      'model': dataclasses.asdict(model),
      'files': _describe_files(model),
      'prompts': digest,
      **settings,
    }
    own = _read(path, asked)
    if own is None:
      own = contestants.respond(model, options, prompts)
      fingerprints.write_json(path, {'asked': asked, 'answers': own})
    answers.append(own)
  return answers


def forget(options: argparse.Namespace) -> None:
  """Removes what is kept, as the output has it all."""
  shutil.rmtree(_folder(options), ignore_errors=True)


def _folder(options: argparse.Namespace) -> Path:
  return options.output.with_suffix('.responses')


def _read(path: Path, asked: dict[str, Any]) -> Answers | None:
  """Reads the responses of a model; None where there are none to the same question."""
  if not path.is_file():
    return None
  # A damaged file is no loss: its model responds once more.
  with contextlib.suppress(UserError, LookupError):
    kept = fingerprints.read_json(path)
    if kept['asked'] == asked:
      return kept['answers']
  return None


def _describe_files(model: Contestant) -> str:
  """Returns a digest of names, sizes and times of a model's files, '' where there are none."""
  if model.kind == 'endpoint':
    return ''
  folder = Path(model.place.rpartition('@')[0] or model.place)  # STAGE@STEP is in STAGE
  paths = sorted(folder.rglob('*')) if folder.is_dir() else [folder]
  found = []
  for path in paths:
    if path.is_file():
      status = path.stat()
      found.append([str(path), status.st_size, status.st_mtime_ns])
  return fingerprints.of_value(found) if found else ''
