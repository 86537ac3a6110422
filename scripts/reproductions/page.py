"""Writes the page of the reproductions, with a plot of each claim that has curves."""

import io
import json

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt

from rlhf_jax import files

HEAD = """# Claims of the field, in small

Each claim is a config of `experiments/reproductions/` with its sizes, seeds and bands. It is
measured in a world small enough for a CPU; it holds if the mean over its seeds is in the band of
every measure. Bands are fixed beforehand, from the papers; arrangements were tried on other seeds
than those reported.

```sh
python scripts/reproduce.py --claims=all --output=docs/results/reproductions.json
python scripts/reproduce.py --output=docs/results/reproductions.json --page=docs/reproductions.md
```

Any config runs alone (`--config=experiments/reproductions/r4_best_of_n.py`), with other settings
(`--config.settings.pairs=256`), and many in a larger size for one GPU (`FILE:gpu`). The GPU sizes
were never run on a GPU and have no measured figures; `--trace` says whether their programs fit
together, at full size and without computing them.

"""
COLOURS = ('#1f5fa8', '#c2571a', '#2f7d4f', '#7a4fa3', '#8a6d00')


def write(path, claims, results):
  """Writes the page, and its plots into the folder `pictures` beside it.

  Args:
    path: of the page.
    claims: all claims, in their order.
    results: id → what was measured, see reproduce.py.
  """
  seconds = sum(row['seconds'] for row in results.values())
  parts = [HEAD, f'{len(results)} of {len(claims)} claims were run, in {seconds:.0f} s of CPU.\n\n']
  parts.append('| claim | | holds |\n| --- | --- | --- |\n')
  for claim in claims:
    row = results.get(claim.id)
    verdict = 'not run'
    if row is not None:
      held = sum(row['in_band'].values())
      missed = f'**no**: {held} of {len(row["in_band"])} measures in their bands'
      verdict = 'yes' if row['holds'] else missed
    parts.append(f'| {claim.id} | {claim.text} | {verdict} |\n')
  for claim in claims:
    if claim.id in results:
      parts += describe(claim, results[claim.id], path)
  files.write_text(path, ''.join(parts).rstrip() + '\n')


def describe(claim, row, path):
  """Returns the section of one claim."""
  seeds = ', '.join(row['seeds'])
  parts = [
    f'\n## {claim.id}: {claim.text}\n\n',
    f'{claim.source}. {claim.arrangement[0].upper()}{claim.arrangement[1:]}.\n',
    f'`python scripts/reproduce.py --config={claim.config}`, seeds {seeds}, '
    f'{row["seconds"]:.0f} s of CPU.\n\n',
    '| measure | band | mean | of the seeds | |\n| --- | --- | --- | --- | --- |\n',
  ]
  for name in (*claim.bands, *claim.reported):
    values = ', '.join(f'{own[name]:.4g}' for own in row['values'] if name in own)
    band, verdict = '–', ''
    if name in claim.bands:
      band = str(claim.bands[name])
      verdict = 'in' if row['in_band'][name] else '**out**'
    mean = f'{row["means"][name]:.4g}' if name in row['means'] else '–'
    parts.append(f'| {name} | {band} | {mean} | {values} | {verdict} |\n')
  if as_json(row['settings']) != as_json(claim.settings):
    parts.append('\nMeasured with other settings than those of the config.\n')
  if claim.note:
    parts.append(f'\n{claim.note}\n')
  for title, curves in row['curves'].items():
    name = f'reproduction_{claim.id.lower()}.svg'
    draw(path.parent / 'pictures' / name, title, curves)
    parts.append(f'\n![{claim.id}: {title}](pictures/{name})\n')
  return parts


def as_json(settings):
  """Returns settings as text, which tells whether they are the same."""
  own = {name: value for name, value in settings.items() if name != 'runs'}
  return json.dumps(own, sort_keys=True)


def draw(path, title, curves):
  """Draws the curves of one claim as SVG."""
  # The text stays text, and the ids do not change from run to run.
  matplotlib.rcParams.update({'svg.fonttype': 'none', 'svg.hashsalt': 'reproductions'})
  figure, axes = plt.subplots(figsize=(5.6, 3.2))
  for colour, (name, (x, y)) in zip(COLOURS, curves.items(), strict=False):
    style = dict(marker='o', markersize=3) if len(x) <= 24 else dict(linewidth=1.2)
    axes.plot(x, y, label=name, color=colour, **style)
  axes.set_title(f'{title} (first seed)', fontsize=10)
  axes.grid(alpha=0.25)
  axes.spines[['top', 'right']].set_visible(False)
  if len(curves) > 1:
    axes.legend(fontsize=8, frameon=False)
  image = io.StringIO()
  figure.savefig(image, format='svg', bbox_inches='tight', metadata={'Date': None})
  plt.close(figure)
  files.write_text(path, image.getvalue())
