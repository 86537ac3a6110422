"""The exception for a request that the server refuses, with the message for the person."""


class Refused(Exception):
  """Raised when a request is refused: nothing was changed, and the page shows the reason.

  Attributes:
    status: HTTP status, such as 422 for an answer whose ranks are not a valid
      ordering.
    message: the reason, as a plain sentence that the person reads.
  """

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status
    self.message = message
