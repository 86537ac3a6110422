"""Judges the responses of a stage's evaluations as the final table does, where it takes no model.

The judge is `config.evaluation.judge`: TinyWorld's oracle, a Python function or a server.
A reward model would need memory that no plan of the stage counts, so that it judges in
the final table only; and a stage's own reward is kept as the score already.
"""

from collections.abc import Callable, Mapping, Sequence
import itertools
import json
import logging
from typing import Any

import numpy as np

from rlhf_jax import options as options_lib
from rlhf_jax.data import sources
from rlhf_jax.data.records import conversation, Prompt
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import oracle_judge
from rlhf_jax.rewards import sources as reward_sources
from rlhf_jax.rewards.sources import RewardSourceOptions
from rlhf_jax.stages.shared.context import Context

ORACLE = 'oracle'  # the name of TinyWorld's oracle, as a judge
_TINYWORLD = 'tinyworld'

# N lists of S responses → measure → [N, S] float; {} where nobody judges
Judge = Callable[[Sequence[Sequence[str]]], Mapping[str, np.ndarray]]


def open_judge(
  context: Context, prompts: Sequence[Prompt], data: DataOptions, rewards: Sequence[str] = ()
) -> Judge:
  """Opens the judge of the responses to some prompts.

  Args:
    context: the context of the stage.
    prompts: N prompts; those of demonstrations and rankings have no `meta`.
    data: where the prompts are from.
    rewards: the stage's rewards, which need no second verdict.

  Returns:
    The judge. All processes must call it with the same responses.

  Raises:
    UserError: there is no such function.
  """
  section = context.config.evaluation
  if not prompts:
    return _judge_nothing
  # In TinyWorld the truth is known, whoever judges the final table.
  if section.judge == ORACLE or data.source == _TINYWORLD:
    return _open_oracle(context, prompts, data)
  source = reward_sources.parse_reward_source(section.judge)
  is_here = source.scores_texts and not source.on_device
  if not is_here or section.judge in rewards or not len(section.models):
    return _judge_nothing  # without a table nobody chose the judge
  options = options_lib.from_section(RewardSourceOptions, section)
  score = reward_sources.open_reward_source(source, options, _open_no_model)
  conversations = [conversation(prompt) for prompt in prompts]

  def judge(texts: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    count = len(texts[0]) if texts else 0  # S
    try:
      values, _ = score(
        [asked for asked in conversations for _ in range(count)],
        [*itertools.chain.from_iterable(texts)],
        [prompt for prompt in prompts for _ in range(count)],
      )
    except UserError as error:  # the loss of the same evaluation must not be lost with it
      logging.warning('evaluation.judge: the responses are kept without verdicts: %s', error)
      return {}
    return {'utility': np.asarray(values, np.float64).reshape(len(texts), count)}

  return judge


def _open_oracle(context: Context, prompts: Sequence[Prompt], data: DataOptions) -> Judge:
  """Opens the oracle; it judges only where it knows what every prompt asks for."""
  known = [*prompts]
  if not all(map(oracle_judge.knows, known)):
    # Rankings that annotators made are about the prompts of the world, too.
    section = context.config.evaluation
    table = options_lib.from_section(DataOptions, section.data)
    source = data if data.source == _TINYWORLD else table
    has_table = len(section.models) > 0  # else its data is nobody's choice
    if source.source != _TINYWORLD or not (has_table or source is data):
      return _judge_nothing
    world = DataOptions(seed=source.seed, people=source.people)
    asked = {_key(row): row for row in sources.load_records(world, 'prompt', 'validation')}
    known = [asked.get(_key(prompt), prompt) for prompt in known]
    if not all(map(oracle_judge.knows, known)):
      return _judge_nothing

  def judge(texts: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    return oracle_judge.judge_with_oracle(known, texts)

  return judge


def _key(prompt: Prompt) -> str:
  """Returns what two records of the same conversation have in common."""
  return json.dumps(conversation(prompt), sort_keys=True)


def _judge_nothing(texts: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
  del texts
  return {}


def _open_no_model(name: str) -> Any:
  raise AssertionError(f'{name}: a judge that uses a model is not opened here')


def as_prompt(record: Any) -> Prompt:
  """Returns the conversation of a demonstration or a ranking as a prompt."""
  return Prompt(
    id=record.id,
    source=record.source,
    license=record.license,
    messages=conversation(record),
    meta={},
    tools=record.tools,
  )
