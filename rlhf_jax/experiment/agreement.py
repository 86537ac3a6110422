"""Makes sure that all processes of a run do the same, before the first of them computes anything.

One process with another learning rate, other data or another version of the code
would train on with the others and ruin every checkpoint.
"""

from collections.abc import Mapping
import functools
import importlib.metadata
import importlib.util
import json
from pathlib import Path
import re
import sys
from typing import Any

import jax

from rlhf_jax import fingerprints, plain_text
from rlhf_jax.errors import UserError
from rlhf_jax.experiment import config as configs
from rlhf_jax.runtime import hosts

# Their versions can change what is computed.
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'tokenizers', 'transformers')
_FUNCTION = re.compile(r'([A-Za-z_][\w.]*):[A-Za-z_]\w*(\(.*\))?', re.DOTALL)


def check_processes(what: str, values: Mapping[str, Any]) -> None:
  """Compares values over all processes, of which each calls this.

  Args:
    what: what the values are, for the error message.
    values: a JSON object.

  Raises:
    UserError: a process has other values; it is named with the first differences. Raised in all
      processes.
  """
  if jax.process_count() == 1:
    return
  digests = hosts.gather_texts(fingerprints.of_value(values))
  dissenters = hosts.find_dissenters(digests)
  if not dissenters:
    return
  texts = hosts.gather_texts(json.dumps(values))
  number = dissenters[0]
  other = next(i for i in range(len(digests)) if i not in dissenters)
  changed = configs.differences(json.loads(texts[other]), json.loads(texts[number]), what)
  more = f' and {len(changed) - 3} more' if len(changed) > 3 else ''
  raise UserError(
    f'process {number} has another {what} than process {other}: '
    f'{plain_text.one_line("; ".join(changed[:3]), 600)}{more}; give all processes the same'
  )


def describe_code(config: Any) -> dict[str, str]:
  """Returns what this process would compute with: digests and versions by name.

  Args:
    config: the whole config; the modules of the functions that it names are part of the code.
  """
  versions = {'python': sys.version.split()[0]}
  for name in _PACKAGES:
    versions[name] = importlib.metadata.version(name)
  modules = {name: _digest_module(name) for name in sorted(_named_modules(config.to_dict()))}
  return {**versions, 'rlhf_jax': package_fingerprint(), **modules}


@functools.cache
def package_fingerprint() -> str:
  """Returns a fingerprint of the source code of this package."""
  folder = Path(fingerprints.__file__).parent
  sources = {
    str(path.relative_to(folder)): fingerprints.of_file(path)['digest']
    for path in folder.rglob('*.py')
  }
  return fingerprints.of_value(sources)


def _named_modules(value: Any) -> set[str]:
  """Returns the modules of all names 'module:function' in a config."""
  if isinstance(value, str):
    match = _FUNCTION.fullmatch(value)
    return {match[1]} if match else set()
  parts = value.values() if isinstance(value, dict) else value
  if not isinstance(value, (dict, list, tuple)):
    return set()
  return set().union(*map(_named_modules, parts))


def _digest_module(name: str) -> str:
  """Returns the fingerprint of a module's file; '' where there is none."""
  beside = Path(f'{name.replace(".", "/")}.py')  # of the current folder, as named_functions has it
  try:
    spec = importlib.util.find_spec(name)
    origin = spec.origin if spec is not None else None
    return fingerprints.of_file(origin or beside)['digest']
  except (ImportError, OSError, ValueError):
    return ''
