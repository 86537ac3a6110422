r"""R8: RLHF beats supervised fine-tuning on held-out prompts, with length and style controlled.

Stiennon et al. 2020, arXiv:2009.01325; Ouyang et al. 2022, arXiv:2203.02155. It reads finished runs
of a whole experiment, which are made first:

  for seed in 0 1 2; do python -m rlhf_jax --config=experiments/quickstart.py \
      --config.seed=$seed --workdir=runs/seed$seed; done
  python scripts/reproduce.py --config=experiments/reproductions/r8_rlhf.py

Expected: PPO wins 65% or more against SFT, with a lower bound above 55%, and 60% or more with
  length and style controlled, at a KL of 10 nats or less, and 95% of its responses end;
  docs/reproductions.md has the figures and the plot.
Time: about 10 minutes for each run of the quickstart on two CPU cores; nothing beside that.
  FILE:gpu reads runs of experiments/smollm2_human_feedback.py (a command like the above, with
  --config.model.dtype=bfloat16, to runs/smollm2_seed0 and so on) with bands of 60%, 50% and 55%,
  as guessed beforehand; it was never run on a GPU.
Try: --config.settings.runs="('docs/results/quickstart_seed0.json',)", the figures that are kept.
"""

import ml_collections
import sizes


def get_config(size: str = 'cpu') -> ml_collections.ConfigDict:
  """Returns the claim, its bands and its settings."""
  is_large = sizes.check_size(size)
  least, lower, controlled = (0.60, 0.50, 0.55) if is_large else (0.65, 0.55, 0.60)
  folder = 'runs/smollm2_seed' if is_large else 'runs/seed'
  arrangement = 'experiments/quickstart.py, judged by the oracle on 330 held-out prompts'
  if is_large:
    arrangement = 'experiments/smollm2_human_feedback.py, judged by its own reward model'
  return sizes.make_config(
    claim='R8',
    text='RLHF beats supervised fine-tuning on held-out prompts, with length and style controlled',
    source='Ouyang et al. 2022; Stiennon et al. 2020',
    arrangement=arrangement,
    bands={
      'win rate against the baseline': (least, None),
      'lower end of its interval': (lower, None),
      'controlled win rate': (controlled, None),
      'rate of ends': (0.95, None),
      'KL, nats': (None, 10.0),
    },
    reported=() if is_large else ('gain in helpfulness',),
    settings=dict(
      runs=tuple(f'{folder}{seed}' for seed in range(3)),  # in place of seeds
      model='ppo',
      baseline='sft',
      stage='ppo',  # whose held-out reward is drawn
    ),
  )
