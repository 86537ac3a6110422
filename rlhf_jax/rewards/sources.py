"""The registry of reward sources: what a config's name for a reward refers to.

  http://… or https://…    server     a server that scores texts
  scorer:MODEL             scorer     a language model that grades (direct RLAIF)
  module:function(…)       function   a Python function of texts
  anything else            model      a reward model, named as `init` names models

Only this module interprets these names; stages and plans ask the RewardSource. To
add a kind, add one row to REWARD_KINDS and one function that opens it.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import language_judge
from rlhf_jax.feedback.http_requests import is_address
from rlhf_jax.feedback.language_judge import (
  LanguageModel,
  ScorerOptions,
)
from rlhf_jax.named_functions import is_function_name
from rlhf_jax.rewards import functions, server
from rlhf_jax.rewards.functions import RewardFunctionOptions, Score
from rlhf_jax.rewards.server import ServerOptions


@dataclasses.dataclass(frozen=True)
class RewardSourceOptions:
  """The options of all kinds of reward sources; the options of a stage inherit them."""

  reward_functions: RewardFunctionOptions = RewardFunctionOptions()
  scorer: ScorerOptions = ScorerOptions()
  reward_server: ServerOptions = ServerOptions()

  def unread_without(self, names: Sequence[str]) -> dict[str, str]:
    """Returns the settings of kinds of sources that no reward of these names has, and why."""
    kinds = {parse_reward_source(name).kind.name for name in names}
    settings = {'function': 'reward_functions', 'scorer': 'scorer', 'server': 'reward_server'}
    return {
      setting: f'no reward is a {kind}' for kind, setting in settings.items() if kind not in kinds
    }


# Opens the language model of a name and puts its parameters onto the devices.
LanguageModelOpener = Callable[[str], LanguageModel]


@dataclasses.dataclass(frozen=True)
class RewardKind:
  """One kind of reward source."""

  name: str
  matches: Callable[[str], bool]  # whether a name in a config is of this kind
  # Opens a source that scores texts. None for reward models: they score tokens on
  # the devices, and stages open them themselves.
  open: Callable[[str, RewardSourceOptions, LanguageModelOpener], Score] | None
  # Whether its parameters are on the devices, so that plans must count them.
  on_device: bool = False
  head: bool = False  # whether its model has a scalar head
  prefix: str = ''  # of its names in a config; the name of the model follows
  per_process: bool = False  # whether each process scores its own share of the texts


@dataclasses.dataclass(frozen=True)
class RewardSource:
  """A reward: its name in a config, and its kind."""

  name: str
  kind: RewardKind

  @property
  def on_device(self) -> bool:
    """Whether it holds a model's parameters on the devices."""
    return self.kind.on_device

  @property
  def head(self) -> bool:
    """Whether its model has a scalar head, as reward models have."""
    return self.kind.head

  @property
  def scores_texts(self) -> bool:
    """Whether it scores texts, so that tokens must be decoded first."""
    return self.kind.open is not None

  @property
  def model_name(self) -> str | None:
    """The name of the model that it uses, as `init` takes it; None if it uses none."""
    if not self.on_device:
      return None
    return self.name.removeprefix(self.kind.prefix)


def parse_reward_source(name: str) -> RewardSource:
  """Returns the reward source that a name in a config refers to."""
  kind = next(kind for kind in REWARD_KINDS if kind.matches(name))
  return RewardSource(name, kind)


def open_reward_source(
  source: RewardSource,
  options: RewardSourceOptions,
  open_language_model: LanguageModelOpener,
) -> Score:
  """Opens a source that scores texts; every process of a run must call it.

  Args:
    source: from `parse_reward_source`.
    options: the options of all kinds.
    open_language_model: opens a model by its name, where the source uses one.

  Returns:
    score(conversations, responses, records) → (values [N] float32, the number of failed
    responses). All processes must call it with the same texts; all get the same values.

  Raises:
    UserError: there is no such source, its options are invalid, or it is a reward model.
  """
  if source.kind.open is None:
    raise UserError(f'reward {source.name!r}: expected a source that scores texts, got a model')
  score = source.kind.open(source.name, options, open_language_model)
  if source.kind.per_process and jax.process_count() > 1:
    return share_between_processes(score)
  return score


def check_reward_source(source: RewardSource, options: RewardSourceOptions) -> None:
  """Checks that a function or a server could be opened, without starting anything.

  Other sources need a model, whose shape the plan of the stage checks.

  Args:
    source: from `parse_reward_source`.
    options: the options of all kinds.

  Raises:
    UserError: there is no such function, or its options are invalid.
  """
  if source.model_name is not None or source.kind.open is None:
    return
  in_process = dataclasses.replace(options.reward_functions, workers=0)
  options = dataclasses.replace(options, reward_functions=in_process)
  source.kind.open(source.name, options, _no_language_model)


def _no_language_model(name: str) -> LanguageModel:
  raise AssertionError(f'{name}: a source without a model asks for one')


def share_between_processes(score: Score) -> Score:
  """Builds a scoring function that divides the texts between the processes.

  Process i of n scores the texts with the indices i, i + n, …; then all processes
  gather all values.
  """

  def shared(
    conversations: Sequence[list[dict]],
    responses: Sequence[str],
    records: Sequence[Any],
  ) -> tuple[np.ndarray, int]:
    own = slice(jax.process_index(), None, jax.process_count())  # the texts of this process
    # The last element counts the failures. What other processes score is 0 here,
    # so that the sum over the processes has all values.
    values = np.zeros(len(responses) + 1, np.float32)
    values[:-1][own], values[-1] = score(conversations[own], responses[own], records[own])
    values = multihost_utils.process_allgather(values).sum(axis=0)
    return values[:-1], int(values[-1])

  return shared


_SCORER_PREFIX = 'scorer:'


def _is_scorer(name: str) -> bool:
  return name.startswith(_SCORER_PREFIX)


def _is_model(name: str) -> bool:
  return True  # any name that no row above matches


def _open_server(
  name: str,
  options: RewardSourceOptions,
  open_language_model: LanguageModelOpener,
) -> Score:
  return server.build_server_reward(name, options.reward_server)


def _open_function(
  name: str,
  options: RewardSourceOptions,
  open_language_model: LanguageModelOpener,
) -> Score:
  return functions.build_reward_function(name, options.reward_functions)


def _open_scorer(
  name: str,
  options: RewardSourceOptions,
  open_language_model: LanguageModelOpener,
) -> Score:
  reader = open_language_model(name.removeprefix(_SCORER_PREFIX))
  grade = language_judge.build_scorer(
    reader.model,
    reader.params,
    reader.tokenizer,
    reader.layout,
    options.scorer,
  )

  def score(
    conversations: Sequence[list[dict]],
    responses: Sequence[str],
    records: Sequence[Any],
  ) -> tuple[np.ndarray, int]:
    # A response that is too long gets the lowest grade; it does not count as failed.
    return grade(conversations, responses), 0

  return score


REWARD_KINDS = (  # a name is of the first kind that matches it
  RewardKind(
    name='server',
    matches=is_address,
    open=_open_server,
    per_process=True,
  ),
  RewardKind(
    name='scorer',
    matches=_is_scorer,
    open=_open_scorer,
    on_device=True,
    prefix=_SCORER_PREFIX,
  ),
  RewardKind(
    name='function',
    matches=is_function_name,
    open=_open_function,
    per_process=True,
  ),
  RewardKind(
    name='model',
    matches=_is_model,
    open=None,
    on_device=True,
    head=True,
  ),
)
