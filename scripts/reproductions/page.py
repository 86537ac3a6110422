"""Writes the page of the reproductions, with a plot of each claim that has curves."""

import io

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt

from rlhf_jax import files

HEAD = """# Claims of the field, in small

Each claim is measured in a world small enough for a CPU; a claim holds if the mean over its seeds
is in the band of every measure. Bands are fixed beforehand, from the papers and from a pilot.

```sh
python scripts/reproduce.py --claims=all --runs=WORKDIR,… --output=docs/results/reproductions.json
python scripts/reproduce.py --output=docs/results/reproductions.json --page=docs/reproductions.md
```

"""
COLOURS = ('#1f5fa8', '#c2571a', '#2f7d4f', '#7a4fa3')


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
    verdict = 'not run' if row is None else 'yes' if row['holds'] else '**no**'
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
    f'`--claims={claim.id}`, seeds {seeds}, {row["seconds"]:.0f} s of CPU.\n\n',
    '| measure | band | mean | of the seeds | |\n| --- | --- | --- | --- | --- |\n',
  ]
  for name in (*claim.bands, *claim.reported):
    values = ', '.join(f'{own[name]:.4g}' for own in row['values'])
    band, verdict = '–', ''
    if name in claim.bands:
      band = str(claim.bands[name])
      verdict = 'in' if row['in_band'][name] else '**out**'
    parts.append(f'| {name} | {band} | {row["means"][name]:.4g} | {values} | {verdict} |\n')
  if claim.note:
    parts.append(f'\n{claim.note}\n')
  for title, curves in row['curves'].items():
    name = f'reproduction_{claim.id.lower()}.svg'
    draw(path.parent / 'pictures' / name, title, curves)
    parts.append(f'\n![{claim.id}: {title}](pictures/{name})\n')
  return parts


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
