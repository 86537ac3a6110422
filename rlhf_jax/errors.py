"""The exception for mistakes of users."""


class UserError(ValueError):
  """A mistake that the user can correct.

  Its message is one line that names the place of the mistake, such as a key of the config.
  Commands print it without a traceback.
  """
