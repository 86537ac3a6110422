"""JSON Lines in, JSON Lines out: the file handling of the commands `generate` and `score`.

inputs.py says what a line may be; all its fields are copied to the output. The
lines are divided into windows of consecutive lines. Within a window, texts of
similar length share a batch, so that there is little padding; a window is written
when it is complete. If an interrupted command is repeated, it resumes with the
first window that is missing, and the final file is the same as that of an
uninterrupted command.
"""

import argparse
from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import json
import math
import os
from pathlib import Path
import sys
from typing import Any, IO

import jax
import tqdm

from rlhf_jax import file_lock, fingerprints, json_lines
from rlhf_jax.commands.inputs import encode_line, Line, Row
from rlhf_jax.errors import UserError
from rlhf_jax.interop import chat_template
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.models import transformer
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.runtime import mesh
from rlhf_jax.stages.shared import model_sources, model_store
from rlhf_jax.types import Params

# Batches of a window. More of them need less padding; with fewer, less work is
# lost when a command is interrupted.
WINDOW_BATCHES = 16

# (the numbers of at most batch_size texts, padded length, random key) → the
# fields to add for each of these texts
Compute = Callable[[Sequence[int], int, jax.Array], list[Row]]


@dataclasses.dataclass(frozen=True)
class OpenedModel:
  """A model that is ready to use."""

  model: transformer.Model
  params: Params  # float32, sharded over the mesh of the layout
  tokenizer: Tokenizer | None  # None where the model's directory has none
  layout: mesh.Layout


def open_model(options: argparse.Namespace) -> OpenedModel:
  """Opens the model of --model on the mesh of --mesh.

  Raises:
    UserError: there is no model that can be read, the mesh does not fit the devices, or
      the batch size does not divide over it.
  """
  layout = mesh.make_layout(_parse_mesh(options.mesh), where='--mesh')
  shards = layout.batch_shards
  if options.batch_size < 1 or options.batch_size % shards:
    raise UserError(
      f'--batch_size: {options.batch_size} lines do not divide over {shards} device(s)'
    )
  return read_model(options.model, options.dtype, layout)


def read_model(name: str, dtype: str, layout: mesh.Layout) -> OpenedModel:
  """Reads a model.

  Args:
    name: as users name it.
    dtype: to compute in.
    layout: of the devices.

  Raises:
    UserError: there is no model that can be read.
  """
  source = model_sources.find_model(name)
  config = dataclasses.replace(source.config, dtype=dtype)
  model = transformer.build_model(config, layout)
  shardings = model_store.model_shardings(model, layout)
  params = model_store.read_parameters(source, layout, source.config.base, {})
  # without a key a missing parameter is an error rather than initialised at random
  params = model_store.complete_parameters(params, model.init, shardings, layout)
  return OpenedModel(model, params, source.tokenizer(), layout)


def encode_lines(
  lines: Sequence[Line],
  opened: OpenedModel,
  room: int = 0,
) -> list[list[list[int]]]:
  """Returns the token ids of every line, once for each of its responses.

  Args:
    lines: the input.
    opened: the model that reads them.
    room: tokens to reserve for a generated response.

  Raises:
    UserError: a field has the wrong type or is too long, the chat template refuses a
      conversation, or a line needs a tokenizer and the model has none.
  """
  max_length = opened.model.config.max_length
  longest = max_length - room
  if longest < 1:
    raise UserError(f'--max_new_tokens: the model reads {max_length} tokens in all, got {room}')
  explanation = f': the model reads {max_length}, a response may take {room}' if room else ''
  encoded = []
  for line in lines:
    texts = encode_line(line, opened.tokenizer, opened.model.config.vocab_size)
    for ids in texts:
      if not 0 < len(ids) <= longest:
        raise UserError(f'{line.place}: {len(ids)} tokens, expected 1 to {longest}{explanation}')
    encoded.append(texts)
  return encoded


def fill_output(
  options: argparse.Namespace,
  settings: dict[str, Any],
  lines: Sequence[Line],
  ids: Sequence[Sequence[Sequence[int]]],
  compute: Compute,
  merge: Callable[[list[Row]], Row],
  max_padded: float = math.inf,
) -> None:
  """Computes the lines that --output does not have yet, and writes them.

  Args:
    options: the parsed arguments.
    settings: everything else that the result depends on; an output that was begun with
      other settings is refused. Its `seed`, 0 by default, is that of the random keys.
    lines: the input.
    ids: the token ids of each line, once for each response.
    compute: computes a batch of texts, which are numbered through all lines.
    merge: makes the fields to add to a line with a list of responses of those of each.
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
    input=hashlib.sha256(json.dumps([line.row for line in lines]).encode()).hexdigest(),
    date=chat_template.current_date().isoformat(),  # which a template may print
  )
  size = WINDOW_BATCHES * options.batch_size
  root = jax.random.key(settings.get('seed', 0))
  texts = [text for line in ids for text in line]
  begins = [0, *itertools.accumulate(map(len, ids))]  # of each line's texts
  with contextlib.ExitStack() as stack:
    busy = 'another command is writing this file'
    file = stack.enter_context(file_lock.open_locked(options.output, busy))
    done = _begin_output(options.output, settings, size, len(lines))
    progress = stack.enter_context(_show_progress(len(lines), done))
    for begin in range(done, len(lines), size):
      end = min(begin + size, len(lines))
      window = range(begins[begin], begins[end])
      added: dict[int, Row] = {}
      # texts of similar length share a batch, which is padded to its longest text
      by_length = sorted(window, key=lambda number: len(texts[number]))
      for first in range(0, len(by_length), options.batch_size):
        batch = by_length[first : first + options.batch_size]
        length = int(min(bucket_length(len(texts[batch[-1]])), max_padded))
        # the key depends on the place in the file, so that a resumed command samples the same
        key = jax.random.fold_in(root, window.start + first)
        added.update(zip(batch, compute(batch, length, key), strict=True))
      rows = []
      for number in range(begin, end):
        results = [added[text] for text in range(begins[number], begins[number + 1])]
        line = lines[number]
        rows.append({**line.row, **(merge(results) if line.is_list else results[0])})
      _append(file, options.output, rows)
      progress.update(len(rows))
  print(f'{options.output}: {len(lines)} lines', file=sys.stderr)


def _show_progress(count: int, done: int) -> tqdm.tqdm:
  """Begins a bar of the lines, which is shown only on a terminal."""
  return tqdm.tqdm(total=count, initial=done, unit='line', disable=None)


def fix_date(output: Path) -> None:
  """Fixes the date that chat templates see: that of an output's beginning, where it has begun."""
  settings = _settings_path(output)
  if output.exists() and settings.is_file():
    date = _read_settings(settings).get('date')
    if isinstance(date, str):
      chat_template.fix_date(datetime.datetime.fromisoformat(date))


def max_padded_length(config: ModelConfig, room: int = 0) -> float:
  """Returns the maximum length to which a row may be padded.

  It is infinite except for a model with learned positions, which has no embedding
  for positions beyond its maximum length.

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


# -- the output


def _begin_output(output: Path, settings: dict[str, Any], window: int, count: int) -> int:
  """Begins an output file, or prepares an incomplete one to be resumed.

  The settings are kept in a file beside the output.

  Args:
    output: the file, empty where it is new.
    settings: what its lines depend on.
    window: the number of lines of a window.
    count: the number of lines of the complete output.

  Returns:
    The number of lines that are done.

  Raises:
    UserError: it was begun with other settings or not by this command, or cannot be
      written.
  """
  if not output.is_file():  # a device can be read without end, and is never resumed
    raise UserError(f'{output}: expected a file, or a path where none is')
  settings_path = _settings_path(output)
  if not output.stat().st_size and not settings_path.is_file():
    try:
      fingerprints.write_json(settings_path, settings)
    except OSError as error:
      raise UserError(f'{output}: cannot write: {error.strerror}') from None
    return 0
  remedy = 'delete it, or give another --output'
  if not settings_path.is_file():
    raise UserError(f'{output}: was not begun by this command; {remedy}')
  before = _read_settings(settings_path)
  if before != settings:
    changed = [name for name, value in settings.items() if before.get(name) != value]
    changes = ', '.join(changed) or 'command'
    raise UserError(f'{output}: was begun with another {changes}; {remedy}')
  return _keep_whole_windows(output, window, count)


def _settings_path(output: Path) -> Path:
  return output.with_name(output.name + '.settings.json')


def _read_settings(path: Path) -> dict[str, Any]:
  """Reads the settings of an output."""
  return fingerprints.read_json(path, 'delete it with its output, or give another --output')


def _keep_whole_windows(output: Path, window: int, count: int) -> int:
  """Removes an incomplete window from the end of the output; returns the number of lines left."""
  *lines, _ = output.read_bytes().split(b'\n')  # behind the last line feed is half a line
  keep = len(lines)
  if keep < count:  # a complete output may end with a shorter window
    keep -= keep % window
  with output.open('r+b') as file:
    file.truncate(sum(len(line) + 1 for line in lines[:keep]))
  return keep


def _append(file: IO[bytes], output: Path, rows: list[Row]) -> None:
  """Appends a window of rows to the output, and flushes it to the disk."""
  data = ''.join(json_lines.format_value(row) + '\n' for row in rows).encode()
  try:
    while data:  # unbuffered: a disk that becomes full takes a part
      data = data[file.write(data) :]
    os.fsync(file.fileno())  # the machine may be preempted at any time
  except OSError as error:
    raise UserError(
      f'{output}: cannot write: {error.strerror}; the lines written before are kept'
    ) from None
