"""The registry of judges: how a config names each kind, and how it is opened.

  http://… or https://…     endpoint   a server with the chat-completions protocol
  reward:NAME               reward     a reward model that runs here, named as `init` names it
  module:function(…)        function   a Python function
  anything else             model      a language model that runs here, named as `init` names it

To add a kind, add one row to JUDGE_KINDS and one function that opens it.
"""

from collections.abc import Callable, Sequence
import dataclasses
from pathlib import Path

import jax
from jax.experimental import multihost_utils
import numpy as np

from rlhf_jax.feedback import (
  endpoint,
  function_judge,
  judging,
  language_judge,
)
from rlhf_jax.feedback.http_requests import is_address
from rlhf_jax.named_functions import is_function_name

# (N conversations, a response to each) → scores [N] float32
ScoreTexts = Callable[[Sequence[list[dict]], Sequence[str]], np.ndarray]

_REWARD_PREFIX = 'reward:'


@dataclasses.dataclass(frozen=True)
class JudgeResources:
  """What a stage provides to open its judges; each kind uses what it needs."""

  judge: language_judge.JudgeOptions  # how language models compare
  endpoint: endpoint.EndpointOptions  # how servers are asked
  cache: Path  # the file in which answers of servers are kept
  # Opens the language model of a name; called for judges of the kind 'model' only.
  open_language_model: Callable[[str], language_judge.LanguageModel]
  examples: Sequence[language_judge.Example] = ()  # few-shot examples for language models
  # Opens the reward model of a name; called for judges of the kind 'reward' only.
  open_reward_model: Callable[[str], ScoreTexts] | None = None


@dataclasses.dataclass(frozen=True)
class JudgeKind:
  """One kind of judge."""

  name: str
  matches: Callable[[str], bool]  # whether a name in a config is of this kind
  open: Callable[[str, JudgeResources], judging.Judge]
  on_device: bool  # whether its parameters are on the devices, so that plans must count them
  one_process: bool  # whether only the first process asks it and broadcasts the answers


def judge_kind(name: str) -> str:
  """Returns the kind of judge that a name refers to, such as 'endpoint' or 'model'."""
  return find_judge_kind(name).name


def find_judge_kind(name: str) -> JudgeKind:
  """Returns the first row of JUDGE_KINDS that matches a name."""
  return next(kind for kind in JUDGE_KINDS if kind.matches(name))


def model_name(name: str) -> str:
  """Returns the name of the model of a judge that runs here, as `init` names it."""
  return name.removeprefix(_REWARD_PREFIX)


def open_judge(name: str, resources: JudgeResources) -> judging.Judge:
  """Opens a judge by its name; every process of a run must call it.

  Args:
    name: as in a config, see the head of this module.
    resources: what judges are opened with.

  Raises:
    UserError: there is no such judge, or its options are invalid.
  """
  kind = find_judge_kind(name)
  judge = kind.open(name, resources)
  if kind.one_process and jax.process_count() > 1:
    return _broadcast_from_first(judge)
  return judge


def _is_model(name: str) -> bool:
  return True  # any name that no row above matches


def _is_reward(name: str) -> bool:
  return name.startswith(_REWARD_PREFIX)


def _open_endpoint(name: str, resources: JudgeResources) -> judging.Judge:
  return endpoint.build_endpoint_judge(name, resources.endpoint, resources.cache)


def _open_function(name: str, resources: JudgeResources) -> judging.Judge:
  return function_judge.build_function_judge(name)


def _open_model(name: str, resources: JudgeResources) -> judging.Judge:
  reader = resources.open_language_model(name)
  return language_judge.build_judge(
    reader.model,
    reader.params,
    reader.tokenizer,
    reader.layout,
    resources.judge,
    resources.examples,
  )


def _open_reward(name: str, resources: JudgeResources) -> judging.Judge:
  assert resources.open_reward_model is not None  # a stage that has judges provides it
  score = resources.open_reward_model(model_name(name))

  def judge(comparisons: Sequence[judging.Comparison]) -> judging.Judgements:
    messages = [comparison.messages for comparison in comparisons]
    first = [comparison.first for comparison in comparisons]
    second = [comparison.second for comparison in comparisons]
    values = np.asarray(score(2 * messages, first + second), np.float64)
    margins = values[: len(first)] - values[len(first) :]
    # Bradley–Terry: P(first is better) = σ(r_first − r_second).
    return judging.Judgements(0.5 + 0.5 * np.tanh(0.5 * margins), [''] * len(comparisons))

  return judge


JUDGE_KINDS = (  # a name is of the first kind that matches it
  JudgeKind(
    name='endpoint',
    matches=is_address,
    open=_open_endpoint,
    on_device=False,
    one_process=True,  # its answers cost money, and its cache is one file
  ),
  JudgeKind(
    name='reward',
    matches=_is_reward,
    open=_open_reward,
    on_device=True,
    one_process=False,  # its parameters are sharded over all processes
  ),
  JudgeKind(
    name='function',
    matches=is_function_name,
    open=_open_function,
    on_device=False,
    one_process=True,  # it may be random, but all processes need the same answers
  ),
  JudgeKind(
    name='model',
    matches=_is_model,
    open=_open_model,
    on_device=True,
    one_process=False,  # its parameters are sharded over all processes
  ),
)


def _broadcast_from_first(judge: judging.Judge) -> judging.Judge:
  """Builds a judge that only the first process asks, and that broadcasts the probabilities.

  Rationales are not broadcast, as only the first process writes labels.
  """

  def ask(
    comparisons: Sequence[judging.Comparison],
  ) -> judging.Judgements:
    count = len(comparisons)
    judgements = judging.Judgements(np.zeros(count), [''] * count)
    if jax.process_index() == 0:
      judgements = judge(comparisons)
    # JAX disables float64 by default, so all processes use the values rounded to float32.
    broadcast = multihost_utils.broadcast_one_to_all(judgements.probabilities.astype(np.float32))
    return dataclasses.replace(judgements, probabilities=np.asarray(broadcast, float))

  return ask
