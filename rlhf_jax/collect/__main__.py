"""Entry point of `python -m rlhf_jax.collect`; the command is in commands/collect.py."""

import sys

from rlhf_jax.commands.collect import main

if __name__ == '__main__':
  sys.exit(main())
