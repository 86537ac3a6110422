"""Writes the figures of a measurement as a JSON file."""

import json
import math
import os
from typing import Any

from rlhf_jax import files


def write_results(path: str | os.PathLike, results: Any) -> None:
  """Writes figures, whole or not at all; what is not known (NaN) becomes null."""
  text = json.dumps(_without_nan(results), indent=2, ensure_ascii=False, allow_nan=False)
  files.write_text(path, text + '\n')


def _without_nan(value: Any) -> Any:
  """Returns a value in which NaN is None, as JSON has no NaN."""
  if isinstance(value, dict):
    return {key: _without_nan(one) for key, one in value.items()}
  if isinstance(value, (list, tuple)):
    return [_without_nan(one) for one in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
