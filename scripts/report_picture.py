"""Takes the picture of a report that the README shows: its headline and its first table.

  python scripts/report_picture.py runs/quickstart docs/quickstart.png

Needs Debian's chromium, and the extra `browser`.
"""

import argparse
from pathlib import Path
import shutil
import sys
import tempfile

from rlhf_jax.report import page as pages
from rlhf_jax.report import run_files

WIDTH = 1220  # pixels
MARGIN = 12  # below the table


def main() -> int:
  """Takes the picture; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('workdir', type=Path, help='of a finished run')
  parser.add_argument('picture', type=Path, help='the PNG file to write')
  options = parser.parse_args()
  from playwright import sync_api  # here, so that --help needs no extra

  text = pages.render_run(run_files.read_run(options.workdir))
  with tempfile.TemporaryDirectory() as folder, sync_api.sync_playwright() as engine:
    path = Path(folder) / 'report.html'
    path.write_text(text, encoding='utf-8')
    program = shutil.which('chromium')
    browser = engine.chromium.launch(executable_path=program, args=['--no-sandbox'])
    page = browser.new_page(viewport={'width': WIDTH, 'height': 900})
    page.goto(f'file://{path}')
    table = page.query_selector('#table .scroll')
    box = table.bounding_box() if table else None
    if box is None:
      print(f'{options.workdir}: its report has no table', file=sys.stderr)
      return 2
    height = box['y'] + box['height'] + MARGIN
    clip = {'x': 0, 'y': 0, 'width': WIDTH, 'height': height}
    page.screenshot(path=options.picture, full_page=True, clip=clip)
    browser.close()
  return 0


if __name__ == '__main__':
  sys.exit(main())
