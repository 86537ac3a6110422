"""Collecting rankings: several models answer each prompt, and annotators order the answers (step 3, first half).

Here the annotators are simulated people of the embedded world; what they see is text, what they give is ranks. With
data from real people leave this stage out and point the reward stage at their files.
"""

import jax
import numpy as np

from rlhf_jax.data import batches, encode, records, sources
from rlhf_jax.evaluation import answers
from rlhf_jax.feedback import annotators
from rlhf_jax.generation import sampler
from rlhf_jax.stages import common

DEFAULTS = dict(
    policies=('sft',),  # the stages whose models answer, each `samples` times
    samples=4,  # answers of each policy to each prompt
    annotators=5,  # people who rank, each with habits of their own; a prompt is one person's
    batch_size=64,  # prompts answered at once, over all devices
    length=48,  # tokens of a prompt at most
    data=dict(sources.DEFAULTS),
    sampling=dict(sampler.DEFAULTS),
)


def run(context: common.Context) -> None:
  """Writes train.jsonl and validation.jsonl, rankings of the prompts of each split."""
  common.check_batch(context, parts=1)
  sources.load(context.section.data, 'prompt', 'validation')  # what is wrong with it shows before the work
  for number, split in enumerate(('train', 'validation')):
    path = context.directory / f'{split}.jsonl'
    if not path.exists():
      rows = collect(context, split, jax.random.fold_in(context.key(), number))
      if jax.process_index() == 0:
        records.write(path, rows)


def collect(context: common.Context, split: str, key) -> list[records.Ranking]:
  """Rankings of answers to the prompts of a split, in their order."""
  section, tokenizer = context.section, context.tokenizer
  prompts = sources.load(section.data, 'prompt', split)
  examples = encode.prompts(prompts, tokenizer, section.length)
  answered = [[] for _ in examples]
  for number, name in enumerate(section.policies):
    model, read = common.open_model(context, name)
    answer = answers.build(model, section.sampling, tokenizer, context.layout, section.samples)
    given = answer(read(), batches.prompts_once(examples, section.batch_size), jax.random.fold_in(key, number))
    answered = [texts + more for texts, more in zip(answered, given.texts)]
  people = annotators.pool(section.annotators, context.config.seed)
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
  rows = []
  for example, texts in zip(examples, answered):
    prompt = prompts[int(example['index'])]
    person = int(rng.integers(len(people)))
    ranks = annotators.rank(prompt, texts, people[person], rng)
    rows.append(records.Ranking(f'{prompt.id}/{split}', f'annotator-{person}', '', '', '', prompt.messages, texts, ranks))
  return rows
