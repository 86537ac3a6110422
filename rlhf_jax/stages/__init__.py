"""Finds the kinds of stages.

Every module of this folder is a kind of stage, called by the module's name; `ppo` is a
package of several modules. Its constant `STAGE` is what it registers (a StageKind).
Code that several stages share is in `shared/`. A stage is imported at its first use, so
that a run imports only what its config names.
"""

import importlib
import pkgutil
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.stages.shared.kind import StageKind

_REGISTERED: dict[str, StageKind] = {}  # kinds from outside the package, see `register`


def kinds() -> tuple[str, ...]:
  """Returns the names of all kinds of stages, those of this folder and those registered."""
  return tuple(dict.fromkeys([*_own_kinds(), *_REGISTERED]))


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


def _own_kinds() -> list[str]:
  """Returns the kinds of this folder: its modules and packages, without `shared`."""
  return [module.name for module in pkgutil.iter_modules(__path__) if module.name != 'shared']


def __getattr__(
  name: str,
) -> Any:  # `rlhf_jax.stages.ppo` needs no import of its own (PEP 562)
  if name not in _own_kinds():
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return importlib.import_module(f'{__name__}.{name}')


def register(kind: str, stage: StageKind) -> None:
  """Adds a kind of stage from outside the package, for example from an experiment's folder.

  Raises:
    UserError: the package has a stage of this name.
  """
  # Registering a name again replaces it, as a notebook does when a cell runs twice.
  if kind not in _REGISTERED and kind in kinds():
    raise UserError(f'a stage is called {kind!r} already; register yours under another name')
  _REGISTERED[kind] = stage
