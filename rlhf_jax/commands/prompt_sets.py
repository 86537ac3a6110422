"""Reads the prompts on which models are measured, and finds where they are from."""

import argparse
from collections.abc import Iterator, Sequence
import json
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.data import row_files, shapes, sources
from rlhf_jax.data.conversations import message_text
from rlhf_jax.data.records import conversation, Prompt
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import overlap

_WORLD = 'tinyworld'
_SPLITS = ('validation', 'test')


def read_prompts(options: argparse.Namespace) -> list[Prompt]:
  """Reads the prompts of --prompts.

  Raises:
    UserError: there are none, or a row has no prompt.
  """
  name, _, split = options.prompts.partition(':')
  if name == _WORLD:
    split = split or 'validation'
    if split not in _SPLITS:
      raise UserError(f'--prompts: expected {_WORLD}:validation or {_WORLD}:test, got {split!r}')
    data = DataOptions(seed=options.world)
  elif options.prompts:
    split = 'validation'
    data = DataOptions(source='jsonl', path=(options.prompts,))
  else:
    raise UserError('--prompts: expected a file, or tinyworld')
  if options.limit < 0:
    raise UserError(f'--limit: expected 0 or more, got {options.limit}')
  rows = list(sources.load_records(data, 'prompt', split))
  return sources.spread_evenly(rows, options.limit) if options.limit else rows


def is_world(options: argparse.Namespace) -> bool:
  """Says whether the prompts are of TinyWorld, so that its oracle can judge responses."""
  return options.prompts.partition(':')[0] == _WORLD


def prompt_key(messages: Sequence[Any]) -> str:
  """Returns a text that is the same for the same conversation."""
  said = [[message['role'], message_text(message)] for message in messages]
  return json.dumps(said, ensure_ascii=False)


def prompt_clusters(prompts: Sequence[Prompt], field: str) -> np.ndarray:
  """Returns the cluster of each prompt, [N] str: a field of its row, or the prompt itself."""
  clusters = []
  for prompt in prompts:
    value = prompt.meta.get(field)
    clusters.append(f'{field}={value}' if value is not None else prompt_key(prompt.messages))
  return np.array(clusters)


def count_overlap(prompts: Sequence[Prompt], training: Sequence[Path]) -> dict[str, Any]:
  """Counts the prompts that stand in files of training data.

  Args:
    prompts: the prompts.
    training: files of rows of any kind.

  Returns:
    prompts, copies and contained, as numbers, and the ids of the
    contained ones.
  """
  texts = [message_text(conversation(prompt)[-1]) for prompt in prompts]
  found = overlap.find_overlap(texts, _training_texts(training))
  return {
    'prompts': found.prompts,
    'copies': len(found.copies),
    'contained': len(found.contained),
    'ids': [prompts[number].id for number in found.contained],
  }


def _training_texts(files: Sequence[Path]) -> Iterator[str]:
  """Yields the texts of documents and the messages of conversations."""
  for path in files:
    for place, row in row_files.read_rows(path):
      if isinstance(row, dict) and isinstance(row.get('text'), str):
        yield row['text']
        continue
      parsed = shapes.parse_row(row, place)
      for message in parsed.messages or ():
        yield message_text(message)
