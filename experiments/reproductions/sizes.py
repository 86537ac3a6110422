"""What the configs of the reproductions have in common."""

from typing import Any

import ml_collections


def make_config(**fields: Any) -> ml_collections.ConfigDict:
  """Makes the config of a claim.

  Args:
    **fields: claim, its id; text, what is claimed; source; arrangement; bands, measure →
      (low, high), with None for no bound; settings, what its function reads; and
      optionally reported (measures without a band), note, seeds.
  """
  config = ml_collections.ConfigDict({'reported': (), 'note': '', 'seeds': (0, 1, 2)})
  # A ConfigDict would sort the measures.
  bands = tuple((name, low, high) for name, (low, high) in fields['bands'].items())
  config.update({**fields, 'bands': bands})
  return config


def check_size(size: str) -> bool:
  """Says whether the size for a GPU is wanted; raises ValueError for a size that is not known."""
  if size not in ('cpu', 'gpu'):
    raise ValueError(f'expected the size cpu or gpu, got {size!r}')
  return size == 'gpu'


def sequences(is_large: bool = False, length: int = 12) -> dict[str, Any]:
  """Returns the world of sequences: its gold reward turns down beyond `knee`.

  One sample in ten is beyond the knee, so that comparisons show little of it.

  Args:
    is_large: whether it is for a GPU.
    length: tokens of a response, on a CPU.
  """
  return dict(tokens=48 if is_large else 24, length=48 if is_large else length, knee=1.25, fall=1.0)


def proxy(is_large: bool = False) -> dict[str, Any]:
  """Returns the settings of a proxy, a network of one layer trained with Adam.

  It is smaller than the gold reward, as the proxies of Gao et al. 2022 are.
  """
  if is_large:
    return dict(units=4, updates=1000, rate=1e-3, batch=512)
  return dict(units=2, updates=200, rate=3e-3, batch=128)
