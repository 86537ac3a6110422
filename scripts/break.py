"""Tries malformed and damaged inputs, and counts what the user would see of each.

  python scripts/break.py --out=runs/break.md
  python scripts/break.py --part=20           # every 20th input, as the tests do
  python scripts/break.py --disk=30           # full disks, for which root may mount a small one

An input is to end in one clear line that names its place, and exit code 2. The exit code of this
script is 1 if one ended in a traceback, hung, or was read although it is wrong, or if more than one
in a hundred ended in a line that names no place. Every input has a limit of time and of memory.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
import os
from pathlib import Path
import sys
import tempfile
import time

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'scripts')]
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # its threads would not survive a fork

from breaking import commands, disk, models, pool, programs, texts  # noqa: E402
from breaking.cases import Case  # noqa: E402

HEADINGS = {
  'clear': 'one clear line',
  'read': 'read, rightly',
  'vague': 'vague line',
  'traceback': 'traceback',
  'hang': 'hang',
  'accepted': 'wrongly accepted',
}
VAGUE = 0.01  # of the inputs at most


def main() -> int:
  """Runs the cases and prints the table; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--part', type=int, default=1, help='run every PARTth case of a group only')
  parser.add_argument('--only', default='', help='run the cases whose group has this in its name')
  parser.add_argument('--workers', type=int, default=2, help='processes at once')
  parser.add_argument('--disk', type=int, default=0, help='how many full disks are tried')
  parser.add_argument('--out', type=Path, help='a file for the table')
  parser.add_argument('--minutes', type=float, default=15, help='no further case is begun then')
  parser.add_argument('--base', type=Path, help='a folder that keeps the trained workdir')
  options = parser.parse_args()
  began = time.monotonic()
  with tempfile.TemporaryDirectory(prefix='break-base-') as name:
    base = options.base or Path(name)
    cases = list(list_cases(base, options))
    results = pool.run_cases(cases, options.workers, options.minutes, show)
    if options.disk:
      for case, result in disk.fill_disks(base, options.disk):
        cases.append(case)
        results.append(result)
        print(f'{result[0]:9} {case.group}: {case.name}: {result[1][:300]}', flush=True)
  tried = [number for number, (verdict, _) in enumerate(results) if verdict]
  if len(tried) < len(cases):
    print(f'the time was over: {len(cases) - len(tried)} inputs were not tried')
  cases = [cases[number] for number in tried]
  results = [results[number] for number in tried]
  text = format_table(cases, results, time.monotonic() - began)
  print(text)
  if options.out:
    options.out.write_text(text, encoding='utf-8')
  return judge(results)


def show(case: Case, verdict: str, said: str) -> None:
  """Prints a case that ended in no clear line."""
  if verdict not in ('clear', 'read'):
    print(f'{verdict:9} {case.group}: {case.name}\n          {said[:300]}', flush=True)


def list_cases(base: Path, options: argparse.Namespace) -> Iterator[Case]:
  """Yields the cases that the options choose; makes what they need first."""
  groups = {
    'JSON Lines': texts.record_cases,
    "commands' lines": texts.line_cases,
    'constitutions': texts.constitution_cases,
    'Hugging Face': models.hugging_face_cases,
    'tokenizer and template': models.tokenizer_cases,
    'GGUF': models.gguf_cases,
    'PEFT': models.adapter_cases,
    'endpoint and cache': programs.endpoint_cases,
    'reward programs': programs.reward_cases,
    'experiments, overrides': commands.experiment_cases,
    'config values': commands.value_cases,
    'numbers': lambda: commands.number_cases(base),
    'CLI words': lambda: commands.word_cases(base),
    'small files': lambda: commands.small_file_cases(base),
  }
  chosen = {name: make for name, make in groups.items() if options.only in name}
  if options.only == 'disk':
    chosen = {}
  if {'CLI words', 'small files'} & {*chosen} and options.part == 1 or options.disk:
    commands.make_base(base)
  elif options.part > 1:  # these two need a trained workdir
    chosen.pop('small files', None)
    chosen.pop('CLI words', None)
    chosen.pop('numbers', None)
  if {'tokenizer and template', "commands' lines"} & {*chosen}:
    models.tokenizer()  # before the workers are forked, so that they need not train it
  for make in chosen.values():
    yield from list(make())[options.part // 2 :: options.part]


def format_table(cases: Sequence[Case], results: Sequence[tuple[str, str]], seconds: float) -> str:
  """Formats the counts of every group as a table in Markdown."""
  counts: dict[str, Counter[str]] = {}
  for case, (verdict, _) in zip(cases, results, strict=True):
    counts.setdefault(case.group, Counter())[verdict] += 1
  counts['all'] = sum(counts.values(), Counter())
  lines = [
    '| inputs | tried | ' + ' | '.join(HEADINGS.values()) + ' |',
    '| --- |' + ' --- |' * (len(HEADINGS) + 1),
  ]
  for group, row in counts.items():
    cells = [str(row[verdict]) for verdict in HEADINGS]
    lines.append(f'| {group} | {row.total()} | ' + ' | '.join(cells) + ' |')
  return '\n'.join([*lines, '', f'{seconds:.0f} s']) + '\n'


def judge(results: Sequence[tuple[str, str]]) -> int:
  """Returns the exit code."""
  counts = Counter(verdict for verdict, _ in results)
  bad = counts['traceback'] + counts['hang'] + counts['accepted']
  return int(bad > 0 or counts['vague'] > VAGUE * len(results))


if __name__ == '__main__':
  sys.exit(main())
