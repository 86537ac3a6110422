"""Entry point of `python -m rlhf_jax`; the command itself is in commands/train.py."""

import sys

from rlhf_jax.commands.train import main

if __name__ == '__main__':
  sys.exit(main())
