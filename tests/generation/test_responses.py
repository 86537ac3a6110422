import jax
import numpy as np
import pytest

from rlhf_jax import testing
from rlhf_jax.errors import UserError
from rlhf_jax.generation import responses, sampler


def test_best_of_n_takes_the_highest_of_each_group():
  """Two prompts, two answers each, each the best of three."""
  scores = np.array([[0.1, 0.9, 0.2, -1.0, -3.0, -2.0], [5.0, 5.0, 4.0, 0.0, 1.0, 2.0]])
  given = responses.Responses(
    [list('abcdef'), list('uvwxyz')],
    np.arange(12).reshape(2, 6),
    np.arange(12).reshape(2, 6) % 2 == 0,
    None,
    scores,
  )
  best = responses.select_best_of(given, 3)
  assert best.texts == [['b', 'd'], ['u', 'z']]
  np.testing.assert_array_equal(best.lengths, [[1, 3], [6, 11]])
  np.testing.assert_array_equal(best.ended, [[False, False], [True, False]])
  np.testing.assert_array_equal(best.scores, [[0.9, -1.0], [5.0, 2.0]])
  np.testing.assert_allclose(best.kl, np.log(3) - 2 / 3)


def test_a_damaged_model_gives_no_text():
  """From NaN logits greedy decoding would return the last token again and again."""
  model = testing.make_model(vocab_size=384)
  params = jax.tree.map(lambda x: x * np.nan, testing.make_params(model))
  tokenizer = testing.make_tokenizer()
  layout = testing.make_layout()
  options = sampler.SamplingOptions(max_new_tokens=2, temperature=0.0)
  respond = responses.build_responder(model, options, tokenizer, layout)
  with pytest.raises(UserError, match='expected finite logits'):
    responses.complete_prompts(respond, params, [[1, 2]], 1, tokenizer.pad_id, jax.random.key(0))
