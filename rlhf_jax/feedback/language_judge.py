"""A language model of ours as judge: how probable each option is as the next words.

  P(A) / (P(A) + P(B))  after  "… Options: (A) … (B) … The answer is: ("

This is §4.1 of Bai et al. 2022b (arXiv:2212.08073) with soft labels; with `thought`
it is their chain of thought, whose probabilities are clamped to `clamp`. As a scorer
(direct RLAIF, Lee et al. 2023, arXiv:2309.00267, §2.3) it grades one response: the
mean of the grades' values under their probabilities.

Letters: N questions, B of them in a batch, P tokens of a prompt, M tokens of an
option but its last, O options, F options that are read at once, V vocabulary.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import batches, encode
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import judging
from rlhf_jax.generation import responses as generation
from rlhf_jax.generation import sampler
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.models import heads
from rlhf_jax.models.transformer import Model
from rlhf_jax.runtime import hosts
from rlhf_jax.runtime.mesh import Layout
from rlhf_jax.types import Params, Prompts


@dataclasses.dataclass(frozen=True)
class JudgeOptions:
  """How a language model compares two responses."""

  template: str = (
    'Consider the following conversation between a human and an assistant:\n\n'
    '{conversation}\n\n{principle}\nOptions:\n(A) {first}\n(B) {second}\n'
  )
  ending: str = 'The answer is: ('  # the option follows it directly
  options: tuple = (
    'A',
    'B',
  )  # what stands for the first and the second response
  close: str = ')'  # follows the option in examples
  chat: bool = False  # the template as a user's message, the ending begins the response
  examples: int = 0  # how many of the constitution's to show before the question
  thought: int = 0  # tokens of a chain of thought before the ending; 0 = none
  think: str = "Let's think step by step:"  # begins the chain of thought
  clamp: tuple = (
    0.4,
    0.6,
  )  # bounds of a probability after a chain of thought
  batch_size: int = 32  # comparisons read at once, over all devices
  max_length: int = 512  # tokens; a longer comparison gets no verdict


@dataclasses.dataclass(frozen=True)
class ScorerOptions:
  """How a language model grades a response."""

  template: str = (
    'Rate the answer from 1 (worst) to 9 (best).\n\n{conversation}\n\nAssistant: {response}\n\n'
  )
  ending: str = 'Rating: '  # the grade follows it directly
  options: tuple = ('1', '2', '3', '4', '5', '6', '7', '8', '9')  # texts of the grades
  grades: tuple = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)  # their values
  chat: bool = False  # the template as a user's message, the ending begins the response
  batch_size: int = 32  # responses read at once, over all devices
  max_length: int = 512  # tokens; a longer question gets the lowest grade


# Lengths are rounded up to multiples of this, so that few programs are compiled.
_BUCKET = 64

# A comparison with which response is better (0 or 1), or a whole example as text.
Example = tuple[judging.Comparison, int] | str
# read(params, prompts) → log P(option | prompt), [N, O] float64.
OptionReader = Callable[[Params, Sequence[list[int]]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """A language model that is ready to read: what judges and scorers are built from."""

  model: Model
  params: Params
  tokenizer: Tokenizer
  layout: Layout  # where the parameters lie


def build_judge(
  model: Model,
  params: Params,
  tokenizer: Tokenizer,
  layout: Layout,
  options: JudgeOptions,
  examples: Sequence[Example] = (),
) -> judging.Judge:
  """Builds a judge that is a language model.

  Args:
    model: the definition of the model.
    params: its parameters, sharded as `layout` says.
    tokenizer: the tokenizer that the model was trained with.
    layout: the mesh and its rules.
    options: how it compares.
    examples: shown before every question.

  Raises:
    UserError: the options are wrong by themselves, or do not fit the mesh.
  """
  if len(options.options) != 2 or len(options.clamp) != 2:
    raise UserError('judge: expected two options and two numbers to clamp to')
  if options.chat and any(isinstance(example, str) for example in examples):
    raise UserError(
      'judge.examples: expected 0 with chat=True:'
      ' examples of thoughts are texts, which no chat template has'
    )
  read_options = build_option_reader(model, tokenizer, layout, options)
  think = None
  if options.thought:
    think = _build_thinker(model, params, tokenizer, layout, options)
  texts, turns = _format_examples(options, examples)
  paragraphs = [*texts, *(question + answer for question, answer in turns)]
  shown = ''.join(f'{paragraph}\n\n' for paragraph in paragraphs)

  def build_prompt(question: str, beginning: str) -> list[int]:
    if options.chat:
      return _chat_prompt(tokenizer, turns, question, beginning)
    return _text_prompt(tokenizer, shown + question + beginning)

  def judge(
    comparisons: Sequence[judging.Comparison],
  ) -> judging.Judgements:
    questions = []
    for comparison in comparisons:
      questions.append(judging.fill_template(options.template, comparison))
    thoughts = [''] * len(questions)
    beginnings = [options.ending] * len(questions)
    if think is not None:
      thoughts = think([build_prompt(text, options.think) for text in questions])
      beginnings = [f'{options.think} {thought}\n{options.ending}' for thought in thoughts]
    prompts = []
    for question, beginning in zip(questions, beginnings, strict=True):
      prompts.append(build_prompt(question, beginning))
    logprobs = read_options(params, prompts)  # [N, 2]
    probabilities = 1 / (1 + np.exp(logprobs[:, 1] - logprobs[:, 0]))
    if options.thought:
      # After its own reasoning a model is sure of anything. NaN stays NaN.
      probabilities = np.clip(probabilities, *options.clamp)
    return judging.Judgements(probabilities, thoughts)

  return judge


def build_scorer(
  model: Model,
  params: Params,
  tokenizer: Tokenizer,
  layout: Layout,
  options: ScorerOptions,
) -> Callable[[Sequence[list[dict]], Sequence[str]], np.ndarray]:
  """Builds a function that grades responses by a language model.

  Args:
    model: the definition of the model.
    params: its parameters, sharded as `layout` says.
    tokenizer: the tokenizer that the model was trained with.
    layout: the mesh and its rules.
    options: how it grades.

  Returns:
    grade(conversations, responses) → [N] float32, the expected value of the grades;
    the lowest one for a response that is too long to read.

  Raises:
    UserError: the options are wrong by themselves, or do not fit the mesh.
  """
  if len(options.options) != len(options.grades):
    raise UserError(
      f'scorer.grades: expected {len(options.options)} numbers, one for each'
      f' option, got {len(options.grades)}'
    )
  read_options = build_option_reader(model, tokenizer, layout, options)
  values = np.asarray(options.grades, float)

  def grade(conversations: Sequence[list[dict]], responses: Sequence[str]) -> np.ndarray:
    prompts = []
    for messages, response in zip(conversations, responses, strict=True):
      question = options.template.format(
        conversation=judging.format_transcript(messages),
        question=messages[-1]['content'],
        response=response,
      )
      if options.chat:
        prompts.append(_chat_prompt(tokenizer, (), question, options.ending))
      else:
        prompts.append(_text_prompt(tokenizer, question + options.ending))
    logprobs = read_options(params, prompts)  # [N, O]
    weights = np.exp(logprobs - logprobs.max(axis=1, keepdims=True))
    grades = (weights * values).sum(axis=1) / weights.sum(axis=1)
    # NaN: too long to read. The lowest grade teaches a policy to be shorter.
    return np.where(np.isnan(grades), values.min(), grades).astype(np.float32)

  return grade


def build_option_reader(
  model: Model,
  tokenizer: Tokenizer,
  layout: Layout,
  options: JudgeOptions | ScorerOptions,
) -> OptionReader:
  """Builds a function that reads how probable each option is as the next words.

  Args:
    model: the definition of the model.
    tokenizer: the tokenizer that the model was trained with.
    layout: the mesh and its rules.
    options: its `options` are texts of one or several tokens; also its `batch_size`
      and `max_length`.

  Returns:
    read(params, prompts: N lists of tokens) → [N, O] float64, log P(option | prompt)
    in nats; NaN where a prompt is longer than `max_length`.

  Raises:
    UserError: two options are equal or one is empty, or batches do not divide over
      the devices.
  """
  option_ids = [tokenizer.encode(option) for option in options.options]
  if not all(option_ids) or len(set(map(tuple, option_ids))) < len(option_ids):
    raise UserError(f'options: expected different texts, got {list(options.options)}')
  if options.batch_size % layout.batch_shards:
    raise UserError(
      f'judge: a batch of {options.batch_size} does not divide over the'
      f' {layout.batch_shards} device(s) of the mesh axes data, fsdp and expert'
    )
  logprobs = jax.jit(functools.partial(last_token_logprobs, model))
  groups = _group_by_beginning(option_ids)

  def read(params: Params, prompts: Sequence[list[int]]) -> np.ndarray:
    result = np.full((len(prompts), len(option_ids)), np.nan)
    for width, examples in _bucketed(prompts, options.max_length, tokenizer.pad_id):
      del width  # each width compiles a program of its own
      for batch in batches.prompts_once(examples, options.batch_size):
        placed = layout.place(batch)
        is_real = batch.index >= 0  # the last batch is filled up
        for beginning, places, last_ids in groups:
          values = hosts.to_host(logprobs(params, placed, beginning, last_ids))
          rows = np.asarray(batch.index)[is_real]
          result[np.ix_(rows, np.asarray(places))] = values[is_real]
    return result

  return read


def last_token_logprobs(
  model: Model,
  params: Params,
  prompts: Prompts,
  beginning: jax.Array,
  last_ids: jax.Array,
) -> jax.Array:
  """Computes log P(option | prompt) of options that differ in their last token only.

  Args:
    model: the definition of the model.
    params: its parameters.
    prompts: tokens and mask [B, P], left-padded.
    beginning: [M] int32, the tokens that all these options begin with.
    last_ids: [F] int32, the last token of each option.

  Returns:
    [B, F] float32 nats, of the beginning and the last token together.
  """
  B, P = prompts.tokens.shape
  M = len(beginning)
  beginnings = jnp.broadcast_to(beginning, (B, M)).astype(jnp.int32)
  tokens = jnp.concatenate([prompts.tokens, beginnings], axis=1)  # [B, P + M]
  mask = jnp.concatenate([prompts.mask, jnp.ones((B, M), bool)], axis=1)
  positions = sampler.prompt_positions(mask)
  segment_ids = mask.astype(jnp.int32)
  hidden, _ = model.apply(params, tokens, positions, segment_ids)  # [B, P + M, D]
  beginning_logprobs = jnp.zeros((B, 1))
  if M:
    before = hidden[:, P - 1 : -1]  # what predicts each token of the beginning
    targets = tokens[:, P:]
    beginning_logprobs, _ = heads.token_logprobs(model, params, before, targets)
  logits = heads.next_token_logits(model, params, hidden[:, -1])  # [B, V]
  next_token = jax.nn.log_softmax(logits)
  return jnp.sum(beginning_logprobs, axis=1, keepdims=True) + next_token[:, last_ids]


def _group_by_beginning(
  option_ids: Sequence[list[int]],
) -> list[tuple[np.ndarray, list[int], np.ndarray]]:
  """Groups options that share all tokens but the last: one forward reads a group.

  Returns:
    Of each group the beginning [M] int32, the places of its options among all, and
    their last tokens [F] int32.
  """
  groups = []
  for beginning in sorted({tuple(ids[:-1]) for ids in option_ids}):
    places = []
    for place, ids in enumerate(option_ids):
      if tuple(ids[:-1]) == beginning:
        places.append(place)
    last_ids = np.array([option_ids[place][-1] for place in places], np.int32)
    groups.append((np.array(beginning, np.int32), places, last_ids))
  return groups


def _bucketed(
  prompts: Sequence[list[int]], max_length: int, pad_id: int
) -> list[tuple[int, list[dict[str, Any]]]]:
  """Sorts prompts into buckets of like length, left-padded; those too long fall out.

  Returns:
    (width, examples with their place as `index`), by width.
  """
  buckets: dict[int, list[dict[str, Any]]] = {}
  for index, prompt in enumerate(prompts):
    if len(prompt) <= max_length:
      width = -(-len(prompt) // _BUCKET) * _BUCKET
      example = encode.left_padded(prompt, width, pad_id, index)
      buckets.setdefault(width, []).append(example)
  return sorted(buckets.items())


def _build_thinker(
  model: Model,
  params: Params,
  tokenizer: Tokenizer,
  layout: Layout,
  options: JudgeOptions,
) -> Callable[[list[list[int]]], list[str]]:
  """Builds a function that lets the model reason before it judges.

  Returns:
    think(prompts: N lists of tokens) → N texts, up to the ending; '' where the
    prompt leaves no room for a thought.
  """
  greedy = SamplingOptions(max_new_tokens=options.thought, temperature=0.0)
  respond = generation.build_responder(model, greedy, tokenizer, layout)

  def think(prompts: list[list[int]]) -> list[str]:
    thoughts = [''] * len(prompts)
    fitting = []
    for number, tokens in enumerate(prompts):
      if len(tokens) + options.thought < options.max_length:
        fitting.append(number)
    if not fitting:
      return thoughts
    completed = generation.complete_prompts(
      respond,
      params,
      [prompts[number] for number in fitting],
      options.batch_size,
      tokenizer.pad_id,
      jax.random.key(0),  # greedy: nothing is drawn
    )
    for number, texts in zip(fitting, completed.texts, strict=True):
      thoughts[number] = texts[0].split(options.ending)[0].strip()
    return thoughts

  return think


def _format_examples(
  options: JudgeOptions, examples: Sequence[Example]
) -> tuple[list[str], list[tuple[str, str]]]:
  """Returns the examples that are texts, and (question, answer) of the others."""
  texts = []
  turns = []
  for example in examples:
    if isinstance(example, str):
      texts.append(example)
    else:
      comparison, better = example
      question = judging.fill_template(options.template, comparison)
      answer = options.ending + options.options[better] + options.close
      turns.append((question, answer))
  return texts, turns


def _text_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
  """Returns the tokens of a plain text that the model is to continue."""
  start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  return start + tokenizer.encode(text)


def _chat_prompt(
  tokenizer: Tokenizer,
  turns: Sequence[tuple[str, str]],
  question: str,
  beginning: str,
) -> list[int]:
  """Returns the tokens of a conversation whose last response is begun.

  Args:
    tokenizer: of the model; it has the chat template.
    turns: (question, answer) that stand before.
    question: the last user message.
    beginning: how the response to it begins.
  """
  messages = []
  for user, assistant in turns:
    messages.append(dict(role='user', content=user))
    messages.append(dict(role='assistant', content=assistant))
  messages.append(dict(role='user', content=question))
  response = tokenizer.encode(tokenizer.response_prefix + beginning)
  return tokenizer.prompt(messages) + response
