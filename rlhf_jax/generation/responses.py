"""Responses of a model to a list of prompts, as text, with what they cost in KL."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from rlhf_jax.data import batches, encode
from rlhf_jax.generation import sampler
from rlhf_jax.models import heads
from rlhf_jax.objectives import divergence


@dataclasses.dataclass(frozen=True)
class Responses:
  """S answers to each of N prompts.

  Attributes:
    texts: N lists of S strings.
    lengths: [N, S] int, tokens with the end token.
    ended: [N, S] bool.
    kl: [N, S] float, Σ_t log π − log π_ref of the answer's tokens, nats; None without a reference.
    scores: [N, S] float, of the reward; None without one.
  """
  texts: list
  lengths: np.ndarray
  ended: np.ndarray
  kl: np.ndarray | None = None
  scores: np.ndarray | None = None


def build_responder(model, sampling, tokenizer, layout, samples: int = 1, reference_model=None, score=None):
  """A function that answers prompts.

  Args:
    model: the policy's definition.
    sampling: the sampler's config.
    samples: S answers to each prompt.
    reference_model: the definition of the model against which KL is measured.
    score: (Prompts, Samples) → [B * S] float32 on the mesh.

  Returns:
    answer(params, prompts: batches of host Prompts, key, reference=None) → Responses. Rows with index -1 are left out.
  """
  generate = sampler.build_sampler(model, sampling, (tokenizer.eos_id,), tokenizer.pad_id, samples, layout=layout)
  R = sampling.max_new_tokens

  @jax.jit
  def divergence_of(params, reference, prompts, answers):
    sequences = sampler.join_sequences(prompts, answers)
    def logprobs(model, params):
      hidden, _ = model.apply(params, sequences.tokens, sequences.positions, sequences.segment_ids)
      return heads.token_logprobs(model, params, hidden[:, -R - 1:-1], answers.tokens, sampling.temperature)[0]
    kl = divergence.k1(logprobs(model, params), logprobs(reference_model, reference))
    return jnp.sum(jnp.where(answers.mask, kl, 0.0), axis=1)

  def answer(params, prompts, key, reference=None) -> Responses:
    texts, columns = [], []
    shown = tqdm.tqdm(prompts, desc='answers', unit='batch', leave=False, disable=None)  # on a terminal
    for number, host_prompts in enumerate(shown):
      placed = layout.place(host_prompts)
      answers = generate(params, placed, jax.random.fold_in(key, number))
      column = dict(lengths=jnp.sum(answers.mask, axis=1), ended=answers.ended)
      if reference is not None:
        column['kl'] = divergence_of(params, reference, placed, answers)
      if score is not None:
        column['scores'] = score(placed, answers)
      tokens, mask, column = to_host((answers.tokens, answers.mask, column))
      real = np.repeat(to_host(placed.index) >= 0, samples)
      rows = [tokenizer.decode(row[seen].tolist()) for row, seen in zip(tokens[real], mask[real])]
      texts += [rows[i:i + samples] for i in range(0, len(rows), samples)]
      columns.append({name: x[real].reshape(-1, samples) for name, x in column.items()})
    return Responses(texts, **{name: np.concatenate([c[name] for c in columns]) for name in columns[0]})

  return answer


def complete_prompts(answer, params, prompts, batch_size: int, pad_id: int, key) -> Responses:
  """Responses to lists of tokens, with `answer` of build. All are padded to the same length, a multiple of 64, so that few
  programs are compiled."""
  width = -(-max(map(len, prompts)) // 64) * 64
  rows = [encode.left_padded(tokens, width, pad_id, index) for index, tokens in enumerate(prompts)]
  return answer(params, batches.prompts_once(rows, batch_size), key)


def select_best_of(answers: Responses, count: int) -> Responses:
  """Of every `count` answers the one that scores highest: best-of-N.

  Args:
    answers: S * count to each prompt, with scores.

  Returns:
    S answers to each prompt; `kl` is the bound log n − (n − 1)/n.
  """
  scores = answers.scores.reshape(len(answers.texts), -1, count)
  chosen = np.argmax(scores, axis=2) + count * np.arange(scores.shape[1])
  take = lambda x: np.take_along_axis(x, chosen, axis=1)
  return Responses([[row[i] for i in places] for row, places in zip(answers.texts, chosen)], take(answers.lengths),
                 take(answers.ended), np.full(chosen.shape, divergence.best_of_n_kl(count)), take(answers.scores))


def to_host(tree):
  """Global arrays as numpy arrays, on every process."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  from jax.experimental import multihost_utils
  return multihost_utils.process_allgather(tree, tiled=True)
