"""JSON Lines in, JSON Lines out: the file handling of the commands `generate` and `score`.

A line is {"text": …}, {"messages": …}, {"prompt": …, "response": …} or {"tokens": [ids]}; its other
fields are copied to the output. The lines are divided into windows of consecutive lines. Within a
window, lines of similar length share a batch, so that there is little padding; a window is written
when it is complete. If an interrupted command is repeated, it resumes with the first window that is
missing, and the final file is the same as that of an uninterrupted command.
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

# Batches of a window. More of them need less padding; with fewer, less work is lost when a
# command is interrupted.
WINDOW_BATCHES = 16

_FORMS = (
  '{"text": …}, {"messages": …}, {"prompt": …} with or without "response", or {"tokens": [ids]}'
)
_FIELDS = ('text', 'messages', 'prompt', 'tokens')  # a line has exactly one of them

Row = dict[str, Any]  # the JSON object of a line
# (the numbers of at most batch_size rows, padded length, random key) → the fields to add to
# each of these rows
Compute = Callable[[Sequence[int], int, jax.Array], list[Row]]


@dataclasses.dataclass(frozen=True)
class OpenedModel:
  """A model that is ready to use."""

  model: transformer.Model
  params: Params  # float32, sharded over the mesh of the layout
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
    UserError: there is no model that can be read, the mesh does not fit the devices, or
      the batch size does not divide over it.
  """
  layout = mesh.make_layout(_parse_mesh(options.mesh))
  shards = layout.batch_shards
  if options.batch_size < 1 or options.batch_size % shards:
    raise UserError(
      f'--batch_size: {options.batch_size} lines do not divide over {shards} device(s)'
    )
  source = model_sources.find_model(options.model)
  config = dataclasses.replace(source.config, dtype=options.dtype)
  model = transformer.build_model(config, layout)
  shardings = model_store.model_shardings(model, layout)
  params = model_store.read_parameters(source, layout, source.config.base, {})
  # without a key a missing parameter is an error rather than initialised at random
  params = model_store.complete_parameters(params, model.init, shardings, layout)
  return OpenedModel(model, params, source.tokenizer(), layout)


def read_lines(path: Path) -> Lines:
  """Reads the lines of a file; empty lines are skipped.

  Raises:
    UserError: the file cannot be read, a line has none of the accepted forms, or there
      are no lines.
  """
  try:
    with files.open_text(path) as file:
      texts = file.read().splitlines()
  except (OSError, UnicodeDecodeError, EOFError) as error:  # EOFError: an incomplete .gz file
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
    with_response: whether conversations are encoded with their response, which they
      must then have; otherwise they are encoded up to where a response begins.
    room: tokens to reserve for a generated response.

  Raises:
    UserError: a field has the wrong type or is too long, or it needs a tokenizer and the
      model has none.
  """
  max_length = opened.model.config.max_length
  longest = max_length - room
  explanation = f': the model reads {max_length}, a response may take {room}' if room else ''
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
  """Computes the lines that --output does not have yet, and writes them.

  Args:
    options: the parsed arguments.
    settings: everything else that the result depends on; an output that was begun with
      other settings is refused. Its `seed`, 0 by default, is that of the random keys.
    rows: the input.
    ids: the token ids of each row.
    compute: computes a batch.
    max_padded: the maximum padded length.

  Raises:
    UserError: the output was begun with other settings or not by this command, or cannot
      be written.
  """
  settings = dict(
    settings,
    model=str(options.model),
    dtype=options.dtype,
    batch_size=options.batch_size,
    # of the parsed rows, so that the file may be compressed or reformatted before resuming
    input=hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
  )
  size = WINDOW_BATCHES * options.batch_size
  done = _begin_output(options.output, settings, size, len(rows))
  root = jax.random.key(settings.get('seed', 0))
  progress = tqdm.tqdm(
    total=len(rows),
    initial=done,
    unit='line',
    disable=None,  # shown only on a terminal
  )
  with options.output.open('ab') as file, progress:
    for begin in range(done, len(rows), size):
      window = range(begin, min(begin + size, len(rows)))
      added: dict[int, Row] = {}
      # rows of similar length share a batch, which is padded to its longest row
      by_length = sorted(window, key=lambda number: len(ids[number]))
      for first in range(0, len(by_length), options.batch_size):
        batch = by_length[first : first + options.batch_size]
        length = int(min(bucket_length(len(ids[batch[-1]])), max_padded))
        # the key depends on the place in the file, so that a resumed command samples the same
        key = jax.random.fold_in(root, begin + first)
        added.update(zip(batch, compute(batch, length, key), strict=True))
        progress.update(len(batch))
      _append(file, options.output, [{**rows[number], **added[number]} for number in window])
  print(f'{options.output}: {len(rows)} lines', file=sys.stderr)


def max_padded_length(config: ModelConfig, room: int = 0) -> float:
  """Returns the maximum length to which a row may be padded.

  It is infinite except for a model with learned positions, which has no embedding for
  positions beyond its maximum length.

  Args:
    config: the model's shape.
    room: tokens to reserve for a generated response.
  """
  return config.max_length - room if config.learned_positions else math.inf


def bucket_length(length: int) -> int:
  """Rounds a length up to one of a few padded lengths, so that few programs are compiled.

  >>> [bucket_length(length) for length in (1, 33, 49, 65, 100)]
  [32, 48, 64, 96, 128]
  """
  size = 32
  while size < length:
    is_power_of_two = size & (size - 1) == 0
    # 32, 48, 64, 96, 128, …
    size = size * 3 // 2 if is_power_of_two else size * 4 // 3
  return size


def round_float32(value: Any) -> float:
  """Rounds a float32 to 9 significant digits, which identify it exactly."""
  return float(f'{value:.9g}')


# -- the model


def _parse_mesh(text: str) -> mesh.MeshOptions:
  """Parses mesh options such as data=2,fsdp=4.

  Raises:
    UserError: an axis does not exist, or its size is not a whole number.
  """
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
  """Parses the JSON object of a line, which must have exactly one of _FIELDS."""
  try:
    row = json.loads(text)
  except ValueError as error:  # JSONDecodeError is one
    raise UserError(f'{place}: not JSON: {error}') from None
  if not isinstance(row, dict) or sum(name in row for name in _FIELDS) != 1:
    raise UserError(f'{place}: expected {_FORMS}')
  return row


def _encode_row(row: Row, place: str, opened: OpenedModel, with_response: bool) -> list[int]:
  """Returns the token ids of a row."""
  if 'tokens' in row:
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
  """Returns a row's own token ids after checking that they are in the vocabulary."""
  # isinstance would accept true and false
  if isinstance(ids, list) and all(type(i) is int and 0 <= i < vocab_size for i in ids):
    return ids
  raise UserError(f'{place}: tokens: expected a list of ids from 0 to {vocab_size - 1}')


def _read_conversation(row: Row, place: str, with_response: bool) -> tuple[list[Row], str | None]:
  """Returns the messages before the response, and the response (None without `with_response`)."""
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
  """Tells whether a value is a list of at least one message."""
  return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
  """Tells whether a value is a message with a role and a text."""
  if not isinstance(value, dict) or 'role' not in value:
    return False
  return isinstance(value.get('content'), str)


# -- the output


def _begin_output(output: Path, settings: dict[str, Any], window: int, count: int) -> int:
  """Creates the output file, or prepares an incomplete one to be resumed.

  The settings are kept in a file beside the output.

  Args:
    output: the file.
    settings: what its lines depend on.
    window: the number of lines of a window.
    count: the number of lines of the complete output.

  Returns:
    The number of lines that are done.

  Raises:
    UserError: it was begun with other settings or not by this command, or cannot be
      written.
  """
  settings_path = output.with_name(output.name + '.settings.json')
  if not output.exists():
    try:  # settings first, as an output without them is refused
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
  """Removes an incomplete window from the end of the output; returns the number of lines left."""
  lines = output.read_bytes().splitlines(keepends=True)
  keep = sum(line.endswith(b'\n') for line in lines)
  if keep < count:  # a complete output may end with a shorter window
    keep -= keep % window
  with output.open('r+b') as file:
    file.truncate(sum(len(line) for line in lines[:keep]))
  return keep


def _append(file: IO[bytes], output: Path, rows: list[Row]) -> None:
  """Appends a window of rows to the output, and flushes it to the disk."""
  text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
  try:
    file.write(text.encode())
    file.flush()
    os.fsync(file.fileno())  # the machine may be preempted at any time
  except OSError as error:
    raise UserError(
      f'{output}: cannot write: {error.strerror}; the lines written before are kept'
    ) from None
