"""A model criticises and revises its own answers by written principles: the data of SL-CAI (Bai et al. 2022b,
arXiv:2212.08073, §3.1).

  prompt → answer → `rounds` times: a principle drawn at random → critique → revision, which is the next round's answer

The revisions of every round, and answers to helpful prompts as they are, become demonstrations; the stage after this one
fine-tunes a pre-trained model on them. Every round is a file, so that a cut run goes on from the last whole one.
"""

import json
import zlib

import jax
import numpy as np

from rlhf_jax.data import encode, records, sources
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import oracle_judge
from rlhf_jax.generation import responses
from rlhf_jax.feedback import constitution, judging
from rlhf_jax.generation import sampler
from rlhf_jax.runtime import metrics
from rlhf_jax.stages.shared import common

SPLITS = ('train', 'validation')
DEFAULTS = dict(
    model='sft',  # answers, criticises and revises; in the paper one that is helpful only
    rounds=4,
    constitution=('harmlessness',),  # files, or shipped ones by name
    examples=0,  # so many of the constitution's critiques before every request
    critique='\n\nCritiqueRequest: {request}\n\nCritique:',  # behind the conversation
    revision='\n\nRevisionRequest: {request}\n\nRevision:',  # behind the critique
    chat=False,  # requests are a user's messages in the model's chat template
    batch_size=64,  # prompts at once, over all devices
    max_length=48,  # tokens of a prompt at most
    max_context=512,  # tokens of a request with all before it; a longer one leaves the answer as it is
    judge='',  # oracle: of the embedded world, rates of every round's answers go to metrics.jsonl
    data=dict(sources.DEFAULTS),  # prompts that tempt to do harm
    helpful=dict(sources.DEFAULTS),  # other prompts
    sampling=dict(sampler.DEFAULTS),
)


def run(context: common.Context) -> None:
  """Writes SPLIT-round-N.jsonl and SPLIT-helpful.jsonl, and of them transcripts.jsonl, train.jsonl, validation.jsonl."""
  common.check_batch(context, parts=1)
  section = context.section
  said = constitution.load_constitution(section.constitution)
  said.draw('critique', np.random.default_rng(0))  # there are some
  if section.rounds < 1 or section.judge not in ('', 'oracle'):
    raise UserError(f'config.{context.name}: expected rounds from 1 and judge "oracle" or none, got {section.rounds} and '
                    f'{section.judge!r}')
  if section.chat and section.examples:
    raise UserError(f'config.{context.name}.examples: expected 0 with chat=True: the constitution\'s examples are dialogues '
                    'as text, which no chat template has')
  prompts = {split: _fitting(context, section.data, split) for split in SPLITS}
  helpful = {split: _fitting(context, section.helpful, split) for split in SPLITS}
  respond, revise = build(context, said)
  whole = {}
  for split in SPLITS:
    rounds = [_kept(context, f'{split}-round-0', lambda: respond(prompts[split], _key(context, split, 0)))]
    for number in range(1, section.rounds + 1):
      rounds.append(_kept(context, f'{split}-round-{number}', lambda: revise(rounds[-1], _key(context, split, number))))
    others = _kept(context, f'{split}-helpful', lambda: respond(helpful[split], _key(context, split, -1)))
    whole[split] = rounds
    _write(context, split, [
        records.Demonstration(f'{row["id"]}/{name}', 'constitution', '', row['messages'], row['response'])
        for name, rows in [*((f'round-{n}', rows) for n, rows in enumerate(rounds) if n), ('helpful', others)]
        for row in rows if row['response']])
  _write(context, 'transcripts', transcripts(whole['train']))
  if section.judge:
    _measure(context, prompts, whole)


def build(context: common.Context, said: constitution.Constitution):
  """What the section's model does.

  Returns:
    respond(prompts, key) → rows {id, messages, response};
    revise(rows, key) → rows {id, messages, principle, critique_request, critique, revision_request, response}: a
    principle is drawn for each. Where a request is too long, or no revision comes, the response stays what it was.
  """
  section, tokenizer = context.section, context.tokenizer
  model, read = common.open_model(context, section.model)
  sample, params = responses.build_responder(model, section.sampling, tokenizer, context.layout), read()
  shown = ''.join(f'{example}\n\n' for example in said.critique_examples[:section.examples])

  def complete(prompts, key):
    return [texts[0].strip() for texts in responses.complete_prompts(
        sample, params, prompts, section.batch_size, tokenizer.pad_id, key).texts]

  def respond(prompts, key):
    given = complete([tokenizer.prompt(records.conversation(prompt)) for prompt in prompts], key)
    return [dict(id=prompt.id, messages=records.conversation(prompt), response=response)
            for prompt, response in zip(prompts, given)]

  def ask(conversations, requests, form, key):
    """What the model says to a request behind each conversation; '' where that is too long."""
    if section.chat:
      texts = [tokenizer.prompt([*messages, dict(role='user', content=request)])
               for messages, request in zip(conversations, requests)]
    else:
      start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
      texts = [start + tokenizer.encode(shown + text + form.format(request=request))
               for text, request in zip(conversations, requests)]
    fits = [i for i, tokens in enumerate(texts) if len(tokens) <= section.max_context]
    given = dict(zip(fits, complete([texts[i] for i in fits], key) if fits else ()))
    return [given.get(i, '') if section.chat else given.get(i, '').split('\n\n')[0].strip() for i in range(len(texts))]

  def revise(rows, key):
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    principles = [said.draw('critique', rng) for _ in rows]
    keys = jax.random.split(key)
    wanted, mended = [one.critique for one in principles], [one.revision for one in principles]
    if section.chat:
      before = [[*row['messages'], dict(role='assistant', content=row['response'])] for row in rows]
      critiques = ask(before, wanted, '', keys[0])
      after = [[*messages, dict(role='user', content=request), dict(role='assistant', content=critique)]
               for messages, request, critique in zip(before, wanted, critiques)]
    else:
      before = [f'{judging.format_transcript(row["messages"])}\n\nAssistant: {row["response"]}' for row in rows]
      critiques = ask(before, wanted, section.critique, keys[0])
      after = [f'{text}{section.critique.format(request=request)} {critique}'
               for text, request, critique in zip(before, wanted, critiques)]
    revisions = ask(after, mended, section.revision, keys[1])
    return [dict(id=row['id'], messages=row['messages'], principle=principle.id, critique_request=principle.critique,
                 critique=critique, revision_request=principle.revision, response=revision or row['response'])
            for row, principle, critique, revision in zip(rows, principles, critiques, revisions)]

  return respond, revise


def transcripts(rounds: list[list[dict]]) -> list[dict]:
  """Rows of each round → a dict a prompt: {id, messages, response, rounds: [{principle, critique_request, critique,
  revision_request, revision}]}."""
  steps = ('principle', 'critique_request', 'critique', 'revision_request')
  return [dict(first, rounds=[{**{name: row[name] for name in steps}, 'revision': row['response']} for row in later])
          for first, *later in zip(*rounds)]


def _measure(context, prompts, whole):
  """Rates of the answers of every round, as the embedded world's oracle sees them: a line of metrics.jsonl each."""
  with metrics.Writer(context.directory, resume_step=-1) as writer:
    for number in range(context.section.rounds + 1):
      values = {}
      for split, prefix in (('train', ''), ('validation', 'eval/')):
        judged = oracle_judge.judge_with_oracle(prompts[split], [[row['response']] for row in whole[split][number]])
        values |= {prefix + name: float(np.nanmean(x)) for name, x in judged.items() if not np.isnan(x).all()}
      writer.metrics(number, values)


def _fitting(context, data, split):
  """The prompts of a split that are not too long."""
  prompts = sources.load_records(data, 'prompt', split)
  fits = encode.prompts(prompts, context.tokenizer, context.section.max_length)
  return [prompts[int(example['index'])] for example in fits]


def _key(context, split, number):
  return jax.random.fold_in(context.key(), zlib.crc32(f'{split} {number}'.encode()))


def _kept(context, name, make):
  """The rows of a file of the stage, made and written first if need be."""
  path = context.directory / f'{name}.jsonl'
  if path.is_file():
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
  rows = make()
  _write(context, name, rows)
  return rows


def _write(context, name, rows):
  if jax.process_index() == 0:
    records.write(context.directory / f'{name}.jsonl', rows)
