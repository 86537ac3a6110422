from rlhf_jax.evaluation import downstream


def row(gain, **more):
  return {
    'utility_gain': gain,
    'utility_gain_ci95': [gain - 0.1, gain + 0.1],
    'win_rate_vs_sft': 0.6,
    'win_rate_vs_sft_ci95': [0.5, 0.7],
    **more,
  }


def test_what_was_optimised_has_its_gain():
  rows = {
    'sft': row(0.0, score=1.0, kl_to_sft=0.0),
    'ppo': row(0.5, score=3.0, kl_to_sft=2.0),
    'best': row(0.25),
  }
  optimised = {'ppo': 'trained', 'best': 'best of 4', 'gone': 'trained'}
  ppo, best = downstream.list_gains(rows, 'sft', optimised)
  assert ppo['score_gain'] == 2.0 and ppo['kl'] == 2.0 and ppo['win_rate'] == 0.6
  assert best['utility_gain_ci95'] == [0.15, 0.35] and 'score_gain' not in best
  assert downstream.format_gains({'gains': [ppo, best]}) == [
    '  ppo (trained) at KL 2.00: utility +0.500 (+0.400 to +0.600), wins 60.0%',
    '  best (best of 4): utility +0.250 (+0.150 to +0.350), wins 60.0%',
  ]
