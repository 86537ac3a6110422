"""Entry point of `python -m rlhf_jax.plan`; the command is in commands/plan.py."""

import sys

from rlhf_jax.commands.plan import main

if __name__ == '__main__':
  sys.exit(main())
