"""Makes the data of SL-CAI: a model revises its own responses by written principles.

  prompt → response → `rounds` times: a principle drawn at random → critique →
  revision, which is the response of the next round

The revisions of every round, and unrevised responses to helpful prompts, become
demonstrations; the next stage fine-tunes a pre-trained model on them. Every round
is a file, so that an interrupted run goes on from the last complete one.

Source: Bai et al. 2022b, arXiv:2212.08073, §3.1.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
from typing import Any

import numpy as np

from rlhf_jax import fingerprints, json_lines, random_keys
from rlhf_jax.data import encode, records, sources
from rlhf_jax.data.records import Prompt
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import oracle_judge
from rlhf_jax.feedback import constitution, judging
from rlhf_jax.feedback.constitution import Constitution
from rlhf_jax.generation import responses
from rlhf_jax.generation.responses import Responses
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.options import Count, Natural
from rlhf_jax.planning.programs import StagePlan
from rlhf_jax.report import kept_responses
from rlhf_jax.runtime import hosts, metrics
from rlhf_jax.stages.shared import response_judge, response_plan, training
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.kind import DataUse, StageKind
from rlhf_jax.stages.shared.model_store import ModelStore
from rlhf_jax.types import Array

SPLITS = ('train', 'validation')
Row = dict[str, Any]  # a line of a round's file: {id, messages, response, …}
Message = dict[str, str]  # {role, content}


@dataclasses.dataclass(frozen=True)
class Options:
  """The section of a critique-and-revision stage."""

  model: str = 'sft'  # responds, criticises and revises; in the paper one that is helpful only
  rounds: Count = 4  # critiques and revisions, one after the other
  constitution: tuple[str, ...] = ('harmlessness',)  # files, or shipped ones by name
  examples: Natural = 0  # how many of the constitution's critiques stand before every request
  critique: str = '\n\nCritiqueRequest: {request}\n\nCritique:'  # behind the conversation
  revision: str = '\n\nRevisionRequest: {request}\n\nRevision:'  # behind the critique
  chat: bool = False  # requests are a user's messages in the model's chat template
  batch_size: Count = 64  # prompts at once, over all devices
  max_length: Count = 48  # tokens of a prompt at most
  # Tokens of a request with all before it; beyond it nothing is revised
  max_context: Count = 512
  judge: str = ''  # oracle: TinyWorld's oracle rates every round; '' = nobody
  data: DataOptions = DataOptions()  # prompts that tempt to do harm
  helpful: DataOptions = DataOptions()  # other prompts
  helpful_samples: Count = 2  # responses to each of them, as in the paper
  sampling: SamplingOptions = SamplingOptions()

  def unread(self) -> dict[str, str]:
    """Returns the settings that are not read with these values, and why."""
    return dict.fromkeys(('critique', 'revision'), 'chat is True') if self.chat else {}


# (token ids of prompts, key) → a response to each
Complete = Callable[[Sequence[Sequence[int]], Array], list[str]]


@dataclasses.dataclass(frozen=True)
class Critic:
  """The model that responds, criticises and revises, with its principles.

  Attributes:
    complete: its compiled sampler on texts.
    tokenizer: the tokenizer of the run.
    principles: the constitution.
    shown: the constitution's examples, a text that precedes every request.
    options: the section.
  """

  complete: Complete
  tokenizer: Tokenizer
  principles: Constitution
  shown: str
  options: Options


def run(context: Context) -> None:
  """Writes the rounds of each split; from them the transcripts and both splits of the data."""
  options = context.read_options(STAGE)
  training.check_batch(context, options.batch_size, 1)
  principles = constitution.load_constitution(options.constitution)
  principles.draw('critique', np.random.default_rng(0))  # fails if there are none
  check_options(options, context.where)
  prompts = {split: _fitting_prompts(context, options, options.data, split) for split in SPLITS}
  helpful = {split: _fitting_prompts(context, options, options.helpful, split) for split in SPLITS}
  critic = open_critic(context, options, principles)
  rounds = {}
  for split in SPLITS:
    rounds[split] = _run_rounds(context, critic, prompts[split], split)
    repeated = [prompt for prompt in helpful[split] for _ in range(options.helpful_samples)]
    make_helpful = functools.partial(respond, critic, repeated, _key(context, split, -1))
    others = _read_or_make(context, f'{split}-helpful', make_helpful)
    demonstrations = _demonstrations(rounds[split], others, options.helpful_samples)
    _write(context, split, list(demonstrations))
  _write(context, 'transcripts', transcripts(rounds['train']))
  _keep_rounds(context, options, prompts['validation'], rounds['validation'])
  if options.judge:
    _measure_rounds(context, options, prompts, rounds)


def check_options(options: Options, where: str) -> None:
  """Checks the options; raises UserError for values that do not fit."""
  if options.judge not in ('', 'oracle'):
    raise UserError(f"{where}.judge: expected oracle or '', got {options.judge!r}")
  if options.chat and options.examples:
    raise UserError(
      f"{where}.examples: expected 0 with chat=True: the constitution's examples are dialogues "
      'as text, which no chat template has'
    )


def open_critic(context: Context, options: Options, principles: Constitution) -> Critic:
  """Opens the section's model and compiles its sampler."""
  opened = ModelStore(context).open(options.model)
  tokenizer = context.tokenizer
  responder = responses.build_responder(opened.model, options.sampling, tokenizer, context.layout)
  params = opened.read()

  def complete(prompts: Sequence[Sequence[int]], key: Array) -> list[str]:
    completed = responses.complete_prompts(
      responder,
      params,
      prompts,
      options.batch_size,
      tokenizer.pad_id,
      key,
    )
    return [texts[0].strip() for texts in completed.texts]

  examples = principles.critique_examples[: options.examples]
  shown = ''.join(f'{example}\n\n' for example in examples)
  return Critic(complete, tokenizer, principles, shown, options)


def respond(critic: Critic, prompts: Sequence[Prompt], key: Array) -> list[Row]:
  """Responds to prompts.

  Args:
    critic: the model.
    prompts: the prompts.
    key: the key of the sampling.

  Returns:
    A row {id, messages, response} for each prompt.
  """
  conversations = [records.conversation(prompt) for prompt in prompts]
  tokens = [
    critic.tokenizer.prompt(messages, prompt.tools)
    for prompt, messages in zip(prompts, conversations, strict=True)
  ]
  texts = critic.complete(tokens, key)
  return [
    {'id': prompt.id, 'messages': messages, 'response': text}
    for prompt, messages, text in zip(prompts, conversations, texts, strict=True)
  ]


def revise(critic: Critic, rows: Sequence[Row], key: Array) -> list[Row]:
  """Criticises and revises the responses of rows, by a principle drawn for each.

  If a request is too long, or the revision is empty, the response stays unchanged.

  Args:
    critic: the model.
    rows: {id, messages, response, …}.
    key: the key of principles and sampling.

  Returns:
    Rows {id, messages, principle, critique_request, critique, revision_request,
    response}.
  """
  rng = random_keys.host_generator(random_keys.for_purpose(key, 'principles'))
  principles = [critic.principles.draw('critique', rng) for _ in rows]
  keys = [random_keys.for_purpose(key, use) for use in ('critiques', 'revisions')]
  requests = [principle.critique for principle in principles]
  revision_requests = [principle.revision for principle in principles]
  if critic.options.chat:
    critiques, revisions = _revise_as_chat(critic, rows, requests, revision_requests, keys)
  else:
    critiques, revisions = _revise_as_text(critic, rows, requests, revision_requests, keys)
  revised = []
  for row, principle, critique, revision in zip(
    rows, principles, critiques, revisions, strict=True
  ):
    revised.append(
      {
        'id': row['id'],
        'messages': row['messages'],
        'principle': principle.id,
        'critique_request': principle.critique,
        'critique': critique,
        'revision_request': principle.revision,
        'response': revision or row['response'],  # '' = no revision came
      }
    )
  return revised


def _revise_as_chat(
  critic: Critic,
  rows: Sequence[Row],
  requests: Sequence[str],
  revision_requests: Sequence[str],
  keys: Sequence[Array],
) -> tuple[list[str], list[str]]:
  """Asks for critiques and revisions as a user would, in the model's chat template."""
  conversations = [
    [*row['messages'], {'role': 'assistant', 'content': row['response']}] for row in rows
  ]
  critiques = _ask_in_chat(critic, conversations, requests, keys[0])
  criticised = []
  for messages, request, critique in zip(conversations, requests, critiques, strict=True):
    turn = [
      {'role': 'user', 'content': request},
      {'role': 'assistant', 'content': critique},
    ]
    criticised.append([*messages, *turn])
  return critiques, _ask_in_chat(critic, criticised, revision_requests, keys[1])


def _revise_as_text(
  critic: Critic,
  rows: Sequence[Row],
  requests: Sequence[str],
  revision_requests: Sequence[str],
  keys: Sequence[Array],
) -> tuple[list[str], list[str]]:
  """Asks for critiques and revisions in a transcript that the model continues."""
  options = critic.options
  transcript = [
    f'{judging.format_transcript(row["messages"])}\n\nAssistant: {row["response"]}' for row in rows
  ]
  critiques = _ask_in_text(critic, transcript, requests, options.critique, keys[0])
  criticised = []
  for text, request, critique in zip(transcript, requests, critiques, strict=True):
    criticised.append(f'{text}{options.critique.format(request=request)} {critique}')
  revisions = _ask_in_text(critic, criticised, revision_requests, options.revision, keys[1])
  return critiques, revisions


def _ask_in_chat(
  critic: Critic,
  conversations: Sequence[list[Message]],
  requests: Sequence[str],
  key: Array,
) -> list[str]:
  """Asks a request after each conversation; returns '' where the prompt is too long."""
  tokens = []
  for messages, request in zip(conversations, requests, strict=True):
    with_request = [*messages, {'role': 'user', 'content': request}]
    tokens.append(critic.tokenizer.prompt(with_request))
  return _complete_fitting(critic, tokens, key)


def _ask_in_text(
  critic: Critic,
  texts: Sequence[str],
  requests: Sequence[str],
  form: str,
  key: Array,
) -> list[str]:
  """Asks a request after each text; the continuation is cut at the first empty line."""
  tokenizer = critic.tokenizer
  start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  tokens = []
  for text, request in zip(texts, requests, strict=True):
    with_request = critic.shown + text + form.format(request=request)
    tokens.append(start + tokenizer.encode(with_request))
  completed = _complete_fitting(critic, tokens, key)
  # Behind an empty line the model begins a next turn of its own.
  return [text.split('\n\n')[0].strip() for text in completed]


def _complete_fitting(critic: Critic, prompts: Sequence[Sequence[int]], key: Array) -> list[str]:
  """Completes the prompts that are not too long; returns '' for the others."""
  limit = critic.options.max_context
  fitting = [i for i, tokens in enumerate(prompts) if len(tokens) <= limit]
  completed = [''] * len(prompts)
  if not fitting:
    return completed
  texts = critic.complete([prompts[i] for i in fitting], key)
  for i, text in zip(fitting, texts, strict=True):
    completed[i] = text
  return completed


def transcripts(rounds: Sequence[Sequence[Row]]) -> list[Row]:
  """Joins the rounds of each prompt to one transcript.

  Args:
    rounds: the rows of each round; those of round 0 are the first responses.

  Returns:
    A dict for each prompt: {id, messages, response, rounds: [{principle,
    critique_request, critique, revision_request, revision}]}.
  """
  names = (
    'principle',
    'critique_request',
    'critique',
    'revision_request',
  )
  result = []
  for first, *later in zip(*rounds, strict=True):
    steps = [{**{name: row[name] for name in names}, 'revision': row['response']} for row in later]
    result.append({**first, 'rounds': steps})
  return result


def _run_rounds(
  context: Context, critic: Critic, prompts: Sequence[Prompt], split: str
) -> list[list[Row]]:
  """Returns the rows of every round of a split; those on disk are read, not made again."""
  make_first = functools.partial(respond, critic, prompts, _key(context, split, 0))
  rows = _read_or_make(context, f'{split}-round-0', make_first)
  rounds = [rows]
  for number in range(1, critic.options.rounds + 1):
    make_round = functools.partial(
      revise,
      critic,
      rounds[-1],
      _key(context, split, number),
    )
    rows = _read_or_make(context, f'{split}-round-{number}', make_round)
    rounds.append(rows)
  return rounds


def _demonstrations(
  rounds: Sequence[Sequence[Row]], others: Sequence[Row], num_samples: int
) -> Iterator[records.Demonstration]:
  """Yields the revisions of all rounds and the helpful responses as demonstrations.

  Args:
    rounds: the rows of each round.
    others: helpful responses, `num_samples` to each prompt one after the other.
    num_samples: how many.
  """
  # Round 0 is left out: it holds the responses before any revision.
  named = [(f'round-{number}', rows) for number, rows in enumerate(rounds) if number > 0]
  named += [(f'helpful-{number}', others[number::num_samples]) for number in range(num_samples)]
  for name, rows in named:
    for row in rows:
      if row['response']:  # an empty response teaches nothing
        yield records.Demonstration(
          id=f'{row["id"]}/{name}',
          source='constitution',
          license='',
          messages=row['messages'],
          response=row['response'],
        )


def _keep_rounds(
  context: Context,
  options: Options,
  prompts: Sequence[Prompt],
  rounds: Sequence[Sequence[Row]],
) -> None:
  """Keeps the held-out responses of every round for the report, a round as a step."""
  judge = response_judge.open_judge(context, prompts, options.data)
  for number, rows in enumerate(rounds):
    texts = [[row['response']] for row in rows]
    verdicts = judge(texts)  # on all processes
    if not hosts.is_first_process():
      continue
    # With the end token, as responses of a model have it.
    lengths = [[len(context.tokenizer.encode(text)) + 1] for (text,) in texts]
    completed = Responses(texts, np.array(lengths), np.ones((len(texts), 1), bool))
    asked = [prompt.messages[-1]['content'] or '' for prompt in prompts]
    kept = kept_responses.make_rows(
      completed,
      asked,
      [prompt.id for prompt in prompts],
      verdicts,
      evaluation=kept_responses.TRAINING,
      stage=context.name,
      step=number,
      model='',
      decoding='sampled',
    )
    kept_responses.keep(context.workdir, kept)


def _measure_rounds(
  context: Context,
  options: Options,
  prompts: dict[str, list[Prompt]],
  rounds: dict[str, list[list[Row]]],
) -> None:
  """Lets the oracle rate every round, and writes a line of metrics.jsonl for each."""
  with metrics.Writer(context.directory, resume_step=-1) as writer:
    for number in range(options.rounds + 1):
      values = {}
      for split, prefix in (('train', ''), ('validation', 'eval/')):
        texts = [[row['response']] for row in rounds[split][number]]
        rates = oracle_judge.judge_with_oracle(prompts[split], texts)
        for name, x in rates.items():
          # NaN: the oracle cannot read what this rate is about.
          if not np.isnan(x).all():
            values[prefix + name] = float(np.nanmean(x))
      writer.metrics(number, values)


def _fitting_prompts(
  context: Context, options: Options, data: DataOptions, split: str
) -> list[Prompt]:
  """Reads the prompts of a split, without those that are too long."""
  prompts = sources.load_records(data, 'prompt', split)
  examples = encode.prompts(prompts, context.tokenizer, options.max_length, spread=hosts.spread)
  return [prompts[int(example['index'])] for example in examples]


def _key(context: Context, split: str, number: int) -> Array:
  """Returns the key of a round of a split; round -1 is the responses to helpful prompts."""
  return context.key(f'{split} {number}')


def _read_or_make(context: Context, name: str, make: Callable[[], list[Row]]) -> list[Row]:
  """Returns the rows of a file of the stage; if there is none, makes and writes them first."""
  path = context.directory / f'{name}.jsonl'
  if path.is_file():
    fingerprints.check_file(path)
    return [row for _, row in json_lines.read_values(path)]
  rows = make()
  _write(context, name, rows)
  return rows


def _write(context: Context, name: str, rows: Sequence[Any]) -> None:
  training.write_records(context, f'{name}.jsonl', rows)


def plan(context: Context) -> StagePlan:
  """Plans the programs and the memory of the stage; `context` has an abstract layout."""
  options = context.read_options(STAGE)
  return response_plan.plan_responses(
    context,
    (options.model,),
    options.sampling,
    batch_size=options.batch_size,
    max_length=options.max_context,
    num_samples=1,
  )


def list_data(options: Options, tokenizer: Any) -> list[DataUse]:
  """Lists the data that the stage reads, with the encoding of its records."""

  def encode_all(rows: Sequence[Prompt], overlong: str) -> list[dict]:
    return encode.prompts(rows, tokenizer, options.max_length, overlong)

  return [
    DataUse('data', options.data, 'prompt', encode_all),
    DataUse('helpful', options.helpful, 'prompt', encode_all),
  ]


def check(context: Context) -> None:
  """Checks options and constitution before any stage runs; raises UserError."""
  options = context.read_options(STAGE)
  training.check_batch(context, options.batch_size, 1)
  check_options(options, context.where)
  principles = constitution.load_constitution(options.constitution)
  principles.draw('critique', np.random.default_rng(0))  # fails if there are none


TINY: dict[str, Any] = {
  'data': {'count': 16},
  'helpful': {'count': 16},
  'batch_size': 16,
}
STAGE = StageKind(
  options=Options,
  run=run,
  plan=plan,
  tiny=TINY,
  data=list_data,
  files=tuple(f'{split}.jsonl' for split in SPLITS),
  check=check,
)
