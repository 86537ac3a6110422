"""The error that users see."""


class UserError(ValueError):
  """A mistake that the user can correct.

  Its message is one line that names the place, such as the key of the config.
  Commands print it without a traceback.
  """
