"""Entry point of `python -m rlhf_jax.report`; the command is in commands/report.py."""

import sys

from rlhf_jax.commands.report import main

if __name__ == '__main__':
  sys.exit(main())
