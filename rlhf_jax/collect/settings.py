"""Settings of a collection, which the lead writes into `collect.toml` of the workdir."""

import dataclasses
import difflib
from pathlib import Path
import tomllib
from typing import Annotated, Any

from rlhf_jax import options
from rlhf_jax.errors import UserError
from rlhf_jax.options import Count, Natural, NonNegative, Range, Share, ShareBelowOne

FILE = 'collect.toml'
GUIDELINES = 'guidelines.md'
CONSENT = 'consent.md'


@dataclasses.dataclass(frozen=True)
class Settings:
  """The settings that apply to all items and people of a workdir."""

  title: str = 'Feedback'  # heading of every page
  contact: str = ''  # whom people can ask; shown on the consent page

  # Assignment.
  people_per_item: Count = 3  # judgements that an item needs, unless its record says otherwise
  lease_minutes: Annotated[float, Range(least=0.01)] = (
    30.0  # an item that is not answered in this time goes to somebody else
  )
  minimum_seconds: NonNegative = 0.0  # an answer that takes less time is refused
  answers_each: Natural = (
    0  # after this many answers a person is done and sees the code; 0 = no limit
  )
  training_items: Natural = 0  # items with a known answer that come first, with an explanation
  qualification: Share = 0.0  # share of the training's ordered pairs that a person must get right
  gold_every: Natural = 0  # one item in so many is an unmarked control question; 0 = none
  # `refit` closes an item whose ranking has at least this confidence; 0 = it closes none.
  stop_confidence: ShareBelowOne = 0.0

  # Ranking.
  axes: tuple[str, ...] = ('overall',)  # people give one order for each, such as helpful, honest
  partial_from: Annotated[int, Range(least=3)] = (
    6  # with this many responses or more, top-k and best–worst are offered
  )
  strength: bool = True  # for two responses, ask how much better the better one is
  reason_length: Natural = 0  # smallest number of characters of a reason; 0 = a reason is optional

  # Writing.
  response_length: Natural = 1  # smallest number of characters of a demonstration or an edit
  longest_text: Count = 20_000  # largest number of characters of any text

  # Conversations with a model.
  converse_turns: Count = 3  # turns after which a conversation is complete
  converse_responses: Annotated[int, Range(least=2, most=9)] = (
    2  # K, the number of replies to each message
  )
  red_team: bool = False  # people are asked to make the model misbehave

  # Crowd platforms.
  completion_code: str = ''  # shown to a person who is done
  completion_url: str = ''  # address to which the person returns; {code} stands for the code

  # The server.
  requests_per_minute: Count = 240  # of one person; further requests are refused
  largest_body: Annotated[int, Range(least=4096)] = 262_144  # largest number of bytes of a request
  tokenizer: str = ''  # a Hugging Face directory, to count tokens; '' = count characters


def read_settings(workdir: Path) -> Settings:
  """Reads the settings of a workdir; settings that its file leaves out have their defaults.

  Args:
    workdir: the folder of the collection, whose `collect.toml` may be absent.

  Raises:
    UserError: the file is not TOML, or has an unknown key, a value of a wrong
      type or a value out of its range.
  """
  path = workdir / FILE
  if not path.exists():
    return Settings()
  try:
    values = tomllib.loads(path.read_text('utf-8'))
  except (OSError, ValueError) as error:
    raise UserError(f'{path}: cannot read: {error}') from None
  return parse_settings(values, str(path))


def parse_settings(values: dict[str, Any], where: str) -> Settings:
  """Makes settings from the keys and values of a parsed file.

  Args:
    values: key → value.
    where: the name of the file in error messages.

  Raises:
    UserError: a key is unknown, or a value has a wrong type or is out of its
      range.
  """
  known = {field.name: field for field in dataclasses.fields(Settings)}
  checked: dict[str, Any] = {}
  for name, value in values.items():
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1)
      hint = f'; did you mean {near[0]}?' if near else ''
      raise UserError(f'{where}: unknown setting {name!r}{hint}')
    checked[name] = _check_type(name, value, known[name].default, where)
  settings = Settings(**checked)
  _check_ranges(settings, where)
  return settings


def _check_type(name: str, value: Any, default: Any, where: str) -> Any:
  """Checks that a value has the type of its setting's default, and returns it in that type."""
  if isinstance(default, tuple) and isinstance(value, list):
    if all(isinstance(item, str) for item in value):
      return tuple(value)
  elif isinstance(default, float) and type(value) is int:  # not bool, which is a subclass of int
    return float(value)
  elif type(value) is type(default):
    return value
  expected = 'a list of texts' if isinstance(default, tuple) else type(default).__name__
  raise UserError(f'{where}: {name}: expected {expected}, got {value!r}')


def _check_ranges(settings: Settings, where: str) -> None:
  """Refuses values that are out of their range."""
  for mistake in options.find_out_of_range(settings):
    raise UserError(f'{where}: {mistake}')
  if not settings.axes or len(set(settings.axes)) < len(settings.axes):
    raise UserError(f'{where}: axes: expected different names, got {list(settings.axes)}')
  for axis in settings.axes:
    if not axis.isidentifier():
      raise UserError(f'{where}: axes: expected names of letters, digits and _, got {axis!r}')
