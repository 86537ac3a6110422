"""The one exception a user's mistake raises: shown as a single line, never as a traceback."""


class UserError(ValueError):
  """Bad input of any kind (config, data, checkpoint, mesh). The message names the place and what was expected."""
