from made_runs import keep_final, keep_training
import pytest

from rlhf_jax.report import kept_responses, samples
from rlhf_jax.report.differences import mark_differences


@pytest.mark.parametrize(
  'text,other,marked',
  [
    ('It is red.', 'It is blue.', ['red']),
    ('same', 'same', []),
    ('all new', '', ['all new']),
    ('a  b', 'a b', ['  ']),
  ],
)
def test_words_that_the_other_lacks_are_marked(text, other, marked):
  pieces = mark_differences(text, other)
  assert ''.join(piece for piece, _ in pieces) == text
  assert [piece for piece, differs in pieces if differs] == marked


def test_best_and_worst(tmp_path):
  texts = ['a', 'b', 'c']
  keep_final(tmp_path, {'sft': (texts, [1, 1, 1]), 'ppo': (texts, [3, 1, 0])})
  models = samples.final_rows(kept_responses.read(tmp_path), 'sampled')
  best, worst = samples.best_and_worst(models, 'ppo', 'sft')
  assert [(case.prompt, case.verdict) for case in best] == [('Question 0?', '+2.00 on average')]
  assert [(case.prompt, case.verdict) for case in worst] == [('Question 2?', '-1.00 on average')]
  cases = samples.side_by_side(models, ['sft', 'ppo'], 'sft')
  assert [case.verdict for case in cases] == ['better', 'same', 'worse']
  assert [case.responses[1].is_better for case in cases] == [True, None, False]


def test_tokens_have_their_kl(tmp_path):
  tokens = {'token': ['a', 'b'], 'logprob': [-1.0, -2.0], 'reference_logprob': [-1.5, -2.0]}
  keep_training(tmp_path, 0, ['ab'], [0.0], tokens={0: tokens})
  (view,) = samples.token_views(kept_responses.read(tmp_path))
  assert view.measures == ['log-probability', 'KL']
  assert view.tokens[0] == ('a', {'log-probability': ('-1.00', -0.5), 'KL': ('+0.50', 1.0)})


def test_a_response_at_every_evaluation(tmp_path):
  for step, text in ((0, 'It is red.'), (5, 'It is blue.')):
    keep_training(tmp_path, step, [text], [0.0])
  (case,) = samples.histories(kept_responses.read(tmp_path), 'ppo')
  assert [shown.name for shown in case.responses] == ['step 0', 'step 5']
  assert [text for text, differs in case.responses[1].pieces if differs] == ['blue']
