"""The last table: every model on the same held-out prompts."""

import numpy as np

from rlhf_jax.evaluation import winrate

HEADINGS = {  # key in results.json → (heading, form)
    'helpful': ('helpful', '{:.1%}'), 'honest': ('honest', '{:.1%}'), 'harmless': ('harmless', '{:.1%}'),
    'evasive': ('evasive', '{:.1%}'), 'utility': ('utility', '{:.3f}'), 'score': ('reward', '{:.3f}'), 'win_rate_vs_sft': ('win rate vs SFT', '{:.1%}'),
    'win_rate_vs_sft_ci95': ('95% interval', '{0[0]:.1%} – {0[1]:.1%}'), 'kl_to_sft': ('KL to SFT (nats)', '{:.2f}'),
    'response_length': ('length', '{:.1f}'), 'eos_rate': ('EOS', '{:.1%}'),
}


def make_row(answers, judged: dict, baseline, others=None) -> dict:
  """What the table says of one model.

  Args:
    answers: its Answers.
    judged: name → [N, S]; `utility` decides who wins, the others are averaged.
    baseline: [N, S], the utility of the model all are compared with.
    others: name → [N, S], of further models to compare with: `win_rate_vs_NAME`.

  Returns:
    A dict with the keys of HEADINGS that are known, of plain floats.
  """
  values = {name: float(np.nanmean(x)) for name, x in judged.items() if not np.isnan(x).all()}
  for name, utility in {'sft': baseline, **(others or {})}.items():
    won = winrate.win_rate(judged['utility'], utility)
    values |= {f'win_rate_vs_{name}': float(won.mean()), f'win_rate_vs_{name}_ci95': list(winrate.bootstrap(won))}
  if answers.scores is not None:
    values['score'] = float(answers.scores.mean())
  if answers.kl is not None:
    values['kl_to_sft'] = float(answers.kl.mean())
  return values | {'response_length': float(answers.lengths.mean()), 'eos_rate': float(answers.ended.mean())}


def format_table(models: dict[str, dict]) -> str:
  """The table as aligned text, a line a model."""
  headings = {**HEADINGS}
  for key in {key: None for values in models.values() for key in values if key.startswith('win_rate_vs_')}:
    name = key.removeprefix('win_rate_vs_').removesuffix('_ci95')
    headings.setdefault(key, HEADINGS['win_rate_vs_sft_ci95'] if key.endswith('_ci95') else (f'vs {name}', '{:.1%}'))
  known = [key for key in headings if any(key in values for values in models.values())]
  lines = [['model', *(headings[key][0] for key in known)]]
  for name, values in models.items():
    lines.append([name, *(headings[key][1].format(values[key]) if key in values else '–' for key in known)])
  widths = [max(map(len, column)) for column in zip(*lines)]
  return '\n'.join('  '.join(cell.rjust(width) if i else cell.ljust(width)
                             for i, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines)
