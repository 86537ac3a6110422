"""The error that users see."""


class UserError(Exception):
  """Something that the user can mend; its message is one line that names the place."""
