"""Reading and writing the small JSON files of a model's directory."""

import json
from pathlib import Path
from typing import Any

from rlhf_jax import files, fingerprints, json_lines
from rlhf_jax.errors import UserError


def read_json(path: Path) -> dict:
  """Reads a JSON file that holds one object.

  Raises:
    UserError: there is no such file, it cannot be read, it does not hold a JSON object, or is no
      longer what a run has written.
  """
  fingerprints.check_file(path)
  try:
    # utf-8-sig: some editors begin files with a byte-order mark
    values = json.loads(path.read_text('utf-8-sig'))
  except FileNotFoundError:
    raise UserError(f'{path}: not found') from None
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror})') from None
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path}: not JSON ({error})') from None
  if not isinstance(values, dict):
    raise UserError(f'{path}: expected an object of keys and values, got {values!r:.40}')
  json_lines.check_depth(values, str(path))
  return values


def write_json(path: Path, values: Any, sort_keys: bool = False, ensure_ascii: bool = True) -> None:
  """Writes values as indented JSON, as transformers and PEFT do."""
  text = json.dumps(
    values,
    indent=2,
    sort_keys=sort_keys,
    ensure_ascii=ensure_ascii,
  )
  files.write_text(path, text + '\n')
