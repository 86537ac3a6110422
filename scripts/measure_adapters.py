"""Measures the loss in quality from a quantised base, and the memory that adapters need.

  python scripts/measure_adapters.py           # takes three minutes on two cores

It needs SmolLM2 (see the README) and the extra `qwix`. The model reads the project's README; for
each format of its matrices, the script prints the nats per token and the KL from the float32 model.
Recorded results are in docs/models.md.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.models import heads, lora, quantised, transformer
from rlhf_jax.runtime import mesh
from rlhf_jax.stages.shared import model_sources, model_store

README = Path(__file__).resolve().parents[1] / 'README.md'
ROWS = 16  # of the text
LENGTH = 128  # tokens of a row


def megabytes(tree: Any) -> float:
  """Returns the size of a tree of arrays or shapes on a device, in MB.

  JAX reports one byte for an int4 element, but a device packs two into a byte.
  """
  total = 0.0
  for leaf in jax.tree.leaves(tree):
    width = 0.5 if 'int4' in leaf.dtype.name else leaf.dtype.itemsize
    total += leaf.size * width
  return total / 1e6


def read_text(source: model_sources.ModelSource) -> np.ndarray:
  """Returns the beginning of the README as rows of token ids, [ROWS, LENGTH] int32."""
  ids = source.tokenizer().encode(README.read_text(encoding='utf-8'))
  complete = len(ids) // LENGTH * LENGTH
  return np.array(ids[:complete], np.int32).reshape(-1, LENGTH)[:ROWS]


def measure(
  source: model_sources.ModelSource,
  layout: mesh.Layout,
  tokens: np.ndarray,
  base: str,
) -> tuple[np.ndarray, float, float]:
  """Reads the text with a model whose matrices are stored in a given format.

  Args:
    source: the model.
    layout: the mesh and its rules.
    tokens: [ROWS, LENGTH] int32.
    base: the format, one of quantised.KINDS.

  Returns:
    (log-probabilities of all possible next tokens [ROWS, LENGTH - 1, V], megabytes of the
    model, megabytes of its matrices).
  """
  model = transformer.build_model(dataclasses.replace(source.config, base=base))
  params = model_store.read_parameters(source, layout, base, {})
  positions = np.tile(np.arange(LENGTH, dtype=np.int32), (len(tokens), 1))
  hidden, _ = jax.jit(model.apply)(params, tokens, positions, np.ones_like(tokens))

  @jax.jit
  def all_logprobs(hidden: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(heads.next_token_logits(model, params, hidden))

  matrices = [params['layers'][name] for name in model.config.matrices]
  return np.asarray(all_logprobs(hidden[:, :-1])), megabytes(params), megabytes(matrices)


def parse_arguments() -> None:
  """Answers --help; there are no other arguments."""
  argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  ).parse_args()


def main() -> None:
  """Prints both tables."""
  parse_arguments()
  layout = mesh.make_layout()
  source = model_sources.find_model('smollm2')
  tokens = read_text(source)
  print(f'{"base":10} {"MB":>5} {"matrices":>8} {"nats per token":>14} {"KL":>8}')
  exact, _, _ = measure(source, layout, tokens, 'float32')
  for base in quantised.KINDS:
    logprobs, total, matrices = measure(source, layout, tokens, base)
    nats = -np.take_along_axis(logprobs, tokens[:, 1:, None], -1).mean()
    divergence = np.mean(np.sum(np.exp(exact) * (exact - logprobs), axis=-1))
    print(f'{base:10} {total:5.0f} {matrices:8.0f} {nats:14.3f} {divergence:8.4f}')

  config = dataclasses.replace(
    source.config, lora_rank=8, lora_targets=source.config.matrices, head=True
  )
  shapes = jax.eval_shape(transformer.build_model(config).init, jax.random.key(0))
  trained, frozen = (megabytes(part) for part in lora.split_trainable(shapes))
  print(f'\nadapters of rank 8: {trained:.1f} MB, Adam {2 * trained:.1f}; base {frozen:.0f}')
  print(
    f'PPO: policy, value, reference and reward model on one base {frozen + 4 * trained:.0f} MB, '
    f'Adam {4 * trained:.0f}; all parameters trained {4 * frozen:.0f} MB, Adam {4 * frozen:.0f}'
  )


if __name__ == '__main__':
  main()
