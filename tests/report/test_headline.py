import pytest

from rlhf_jax.report import headline, run_files
from rlhf_jax.report.kept_responses import Kept


@pytest.mark.parametrize(
  'interval,tone,words',
  [
    ((0.51, 0.7), 'good', 'it is better.'),
    ((0.3, 0.49), 'bad', 'it is worse.'),
    ((0.5, 0.7), 'open', 'no difference is shown'),
    ((0.4, 0.6), 'open', 'no difference is shown'),
  ],
)
def test_a_win_rate_says_what_its_interval_shows(interval, tone, words):
  said = headline.describe_win('ppo', 'sft', 0.55, interval, 'sampled')
  assert said.tone == tone and words in said.text


@pytest.mark.parametrize(
  'own,tone,words',
  [
    ((0.61, 0.7), 'good', 'ppo is more helpful: 50.0% for sft, 65.0% for ppo'),
    ((0.1, 0.39), 'bad', 'ppo is less helpful'),
    ((0.6, 0.7), 'open', 'No difference in being helpful is shown'),
  ],
)
def test_rates_differ_where_their_intervals_do_not_touch(own, tone, words):
  rows = {'helpful': 0.65, 'helpful_ci95': own}, {'helpful': 0.5, 'helpful_ci95': (0.4, 0.6)}
  said = headline.describe_rate('helpful', 'ppo', 'sft', *rows, 'helpful')
  assert said.tone == tone and words in said.text


def kept(step, number, score, utility):
  return Kept(
    'training', 'ppo', step, '', 'sampled', f'p{number}', 0, '', '', score, 0.0, 1, True,
    {'utility': utility},
  )  # fmt: skip


@pytest.mark.parametrize(
  'gold,tone,words', [(-1.0, 'bad', 'over-optimised'), (1.0, 'good', 'both rise')]
)
def test_a_reward_that_rises_alone_is_over_optimised(gold, tone, words):
  rows = [kept(step, n, step, gold * step) for step in (0, 5) for n in range(4)]
  (said,) = headline.describe_progress(rows, ['sft', 'ppo'])
  assert said.tone == tone and words in said.text


def test_the_title(make_run):
  def title(workdir):
    return headline.write_headline(run_files.read_run(workdir)).title

  assert title(make_run('done')) == 'ppo is better than sft'
  unfinished = make_run('killed', finished=False)
  assert title(unfinished) == (
    'Not finished: 1 of 2 stages are finished; ppo is under way, at step 4 of 4'
  )
