r"""Reproduces claims of the field in small, and says which hold.

  python scripts/reproduce.py --config=experiments/reproductions/r4_best_of_n.py
  python scripts/reproduce.py --config=experiments/reproductions/r6_data.py:gpu \
      --config.settings.doublings=4 --output=here.json
  python scripts/reproduce.py --claims=R1,R9 --output=reproductions.json
  python scripts/reproduce.py --claims=all --output=docs/results/reproductions.json
  python scripts/reproduce.py --output=docs/results/reproductions.json \
      --page=docs/reproductions.md
  python scripts/reproduce.py --trace --config=experiments/reproductions/r5_rl.py:gpu

Every claim is a config of experiments/reproductions, which --config names; --claims
names the same by their numbers. Overrides change every config that is measured. A claim
is in if the mean over its seeds is in the band of every measure. Without a config
nothing is measured, and the table is made of what --output already has. --page writes
the page with its plots. --trace measures nothing either: it says whether the programs of
a size fit together (reproductions/tracing.py).
"""

import argparse
import dataclasses
import json
from pathlib import Path
import sys
import time

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / 'scripts'))

import numpy as np
from reproductions import claims, documents, enumerable, evaluator, page, sequences, tracing

from rlhf_jax import files
from rlhf_jax.errors import UserError
from rlhf_jax.text_table import format_rows

# Id of a claim → (settings, seed or run) → Measured.
MEASURES = {
  **enumerable.MEASURES,
  **sequences.MEASURES,
  **documents.MEASURES,
  **evaluator.MEASURES,
}


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', action='append', default=[], metavar='FILE', help='of a claim')
  parser.add_argument('--claims', default='', help='such as R1,R9; all; empty = none')
  parser.add_argument(
    '--runs', default='', help="the finished runs of R8, in place of its config's"
  )
  parser.add_argument('--output', type=Path, default=Path('reproductions.json'))
  parser.add_argument('--trace', action='store_true', help='only trace the programs')
  parser.add_argument('--page', type=Path, help='also write the page with its plots')
  options, rest = parser.parse_known_args()
  for word in rest:
    if not word.startswith('--config.'):
      parser.error(f'unknown argument {word}')
  overrides = tuple(word.removeprefix('--config.') for word in rest)
  try:
    known = {claim.id: claim for claim in map(claims.load_claim, claims.list_configs())}
    chosen = choose(options, known, overrides)
    if options.trace:
      for claim in chosen:
        print(f'{claim.id}: {trace(claim)}', flush=True)
      return 0
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    for claim in chosen:
      results[claim.id] = measure(claim)
      files.write_text(options.output, json.dumps(results, indent=1) + '\n')
  except UserError as error:
    parser.error(str(error))
  shown = {**known, **{claim.id: claim for claim in chosen}}
  print(format_rows(list_rows(shown, results)))
  print(f'{sum(row["seconds"] for row in results.values()):.0f} s of CPU')
  missing = [name for name in known if name not in results]
  if missing:
    print(f'not run: {", ".join(missing)}')
  if options.page:
    page.write(options.page, list(known.values()), results)  # beside what the files say
  return 0


def choose(options, known, overrides):
  """Returns the claims that --config and --claims name, with the overrides."""
  paths = [*options.config]
  names = [*known] if options.claims == 'all' else [*filter(None, options.claims.split(','))]
  for name in names:
    if name not in known:
      raise UserError(f'--claims: no claim {name!r}; there are {", ".join(known)}')
    paths.append(str(ROOT / known[name].config))
  if overrides and not paths:
    raise UserError('--config.KEY=VALUE: expected a config or a claim that it changes')
  chosen = [claims.load_claim(path, overrides) for path in paths]
  runs = tuple(filter(None, options.runs.split(',')))
  if not runs:
    return chosen
  return [
    dataclasses.replace(claim, settings={**claim.settings, 'runs': runs})
    if 'runs' in claim.settings
    else claim
    for claim in chosen
  ]


def measure(claim):
  """Measures a claim with each of its seeds, or on each of its runs."""
  cases = claim.settings.get('runs', claim.seeds)
  started = time.process_time()
  seeds = []
  curves = {}
  for case in cases:
    measured = MEASURES[claim.id](claim.settings, case)
    seeds.append(measured.values)
    curves = curves or measured.curves  # those of the first seed are drawn
    print(f'{claim.id}, {case}: {format_values(measured.values)}', flush=True)
  means = {name: float(np.mean([values[name] for values in seeds])) for name in seeds[0]}
  in_band = {name: band.holds(means[name]) for name, band in claim.bands.items()}
  return {
    'config': claim.config,
    # Not where the runs of R8 lie, which says nothing elsewhere.
    'settings': {name: value for name, value in claim.settings.items() if name != 'runs'},
    'seeds': [Path(str(case)).name for case in cases],
    'values': seeds,
    'means': means,
    'in_band': in_band,
    'holds': all(in_band.values()),
    'curves': curves,
    'seconds': time.process_time() - started,
  }


def trace(claim):
  """Traces a claim with its first seed; returns what was traced, in words."""
  if 'runs' in claim.settings:
    return 'reads finished runs: nothing to trace'
  settings = tracing.lower_counts(claim.settings)
  with tracing.tracing_only() as traced, np.errstate(all='ignore'):
    MEASURES[claim.id](settings, claim.seeds[0])
  return f'{traced.programs} programs traced, up to {traced.elements:,} numbers returned'


def format_values(values):
  return ', '.join(f'{name} {value:.4g}' for name, value in values.items())


def list_rows(known, results):
  """Returns the table: claim, source, measure, band, measured, in or out."""
  rows = [['claim', 'measure', 'band', 'measured', 'seeds', '', 'source']]
  for name, claim in known.items():
    row = results.get(name)
    if row is None:
      continue
    for measure_name, band in claim.bands.items():
      values = [own[measure_name] for own in row['values']]
      spread = f'{row["means"][measure_name]:.4g} ({min(values):.4g} … {max(values):.4g})'
      verdict = 'in' if row['in_band'][measure_name] else 'OUT'
      count = str(len(values))
      rows.append([name, measure_name, str(band), spread, count, verdict, claim.source])
  return rows


if __name__ == '__main__':
  sys.exit(main())
