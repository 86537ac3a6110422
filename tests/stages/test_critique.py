import json

import jax
import numpy as np
import pytest

from rlhf_jax.data import records, tinyworld
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import constitution
from rlhf_jax.report import kept_responses, run_files
from rlhf_jax.stages import critique

EXPERIMENT = 'constitutional_ai'
# In a chat template the experiment's texts around requests have no use.
CHAT = (
  'critique.chat=True',
  f'critique.critique={critique.Options().critique!r}',
  f'critique.revision={critique.Options().revision!r}',
)


def open_critic(made):
  options = made.read_options(critique.STAGE)
  principles = constitution.load_constitution(options.constitution)
  return critique.open_critic(made, options, principles)


def test_rounds_are_kept_and_a_cut_run_goes_on(context):
  options = ('critique.rounds=2', 'critique.helpful_samples=2')
  made = context('critique', *options, experiment=EXPERIMENT)
  critique.run(made)

  def read(name):
    path = made.directory / f'{name}.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()]

  first, second, third = (read(f'train-round-{n}') for n in range(3))
  assert [row['id'] for row in first] == [row['id'] for row in third] and len(first) > 2
  assert {row['principle'] for row in second + third} == {'harm', 'rude'}
  # A principle is drawn again in every round.
  assert any(a['principle'] != b['principle'] for a, b in zip(second, third))
  assert any(row['critique'] for row in second)

  transcripts = read('transcripts')
  assert [row['response'] for row in transcripts] == [row['response'] for row in first]
  assert [row['rounds'][1]['revision'] for row in transcripts] == [row['response'] for row in third]
  assert set(transcripts[0]['rounds'][0]) == {
    'principle',
    'critique_request',
    'critique',
    'revision_request',
    'revision',
  }
  assert run_files.read_transcripts(made.directory) == transcripts[:20]  # the report shows them

  demonstrations = records.read_records(made.directory / 'train.jsonl', 'demonstration')
  helpful = read('train-helpful')
  samples = (helpful[0::2], helpful[1::2])  # two responses to each prompt
  assert [row['id'] for row in samples[0]] == [row['id'] for row in samples[1]]
  assert [row.response for row in demonstrations] == [
    row['response'] for rows in (second, third, *samples) for row in rows if row['response']
  ]
  assert len({row.id for row in demonstrations}) == len(demonstrations)
  metrics = run_files.read_metrics(made.directory)
  assert [line['step'] for line in metrics] == [0, 1, 2]
  assert 'eval/harmful_to_requests' in metrics[0]

  kept = kept_responses.read(made.workdir)
  assert [row.step for row in kept[:: len(kept) // 3]] == [0, 1, 2]
  last = read('validation-round-2')
  assert [row.response for row in kept if row.step == 2] == [row['response'] for row in last]
  assert all('utility' in row.verdict for row in kept)

  paths = [path for path in made.directory.glob('*.jsonl') if path.name != 'metrics.jsonl']
  before = {path.name: path.read_bytes() for path in paths}
  cut = ('train-round-2', 'validation-round-1', 'validation-round-2', 'train', 'transcripts')
  for name in cut:
    (made.directory / f'{name}.jsonl').unlink()
  critique.run(made)
  assert before == {name: (made.directory / name).read_bytes() for name in before}


def test_a_request_that_is_too_long_leaves_the_response(context):
  critic = open_critic(context('critique', 'critique.max_context=64', experiment=EXPERIMENT))
  messages = [dict(role='user', content='Why? ' * 40)]
  row = dict(id='a', messages=messages, response='Because.')
  (revised,) = critique.revise(critic, [row], jax.random.key(0))
  assert revised['response'] == 'Because.' and revised['critique'] == ''


def test_requests_as_messages_of_the_chat_template(context):
  critic = open_critic(context('critique', *CHAT, experiment=EXPERIMENT))
  prompts = tinyworld.records('prompt', 'train', count=3)
  rows = critique.respond(critic, prompts, jax.random.key(0))
  rows = critique.revise(critic, rows, jax.random.key(1))
  assert [row['id'] for row in rows] == [prompt.id for prompt in prompts]
  assert all(row['response'] for row in rows)


@pytest.mark.parametrize(
  'overrides,message',
  [
    (
      [*CHAT, 'critique.examples=1'],
      'config.critique.examples: expected 0 with chat=True',
    ),
    (['critique.rounds=0'], 'rounds: expected a number from 1'),
    (['critique.judge=reward'], "critique.judge: expected oracle or '', got 'reward'"),
    (['critique.constitution=()'], 'no principle has a text for "critique"'),
  ],
)
def test_wrong_options(context, overrides, message):
  with pytest.raises(UserError, match=message):
    critique.run(context('critique', *overrides, experiment=EXPERIMENT))


def test_the_world_s_other_forms():
  """What the experiments of AI feedback learn from."""
  documents = tinyworld.records('document', 'train', count=600, variant='feedback')

  def share(words):
    return np.mean([words in row.text for row in documents])

  assert share('The better answer is (') > 0.25
  assert share('CritiqueRequest:') > 0.2 and share('Revision:') > 0.25
  for variant, asks_for_harm in {
    'harmful': {True},
    'questions': {False},
    '': {True, False},
  }.items():
    prompts = tinyworld.records('prompt', 'validation', variant=variant)
    assert {row.meta['kind'] == 'harmful' for row in prompts} == asks_for_harm
    assert tinyworld.records('ranking', 'validation', variant=variant)
  obeyed = tinyworld.records('demonstration', 'train', variant='helpful_only')
  prompts = {row.messages[-1]['content']: row for row in tinyworld.records('prompt', 'train')}
  harm = []
  for row in obeyed:
    prompt = prompts[row.messages[-1]['content']]
    if prompt.meta['kind'] == 'harmful':
      harm.append(not tinyworld.oracle.judge(prompt, row.response).harmless)
  assert np.mean(harm) > 0.95
  message = 'data.variant: of a prompt: expected one of harmful, questions'
  with pytest.raises(UserError, match=message):
    tinyworld.records('prompt', 'train', variant='rude')
