import types

from rlhf_jax.experiment import reward_agreement
from rlhf_jax.report import kept_responses


def ranking(number, ranks):
  texts = [f'response {n}' for n in range(len(ranks))]
  return types.SimpleNamespace(
    id=f'r{number}', messages=[{'role': 'user', 'content': '?'}], responses=texts, ranks=ranks
  )


def keep(workdir, stage, step, scores):
  rankings = [ranking(0, [1, 2, 3]), ranking(1, [2, 1])]
  lengths = {number: [1] * len(own) for number, own in scores.items()}
  rows = kept_responses.make_given_rows(rankings, scores, lengths, stage=stage, step=step)
  kept_responses.keep(workdir, rows)


def test_two_models_are_compared_on_the_pairs_that_both_scored(tmp_path):
  keep(tmp_path, 'a', 0, {0: [0.0, 0.0, 0.0], 1: [0.0, 0.0]})  # an earlier evaluation
  keep(tmp_path, 'a', 5, {0: [3.0, 2.0, 1.0], 1: [0.0, 1.0]})
  keep(tmp_path, 'b', 5, {0: [3.0, 1.0, 2.0]})  # wrong on one pair, and read one ranking only
  assert reward_agreement.measure(tmp_path, ['a']) == {}
  found = reward_agreement.measure(tmp_path, ['a', 'b'])
  assert found['pairs'] == 3
  [row] = found['agreement'].values()
  assert row['same'] == 2 / 3 and row['expected'] == 2 / 3  # a is always right
  assert found['ensemble']['accuracy'] == (1 + 1 + 0.5) / 3  # the mean of one pair is a tie
  assert 'a, b: the same preference on 66.7% of 3 pairs' in '\n'.join(
    reward_agreement.format_agreement(found)
  )
  assert reward_agreement.measure(tmp_path, ['a', 'none']) == {}
