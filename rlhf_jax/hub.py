"""Copies of what is on the Hugging Face hub, by `huggingface_hub` and in its cache."""

from collections.abc import Sequence
import functools
from pathlib import Path
import re

from rlhf_jax.errors import UserError

_NAME = re.compile(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?')


def is_hub_name(name: str) -> bool:
  """Tells whether a name has the form 'ORG/NAME' or 'ORG/NAME@REVISION'."""
  return _NAME.fullmatch(name) is not None


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
      f'{name}: not in the cache and cannot be downloaded ({reason:.120}); where the hub can be '
      f'reached: hf download {repository} --repo-type {kind}{at}'
    ) from None
