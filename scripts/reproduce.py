"""Reproduces claims of the field in small, and says which hold.

  python scripts/reproduce.py --claims=R1,R9 --seeds=3 --output=reproductions.json
  python scripts/reproduce.py --claims=R8 --runs=runs/seed0,runs/seed1,runs/seed2
  python scripts/reproduce.py --output=reproductions.json --page=docs/reproductions.md

Without --claims no claim is run, and the table is made of what --output already has. A
claim is in if the mean over its seeds is in the band of every measure. --page writes the
page with its plots. docs/reproductions.md says where the bands are from.
"""

import argparse
import json
from pathlib import Path
import sys
import time

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / 'scripts'))

import numpy as np
from reproductions import documents, enumerable, evaluator, page, sequences

from rlhf_jax import files
from rlhf_jax.text_table import format_rows

SEEDED = (
  *enumerable.CLAIMS,
  *sequences.CLAIMS,
  *documents.CLAIMS,
  *evaluator.CLAIMS,
)
CLAIMS = sorted((*SEEDED, *evaluator.FROM_RUNS), key=lambda claim: int(claim.id[1:]))


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--claims', default='', help='such as R1,R9; all; empty = none')
  parser.add_argument('--seeds', type=int, default=3, help='of each claim (default: %(default)s)')
  parser.add_argument('--runs', default='', help='finished workdirs of the quickstart, for R8')
  parser.add_argument('--output', type=Path, default=Path('reproductions.json'))
  parser.add_argument('--page', type=Path, help='also write the page with its plots')
  options = parser.parse_args()
  known = [claim.id for claim in CLAIMS]
  chosen = known if options.claims == 'all' else [*filter(None, options.claims.split(','))]
  for name in chosen:
    if name not in known:
      parser.error(f'--claims: no claim {name!r}; there are {", ".join(known)}')
  runs = [*filter(None, options.runs.split(','))]
  if 'R8' in chosen and not runs:
    parser.error('--claims: R8 reads finished runs; name them with --runs')
  results = json.loads(options.output.read_text()) if options.output.exists() else {}
  for claim in CLAIMS:
    if claim.id not in chosen:
      continue
    cases = runs if claim in evaluator.FROM_RUNS else [*range(options.seeds)]
    results[claim.id] = measure(claim, cases)
    files.write_text(options.output, json.dumps(results, indent=1) + '\n')
  print(format_rows(list_rows(results)))
  print(f'{sum(row["seconds"] for row in results.values()):.0f} s of CPU')
  missing = [name for name in known if name not in results]
  if missing:
    print(f'not run: {", ".join(missing)}')
  if options.page:
    page.write(options.page, CLAIMS, results)
  return 0


def measure(claim, cases):
  """Runs a claim with each seed, or on each run."""
  started = time.process_time()
  seeds = []
  curves = {}
  for case in cases:
    measured = claim.run(case)
    seeds.append(measured.values)
    curves = curves or measured.curves  # those of the first seed are drawn
    print(f'{claim.id}, {case}: {format_values(measured.values)}', flush=True)
  means = {name: float(np.mean([values[name] for values in seeds])) for name in seeds[0]}
  in_band = {name: band.holds(means[name]) for name, band in claim.bands.items()}
  return {
    'seeds': [Path(str(case)).name for case in cases],
    'values': seeds,
    'means': means,
    'in_band': in_band,
    'holds': all(in_band.values()),
    'curves': curves,
    'seconds': time.process_time() - started,
  }


def format_values(values):
  return ', '.join(f'{name} {value:.4g}' for name, value in values.items())


def list_rows(results):
  """Returns the table: claim, source, measure, band, measured, in or out."""
  rows = [['claim', 'measure', 'band', 'measured', 'seeds', '', 'source']]
  for claim in CLAIMS:
    row = results.get(claim.id)
    if row is None:
      continue
    for name, band in claim.bands.items():
      values = [own[name] for own in row['values']]
      spread = f'{row["means"][name]:.4g} ({min(values):.4g} … {max(values):.4g})'
      verdict = 'in' if row['in_band'][name] else 'OUT'
      count = str(len(values))
      rows.append([claim.id, name, str(band), spread, count, verdict, claim.source])
  return rows


if __name__ == '__main__':
  sys.exit(main())
