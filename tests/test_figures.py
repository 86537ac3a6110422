"""Figures in the README and docs are those of the results files."""

from pathlib import Path
import subprocess
import sys

ROOT = Path(__file__).parents[1]


def test_pages_have_the_figures_of_the_results_files():
  command = [sys.executable, 'scripts/fill_figures.py', '--check']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
