"""Writes scalars for TensorBoard, by the thread that measures them.

tensorboardX's own writer hands events to a thread through a bounded queue. That
thread ends on a full disk and sleeps through a jump of the clock; the queue then
blocks the training for ever. Here an event is one write to an unbuffered file.
Events are a convenience: where they cannot be written, that is said once and the
training goes on without them.
"""

from collections.abc import Mapping
import logging
import os
from pathlib import Path
import socket
import struct
import time
from typing import BinaryIO

from tensorboardX import record_writer
from tensorboardX.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2


class EventFile:
  """A file of events in a folder; opened at the first write."""

  def __init__(self, directory: Path, purge_step: int):
    """Begins a file.

    Args:
      directory: an existing folder.
      purge_step: TensorBoard drops what earlier files hold from this step on.
    """
    # TensorBoard orders the files of a folder by name; the process keeps two
    # apart that begin within one second.
    name = f'events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}'
    self._path = directory / name
    self._file: BinaryIO | None = None
    self._failed = False
    self._write(event_pb2.Event(file_version='brain.Event:2'))
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(event_pb2.Event(step=purge_step, session_log=start))

  def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Writes finite numbers by name."""
    scalars = [
      summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in values.items()
    ]
    self._write(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=scalars)))

  def write_text(self, step: int, name: str, text: str) -> None:
    """Writes a text in Markdown, which TensorBoard shows under TEXT."""
    plugin = summary_pb2.SummaryMetadata.PluginData(plugin_name='text')
    value = summary_pb2.Summary.Value(
      tag=name,
      metadata=summary_pb2.SummaryMetadata(plugin_data=plugin),
      tensor=tensor_pb2.TensorProto(
        dtype='DT_STRING',
        string_val=[text.encode()],
        tensor_shape=tensor_shape_pb2.TensorShapeProto(
          dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=1)]
        ),
      ),
    )
    self._write(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=[value])))

  def close(self) -> None:
    """Closes the file."""
    if self._file is not None:
      self._file.close()  # unbuffered, so that nothing is left to write
      self._file = None

  def _write(self, event: event_pb2.Event) -> None:
    """Appends one event; after a failure nothing more is written."""
    if self._failed:
      return
    event.wall_time = time.time()
    try:
      if self._file is None:
        self._file = open(self._path, 'ab', buffering=0)
      self._file.write(_frame(event.SerializeToString()))
    except OSError as error:
      self._failed = True
      self.close()
      logging.warning(
        '%s: cannot write: %s; the run goes on without events for TensorBoard',
        self._path,
        error.strerror or error,
      )


def _frame(event: bytes) -> bytes:
  """Returns a record of the file: length, its checksum, the event, its checksum (TFRecord)."""
  length = struct.pack('<Q', len(event))
  return b''.join(
    (
      length,
      struct.pack('<I', record_writer.masked_crc32c(length)),
      event,
      struct.pack('<I', record_writer.masked_crc32c(event)),
    )
  )
