"""Measures what adapters and kept bases take and change, on SmolLM2-135M-Instruct and the words of the README.

  python scripts/measure_adapters.py           # three minutes on two cores

For each way to keep a base: its bytes, and how far log-probabilities of the next token move. For PPO with adapters of
rank 8 on all matrices, and without: bytes of each part of the state.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from rlhf_jax.models import heads, lora, quantised, transformer
from rlhf_jax.runtime import mesh
from rlhf_jax.stages.shared import model_sources

README = Path(__file__).resolve().parents[1] / 'README.md'


def size(tree) -> float:
  """Megabytes; JAX says that an int4 takes a byte, a device keeps two in one."""
  width = lambda leaf: 0.5 if 'int4' in leaf.dtype.name else leaf.dtype.itemsize
  return sum(leaf.size * width(leaf) for leaf in jax.tree.leaves(tree)) / 1e6


def main():
  layout, source = mesh.make_layout(mesh.DEFAULTS), model_sources.find_model('smollm2')
  ids = source.tokenizer().encode(README.read_text())
  tokens = np.array(ids[:len(ids) // 128 * 128], np.int32).reshape(-1, 128)[:16]
  positions = np.tile(np.arange(128, dtype=np.int32), (len(tokens), 1))

  def logprobs(kind):
    model = transformer.build_model(dataclasses.replace(source.config, base=kind))
    params = model_sources.read_parameters(source, layout, kind, {})
    hidden = jax.jit(model.apply)(params, tokens, positions, np.ones_like(tokens))[0]
    every = jax.jit(lambda hidden: jax.nn.log_softmax(heads.next_token_logits(model, params, hidden)))(hidden[:, :-1])
    return np.asarray(every), size(params), size([params['layers'][name] for name in model.config.matrices])

  print(f'{"base":10} {"MB":>5} {"matrices":>8} {"nats per token":>14} {"KL":>8}')
  for kind in quantised.KINDS:
    found, total, matrices = logprobs(kind)
    exact = found if kind == 'float32' else exact
    loss = -np.take_along_axis(found, tokens[:, 1:, None], -1).mean()
    divergence = np.mean(np.sum(np.exp(exact) * (exact - found), axis=-1))
    print(f'{kind:10} {total:5.0f} {matrices:8.0f} {loss:14.3f} {divergence:8.4f}')

  config = dataclasses.replace(source.config, lora_rank=8, lora_targets=source.config.matrices, head=True)
  shapes = jax.eval_shape(transformer.build_model(config).init, jax.random.key(0))
  trained, frozen = map(size, lora.split_trainable(shapes))
  print(f'\nadapters of rank 8: {trained:.1f} MB, Adam {2 * trained:.1f}; base {frozen:.0f}')
  print(f'PPO: policy, value, reference and reward model on one base {frozen + 4 * trained:.0f} MB, '
        f'Adam {4 * trained:.0f}; all parameters trained {4 * frozen:.0f} MB, Adam {4 * frozen:.0f}')


if __name__ == '__main__':
  main()
