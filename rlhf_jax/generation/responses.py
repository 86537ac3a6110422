"""Responses of a model to prompts, as text, with their KL from a reference model.

Letters: N prompts, K responses to each, B prompts of a batch, R tokens of a response.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from rlhf_jax.data import batches, encode
from rlhf_jax.errors import UserError
from rlhf_jax.generation import sampler
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.models import heads
from rlhf_jax.models.transformer import Model
from rlhf_jax.objectives import divergence
from rlhf_jax.runtime import hosts
from rlhf_jax.types import Params, Prompts, Samples

WIDTH = 64  # prompts are padded to a multiple of it, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Responses:
  """K responses to each of N prompts."""

  texts: list[list[str]]  # N lists of K strings
  lengths: np.ndarray  # [N, K] int, tokens, the end token included
  ended: np.ndarray  # [N, K] bool, False if the response was cut off
  # [N, K] float, Σ_t log π − log π_ref over the response's tokens, nats; None
  # without a reference
  kl: np.ndarray | None = None
  scores: np.ndarray | None = None  # [N, K] float, of the reward; None without one
  tokens: list[list[list[int]]] | None = None  # N lists of K lists of ids; None where texts changed


@dataclasses.dataclass(frozen=True)
class Responder:
  """Generates responses to prompts; made by `build_responder`."""

  # (params, Prompts, key) → Samples
  generate: Callable[[Params, Prompts, jax.Array], Samples]
  # (reference params, Prompts, Samples) → [B * K] float32
  measure_kl: Callable[..., jax.Array]
  # (Prompts, Samples) → [B * K] float32 on the mesh; None without a reward
  score: Callable[[Prompts, Samples], jax.Array] | None
  tokenizer: Any  # decodes the responses
  layout: Any  # of the mesh
  num_samples: int  # K responses to each prompt

  def __call__(
    self,
    params: Params,
    prompts: Iterable[Prompts],
    key: jax.Array,
    reference: Params | None = None,
  ) -> Responses:
    """Responds to prompts batch by batch.

    Args:
      params: the parameters of the policy.
      prompts: batches of Prompts on the host; rows with index −1 are left out.
      key: the random key; batch n uses fold_in(key, n).
      reference: parameters of the reference, against which KL is measured.

    Returns:
      The responses to all prompts, complete on every process.

    Raises:
      UserError: the model's logits are not finite.
    """
    texts: list[list[str]] = []
    tokens: list[list[list[int]]] = []
    columns: list[dict[str, np.ndarray]] = []
    progress = tqdm.tqdm(
      list(prompts),  # so that the bar knows how many there are
      desc='responses',
      unit='batch',
      leave=False,
      disable=None,  # shown on a terminal only
    )
    for number, batch in enumerate(progress):
      batch_key = jax.random.fold_in(key, number)
      batch_tokens, batch_columns = self._respond(params, batch, batch_key, reference)
      tokens += batch_tokens
      texts += [[self.tokenizer.decode(ids) for ids in of_prompt] for of_prompt in batch_tokens]
      columns.append(batch_columns)
    joined = {name: np.concatenate([batch[name] for batch in columns]) for name in columns[0]}
    return Responses(texts, **joined, tokens=tokens)

  def _respond(
    self,
    params: Params,
    prompts: Prompts,
    key: jax.Array,
    reference: Params | None,
  ) -> tuple[list[list[list[int]]], dict[str, np.ndarray]]:
    """Returns the tokens of a batch, K lists of ids for each prompt, and its columns [n, K]."""
    placed = self.layout.place(prompts)
    samples = self.generate(params, placed, key)
    columns = {
      'lengths': jnp.sum(samples.mask, axis=1),
      'ended': samples.ended,
    }
    if reference is not None:
      columns['kl'] = self.measure_kl(reference, placed, samples)
    if self.score is not None:
      columns['scores'] = self.score(placed, samples)
    tokens, mask, logprobs, columns = hosts.to_host(
      (samples.tokens, samples.mask, samples.logprobs, columns)
    )
    # From logits that are NaN the sampler still returns tokens, which would look like a response.
    if not np.isfinite(logprobs).all():
      raise UserError(
        'responses: expected finite logits from the model, got NaN or infinite ones; '
        'its parameters are damaged, or a computation in it overflowed'
      )
    # the last batch is padded with rows that are not prompts
    is_prompt = np.repeat(hosts.to_host(placed.index) >= 0, self.num_samples)
    ids = [row[inside].tolist() for row, inside in zip(tokens[is_prompt], mask[is_prompt])]
    K = self.num_samples
    return (
      [ids[i : i + K] for i in range(0, len(ids), K)],
      {name: x[is_prompt].reshape(-1, K) for name, x in columns.items()},
    )


def build_responder(
  model: Model,
  options: SamplingOptions,
  tokenizer: Any,
  layout: Any,
  num_samples: int = 1,
  reference_model: Model | None = None,
  score: Callable[[Prompts, Samples], jax.Array] | None = None,
) -> Responder:
  """Builds the function that generates a model's responses to prompts.

  Args:
    model: the policy's definition.
    options: how tokens are chosen.
    tokenizer: decodes the responses.
    layout: of the mesh.
    num_samples: K responses to each prompt.
    reference_model: the definition of the model against which KL is measured.
    score: (Prompts, Samples) → [B * K] float32 on the mesh.

  Returns:
    A Responder, called as respond(params, batches of Prompts on the host, key,
    reference=None) → Responses.
  """
  generate = sampler.build_sampler(
    model,
    options,
    tokenizer.stop_ids,
    tokenizer.pad_id,
    num_samples,
    layout=layout,
  )
  measure_kl = functools.partial(
    measure_response_kl,
    reference_model,
    options.temperature,
  )
  return Responder(
    generate=generate,
    measure_kl=jax.jit(measure_kl),
    score=score,
    tokenizer=tokenizer,
    layout=layout,
    num_samples=num_samples,
  )


def measure_response_kl(
  reference_model: Model | None,
  temperature: float,
  reference: Params,
  prompts: Prompts,
  samples: Samples,
) -> jax.Array:
  """Sums log π − log π_ref over the tokens of each response.

  log π is what the sampler reported when it drew the token.

  Args:
    reference_model: the reference's definition.
    temperature: the temperature that the responses were sampled with.
    reference: parameters of the reference.
    prompts: Prompts [B, P].
    samples: Samples [B * K, R].

  Returns:
    [B * K] float32, nats.
  """
  assert reference_model is not None, 'no reference to measure against'
  R = samples.tokens.shape[1]
  sequences = sampler.join_sequences(prompts, samples)
  hidden, _ = reference_model.apply(
    reference,
    sequences.tokens,
    sequences.positions,
    sequences.segment_ids,
  )
  predicting = hidden[:, -R - 1 : -1]  # each position predicts the next token
  reference_logprobs, _ = heads.token_logprobs(
    reference_model,
    reference,
    predicting,
    samples.tokens,
    temperature,
  )
  kl = divergence.k1(samples.logprobs, reference_logprobs)
  return jnp.sum(jnp.where(samples.mask, kl, 0.0), axis=1)


def complete_prompts(
  respond: Responder,
  params: Params,
  prompts: Sequence[Sequence[int]],
  batch_size: int,
  pad_id: int,
  key: jax.Array,
  reference: Params | None = None,
) -> Responses:
  """Generates responses to prompts that are lists of token ids.

  All are padded to the same length, a multiple of 64, so that few programs are compiled.

  Args:
    respond: from `build_responder`.
    params: the parameters of the policy.
    prompts: N lists of token ids.
    batch_size: the number of prompts in a batch.
    pad_id: the padding token.
    key: the random key of this call.
    reference: parameters of the reference, against which KL is measured.

  Returns:
    The responses to the N prompts, in their order.
  """
  longest = max(map(len, prompts))
  width = -(-longest // WIDTH) * WIDTH  # rounded up
  rows = [encode.left_padded(tokens, width, pad_id, index) for index, tokens in enumerate(prompts)]
  return respond(params, batches.prompts_once(rows, batch_size), key, reference)


def select_prompts(responses: Responses, numbers: Sequence[int]) -> Responses:
  """Returns the responses to some of the prompts."""

  def take(values: np.ndarray | None) -> np.ndarray | None:
    return None if values is None else values[list(numbers)]

  return Responses(
    texts=[responses.texts[number] for number in numbers],
    lengths=responses.lengths[list(numbers)],
    ended=responses.ended[list(numbers)],
    kl=take(responses.kl),
    scores=take(responses.scores),
  )


def select_responses(responses: Responses, chosen: np.ndarray) -> Responses:
  """Returns some of the responses to each prompt; `kl` is left out, as they are no samples.

  Args:
    responses: K to each of N prompts.
    chosen: [N, S] int, which of the K.
  """
  take = functools.partial(np.take_along_axis, indices=chosen, axis=1)
  return Responses(
    texts=[[row[index] for index in indices] for row, indices in zip(responses.texts, chosen)],
    lengths=take(responses.lengths),
    ended=take(responses.ended),
    scores=None if responses.scores is None else take(responses.scores),
  )


def select_best_of(responses: Responses, count: int) -> Responses:
  """Selects the response with the highest score out of every `count`: best-of-n.

  Args:
    responses: K * count responses to each prompt, with scores.
    count: the number of responses to select one from, n.

  Returns:
    K responses to each prompt, whose `kl` is the bound log n − (n − 1)/n, nats
    (`divergence.best_of_n_kl`).
  """
  assert responses.scores is not None, 'best-of-n needs scores'
  scores = responses.scores.reshape(len(responses.texts), -1, count)
  offsets = count * np.arange(scores.shape[1])
  chosen = np.argmax(scores, axis=2) + offsets  # [N, K]
  take = functools.partial(np.take_along_axis, indices=chosen, axis=1)
  return Responses(
    texts=[[row[index] for index in indices] for row, indices in zip(responses.texts, chosen)],
    lengths=take(responses.lengths),
    ended=take(responses.ended),
    kl=np.full(chosen.shape, divergence.best_of_n_kl(count)),
    scores=take(responses.scores),
  )
