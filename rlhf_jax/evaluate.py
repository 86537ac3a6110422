"""Entry point of `python -m rlhf_jax.evaluate`; the command is in commands/evaluate.py."""

import sys

from rlhf_jax.commands.evaluate import main

if __name__ == '__main__':
  sys.exit(main())
