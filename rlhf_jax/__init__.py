"""Reinforcement learning from human feedback in JAX, from pre-training to PPO and beyond.

  python -m rlhf_jax --config=FILE --workdir=DIR     run an experiment
  python -m rlhf_jax.generate, score, plan           use a model; plan for other hardware
  python -m rlhf_jax.collect --workdir=DIR           people demonstrate and rank

In code, stages are modules with pure train steps, such as `rlhf_jax.stages.ppo.train_step`;
`rlhf_jax.testing` makes tiny models, states and batches for them. Importing
this package imports neither jax nor flax.
"""

import importlib
from typing import Any

__version__ = '0.2.0'
__all__ = ['UserError', '__version__', 'load_config', 'run', 'stages', 'testing']

# Public name → the module that defines it. It is imported at the first access, so
# that `import rlhf_jax` does not wait for jax.
_PUBLIC = {
  'UserError': 'rlhf_jax.errors',
  'load_config': 'rlhf_jax.pipeline',
  'run': 'rlhf_jax.pipeline',
}
_MODULES = ('stages', 'testing')  # public modules, imported at the first access too


def __getattr__(
  name: str,
) -> Any:  # called for names that the module does not have (PEP 562)
  if name in _MODULES:
    return importlib.import_module(f'{__name__}.{name}')
  if name not in _PUBLIC:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_PUBLIC[name]), name)
