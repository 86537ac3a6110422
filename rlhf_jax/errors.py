"""The exceptions for mistakes of users."""

from collections.abc import Sequence


class UserError(ValueError):
  """A mistake that the user can correct.

  Its message is one line that names the place of the mistake, such as a key of
  the config. Commands print it without a traceback.
  """


class UserErrors(UserError):
  """Several mistakes that were found together; commands print a line for each."""

  def __init__(self, messages: Sequence[str]):
    self.messages = list(messages)
    super().__init__('; '.join(self.messages))
