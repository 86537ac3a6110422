"""Judges and scorers that are language models: they read the probabilities of the next words.

A judge prefers the first response with probability

  P(A) / (P(A) + P(B))  after the prompt  "… Options: (A) … (B) … The answer is: ("

These are the soft labels of Bai et al. 2022b (arXiv:2212.08073), §4.1. With
`thought` the model writes a chain of thought first, as in that paper, and
probabilities are clipped to `clamp`. A scorer grades one response: the expected
grade under the probabilities of the grades (direct RLAIF, Lee et al. 2023,
arXiv:2309.00267, §2.3).

Shape letters: N questions, B questions of a batch, P tokens of a prompt, O
options, F options that share all tokens but the last one, M those shared
tokens, V vocabulary, D width of the model.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from rlhf_jax.data import batches, encode
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import judging
from rlhf_jax.generation import responses as generation
from rlhf_jax.generation import sampler
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.models import heads
from rlhf_jax.models.transformer import Model
from rlhf_jax.options import Count, Natural, Numbers, Shares
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
  options: tuple = ('A', 'B')  # the names of the first and the second response
  close: str = ')'  # follows the option in few-shot examples
  # Use the chat template: `template` is the user's message and `ending` begins the response.
  chat: bool = False
  examples: Natural = 0  # how many of the constitution's examples are shown before the question
  thought: Natural = 0  # tokens of a chain of thought before the ending; 0 = none
  think: str = "Let's think step by step:"  # begins the chain of thought
  clamp: Shares = (0.4, 0.6)  # if thought > 0, probabilities are clipped to this range
  batch_size: Count = 32  # comparisons read at once, over all devices
  max_length: Count = 512  # tokens; a longer comparison gets no verdict

  def unread(self) -> dict[str, str]:
    """Returns the settings that are not read with these values, and why."""
    return {} if self.thought else dict.fromkeys(('think', 'clamp'), 'thought is 0')


@dataclasses.dataclass(frozen=True)
class ScorerOptions:
  """How a language model grades a response."""

  template: str = (
    'Rate the answer from 1 (worst) to 9 (best).\n\n{conversation}\n\nAssistant: {response}\n\n'
  )
  ending: str = 'Rating: '  # the grade follows it directly
  options: tuple = ('1', '2', '3', '4', '5', '6', '7', '8', '9')  # texts of the grades
  # The value of each grade.
  grades: Numbers = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)
  # Use the chat template: `template` is the user's message and `ending` begins the response.
  chat: bool = False
  batch_size: Count = 32  # responses read at once, over all devices
  max_length: Count = 512  # tokens; a longer question gets the lowest grade


# Prompt lengths are rounded up to multiples of this, so that few programs are compiled.
_BUCKET = 64

# A few-shot example: (comparison, which response is better, 0 or 1), or a text.
Example = tuple[judging.Comparison, int] | str
# read(params, prompts) → log P(option | prompt), [N, O] float64.
OptionReader = Callable[[Params, Sequence[list[int]]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """An opened language model, from which judges and scorers are built."""

  model: Model
  params: Params  # sharded over the mesh of the layout
  tokenizer: Tokenizer
  layout: Layout


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
    examples: few-shot examples, shown before every question.

  Raises:
    UserError: an option is invalid, or the batch size does not divide over the
      devices.
  """
  if len(options.options) != 2 or len(options.clamp) != 2:
    raise UserError(
      'judge: expected two options and two numbers to clamp to, got'
      f' {options.options} and {options.clamp}'
    )
  if options.chat and any(isinstance(example, str) for example in examples):
    raise UserError(
      'judge.examples: expected 0 with chat=True:'
      ' examples of chains of thought are texts, which cannot be put into a chat template'
    )
  read_options = build_option_reader(model, tokenizer, layout, options)
  think = None
  if options.thought:
    think = _build_thought_sampler(model, params, tokenizer, layout, options)
  texts, turns = _format_examples(options, examples)
  paragraphs = [*texts, *(question + answer for question, answer in turns)]
  few_shot = ''.join(f'{paragraph}\n\n' for paragraph in paragraphs)

  def build_prompt(question: str, beginning: str) -> list[int]:
    if options.chat:
      return _chat_prompt(tokenizer, turns, question, beginning)
    return _text_prompt(tokenizer, few_shot + question + beginning)

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
      # After its own reasoning a model is almost certain of either answer. NaN stays NaN.
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
    grade(conversations, responses) → [N] float32, the expected grades; the
    lowest grade for a response with which the prompt would exceed `max_length`.

  Raises:
    UserError: an option is invalid, or the batch size does not divide over the
      devices.
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
    # NaN: the prompt is too long. The lowest grade teaches a policy to be shorter.
    return np.where(np.isnan(grades), values.min(), grades).astype(np.float32)

  return grade


def build_option_reader(
  model: Model,
  tokenizer: Tokenizer,
  layout: Layout,
  options: JudgeOptions | ScorerOptions,
) -> OptionReader:
  """Builds a function that computes the log-probability of each option as the next words.

  Args:
    model: the definition of the model.
    tokenizer: the tokenizer that the model was trained with.
    layout: the mesh and its rules.
    options: of which `options` (texts of one or more tokens), `batch_size` and
      `max_length` are used.

  Returns:
    read(params, prompts: N lists of token ids) → [N, O] float64, log P(option |
    prompt) in nats; NaN where a prompt is longer than `max_length`.

  Raises:
    UserError: two options are equal, one is empty, or the batch size does not
      divide over the devices.
  """
  option_ids = [tokenizer.encode(option) for option in options.options]
  if not all(option_ids) or len(set(map(tuple, option_ids))) < len(option_ids):
    raise UserError(f'options: expected non-empty, different texts, got {list(options.options)}')
  if options.batch_size % layout.batch_shards:
    raise UserError(
      f'judge: a batch of {options.batch_size} does not divide over the'
      f' {layout.batch_shards} device(s) of the mesh axes data, fsdp and expert'
    )
  logprobs = jax.jit(functools.partial(last_token_logprobs, model))
  groups = _group_by_beginning(option_ids)

  def read(params: Params, prompts: Sequence[list[int]]) -> np.ndarray:
    result = np.full((len(prompts), len(option_ids)), np.nan)
    # Prompts that are too long are not read, so that the bar may end early.
    progress = tqdm.tqdm(
      total=len(prompts), desc='judge', unit='comparison', leave=False, disable=None
    )
    for width, examples in _group_by_length(prompts, options.max_length, tokenizer.pad_id):
      del width  # each width compiles a program of its own
      for batch in batches.prompts_once(examples, options.batch_size):
        placed = layout.place(batch)
        is_real = batch.index >= 0  # the last batch is padded with empty rows
        for beginning, columns, last_ids in groups:
          values = hosts.to_host(logprobs(params, placed, beginning, last_ids))
          rows = np.asarray(batch.index)[is_real]
          result[np.ix_(rows, np.asarray(columns))] = values[is_real]
        progress.update(int(is_real.sum()))
    progress.close()
    return result

  return read


def last_token_logprobs(
  model: Model,
  params: Params,
  prompts: Prompts,
  beginning: jax.Array,
  last_ids: jax.Array,
) -> jax.Array:
  """Computes log P(option | prompt) of options that differ only in their last token.

  Args:
    model: the definition of the model.
    params: its parameters.
    prompts: tokens [B, P] int32 and mask [B, P] bool, left-padded.
    beginning: [M] int32, the tokens that the options share: all but the last
      one.
    last_ids: [F] int32, the last token of each option.

  Returns:
    [B, F] float32, in nats: the log-probability of the whole option.
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
    # The position before each token of the beginning predicts it.
    predicting = hidden[:, P - 1 : -1]  # [B, M, D]
    targets = tokens[:, P:]
    beginning_logprobs, _ = heads.token_logprobs(model, params, predicting, targets)
  logits = heads.next_token_logits(model, params, hidden[:, -1])  # [B, V]
  next_logprobs = jax.nn.log_softmax(logits)
  return jnp.sum(beginning_logprobs, axis=1, keepdims=True) + next_logprobs[:, last_ids]


def _group_by_beginning(
  option_ids: Sequence[list[int]],
) -> list[tuple[np.ndarray, list[int], np.ndarray]]:
  """Groups options that share all tokens but the last, so that one forward pass reads a group.

  Args:
    option_ids: the token ids of each option.

  Returns:
    For each group: the shared beginning [M] int32, the indices of its options,
    and their last tokens [F] int32.
  """
  groups = []
  for beginning in sorted({tuple(ids[:-1]) for ids in option_ids}):
    indices = []
    for index, ids in enumerate(option_ids):
      if tuple(ids[:-1]) == beginning:
        indices.append(index)
    last_ids = np.array([option_ids[index][-1] for index in indices], np.int32)
    groups.append((np.array(beginning, np.int32), indices, last_ids))
  return groups


def _group_by_length(
  prompts: Sequence[list[int]], max_length: int, pad_id: int
) -> list[tuple[int, list[dict[str, Any]]]]:
  """Groups prompts by padded length, and pads them on the left; longer ones are left out.

  Args:
    prompts: lists of token ids.
    max_length: the longest prompt that is read, in tokens.
    pad_id: the token that pads.

  Returns:
    (padded length, left-padded examples), in ascending order of length; an
    example's `index` is its prompt's place in `prompts`.
  """
  buckets: dict[int, list[dict[str, Any]]] = {}
  for index, prompt in enumerate(prompts):
    if len(prompt) <= max_length:
      width = -(-len(prompt) // _BUCKET) * _BUCKET
      example = encode.left_padded(prompt, width, pad_id, index)
      buckets.setdefault(width, []).append(example)
  return sorted(buckets.items())


def _build_thought_sampler(
  model: Model,
  params: Params,
  tokenizer: Tokenizer,
  layout: Layout,
  options: JudgeOptions,
) -> Callable[[list[list[int]]], list[str]]:
  """Builds a function that generates a chain of thought for each prompt, greedily.

  Returns:
    think(prompts: N lists of token ids) → N texts, cut before `options.ending`;
    '' where the prompt and the thought together would reach `max_length`.
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
      jax.random.key(0),  # not used, as sampling is greedy
    )
    for number, texts in zip(fitting, completed.texts, strict=True):
      thoughts[number] = texts[0].split(options.ending)[0].strip()
    return thoughts

  return think


def _format_examples(
  options: JudgeOptions, examples: Sequence[Example]
) -> tuple[list[str], list[tuple[str, str]]]:
  """Returns the examples that are texts, and the others as (question, answer)."""
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
  """Returns the token ids of a plain text that the model is to continue."""
  start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  return start + tokenizer.encode(text)


def _chat_prompt(
  tokenizer: Tokenizer,
  turns: Sequence[tuple[str, str]],
  question: str,
  beginning: str,
) -> list[int]:
  """Returns the token ids of a conversation, up to and including the beginning of a response.

  Args:
    tokenizer: the model's, with its chat template.
    turns: (question, answer) of the few-shot examples, which come first.
    question: the last user message.
    beginning: the beginning of the response to it.
  """
  messages = []
  for user, assistant in turns:
    messages.append(dict(role='user', content=user))
    messages.append(dict(role='assistant', content=assistant))
  messages.append(dict(role='user', content=question))
  return tokenizer.begun(messages, beginning)
