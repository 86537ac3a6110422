"""Collecting rankings: models answer each prompt, and somebody orders the answers (step 3, first half).

Who orders them, `source`:
  simulated: annotators of the embedded world; what they see is text, what they give is ranks.
  ai: one or several judges (stages/shared/ai_labels.py), which is RLAIF; they compare pairs and give probabilities.
  reward: a reward model, or a program. Then these rankings serve iterated DPO (sample, rank, train, again), and SFT on
    the best of each, which is rejection-sampling fine-tuning (RAFT: Dong et al. 2023, arXiv:2304.06767).
With data from real people leave this stage out and point the next one at their files.
"""

import jax
import numpy as np

from rlhf_jax.data import batches, encode, records, sources
from rlhf_jax.errors import UserError
from rlhf_jax.generation import responses
from rlhf_jax.feedback import simulated
from rlhf_jax.rewards import functions
from rlhf_jax.generation import sampler
from rlhf_jax.objectives import ranking
from rlhf_jax.stages.shared import ai_labels, common, rollout

DEFAULTS = dict(
    policies=('sft',),  # the stages whose models answer, each `samples` times
    num_samples=4,  # answers of each policy to each prompt
    source='simulated',  # simulated, ai, reward
    annotators=5,  # people who rank, each with habits of their own; a prompt is one person's
    ai=dict(ai_labels.DEFAULTS),
    reward='reward',  # as in PPO
    reward_functions=dict(functions.DEFAULTS),
    batch_size=64,  # prompts answered at once, over all devices
    max_length=48,  # tokens of a prompt at most
    data=dict(sources.DEFAULTS),
    sampling=dict(sampler.DEFAULTS),
)
SOURCES = ('simulated', 'ai', 'reward')


def run(context: common.Context) -> None:
  """Writes train.jsonl and validation.jsonl, rankings of the prompts of each split."""
  common.check_batch(context, parts=1)
  section = context.section
  if section.source not in SOURCES:
    raise UserError(f'config.{context.name}.source: expected one of {", ".join(SOURCES)}, got {section.source!r}')
  sources.load_records(section.data, 'prompt', 'validation')  # what is wrong with it shows before the work
  judge = ai_labels.open_judge(context) if section.source == 'ai' else None
  for number, split in enumerate(('train', 'validation')):
    path = context.directory / f'{split}.jsonl'
    if not path.exists():
      key = jax.random.fold_in(context.key(), number)
      rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
      prompts, given, scores = answer(context, split, key)
      if judge is not None:
        rows = ai_labels.label(context, judge, split, prompts, given, rng)
      else:
        orders = _people(context, prompts, given, rng) if section.source == 'simulated' else _reward(context, scores)
        rows = [records.Ranking(f'{prompt.id}/{split}', who, '', '', '', records.conversation(prompt), texts, ranks)
                for prompt, texts, (who, ranks) in zip(prompts, given, orders)]
      if jax.process_index() == 0:
        records.write_records(path, rows)


def answer(context: common.Context, split: str, key):
  """(prompts of a split, for each the texts of all answers, for each their scores where a reward orders them)."""
  section, tokenizer = context.section, context.tokenizer
  prompts = sources.load_records(section.data, 'prompt', split)
  examples = encode.prompts(prompts, tokenizer, section.max_length)
  score = None
  if section.source == 'reward':
    of = rollout.open_score(context, section.reward, programs=section.reward_functions)
    score = lambda asked, samples: of(asked, samples, prompts)[0]
  texts, scores = [[] for _ in examples], [[] for _ in examples]
  for number, name in enumerate(section.policies):
    model, read = common.open_model(context, name)
    ask = responses.build_responder(model, section.sampling, tokenizer, context.layout, section.num_samples, score=score)
    given = ask(read(), batches.prompts_once(examples, section.batch_size), jax.random.fold_in(key, number))
    texts = [some + more for some, more in zip(texts, given.texts)]
    if score is not None:
      scores = [some + more for some, more in zip(scores, given.scores.tolist())]
  return [prompts[int(example['index'])] for example in examples], texts, scores


def _people(context, prompts, texts, rng):
  people = simulated.draw_annotators(context.section.annotators, context.config.seed)
  for prompt, given in zip(prompts, texts):
    person = int(rng.integers(len(people)))
    yield f'annotator-{person}', simulated.rank_responses(prompt, given, people[person], rng)


def _reward(context, scores):
  for values in scores:
    yield context.section.reward, ranking.from_scores(np.asarray([values], np.float32))[0].tolist()
