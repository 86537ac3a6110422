"""Reward sources: where a score comes from, by its name in a config.

  http://… or https://…    server     a server that scores texts
  scorer:MODEL             scorer     a language model that grades (direct RLAIF)
  module:function(…)       function   a Python function on texts
  anything else            model      a reward model: a stage, a folder, a directory

What a name means is decided here, once; stages and plans ask the RewardSource. A
new kind is one row of REWARD_KINDS and one function that opens it.
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
  """What the kinds of reward sources can be told; a stage's options inherit it."""

  reward_functions: RewardFunctionOptions = RewardFunctionOptions()
  scorer: ScorerOptions = ScorerOptions()
  reward_server: ServerOptions = ServerOptions()


# Opens the language model of a name, its parameters on the devices.
LanguageModelOpener = Callable[[str], LanguageModel]


@dataclasses.dataclass(frozen=True)
class RewardKind:
  """One kind of reward source."""

  name: str
  matches: Callable[[str], bool]  # whether a name in a config is of this kind
  # Opens a source that scores texts. None: it scores tokens on the devices, and
  # stages open it as a reward model.
  open: Callable[[str, RewardSourceOptions, LanguageModelOpener], Score] | None
  on_device: bool = False  # whether it holds parameters on the devices: plans count them
  head: bool = False  # whether its model has a scalar head
  prefix: str = ''  # of its names, before that of the model that it reads
  per_process: bool = False  # whether each process scores its own share of the texts


@dataclasses.dataclass(frozen=True)
class RewardSource:
  """A reward by its name in a config, and its kind."""

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
    """The name of the model that it reads, as `init` takes it; None for others."""
    if not self.on_device:
      return None
    return self.name.removeprefix(self.kind.prefix)


def parse_reward_source(name: str) -> RewardSource:
  """Returns what a name in a config means, by the first row that matches it."""
  kind = next(kind for kind in REWARD_KINDS if kind.matches(name))
  return RewardSource(name, kind)


def open_reward_source(
  source: RewardSource,
  options: RewardSourceOptions,
  open_language_model: LanguageModelOpener,
) -> Score:
  """Opens a source that scores texts; every process of a run calls it.

  Args:
    source: of `parse_reward_source`.
    options: what each kind can be told.
    open_language_model: gives the model of a name, where the source reads one.

  Returns:
    score(conversations, responses, records) → (values [N] float32, how many
    responses failed). All processes call it with the same texts and get the same.

  Raises:
    UserError: there is no such source, or its options are wrong.
  """
  if source.kind.open is None:
    raise UserError(f'reward {source.name!r}: expected a source that scores texts, got a model')
  score = source.kind.open(source.name, options, open_language_model)
  if source.kind.per_process and jax.process_count() > 1:
    return share_between_processes(score)
  return score


def share_between_processes(score: Score) -> Score:
  """Builds a score for which each process scores its share of the texts.

  Process i of n scores the texts at places i, i + n, …; all are told all values.
  """

  def shared(
    conversations: Sequence[list[dict]],
    responses: Sequence[str],
    records: Sequence[Any],
  ) -> tuple[np.ndarray, int]:
    here = slice(jax.process_index(), None, jax.process_count())
    # The last place holds the number of failures. Elsewhere 0, so that sums gather.
    values = np.zeros(len(responses) + 1, np.float32)
    values[:-1][here], values[-1] = score(conversations[here], responses[here], records[here])
    values = multihost_utils.process_allgather(values).sum(axis=0)
    return values[:-1], int(values[-1])

  return shared


_SCORER_PREFIX = 'scorer:'


def _is_scorer(name: str) -> bool:
  return name.startswith(_SCORER_PREFIX)


def _is_model(name: str) -> bool:
  return True  # whatever no other kind matches


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
    return grade(conversations, responses), 0  # too long is graded, not failed

  return score


REWARD_KINDS = (  # the first row that matches a name is its kind
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
