import json

import jax
import numpy as np
import pytest

from rlhf_jax.data import records, tinyworld
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import report
from rlhf_jax.feedback import constitution
from rlhf_jax.stages import critique

EXPERIMENT = 'constitutional_ai'


def test_rounds_are_kept_and_a_cut_run_goes_on(context):
  made = context('critique', 'critique.rounds=2', experiment=EXPERIMENT)
  critique.run(made)
  read = lambda name: [json.loads(line) for line in (made.directory / f'{name}.jsonl').read_text().splitlines()]
  first, second, third = (read(f'train-round-{n}') for n in range(3))
  assert [row['id'] for row in first] == [row['id'] for row in third] and len(first) > 2
  assert {row['principle'] for row in second + third} == {'harm', 'rude'}
  assert any(a['principle'] != b['principle'] for a, b in zip(second, third))  # drawn again in every round
  assert any(row['critique'] for row in second)

  whole = read('transcripts')
  assert [row['response'] for row in whole] == [row['response'] for row in first]
  assert [row['rounds'][1]['revision'] for row in whole] == [row['response'] for row in third]
  assert set(whole[0]['rounds'][0]) == {'principle', 'critique_request', 'critique', 'revision_request', 'revision'}
  page = report.format_page('run', '', b'', {}, [], {'critique': report.read_transcripts(made.directory)})
  assert page.count('<details>') == len(whole) and 'Does it do harm?' in page

  demonstrations = records.read(made.directory / 'train.jsonl', 'demonstration')
  helpful = read('train-helpful')
  assert [row.response for row in demonstrations] == [
      row['response'] for rows in (second, third, helpful) for row in rows if row['response']]
  assert [line['step'] for line in report.read_metrics(made.directory)] == [0, 1, 2]
  assert 'eval/harmful_to_requests' in report.read_metrics(made.directory)[0]

  before = {path.name: path.read_bytes() for path in made.directory.glob('*.jsonl') if path.name != 'metrics.jsonl'}
  for name in ('train-round-2', 'validation-round-1', 'validation-round-2', 'train', 'transcripts'):
    (made.directory / f'{name}.jsonl').unlink()
  critique.run(made)
  assert before == {name: (made.directory / name).read_bytes() for name in before}


def test_a_request_that_is_too_long_leaves_the_answer(context):
  made = context('critique', 'critique.context=64', experiment=EXPERIMENT)
  _, revise = critique.build(made, constitution.load_constitution(made.section.constitution))
  row = dict(id='a', messages=[dict(role='user', content='Why? ' * 40)], response='Because.')
  revised, = revise([row], jax.random.key(0))
  assert revised['response'] == 'Because.' and revised['critique'] == ''


def test_requests_as_messages_of_the_chat_template(context):
  made = context('critique', 'critique.chat=True', experiment=EXPERIMENT)
  respond, revise = critique.build(made, constitution.load_constitution(made.section.constitution))
  prompts = tinyworld.records('prompt', 'train', count=3)
  rows = revise(respond(prompts, jax.random.key(0)), jax.random.key(1))
  assert [row['id'] for row in rows] == [prompt.id for prompt in prompts] and all(row['response'] for row in rows)


def test_wrong_examples(context):
  with pytest.raises(UserError, match='config.critique.examples: expected 0 with chat=True'):
    critique.run(context('critique', 'critique.chat=True', 'critique.examples=1', experiment=EXPERIMENT))


@pytest.mark.parametrize('override,message', [
    ('critique.rounds=0', 'rounds from 1'), ('critique.judge=reward', 'judge "oracle" or none'),
    ('critique.constitution=()', 'no principle says "critique"')])
def test_wrong_settings(context, override, message):
  with pytest.raises(UserError, match=message):
    critique.run(context('critique', override, experiment=EXPERIMENT))


def test_the_world_s_other_forms():
  """What the experiments of AI feedback learn from."""
  texts = [row.text for row in tinyworld.records('document', 'train', count=600, variant='feedback')]
  share = lambda words: np.mean([words in text for text in texts])
  assert share('The better answer is (') > 0.25 and share('CritiqueRequest:') > 0.2 and share('Revision:') > 0.25
  for variant, kinds in (('harmful', {'harmful'}), ('questions', {'question'}), ('', {'harmful', 'question'})):
    for kind in ('prompt', 'ranking'):
      rows = tinyworld.records(kind, 'validation', variant=variant)
      if kind == 'prompt':
        assert {row.meta['kind'] for row in rows} == kinds
      assert rows
  obeyed = [row for row in tinyworld.records('demonstration', 'train', variant='helpful_only')]
  prompts = {row.messages[-1]['content']: row for row in tinyworld.records('prompt', 'train')}
  harm = [not tinyworld.oracle.judge(prompts[row.messages[-1]['content']], row.response).harmless for row in obeyed
          if prompts[row.messages[-1]['content']].meta['kind'] == 'harmful']
  assert np.mean(harm) > 0.95
  with pytest.raises(UserError, match='variant of a prompt: expected one of harmful, questions'):
    tinyworld.records('prompt', 'train', variant='rude')
