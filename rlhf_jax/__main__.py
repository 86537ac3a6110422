"""Entry point of `python -m rlhf_jax`; the command is in commands/train.py."""

import sys

from rlhf_jax.commands.train import main

if __name__ == '__main__':
  sys.exit(main())
