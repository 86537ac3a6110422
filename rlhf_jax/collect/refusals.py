"""The answer to a request that is not carried out."""


class Refused(Exception):
  """A request that changes nothing; the person reads why.

  Attributes:
    status: of HTTP, such as 422 for an answer that is no ordering.
    message: a plain sentence.
  """

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status
    self.message = message
