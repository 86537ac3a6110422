"""Every family beside what transformers computed for it: scripts/record_references.py."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import heads, pretrained, transformer

DATA = Path(__file__).parent / 'data'
CASES = sorted(path.name for path in DATA.iterdir())
TOKENS = np.array([[5, 9, 60, 7, 33, 2, 18, 41, 4, 11, 50, 22], [3, 50, 1, 27, 6, 12, 44, 19, 8, 0, 0, 0],
                   [63, 10, 31, 2, 5, 0, 0, 0, 0, 0, 0, 0]])
MASK = np.arange(12) < np.array([12, 9, 5])[:, None]


def batch():
  """Three texts padded on the right, the same padded on the left, and a row of two packed texts."""
  left = lambda x: np.stack([np.roll(row, 12 - mask.sum()) for row, mask in zip(x, MASK)])
  packed = np.concatenate([TOKENS[0, :7], TOKENS[1, :5]])[None]
  tokens = np.concatenate([TOKENS, left(TOKENS), packed])
  mask = np.concatenate([MASK, left(MASK)]).astype(np.int32)
  segments = np.concatenate([mask, [[1] * 7 + [2] * 5]])
  positions = np.concatenate([np.maximum(mask.cumsum(1) - 1, 0), [[*range(7), *range(5)]]])
  return [jnp.asarray(x, jnp.int32) for x in (tokens, positions, segments)]


@pytest.mark.parametrize('case', CASES)
def test_logits_of_padded_and_packed_texts_and_of_a_cache(case):
  config = pretrained.read_config(DATA / case)
  params, reference = pretrained.load(DATA / case, config), np.load(DATA / case / 'logits.npz')
  model, (tokens, positions, segments) = transformer.build(config), batch()
  hidden = jax.jit(model.apply)(params, tokens, positions, segments)[0]
  logits = np.asarray(heads.logits(model, params, hidden))
  left = np.asarray(segments[3:6]).astype(bool)
  np.testing.assert_allclose(logits[:3][MASK], reference['right'][MASK], atol=1e-4, rtol=1e-5)
  np.testing.assert_allclose(logits[3:6][left], reference['left'][left], atol=1e-4, rtol=1e-5)
  np.testing.assert_allclose(logits[6, :7], reference['right'][0, :7], atol=1e-4, rtol=1e-5)
  np.testing.assert_allclose(logits[6, 7:], reference['right'][1, :5], atol=1e-4, rtol=1e-5)

  apply, weights = jax.jit(model.apply), transformer.unstack(params)
  cache, parts = transformer.empty_cache(config, 7, 12, stacked=False), []
  for start in range(0, 12, 4):
    part = slice(start, start + 4)
    found, cache = apply(weights, tokens[:, part], positions[:, part], segments[:, part], cache)
    parts.append(found)
  seen = np.asarray(segments).astype(bool)
  np.testing.assert_allclose(np.concatenate(parts, axis=1)[seen], np.asarray(hidden)[seen], atol=2e-5)
