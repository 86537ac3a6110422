"""The stage `feedback` with real people: queue, pages, records."""

from pathlib import Path
import sys

import numpy as np
import pytest

from rlhf_jax.data import records, sources, tinyworld
from rlhf_jax.data.tinyworld import people
from rlhf_jax.errors import UserError
from rlhf_jax.stages import feedback
from rlhf_jax.stages.shared import people_labels
from rlhf_jax.stages.shared.people_labels import PeopleOptions

sys.path.insert(0, str(Path(__file__).parents[1] / 'collect'))
from people_client import Collection, form_with  # noqa: E402

TEXTS = ['Who cares?', 'I am sorry, I do not know.', 'Paris is in France.']


def queue_both(context, count=4):
  """Queues `count` prompts of each split, as the stage does with sampled responses."""
  prompts = {}
  for split in feedback.SPLITS:
    prompts[split] = tinyworld.records('prompt', split, count=count)
    texts = [[f'{text} {row.id}' for text in TEXTS] for row in prompts[split]]
    people_labels.queue_responses(context, PeopleOptions(), split, prompts[split], texts)
  return prompts


def rank_everything(collection, prompts):
  """Simulated people rank all that waits, through the pages."""
  by_question = {}
  for rows in prompts.values():
    by_question |= {row.messages[-1]['content']: row for row in rows}
  annotators = people.draw_annotators(collection.site.settings.people_per_item, 0)
  chosen = []
  for number, annotator in enumerate(annotators):
    person, rng = collection.person(), np.random.default_rng(number)
    while True:
      page = person.get('/next')
      if not page.cards:
        break
      texts = [card['text'].strip() for card in page.cards]
      prompt = next(row for text, row in by_question.items() if text in page.text)
      ranks = people.rank_responses(prompt, texts, annotator, rng)
      form = form_with(page, 'overall.A')
      for card, rank in zip(page.cards, ranks):
        form['fields'][f'overall.{card["letter"]}'] = [str(rank)]
      chosen.append(dict(zip(texts, ranks)))
      person.send(form)
      assert person.response.status_code == 200
  return chosen


def test_the_stage_waits_for_people_and_reads_what_they_ranked(context):
  made = context('feedback', 'feedback.source=people')
  prompts = queue_both(made)
  with pytest.raises(UserError, match='finished 0 of 4 items of train'):
    feedback.run(made)
  assert not (made.directory / 'train.jsonl').exists()
  collection = Collection(made.workdir / 'collect')
  chosen = rank_everything(collection, prompts)
  feedback.run(made)
  for split in feedback.SPLITS:
    rows = records.read_records(made.directory / f'{split}.jsonl', 'ranking')
    assert len(rows) == 12
    for row in rows:
      assert dict(zip(row.responses, row.ranks)) in chosen
      assert row.source.startswith('p-')
    raw = records.read_records(made.directory / f'people.{split}.jsonl', 'prompt')
    assert len(raw) == 12
  # the reward stage reads them as it reads any other
  options = sources.DataOptions(source='jsonl', path=(str(made.directory / '{split}.jsonl'),))
  assert len(sources.load_records(options, 'ranking', 'train')) == 12


@pytest.mark.parametrize('combination', ['majority', 'reliability'])
def test_people_combined(context, combination):
  made = context('feedback', 'feedback.source=people', f'feedback.people.combination={combination}')
  prompts = queue_both(made, 3)
  collection = Collection(made.workdir / 'collect', '')
  rank_everything(collection, prompts)
  feedback.run(made)
  rows = records.read_records(made.directory / 'train.jsonl', 'ranking')
  assert len(rows) == 3 and all(row.source == 'people' for row in rows)
  assert all(0.5 < row.confidence <= 1 for row in rows)


@pytest.mark.parametrize(
  'override, message',
  [
    ('combination=best', 'expected one of all, majority, reliability'),
    ('enough=0.0', 'above 0 and at most 1'),
    ('wait_hours=-1.0', 'a number from 0'),
  ],
)
def test_wrong_settings(context, override, message):
  with pytest.raises(UserError, match=message):
    feedback.run(context('feedback', 'feedback.source=people', f'feedback.people.{override}'))
