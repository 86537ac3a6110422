"""The plan of a stage: its programs, and the abstract arrays for which they are compiled.

An abstract array is a `jax.ShapeDtypeStruct` with a sharding: an argument's shape
and dtype without its values. A stage's `plan(context)` returns a `StagePlan`; no
data is read and nothing is computed.

Shape letters: B rows or prompts, K response slots of a row, T length, P length of a prompt.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rlhf_jax.planning import work
from rlhf_jax.runtime.mesh import Layout
from rlhf_jax.types import Prompts, Rankings, Sequences, TrainState


@dataclasses.dataclass(frozen=True)
class Program:
  """One compiled program of a training step."""

  name: str  # in the printed plan, such as step, rollout, score or update
  # traces and lowers the program for abstract arguments; called only if it will be compiled
  lower: Callable[[], jax.stages.Lowered]
  work: work.Work  # the estimated cost of one call
  calls: int = 1  # how often a training step calls it


@dataclasses.dataclass(frozen=True)
class StagePlan:
  """The arrays that a stage keeps on the devices, and the programs that it runs there."""

  # purpose (such as optimizer) → tree of abstract arrays that stay on the devices
  # during the whole stage
  resident: dict[str, Any]
  programs: list[Program]  # the programs of a training step, in the order in which they run
  # what the plan does not include, one line each
  notes: list[str] = dataclasses.field(default_factory=list)


def abstract_rows(layout: Layout, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
  """Returns an abstract array whose first axis is sharded like a batch."""
  return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(('batch',)))


def abstract_batch(layout: Layout, tree: Any) -> Any:
  """Returns abstract arrays like those of a tree, with the first axis sharded like a batch."""

  def place(leaf: Any) -> Any:
    return abstract_rows(layout, leaf.shape, leaf.dtype)

  return jax.tree.map(place, tree)


def abstract_scalar(layout: Layout, dtype: DTypeLike) -> Any:
  """Returns an abstract scalar, replicated on every device."""
  return jax.ShapeDtypeStruct((), dtype, sharding=layout.sharding())


def abstract_key(layout: Layout) -> Any:
  """Returns an abstract random key, replicated on every device."""
  return abstract_scalar(layout, jax.random.key(0).dtype)


def abstract_sequences(layout: Layout, rows: int, length: int) -> Sequences:
  """Returns a batch of abstract sequences.

  Args:
    layout: the mesh and its rules.
    rows: B, over all devices.
    length: T.

  Returns:
    Sequences whose leaves are [B, T]: int32, and float32 for the loss mask.
  """
  tokens = abstract_rows(layout, (rows, length), jnp.int32)
  return Sequences(
    tokens=tokens,
    positions=abstract_rows(layout, (rows, length), jnp.int32),
    segment_ids=abstract_rows(layout, (rows, length), jnp.int32),
    loss_mask=abstract_rows(layout, (rows, length), jnp.float32),
  )


def abstract_rankings(layout: Layout, rows: int, places: int, length: int) -> Rankings:
  """Returns a batch of abstract rankings.

  Args:
    layout: the mesh and its rules.
    rows: B, over all devices.
    places: K, the number of responses in a row.
    length: T, tokens of a prompt with one response.

  Returns:
    Rankings whose leaves are [B, K, T] int32, or [B, K] int32 or float32.
  """

  def tokens() -> Any:  # [B, K, T]
    return abstract_rows(layout, (rows, places, length), jnp.int32)

  def values(dtype: DTypeLike) -> Any:  # [B, K]
    return abstract_rows(layout, (rows, places), dtype)

  return Rankings(
    tokens=tokens(),
    positions=tokens(),
    segment_ids=tokens(),
    group=values(jnp.int32),
    ranks=values(jnp.int32),
    index=values(jnp.int32),
    begins=values(jnp.int32),
    confidence=values(jnp.float32),
    reference_logprobs=values(jnp.float32),
  )


def abstract_prompts(layout: Layout, rows: int, length: int) -> Prompts:
  """Returns a batch of abstract prompts.

  Args:
    layout: the mesh and its rules.
    rows: B, over all devices.
    length: P.

  Returns:
    Prompts with tokens [B, P] int32, mask [B, P] bool and index [B] int32.
  """
  return Prompts(
    tokens=abstract_rows(layout, (rows, length), jnp.int32),
    mask=abstract_rows(layout, (rows, length), bool),
    index=abstract_rows(layout, (rows,), jnp.int32),
  )


def resident(state: TrainState) -> dict[str, Any]:
  """Returns the arrays of a train state by their purpose.

  The state of a rollout stage may also hold a value model, and an older policy that
  generates the responses; both count as parameters.

  Returns:
    'parameters', 'optimizer' and 'frozen base' → tree of arrays.
  """
  # The order matters: a leaf that appears twice counts for the first name only.
  trained = [
    state.trained,
    getattr(state, 'value_trained', {}),
    getattr(state, 'sampler_trained', {}),
  ]
  return {
    'parameters': trained,
    'optimizer': state.opt_state,
    'frozen base': state.frozen,
  }
