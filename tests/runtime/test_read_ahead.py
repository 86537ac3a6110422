from rlhf_jax.runtime.read_ahead import ReadAhead


class Numbers:
  """1, 2, … up to `end`; `asked` counts how often it told its position."""

  def __init__(self, end=10**9):
    self.number = 0
    self.end = end
    self.asked = 0

  def __next__(self):
    if self.number >= self.end:
      raise StopIteration
    self.number += 1
    return self.number

  def get_state(self):
    self.asked += 1
    return {'number': self.number}

  def set_state(self, state):
    self.number = state['number']


def test_positions_are_those_of_what_was_taken():
  numbers = Numbers()
  data = ReadAhead(numbers)
  assert [data.take(), data.take()] == [1, 2]
  data.read()
  data.read()  # one ahead at most
  assert numbers.number == 3
  assert data.position() == {'number': 2}
  assert [data.take(), data.take()] == [3, 4]
  data.read()
  data.step_back()  # 4 is given back, 5 was never taken
  assert data.position() == {'number': 3} and data.take() == 4
  assert numbers.asked == 3  # at the start, and where a position was wanted


def test_data_that_ends_is_told_when_it_is_wanted():
  data = ReadAhead(Numbers(end=1))
  assert data.take() == 1
  data.read()
  assert data.position() == {'number': 1}
  try:
    data.take()
  except StopIteration:
    return
  raise AssertionError('there was a second number')
