"""Entry point of `python -m rlhf_jax.compare`; the command is in commands/compare.py."""

import sys

from rlhf_jax.commands.compare import main

if __name__ == '__main__':
  sys.exit(main())
