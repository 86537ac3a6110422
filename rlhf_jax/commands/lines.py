"""JSON Lines in, JSON Lines out: what the commands `generate` and `score` do with files.

A line is {"text": …}, {"messages": …}, {"prompt": …, "response": …} or {"tokens":
[ids]}; whatever else it holds is kept. Lines are computed in windows, in the order of
the input: inside a window sorted by length, so that little is padded. A window is
written as a whole. A command that was cut and is repeated goes on with the first window
that is missing, and ends with the same file.
"""

import argparse
from collections.abc import Callable, Sequence
import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path
import sys
from typing import Any, IO

import jax
import tqdm

from rlhf_jax import files
from rlhf_jax.errors import UserError
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.models import transformer
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.runtime import mesh
from rlhf_jax.stages.shared import model_sources, model_store
from rlhf_jax.types import Params

WINDOW_BATCHES = 16  # batches of a window: more pad less, fewer lose less work when cut

_FORMS = (
  '{"text": …}, {"messages": …}, {"prompt": …} with or without "response", or {"tokens": [ids]}'
)
_FIELDS = ('text', 'messages', 'prompt', 'tokens')  # a line has exactly one of them

Row = dict[str, Any]  # a line as an object
# (numbers of at most batch_size rows, padded length, random key) → what is added to
# each row
Compute = Callable[[Sequence[int], int, jax.Array], list[Row]]


@dataclasses.dataclass(frozen=True)
class OpenedModel:
  """A model that is ready to use."""

  model: transformer.Model
  params: Params  # sharded as the layout says, in float32
  tokenizer: Tokenizer | None  # None where the model's directory has none
  layout: mesh.Layout


@dataclasses.dataclass(frozen=True)
class Lines:
  """The lines of an input file."""

  rows: list[Row]
  places: list[str]  # 'FILE:NUMBER' of each row, for error messages


def open_model(options: argparse.Namespace) -> OpenedModel:
  """Opens the model of --model on the mesh of --mesh.

  Raises:
    UserError: nothing there that can be read, or a mesh or batch that does not fit.
  """
  layout = mesh.make_layout(_parse_mesh(options.mesh))
  shards = layout.batch_shards  # parts in which the mesh cuts a batch
  if options.batch_size < 1 or options.batch_size % shards:
    raise UserError(
      f'--batch_size: {options.batch_size} lines do not divide over {shards} device(s)'
    )
  source = model_sources.find_model(options.model)
  config = dataclasses.replace(source.config, dtype=options.dtype)
  model = transformer.build_model(config, layout)
  shardings = model_store.model_shardings(model, layout)
  params = model_store.read_parameters(source, layout, source.config.base, {})
  # no key: a model that lacks a leaf is an error, not a model with random parts
  params = model_store.complete_parameters(params, model.init, shardings, layout)
  # a model from a stage of ours has the tokenizer of its run
  return OpenedModel(model, params, source.tokenizer(), layout)


def read_lines(path: Path) -> Lines:
  """Reads the lines of a file; empty ones are skipped.

  Raises:
    UserError: it cannot be read, a line has none of the forms, or there are no lines.
  """
  try:
    with files.open_text(path) as file:
      texts = file.read().splitlines()
  except (OSError, UnicodeDecodeError, EOFError) as error:  # EOFError: a cut .gz
    raise UserError(f'{path}: cannot read: {error}') from None
  rows = []
  places = []
  for number, text in enumerate(texts, 1):
    if text.strip():
      place = f'{path}:{number}'
      rows.append(_parse_line(text, place))
      places.append(place)
  if not rows:
    raise UserError(f'{path}: no lines')
  return Lines(rows, places)


def encode_lines(
  lines: Lines,
  opened: OpenedModel,
  with_response: bool,
  room: int = 0,
) -> list[list[int]]:
  """Returns the token ids of every line.

  Args:
    lines: the input.
    opened: the model that reads them.
    with_response: include the response, which messages and a prompt must then have;
      otherwise they are encoded up to where a response begins.
    room: tokens that a generated response may take.

  Raises:
    UserError: a field is of another type or too long, or needs a tokenizer where there
      is none.
  """
  reads = opened.model.config.max_length
  longest = reads - room
  explanation = f': the model reads {reads}, a response may take {room}' if room else ''
  encoded = []
  for row, place in zip(lines.rows, lines.places, strict=True):
    ids = _encode_row(row, place, opened, with_response)
    if not 0 < len(ids) <= longest:
      raise UserError(f'{place}: {len(ids)} tokens, expected 1 to {longest}{explanation}')
    encoded.append(ids)
  return encoded


def fill_output(
  options: argparse.Namespace,
  settings: dict[str, Any],
  rows: list[Row],
  ids: list[list[int]],
  compute: Compute,
  max_padded: float = math.inf,
) -> None:
  """Computes and writes the lines of --output that are not there yet.

  Args:
    options: the command's words.
    settings: whatever else the result depends on; an output begun with others is
      refused. `seed` is that of the random keys, 0 where there is none.
    rows: the input.
    ids: the tokens of each row.
    compute: computes a batch.
    max_padded: the longest padded length.

  Raises:
    UserError: the output was begun with other settings or is not ours, or cannot be
      written.
  """
  settings = dict(
    settings,
    model=str(options.model),
    dtype=options.dtype,
    batch_size=options.batch_size,
    # the parsed rows, so that a file may be compressed or reformatted meanwhile
    input=hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
  )
  size = WINDOW_BATCHES * options.batch_size
  done = _begin_output(options.output, settings, size, len(rows))
  root = jax.random.key(settings.get('seed', 0))
  progress = tqdm.tqdm(
    total=len(rows),
    initial=done,
    unit='line',
    disable=None,  # hidden where the output is not a terminal
  )
  with options.output.open('ab') as file, progress:
    for begin in range(done, len(rows), size):
      window = range(begin, min(begin + size, len(rows)))
      added: dict[int, Row] = {}
      # neighbours in length share a batch, which is padded to its longest row
      by_length = sorted(window, key=lambda number: len(ids[number]))
      for first in range(0, len(by_length), options.batch_size):
        batch = by_length[first : first + options.batch_size]
        length = int(min(bucket_length(len(ids[batch[-1]])), max_padded))
        # by its place in the file, so that a resumed command draws the same
        key = jax.random.fold_in(root, begin + first)
        added.update(zip(batch, compute(batch, length, key), strict=True))
        progress.update(len(batch))
      _append(file, options.output, [{**rows[number], **added[number]} for number in window])
  print(f'{options.output}: {len(rows)} lines', file=sys.stderr)


def max_padded_length(config: ModelConfig, room: int = 0) -> float:
  """Returns how many places a padded row may have.

  Only a model with learned positions has a limit: it has no position beyond its last
  one.

  Args:
    config: the model's shape.
    room: tokens that a generated response may take.
  """
  return config.max_length - room if config.learned_positions else math.inf


def bucket_length(length: int) -> int:
  """Returns the padded length for a length, one of a few, so that few programs are compiled.

  >>> [bucket_length(length) for length in (1, 33, 49, 65, 100)]
  [32, 48, 64, 96, 128]
  """
  size = 32
  while size < length:
    is_power_of_two = size & (size - 1) == 0
    # 32, 48, 64, 96, 128, …: at most half of a row is padding
    size = size * 3 // 2 if is_power_of_two else size * 4 // 3
  return size


def round_float32(value: Any) -> float:
  """Returns a float32 as a float of 9 digits, which are enough to restore it."""
  return float(f'{value:.9g}')


# -- the model


def _parse_mesh(text: str) -> mesh.MeshOptions:
  """Returns the mesh options of a text such as data=2,fsdp=4."""
  known = (*mesh.AXES, 'rollout_tensor')
  axes: dict[str, Any] = {}
  for part in filter(None, text.split(',')):
    name, _, size = part.partition('=')
    if name not in known or not size.lstrip('-').isdecimal():
      names = ', '.join(known)
      raise UserError(f'--mesh: expected AXIS=N with AXIS among {names}, got {part!r}')
    axes[name] = int(size)
  return mesh.MeshOptions(**axes)


# -- the input


def _parse_line(text: str, place: str) -> Row:
  """Returns the object in a line."""
  try:
    row = json.loads(text)
  except ValueError as error:  # JSONDecodeError is one
    raise UserError(f'{place}: not JSON: {error}') from None
  if not isinstance(row, dict) or sum(name in row for name in _FIELDS) != 1:
    raise UserError(f'{place}: expected {_FORMS}')
  return row


def _encode_row(row: Row, place: str, opened: OpenedModel, with_response: bool) -> list[int]:
  """Returns the token ids of a row."""
  if 'tokens' in row:  # needs no tokenizer
    return _check_tokens(row['tokens'], place, opened.model.config.vocab_size)
  tokenizer = opened.tokenizer
  if tokenizer is None:
    raise UserError(f'{place}: the model has no tokenizer, expected {{"tokens": [ids]}}')
  if 'text' in row:
    if not isinstance(row['text'], str):
      raise UserError(f'{place}: text: expected a text')
    return tokenizer.text(row['text'])
  messages, response = _read_conversation(row, place, with_response)
  ids = tokenizer.prompt(messages)
  if response is not None:
    ids = ids + tokenizer.response(response)
  return ids


def _check_tokens(ids: Any, place: str, vocab_size: int) -> list[int]:
  """Returns a row's own token ids, if they are ids."""
  # bool is an int to isinstance, but true is not a token
  if isinstance(ids, list) and all(type(i) is int and 0 <= i < vocab_size for i in ids):
    return ids
  raise UserError(f'{place}: tokens: expected a list of ids from 0 to {vocab_size - 1}')


def _read_conversation(row: Row, place: str, with_response: bool) -> tuple[list[Row], str | None]:
  """Returns the messages before the response, and the response, None where it is not wanted."""
  if 'prompt' in row:
    messages = row['prompt']
    if isinstance(messages, str):
      messages = [dict(role='user', content=messages)]
    if not _are_messages(messages):
      raise UserError(f'{place}: prompt: expected a list of {{"role": …, "content": …}} or a text')
    response = row.get('response') if with_response else None
    if with_response and not isinstance(response, str):
      raise UserError(f'{place}: response: expected a text')
    return messages, response
  messages = row['messages']
  if not _are_messages(messages):
    raise UserError(f'{place}: messages: expected a list of {{"role": …, "content": …}}')
  if not with_response:
    return messages, None
  if messages[-1]['role'] != 'assistant':
    raise UserError(f'{place}: messages: expected the last one from the assistant')
  return messages[:-1], messages[-1]['content']


def _are_messages(value: Any) -> bool:
  """Whether a value is a list of at least one message."""
  return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
  """Whether a value is a message with a role and a text."""
  if not isinstance(value, dict) or 'role' not in value:
    return False
  return isinstance(value.get('content'), str)


# -- the output


def _begin_output(output: Path, settings: dict[str, Any], window: int, count: int) -> int:
  """Begins an output, or prepares one that was cut to be continued.

  The settings are kept in a file beside the output.

  Args:
    output: the file.
    settings: what its lines depend on.
    window: lines of a window.
    count: lines of the whole output.

  Returns:
    How many lines it has and keeps.

  Raises:
    UserError: it was begun with other settings, is not ours, or cannot be written.
  """
  settings_path = output.with_name(output.name + '.settings.json')
  if not output.exists():
    try:  # settings first: an output without them would not be known as ours
      files.write_text(settings_path, json.dumps(settings, indent=2) + '\n')
      output.touch()
    except OSError as error:
      raise UserError(f'{output}: cannot write: {error.strerror}') from None
    return 0
  remedy = 'delete it, or give another --output'
  if not settings_path.is_file():
    raise UserError(f'{output}: was not begun by this command; {remedy}')
  before = json.loads(settings_path.read_text())
  if before != settings:
    changed = [name for name, value in settings.items() if before.get(name) != value]
    changes = ', '.join(changed) or 'command'
    raise UserError(f'{output}: was begun with another {changes}; {remedy}')
  return _keep_whole_windows(output, window, count)


def _keep_whole_windows(output: Path, window: int, count: int) -> int:
  """Cuts a window off that was not written to its end; returns how many lines are left."""
  lines = output.read_bytes().splitlines(keepends=True)
  keep = sum(line.endswith(b'\n') for line in lines)
  if keep < count:  # the last window of a complete output may be a short one
    keep -= keep % window
  with output.open('r+b') as file:
    file.truncate(sum(len(line) for line in lines[:keep]))
  return keep


def _append(file: IO[bytes], output: Path, rows: list[Row]) -> None:
  """Writes a window of rows to the disk."""
  text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
  try:
    file.write(text.encode())
    file.flush()
    os.fsync(file.fileno())  # a machine may be taken away at any time
  except OSError as error:
    raise UserError(
      f'{output}: cannot write: {error.strerror}; the lines before are kept'
    ) from None
