"""Rewards that are programs: a function on texts, run on the host between rollout and update.

  def reward(prompts: list[list[dict]], responses: list[str], records: list[Prompt]) -> list[float]

It gets the conversations, the answers and the prompts' records (with their `meta`), and gives a float for each.
"""

import importlib
import os
import sys

import numpy as np

from rlhf_jax.data import records
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.answers import whole


def build(name: str, rows, tokenizer, layout):
  """The score of a program.

  Args:
    name: 'module:function', found from the current directory too.
    rows: the prompt records that Prompts.index points at.

  Returns:
    score(Prompts, Samples) → [B * K] float32 on the mesh, or None where the name is no program's.

  Raises:
    UserError: no such function; and, when called, what it returned is not a finite float for each answer.
  """
  module, colon, function_name = name.partition(':')
  if not colon:
    return None
  if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
  try:
    function = getattr(importlib.import_module(module), function_name)
  except (ImportError, AttributeError) as error:
    raise UserError(f'reward {name!r}: {error}') from None

  def score(prompts, samples):
    index, tokens, mask = whole((prompts.index, samples.tokens, samples.mask))
    asked = [rows[max(i, 0)] for i in np.repeat(index, len(tokens) // len(index))]
    texts = [tokenizer.decode(row[seen].tolist()) for row, seen in zip(tokens, mask)]
    given = function([records.conversation(row) for row in asked], texts, asked)
    try:
      values = np.asarray(given, np.float32)
    except (TypeError, ValueError):
      values = None
    if values is None or values.shape != (len(texts),) or not np.isfinite(values).all():
      said = ' '.join(repr(given).split())[:80]
      raise UserError(f'reward {name!r}: expected {len(texts)} finite floats, got {said}')
    return layout.spread(values)

  return score
