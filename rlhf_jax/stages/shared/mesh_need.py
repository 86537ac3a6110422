"""Computes what the models of an experiment need of a mesh, for the preset `auto`."""

import math
from typing import Any

import jax.numpy as jnp

from rlhf_jax.interop import pretrained
from rlhf_jax.models import quantised, transformer
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.rewards.sources import parse_reward_source
from rlhf_jax.runtime.mesh_choice import MeshNeed
from rlhf_jax.stages.shared.model_sources import find_model
from rlhf_jax.stages.shared.model_store import RANDOM, random_model_config

# Bytes of a trained parameter with its gradient and two moments of Adam, all float32.
TRAINED_BYTES = 16
FROZEN_BYTES = 4  # of a parameter that is only read: float32


def compute_mesh_need(config: Any) -> MeshNeed:
  """Computes how many bytes a mesh must hold, and which sizes its axes must divide.

  Only the shapes of models are read, not their parameters.

  Args:
    config: the whole config, with {workdir} and {data} resolved.

  Returns:
    The bytes of the heaviest stage, and the greatest common divisors of the numbers
    of rows, widths and heads, which the sizes of mesh axes must divide.
  """
  models = _Models(config)
  # Stages that train; the others compute with models that were trained before.
  sections = [config[name] for name in config.stages if 'optimizer' in config[name]]
  state_bytes = 0
  row_counts: list[int] = []
  can_reshard = True
  for section in sections:
    state_bytes = max(state_bytes, _state_bytes(section, models))  # stages run one after the other
    row_counts += _row_counts(section)
    if _has_adapters(section) and section.lora.base in quantised.QUANTISED_KINDS:
      can_reshard = False  # quantised matrices stay as they are laid
  if len(config.evaluation.models):
    row_counts.append(config.evaluation.batch_size)
  shapes = models.shapes()
  largest = models.largest_count()
  compute_bytes = jnp.dtype(config.model.dtype).itemsize
  return MeshNeed(
    parameters=largest,
    state=state_bytes,
    decoded=largest * compute_bytes if can_reshard else 0,
    rows=math.gcd(*row_counts),
    width=math.gcd(*(shape.embed for shape in shapes)),
    heads=math.gcd(*(size for shape in shapes for size in _tensor_sizes(shape))),
  )


class _Models:
  """The shapes and sizes of an experiment's models, each looked up once."""

  def __init__(self, config: Any):
    self._config = config
    self._by_name: dict[str, tuple[ModelConfig, int]] = {}
    self._vocab_size = config.tokenizer.vocab_size
    if config.tokenizer.init != 'train':
      self._vocab_size = pretrained.open_tokenizer(config.tokenizer.init).vocab_size

  def count(self, name: str) -> int:
    """Returns the number of parameters of a model, that of its `init` for a stage of the run."""
    # A stage has the shape of the model that it begins with, and so on to the first.
    while name in self._config.stages:
      name = self._config[name].init
    if name not in self._by_name:
      if name == RANDOM:
        shape = random_model_config(self._config, self._vocab_size)
      else:
        shape = find_model(name).config
      count = transformer.parameter_count(transformer.build_model(shape))
      self._by_name[name] = (shape, count)
    return self._by_name[name][1]

  def shapes(self) -> list[ModelConfig]:
    """Returns the shapes of all models looked up so far."""
    return [shape for shape, _ in self._by_name.values()]

  def largest_count(self) -> int:
    """Returns the number of parameters of the largest model."""
    return max(count for _, count in self._by_name.values())


def _state_bytes(section: Any, models: _Models) -> int:
  """Returns the bytes of all models of a stage with gradients and optimizer."""
  trained = [section.init]
  if section.get('value'):
    trained.append(section.value)
  frozen = []
  if section.get('reference'):
    frozen.append(section.reference)
  for name in section.get('reward', ()):
    source = parse_reward_source(name)
    if source.on_device:
      frozen.append(source.model_name)
  trained_counts = [models.count(name) for name in trained]
  frozen_counts = [models.count(name) for name in frozen]
  if _has_adapters(section):
    # One base for all of them, and only the adapters have gradients and moments.
    base_bytes = quantised.BYTES[section.lora.base] * max(trained_counts + frozen_counts)
    return int(base_bytes)
  return TRAINED_BYTES * sum(trained_counts) + FROZEN_BYTES * sum(frozen_counts)


def _row_counts(section: Any) -> list[int]:
  """Returns how many rows a stage computes at once, in every program of its step."""
  # Only in stages with rollouts, which have minibatches, does num_samples add rows.
  responses = section.num_samples if 'minibatches' in section else 1
  parts = section.get('minibatches', 1) * section.microbatches
  return [section.batch_size, section.batch_size * responses // parts]


def _has_adapters(section: Any) -> bool:
  return 'lora' in section and section.lora.rank > 0


def _tensor_sizes(shape: ModelConfig) -> tuple[int, ...]:
  """Returns the sizes that the mesh axis `tensor` cuts."""
  return shape.heads, shape.kv_heads, shape.mlp, shape.vocab_size
