"""Entry point of `python -m rlhf_jax.generate`; the command is in commands/generate.py."""

import sys

from rlhf_jax.commands.generate import main

if __name__ == '__main__':
  sys.exit(main())
