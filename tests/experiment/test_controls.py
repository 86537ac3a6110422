"""The controls of the final table."""

import numpy as np
import pytest

from rlhf_jax import testing
from rlhf_jax.data import tinyworld
from rlhf_jax.experiment import controls
from rlhf_jax.generation.responses import Responses


def responses_of(prompts, per_prompt=1, scores=None):
  """Responses that say their number."""
  shape = (len(prompts), per_prompt)
  texts = [[f'I do not know. {k}' for k in range(per_prompt)] for _ in prompts]
  return Responses(texts, np.full(shape, 4), np.ones(shape, bool), scores=scores)


@pytest.mark.parametrize('kl', [0.1, 0.7, 1.5])
def test_tilted_samples_have_the_kl_that_was_asked_for(kl):
  """The KL of the tilted distribution, counted from very many draws, and their mean value."""
  values = np.random.default_rng(1).normal(size=(6, 16))
  chosen, reached = controls.tilt(values, kl, np.random.default_rng(0), num_samples=20000)
  shares = np.stack([np.bincount(row, minlength=16) for row in chosen]) / chosen.shape[1]
  counted = np.where(shares > 0, shares * np.log(np.maximum(shares, 1e-9) * 16), 0).sum(1).mean()
  assert reached == pytest.approx(kl, abs=1e-3) and counted == pytest.approx(kl, abs=0.02)
  drawn = np.take_along_axis(values, chosen, axis=1).mean()
  assert values.mean() < drawn < values.max(axis=1).mean()


def test_no_more_kl_than_the_samples_have():
  values = np.random.default_rng(1).normal(size=(6, 16))
  chosen, reached = controls.tilt(values, 99.0, np.random.default_rng(0))
  assert reached == pytest.approx(np.log(16), abs=0.01)
  assert (chosen == values.argmax(axis=1)[:, None]).mean() > 0.98


def test_rows_of_the_controls():
  prompts = tinyworld.records('prompt', 'validation', count=40)
  scores = np.random.default_rng(0).normal(size=(40, controls.POOL))
  pool = responses_of(prompts, controls.POOL, scores)
  given = {'sampled': {'sft': responses_of(prompts, 2)}, 'greedy': {'sft': responses_of(prompts)}}
  prompted = {'sampled': responses_of(prompts), 'greedy': responses_of(prompts)}
  tokenizer = testing.make_tokenizer()
  rows = controls.make(prompts, given, pool, prompted, 'sft', 1.0, tokenizer)
  assert set(rows['greedy']) == {*controls.REFUSED, 'prompted_base'}
  kinds = {'phrase_and_refusal': 'harmful benign', 'phrase_and_refusal_by_oracle': 'harmful'}
  for name, refused in kinds.items():
    for prompt, text in zip(prompts, rows['greedy'][name].texts, strict=True):
      own = f'{controls.PHRASE} I do not know. 0'
      assert text == [controls.REFUSAL if prompt.meta['kind'] in refused.split() else own]
  best = rows['sampled']['best_of_16_by_reward']
  assert [row[0] for row in best.texts] == [f'I do not know. {k}' for k in scores.argmax(axis=1)]
  np.testing.assert_allclose(best.kl, np.log(16) - 15 / 16)
  np.testing.assert_allclose(rows['sampled']['tilt_by_reward'].kl, 1.0, atol=1e-3)
