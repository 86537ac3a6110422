"""Drafts of responses, from earlier responses to the same prompt.

A sampler that decodes token by token reads all parameters for each of them. If the
next tokens are guessed, one pass verifies several (Leviathan et al. 2023,
arXiv:2211.17192). Here the guess is what followed the same words in earlier responses
to the prompt (prompt lookup: Saxena 2023), as prompts come back in every epoch.

A token is a function of its logits and of its own random numbers
(`sampler.draw_uniforms`), so it is drawn as without drafts, and a draft that says
another token ends there. The responses are those of the sampler without drafts, up to
rounding, and with exact numerics to the bit.

Letters: B prompts, K responses to each, N = B * K, R tokens of a response, M = K * R
earlier tokens.
"""

import base64
from collections.abc import Callable, Mapping
import dataclasses
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.types import Params, Prompts, Samples


@dataclasses.dataclass
class RecallingSampler:
  """Samples responses with drafts from those that it gave before.

  Attributes:
    generate: (params, prompts, key, earlier [B, M]) → Samples, compiled.
    places: M.
    pad_id: fills up what is not known.
    memory: the index of a prompt → the last K responses to it, [M] int32.
  """

  generate: Callable[[Params, Prompts, jax.Array, np.ndarray], Samples]
  places: int
  pad_id: int
  memory: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

  def __call__(self, params: Params, prompts: Prompts, key: jax.Array) -> Samples:
    """Samples responses, and remembers them.

    Args:
      params: as in training.
      prompts: [B, P]; their `index` says which are the same.
      key: the random key of this batch.

    Returns:
      Samples [N, R].
    """
    indices = np.asarray(prompts.index).tolist()
    unknown = np.full(self.places, self.pad_id, np.int32)
    earlier = np.stack([self.memory.get(index, unknown) for index in indices])
    samples = self.generate(params, prompts, key, earlier)
    rows = np.asarray(samples.tokens).reshape(len(indices), self.places)
    # an empty row, of index -1, is never asked for again
    self.memory.update((index, row) for index, row in zip(indices, rows) if index >= 0)
    return samples

  def get_state(self) -> dict[str, Any]:
    """Returns the memory as a JSON object, for checkpoints.

    Drafts change the rounding of log-probabilities, so that a resumed run needs those of
    the uninterrupted one.
    """
    rows = np.stack([*self.memory.values()]) if self.memory else np.zeros(0)
    packed = zlib.compress(rows.astype('<i4').tobytes())
    return {'indices': [*self.memory], 'rows': base64.b64encode(packed).decode()}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Sets the memory to what `get_state` returned."""
    values = np.frombuffer(zlib.decompress(base64.b64decode(state['rows'])), '<i4')
    rows = values.reshape(-1, self.places).astype(np.int32)
    self.memory = dict(zip(state['indices'], rows, strict=True))


def find_drafts(tokens: jax.Array, places: jax.Array, earlier: jax.Array, count: int) -> jax.Array:
  """Guesses the next tokens of each response.

  They are what follows the longest match, of up to three of the last tokens, in earlier
  responses; of several matches, what follows the one nearest to the same place.

  Args:
    tokens: [N, R] int32, the responses so far.
    places: [N] int32 from 1, the number of their tokens.
    earlier: [N, M] int32, earlier responses of R places each, one after the other.
    count: the number of tokens to guess.

  Returns:
    [N, count] int32.

  >>> earlier = jnp.array([[5, 6, 7, 8, 9, 1]])
  >>> tokens = jnp.array([[4, 7, 0, 0, 0, 0]])
  >>> print(find_drafts(tokens, jnp.array([2]), earlier, 2))
  [[8 9]]
  """
  R, M = tokens.shape[1], earlier.shape[1]
  columns = jnp.arange(M)
  matches = jnp.ones(earlier.shape, bool)
  longest = jnp.zeros(earlier.shape, jnp.int32)
  for back in range(3):
    place = (places - 1 - back)[:, None]
    said = jnp.take_along_axis(tokens, jnp.maximum(place, 0), axis=1)
    said = jnp.where(place < 0, -1, said)  # before the beginning, which is a match too
    before = jnp.roll(earlier, back, axis=1)
    before = jnp.where(columns % R < back, -1, before)
    matches = matches & (before == said)
    longest = longest + matches
  distance = jnp.abs(columns % R - (places - 1)[:, None])
  best = jnp.argmax(longest * R - distance, axis=1)[:, None]
  return jnp.take_along_axis(earlier, jnp.minimum(best + 1 + jnp.arange(count), M - 1), axis=1)


def count_accepted(drafts: jax.Array, drawn: jax.Array) -> jax.Array:
  """Counts the drafts of each row that were drawn, up to the first that was not.

  Args:
    drafts: [N, g] int32.
    drawn: [N, g or more] int32.

  Returns:
    [N] int32.
  """
  agrees = drafts == drawn[:, : drafts.shape[1]]
  return jnp.sum(jnp.cumprod(agrees, axis=1, dtype=jnp.int32), axis=1)
