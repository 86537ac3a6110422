"""Entry point of `python -m rlhf_jax.chat`; the command is in commands/chat.py."""

import sys

from rlhf_jax.commands.chat import main

if __name__ == '__main__':
  sys.exit(main())
