"""R13: mixing pre-training into PPO removes most of the alignment tax at little cost.

Ouyang et al. 2022, arXiv:2203.02155, section 4.2 and equation 2.

  python scripts/reproduce.py --config=experiments/reproductions/r13_alignment_tax.py

Expected: the held-out loss of documents rises at most half as much as without the mixture, and at
  most 5% of the gain is lost; docs/reproductions.md has the figures and the plot.
Time: 61 s on one CPU core. FILE:gpu has 64 tokens, texts of 48, 64 prompts, a network of 512 units
  and ten times the steps; it was never run on a GPU.
Try: --config.settings.coefficient=0.1, less of the mixture.
"""

import ml_collections
import sizes


def get_config(size: str = 'cpu') -> ml_collections.ConfigDict:
  """Returns the claim, its bands and its settings."""
  settings = dict(
    tokens=24,
    length=12,
    prompts=16,
    width=32,
    rows=256,
    pretraining=dict(steps=800, rate=1e-2),
    ppo=dict(steps=300, rate=3e-3, beta=0.05),
    coefficient=1.0,  # of the documents' loss
  )
  if sizes.check_size(size):
    settings |= dict(tokens=64, length=48, prompts=64, width=512, rows=1024)
    settings |= dict(pretraining=dict(steps=8000, rate=1e-3))
    settings |= dict(ppo=dict(steps=3000, rate=3e-4, beta=0.05))
  return sizes.make_config(
    claim='R13',
    text='Mixing pre-training into PPO removes most of the alignment tax at little cost',
    source='Ouyang et al. 2022',
    arrangement='a network of two layers, pre-trained on Markov chains; PPO on half of its '
    f'{settings["prompts"]} prompts, documents behind the others; {settings["ppo"]["steps"]:,} '
    f'rollouts of {settings["rows"]:,}',
    bands={'tax of PPO-ptx / of PPO': (None, 0.5), 'gold gain lost, share': (None, 0.05)},
    reported=(
      'tax of PPO, nats per token',
      'tax of PPO-ptx, nats per token',
      'gold of PPO',
      'gold of PPO-ptx',
    ),
    settings=settings,
  )
