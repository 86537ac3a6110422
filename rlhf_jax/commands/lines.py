"""JSON Lines in, JSON Lines out: what the commands `generate` and `score` share.

A line is {"text": …}, {"messages": …}, {"prompt": …, "response": …} or {"tokens": [ids]}; what else it holds is kept. Lines
are done in windows, in the order of the input: inside a window by length, so that little is padded. A window is written
whole, so a command that was cut and is repeated goes on with the window that is missing and ends with the same file.
"""

import argparse
from collections.abc import Callable
import dataclasses
import gzip
import hashlib
import json
import math
import os
from pathlib import Path
import sys
from typing import Any

import jax
import tqdm

from rlhf_jax import pipeline
from rlhf_jax.errors import UserError
from rlhf_jax.models import model_config, transformer
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.runtime import mesh
from rlhf_jax.stages.shared import model_sources

_WINDOW = 16  # batches
_FORMS = '{"text": …}, {"messages": …}, {"prompt": …} with or without "response", or {"tokens": [ids]}'


@dataclasses.dataclass(frozen=True)
class Opened:
  """A model to use. `tokenizer` is None where its directory has none."""
  model: transformer.Model
  params: Any
  tokenizer: Tokenizer | None
  layout: mesh.Layout


def parser(command: str, text: str) -> argparse.ArgumentParser:
  """What both commands ask for."""
  made = argparse.ArgumentParser(prog=f'python -m rlhf_jax.{command}', description=text,
                                 formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
  made.add_argument('--model', required=True, metavar='DIR', help="a Hugging Face directory, a stage's folder of a "
                    "workdir, a .gguf file, or 'smollm2'")
  made.add_argument('--input', required=True, metavar='FILE', type=Path, help='JSON Lines, .gz too')
  made.add_argument('--output', required=True, metavar='FILE', type=Path, help='the same lines with more in them; '
                    'repeat the command to go on where it was cut')
  made.add_argument('--batch_size', type=int, default=32, help='lines at once, over all devices; default 32')
  made.add_argument('--dtype', default='float32', choices=model_config.DTYPES, help='to compute in; default float32')
  made.add_argument('--mesh', default='', metavar='AXIS=N,…', help='devices along data, fsdp, expert, context, tensor; '
                    'default: all along data')
  return made


def run(command: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
  """The exit code: 0, 2 for a user's mistake, 130 for Ctrl-C."""
  try:
    pipeline.cache_compilations()
    command(options)
  except UserError as error:
    print(f'rlhf_jax: error: {error}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print('\nrlhf_jax: interrupted; repeat the command to go on', file=sys.stderr)
    return 130
  return 0


def open_model(options) -> Opened:
  """The model of --model on the mesh of --mesh.

  Raises:
    UserError: nothing there that can be read, or a mesh or batch that does not fit.
  """
  axes = {name: getattr(mesh.MeshOptions, name) for name in (*mesh.AXES, 'rollout_tensor')}
  for part in filter(None, options.mesh.split(',')):
    name, _, size = part.partition('=')
    if name not in axes or not size.lstrip('-').isdecimal():
      raise UserError(f'--mesh: expected AXIS=N with AXIS of {", ".join(axes)}, got {part!r}')
    axes[name] = int(size)
  layout = mesh.make_layout(mesh.MeshOptions(**axes))
  if options.batch_size < 1 or options.batch_size % layout.batch_shards:
    raise UserError(f'--batch_size: {options.batch_size} lines do not divide over {layout.batch_shards} device(s)')
  source = model_sources.find_model(options.model)
  model = transformer.build_model(dataclasses.replace(source.config, dtype=options.dtype), layout)
  shardings = layout.shardings(model.axes, jax.eval_shape(model.init, jax.random.key(0)))
  params = model_sources.complete_parameters(model_sources.read_parameters(source, layout, source.config.base, {}), model.init, shardings, layout)
  return Opened(model, params, source.tokenizer(), layout)


def read(path: Path) -> tuple[list[dict], list[str]]:
  """The objects of a file, and what errors call each: its place.

  Raises:
    UserError: it cannot be read, or a line is none of the forms.
  """
  try:
    with gzip.open(path, 'rt', encoding='utf-8') if path.suffix == '.gz' else path.open(encoding='utf-8') as file:
      texts = file.read().splitlines()
  except (OSError, UnicodeDecodeError, EOFError) as error:
    raise UserError(f'{path}: cannot read: {error}') from None
  rows, places = [], []
  for number, text in enumerate(texts, 1):
    if text.strip():
      try:
        row = json.loads(text)
      except ValueError as error:
        raise UserError(f'{path}:{number}: not JSON: {error}') from None
      if not isinstance(row, dict) or sum(name in row for name in ('text', 'messages', 'prompt', 'tokens')) != 1:
        raise UserError(f'{path}:{number}: expected {_FORMS}')
      rows.append(row)
      places.append(f'{path}:{number}')
  if not rows:
    raise UserError(f'{path}: no lines')
  return rows, places


def encode(rows, places, opened: Opened, whole: bool, room: int = 0) -> list[list[int]]:
  """The ids of lines.

  Args:
    whole: with the answer, which is then needed for messages and prompt; else up to where an answer begins.
    room: tokens that an answer may take.

  Raises:
    UserError: a field is of another kind or too long, or needs a tokenizer where there is none.
  """
  ids, limit = [], opened.model.config.max_length - room
  for row, where in zip(rows, places):
    ids.append(_tokens(row, where, opened, whole))
    if not 0 < len(ids[-1]) <= limit:
      raise UserError(f'{where}: {len(ids[-1])} tokens, expected 1 to {limit}' + (
          f': the model reads {limit + room}, an answer may take {room}' if room else ''))
  return ids


def _tokens(row, where, opened, whole):
  tokenizer, size = opened.tokenizer, opened.model.config.vocab_size
  if 'tokens' in row:
    ids = row['tokens']
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < size for i in ids):
      raise UserError(f'{where}: tokens: expected a list of ids from 0 to {size - 1}')
    return ids
  if tokenizer is None:
    raise UserError(f'{where}: the model has no tokenizer, expected {{"tokens": [ids]}}')
  if 'text' in row:
    if not isinstance(row['text'], str):
      raise UserError(f'{where}: text: expected a text')
    return tokenizer.text(row['text'])
  messages, answer = row.get('messages'), None
  if 'prompt' in row:
    messages, answer = row['prompt'], row.get('response')
    messages = [dict(role='user', content=messages)] if isinstance(messages, str) else messages
  if not isinstance(messages, list) or not messages or not all(
      isinstance(one, dict) and {'role', 'content'} <= {*one} and isinstance(one['content'], str) for one in messages):
    raise UserError(f'{where}: {"prompt" if "prompt" in row else "messages"}: expected a list of '
                    '{"role": …, "content": …}' + (' or a text' if 'prompt' in row else ''))
  if 'prompt' not in row and whole and messages[-1]['role'] == 'assistant':
    messages, answer = messages[:-1], messages[-1]['content']
  if whole and not isinstance(answer, str):
    raise UserError(f'{where}: ' + ('response: expected a text' if 'prompt' in row else
                                    'messages: expected the last one from the assistant'))
  return tokenizer.prompt(messages) + (tokenizer.response(answer) if whole else [])


def process(options, settings: dict, rows: list[dict], ids: list[list[int]], work, limit: float = math.inf) -> None:
  """Fills --output.

  Args:
    settings: what else the result depends on; a file begun with others is refused.
    ids: of each row.
    work: (numbers of at most batch_size rows, padded length, key) → what is added to each of these rows.
    limit: of padded lengths.

  Raises:
    UserError: --output was begun with other settings or is no file of ours, or it cannot be written.
  """
  settings = dict(settings, model=str(options.model), dtype=options.dtype, batch_size=options.batch_size,
                  input=hashlib.sha256(json.dumps(rows).encode()).hexdigest())
  done = _begin(options.output, settings, _WINDOW * options.batch_size, len(rows))
  progress = tqdm.tqdm(total=len(rows), initial=done, unit='line', disable=None)
  with options.output.open('ab') as file:
    for begin in range(done, len(rows), _WINDOW * options.batch_size):
      window = range(begin, min(begin + _WINDOW * options.batch_size, len(rows)))
      order, added = sorted(window, key=lambda number: len(ids[number])), {}
      for first in range(0, len(order), options.batch_size):
        part = order[first:first + options.batch_size]
        added.update(zip(part, work(part, min(bucket(len(ids[part[-1]])), limit), jax.random.fold_in(
            jax.random.key(settings.get('seed', 0)), begin + first))))
        progress.update(len(part))
      text = ''.join(json.dumps({**rows[number], **added[number]}, ensure_ascii=False) + '\n' for number in window)
      try:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
      except OSError as error:
        raise UserError(f'{options.output}: cannot write: {error.strerror}; what is there is kept') from None
  progress.close()
  print(f'{options.output}: {len(rows)} lines', file=sys.stderr)


def limit(config, room: int = 0) -> float:
  """Places that a row may have: of a model that learned each position, those it has, but for `room` of an answer."""
  return config.max_length - room if config.learned_positions else math.inf


def bucket(length: int) -> int:
  """The padded length: 32, 48, 64, 96, 128, … so that few programs are compiled."""
  size = 32
  while size < length:
    size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
  return size


def number(x) -> float:
  """A float32 with as many digits as it has."""
  return float(f'{x:.9g}')


def _begin(output: Path, settings: dict, window: int, count: int) -> int:
  """Lines that are there and stay: whole windows. A half-written one is cut off."""
  said = output.with_name(output.name + '.settings.json')
  if not output.exists():
    try:
      output.parent.mkdir(parents=True, exist_ok=True)
      said.write_text(json.dumps(settings, indent=2) + '\n')
      output.touch()
    except OSError as error:
      raise UserError(f'{output}: cannot write: {error.strerror}') from None
    return 0
  before = json.loads(said.read_text()) if said.is_file() else None
  if before != settings:
    names = [name for name in settings if before is not None and before.get(name) != settings[name]]
    raise UserError(f'{output}: ' + ('was not begun by this command' if before is None else
                                     f'was begun with another {", ".join(names) or "command"}')
                    + '; delete it, or give another --output')
  lines = output.read_bytes().splitlines(keepends=True)
  whole = sum(line.endswith(b'\n') for line in lines)
  keep = whole if whole == count else whole - whole % window
  with output.open('r+b') as file:
    file.truncate(sum(map(len, lines[:keep])))
  return keep
