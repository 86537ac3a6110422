"""The stages, by kind.

Every module of this folder is a stage and bears the name of its kind; it registers itself whole
in `STAGE`. What several stages share is in `shared/`. A stage is imported when it is asked for.
"""

import importlib
import pkgutil

from rlhf_jax.errors import UserError
from rlhf_jax.stages.shared.kind import StageKind

_REGISTERED: dict[str, StageKind] = {}  # kinds from outside the package, see `register`


def kinds() -> tuple[str, ...]:
  """Returns the names of all kinds of stages, those of this folder and those registered."""
  modules = [module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg]
  return tuple(dict.fromkeys([*modules, *_REGISTERED]))


def find(kind: str) -> StageKind:
  """Returns a kind of stage by its name.

  Raises:
    UserError: no stage has this name.
  """
  if kind in _REGISTERED:
    return _REGISTERED[kind]
  if kind not in kinds():
    raise UserError(f'no stage is called {kind!r}; expected one of {", ".join(kinds())}')
  return importlib.import_module(f'rlhf_jax.stages.{kind}').STAGE


def register(kind: str, stage: StageKind) -> None:
  """Adds a kind of stage from outside the package, for example from an experiment's folder.

  Raises:
    UserError: a stage of the package has this name.
  """
  if kind not in _REGISTERED and kind in kinds():
    raise UserError(f'a stage is called {kind!r} already; register yours under another name')
  _REGISTERED[kind] = stage
