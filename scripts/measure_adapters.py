"""Measures what adapters and kept bases take and change.

  python scripts/measure_adapters.py           # three minutes on two cores

The model is SmolLM2-135M-Instruct, the text the words of the README. For each way to keep a base
it prints its bytes, and how far log-probabilities of the next token move. For PPO with adapters of
rank 8 on all matrices, and without, it prints the bytes of each part of the state.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.models import heads, lora, quantised, transformer
from rlhf_jax.runtime import mesh
from rlhf_jax.stages.shared import model_sources

README = Path(__file__).resolve().parents[1] / 'README.md'
ROWS = 16
LENGTH = 128
RANK = 8


def megabytes(tree: Any) -> float:
  """Returns the size of a tree of arrays."""
  return sum(leaf.size * bytes_of(leaf.dtype) for leaf in jax.tree.leaves(tree)) / 1e6


def bytes_of(dtype: np.dtype) -> float:
  """Returns the bytes of a number; JAX says 1 for an int4, but a device keeps two in a byte."""
  return 0.5 if 'int4' in dtype.name else dtype.itemsize


def read_tokens(source: model_sources.ModelSource) -> np.ndarray:
  """Returns the words of the README, at most [ROWS, LENGTH], int32."""
  ids = source.tokenizer().encode(README.read_text())
  rows = min(len(ids) // LENGTH, ROWS)
  return np.array(ids[: rows * LENGTH], np.int32).reshape(rows, LENGTH)


def measure_base(
  source: model_sources.ModelSource,
  layout: mesh.Layout,
  kind: str,
  tokens: np.ndarray,
) -> tuple[np.ndarray, float, float]:
  """Computes with a base that is kept in one of the ways.

  Returns:
    Log-probabilities of every next token [B, T - 1, V], megabytes of all parameters and of the
    matrices of the layers.
  """
  model = transformer.build_model(dataclasses.replace(source.config, base=kind))
  params = model_sources.read_parameters(source, layout, kind, {})
  positions = np.tile(np.arange(LENGTH, dtype=np.int32), (len(tokens), 1))
  hidden = jax.jit(model.apply)(params, tokens, positions, np.ones_like(tokens))[0]

  @jax.jit
  def logprobs(hidden):
    return jax.nn.log_softmax(heads.next_token_logits(model, params, hidden))

  matrices = [params['layers'][name] for name in model.config.matrices]
  return np.asarray(logprobs(hidden[:, :-1])), megabytes(params), megabytes(matrices)


def compare_bases(source: model_sources.ModelSource, layout: mesh.Layout) -> None:
  """Prints a row for each way to keep a base."""
  tokens = read_tokens(source)
  exact, _, _ = measure_base(source, layout, 'float32', tokens)
  print(f'{"base":10} {"MB":>5} {"matrices":>8} {"nats per token":>14} {"KL":>8}')
  for kind in quantised.KINDS:
    logprobs, total, matrices = measure_base(source, layout, kind, tokens)
    loss = -np.take_along_axis(logprobs, tokens[:, 1:, None], -1).mean()
    divergence = np.mean(np.sum(np.exp(exact) * (exact - logprobs), axis=-1))
    print(f'{kind:10} {total:5.0f} {matrices:8.0f} {loss:14.3f} {divergence:8.4f}')


def compare_states(source: model_sources.ModelSource) -> None:
  """Prints what PPO keeps with adapters and without."""
  config = dataclasses.replace(
    source.config,
    lora_rank=RANK,
    lora_targets=source.config.matrices,
    head=True,
  )
  shapes = jax.eval_shape(transformer.build_model(config).init, jax.random.key(0))
  adapters, base = lora.split_trainable(shapes)
  trained = megabytes(adapters)
  frozen = megabytes(base)
  print(f'\nadapters of rank {RANK}: {trained:.1f} MB, Adam {2 * trained:.1f}; base {frozen:.0f}')
  # The policy and the value model are trained, each with two moments of Adam.
  print(
    'PPO: policy, value, reference and reward model on one base '
    f'{frozen + 4 * trained:.0f} MB, Adam {4 * trained:.0f}; '
    f'all parameters trained {4 * frozen:.0f} MB, Adam {4 * frozen:.0f}'
  )


def main() -> None:
  """Measures and prints."""
  layout = mesh.make_layout(mesh.DEFAULTS)
  source = model_sources.find_model('smollm2')
  compare_bases(source, layout)
  compare_states(source)


if __name__ == '__main__':
  main()
