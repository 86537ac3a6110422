"""What optimising a reward model buys: accuracy alone does not tell how well it guides."""

from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]  # of the final table, see table.make_row


def list_gains(
  rows: Mapping[str, Row], baseline: str, optimised: Mapping[str, str]
) -> list[dict[str, Any]]:
  """Lists what models gained that were trained or chosen by a reward.

  Args:
    rows: name → its row, sampled.
    baseline: the name of the row that all are compared with.
    optimised: name → how the reward was optimised, such as 'trained' or 'best of 16'.

  Returns:
    A dict for each of `optimised` that has a row: row, how; utility_gain, of the judge, paired,
    and win_rate, each with its _ci95; and where they are known kl, nats, and score_gain, of the
    reward itself.
  """
  other = rows.get(baseline, {})
  gains = []
  for name, how in optimised.items():
    row = rows.get(name)
    if row is None or 'utility_gain' not in row:
      continue
    gain = {'row': name, 'how': how}
    for key, ours in (
      ('utility_gain', 'utility_gain'),
      ('win_rate', 'win_rate_vs_sft'),
    ):
      gain[key] = row[ours]
      gain[f'{key}_ci95'] = row[f'{ours}_ci95']
    if 'kl_to_sft' in row:
      gain['kl'] = row['kl_to_sft']
    if 'score' in row and 'score' in other:
      gain['score_gain'] = row['score'] - other['score']
    gains.append(gain)
  return gains


def format_gains(bought: Mapping[str, Any]) -> list[str]:
  """Formats what final_table.py keeps as `downstream`, as lines of text."""
  lines = []
  for gain in bought.get('gains', ()):
    low, high = gain['utility_gain_ci95']
    at = f' at KL {gain["kl"]:.2f}' if 'kl' in gain else ''
    lines.append(
      f'  {gain["row"]} ({gain["how"]}){at}: utility {gain["utility_gain"]:+.3f} '
      f'({low:+.3f} to {high:+.3f}), wins {gain["win_rate"]:.1%}'
    )
  return lines
