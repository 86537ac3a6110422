"""Entry point of `python -m rlhf_jax.score`; the command is in commands/score.py."""

import sys

from rlhf_jax.commands.score import main

if __name__ == '__main__':
  sys.exit(main())
