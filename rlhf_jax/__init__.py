"""Reinforcement learning from human feedback in JAX, from pre-training to PPO and beyond.

  python -m rlhf_jax --config=FILE --workdir=DIR     runs an experiment
  python -m rlhf_jax.generate …                      generates responses to a file of prompts
  python -m rlhf_jax.score …                         computes log-probabilities or rewards of texts
  python -m rlhf_jax.plan …                          plans an experiment for other hardware
  python -m rlhf_jax.collect …                       serves pages on which people rank and write

In code, every stage is a module with a pure train step, such as
`rlhf_jax.stages.ppo.train_step`; `rlhf_jax.testing` makes tiny models, states and
batches to call it with. Importing this package imports neither jax nor flax.
"""

import importlib
from typing import Any

__version__ = '0.2.0'
__all__ = ['UserError', '__version__', 'load_config', 'run', 'stages', 'testing']

# Public name → the module that defines it. The module is imported at the first
# access, so that `import rlhf_jax` need not import jax.
_PUBLIC = {
  'UserError': 'rlhf_jax.errors',
  'load_config': 'rlhf_jax.experiment.pipeline',
  'run': 'rlhf_jax.experiment.pipeline',
}
_MODULES = ('stages', 'testing')  # public modules, also imported at the first access


def __getattr__(name: str) -> Any:
  """Imports a public name; Python calls this for names the package does not have yet (PEP 562)."""
  if name in _MODULES:
    return importlib.import_module(f'{__name__}.{name}')
  if name not in _PUBLIC:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_PUBLIC[name]), name)
