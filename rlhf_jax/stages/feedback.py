"""Collecting rankings: models answer each prompt, and somebody orders the answers (step 3, first half).

Who orders them, `source`:
  people: simulated annotators of the embedded world; what they see is text, what they give is ranks.
  reward: a reward model, or a program. Then these rankings serve iterated DPO (sample, rank, train, again), and SFT on
    the best of each, which is rejection-sampling fine-tuning (RAFT: Dong et al. 2023, arXiv:2304.06767).
With data from real people leave this stage out and point the next one at their files.
"""

import jax
import numpy as np

from rlhf_jax.data import batches, encode, records, sources
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import answers
from rlhf_jax.feedback import annotators, rewards
from rlhf_jax.generation import sampler
from rlhf_jax.objectives import ranking
from rlhf_jax.stages import common, rollout

DEFAULTS = dict(
    policies=('sft',),  # the stages whose models answer, each `samples` times
    samples=4,  # answers of each policy to each prompt
    source='people',  # people, reward
    annotators=5,  # people who rank, each with habits of their own; a prompt is one person's
    reward='reward',  # as in PPO
    programs=dict(rewards.DEFAULTS),
    batch_size=64,  # prompts answered at once, over all devices
    length=48,  # tokens of a prompt at most
    data=dict(sources.DEFAULTS),
    sampling=dict(sampler.DEFAULTS),
)


def run(context: common.Context) -> None:
  """Writes train.jsonl and validation.jsonl, rankings of the prompts of each split."""
  common.check_batch(context, parts=1)
  if context.section.source not in SOURCES:
    raise UserError(f'config.{context.name}.source: expected one of {", ".join(SOURCES)}, got '
                    f'{context.section.source!r}')
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
  score = None
  if section.source == 'reward':
    of = rollout.open_score(context, section.reward, programs=section.programs)
    score = lambda asked, samples: of(asked, samples, prompts)[0]
  answered = [[] for _ in examples]
  scores = [[] for _ in examples]
  for number, name in enumerate(section.policies):
    model, read = common.open_model(context, name)
    answer = answers.build(model, section.sampling, tokenizer, context.layout, section.samples, score=score)
    given = answer(read(), batches.prompts_once(examples, section.batch_size), jax.random.fold_in(key, number))
    answered = [texts + more for texts, more in zip(answered, given.texts)]
    if score is not None:
      scores = [values + more for values, more in zip(scores, given.scores.tolist())]
  asked = [prompts[int(example['index'])] for example in examples]
  orders = SOURCES[section.source](context, asked, answered, scores, np.random.default_rng(
      np.asarray(jax.random.key_data(key))))
  return [records.Ranking(f'{prompt.id}/{split}', who, '', '', '', prompt.messages, texts, ranks)
          for prompt, texts, (who, ranks) in zip(asked, answered, orders)]


def _people(context, prompts, texts, scores, rng):
  del scores
  people = annotators.pool(context.section.annotators, context.config.seed)
  for prompt, answers_given in zip(prompts, texts):
    person = int(rng.integers(len(people)))
    yield f'annotator-{person}', annotators.rank(prompt, answers_given, people[person], rng)


def _reward(context, prompts, texts, scores, rng):
  del prompts, texts, rng
  for values in scores:
    yield context.section.reward, ranking.from_scores(np.asarray([values], np.float32))[0].tolist()


SOURCES = {'people': _people, 'reward': _reward}
