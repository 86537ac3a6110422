"""Copies of what is on the Hugging Face hub, by `huggingface_hub` and in its cache."""

from collections.abc import Sequence
import functools
from pathlib import Path
import re

from rlhf_jax import storage
from rlhf_jax.errors import UserError

# Globs of what a model's folder is read from.
MODEL_FILES = ('*.json', '*.jinja', '*.safetensors')
_STORED = (*MODEL_FILES, '*.gguf')

_NAME = re.compile(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?')


def is_hub_name(name: str) -> bool:
  """Tells whether a name has the form 'ORG/NAME' or 'ORG/NAME@REVISION'."""
  return _NAME.fullmatch(name) is not None


def find_model_folder(name: str) -> str:
  """Returns the folder of a model that is named 'ORG/NAME' or by URL; other names as they are."""
  if storage.is_url(name):
    return storage.local_copy(name, 'model', _STORED)
  if Path(name).exists() or not is_hub_name(name):
    return name
  return str(find_snapshot(name, 'model', MODEL_FILES))


def find_snapshot(name: str, kind: str, patterns: Sequence[str]) -> Path:
  """Returns the folder with a copy of a repository; what is missing is downloaded.

  Args:
    name: 'ORG/NAME', or 'ORG/NAME@REVISION'.
    kind: 'model' or 'dataset'.
    patterns: of the files that are needed, as globs.

  Raises:
    UserError: there is no copy and none can be had now. The message has the command that
      downloads it.
  """
  if not is_hub_name(name):
    raise UserError(f'hf:{name}: expected ORG/NAME, or ORG/NAME@REVISION')
  import huggingface_hub  # slow to import, and few need it

  repository, _, revision = name.partition('@')
  fetch = functools.partial(
    huggingface_hub.snapshot_download,
    repository,
    repo_type=kind,
    revision=revision or None,
    allow_patterns=list(patterns),
  )
  try:
    return Path(fetch())
  except Exception as error:  # the library and its HTTP client raise many kinds
    reason = f'{type(error).__name__}: {error}'.splitlines()[0]
  try:
    return Path(fetch(local_files_only=True))
  except Exception:
    at = f' --revision {revision}' if revision else ''
    raise UserError(
      f'{name}: not found: no such path, not in the cache of the hub, and it cannot be downloaded '
      f'({reason:.120}); where the hub can be reached: hf download {repository} --repo-type '
      f'{kind}{at}'
    ) from None
