import numpy as np
import pytest

from rlhf_jax.data import encode, records
from rlhf_jax.data.tinyworld import vocabulary
from rlhf_jax.errors import UserError
from rlhf_jax.interop.tokenizer import Tokenizer

ASKED = [{'role': 'user', 'content': 'Why?'}]


@pytest.fixture(scope='module')
def tokenizer():
  core = vocabulary.train_tokenizer([], 258)  # bytes
  return Tokenizer(core, vocabulary.CHAT_TEMPLATE, eos='<eos>', pad='<pad>')


def demonstration(response='No.', messages=ASKED):
  return records.Demonstration('d1', '', '', messages, response)


def ids(tokenizer, text):
  return tokenizer.core.encode(text).ids


def test_the_response_and_its_end_are_the_targets(tokenizer):
  [example] = encode.demonstrations([demonstration()], tokenizer, 64)
  prompt = ids(tokenizer, 'Human: Why?\n\nAssistant:')
  response = ids(tokenizer, ' No.') + [1]
  np.testing.assert_array_equal(example['tokens'], prompt + response)
  np.testing.assert_array_equal(example['targets'], [0] * len(prompt) + [1] * len(response))
  [empty] = encode.demonstrations([demonstration('')], tokenizer, 64)
  assert empty['targets'].sum() >= 1
  assert empty['tokens'][-1] == tokenizer.eos_id and empty['targets'][-1] == 1


def test_a_conversation_in_turns_is_the_whole_conversation(tokenizer):
  turns = [*ASKED, {'role': 'assistant', 'content': 'No.'}, {'role': 'user', 'content': 'Oh?'}]
  [example] = encode.demonstrations([demonstration('Yes.', turns)], tokenizer, 128)
  whole = 'Human: Why?\n\nAssistant: No.<eos>\n\nHuman: Oh?\n\nAssistant: Yes.<eos>'
  np.testing.assert_array_equal(example['tokens'], ids(tokenizer, whole))
  assert example['targets'].sum() == len(ids(tokenizer, ' Yes.')) + 1  # the last response only


def test_every_token_of_a_document_but_the_first_is_a_target_once(tokenizer):
  text = ''.join(chr(97 + i % 26) for i in range(57))
  for length in (8, 16, 58, 100):
    windows = encode.documents([records.Document('', '', '', text)], tokenizer, length)
    assert all(len(w['tokens']) <= length and w['targets'][0] == 0 for w in windows)
    targets = np.concatenate([w['tokens'][w['targets'] > 0] for w in windows])
    np.testing.assert_array_equal(targets, ids(tokenizer, text)[1:] + [1])


def with_beginning():
  core = vocabulary.train_tokenizer([], 258)
  core.add_special_tokens(['<bos>'])
  template = '{{ bos_token }}' + vocabulary.CHAT_TEMPLATE
  return Tokenizer(core, template, eos='<eos>', pad='<pad>', bos='<bos>')


def test_a_beginning_of_sequence_stands_before_every_document():
  tokenizer = with_beginning()
  rows = [records.Document('', '', '', text) for text in ('ab', '')]
  windows = encode.documents(rows, tokenizer, 8)
  assert [w['tokens'].tolist() for w in windows] == [[258, *ids(tokenizer, 'ab'), 1], [258, 1]]
  assert [w['targets'].tolist() for w in windows] == [[0, 1, 1, 1], [0, 1]]


def test_an_empty_document_is_no_example(tokenizer):
  rows = [records.Document('', '', '', text) for text in ('', 'ab')]
  [example] = encode.documents(rows, tokenizer, 8)
  assert example['tokens'].tolist() == ids(tokenizer, 'ab') + [1]
  with pytest.raises(UserError, match='no document fits'):
    encode.documents(rows[:1], tokenizer, 8)


def test_what_is_cut_from_the_left_keeps_its_beginning_of_sequence():
  tokenizer = with_beginning()
  asked = [{'role': 'user', 'content': 'W' * 60}]
  prompt = tokenizer.prompt(asked)
  assert prompt[0] == 258 and prompt.count(258) == 1
  row = records.Prompt('p', '', '', asked, {})
  [example] = encode.prompts([row], tokenizer, 20, 'truncate_left')
  assert example['tokens'].tolist() == [258, *prompt[-19:]] and example['mask'].all()
  response = ids(tokenizer, ' No.') + [1]
  rows = [demonstration('No.', asked)]
  [example] = encode.demonstrations(rows, tokenizer, 20, 'truncate_left')
  assert example['tokens'].tolist() == [258, *prompt[len(response) - 19 :], *response]
  assert example['targets'].tolist() == [0] * (20 - len(response)) + [1] * len(response)
  for room in (0, 1):  # nothing of the prompt but its beginning would be left
    with pytest.raises(UserError, match='no demonstration fits'):
      encode.demonstrations(rows, tokenizer, len(response) + room, 'truncate_left')


def test_a_row_of_one_token_predicts_nothing(tokenizer):
  with pytest.raises(UserError, match='^max_length: expected 2 tokens or more, got 1'):
    encode.documents([records.Document('', '', '', 'ab')], tokenizer, 1)


def test_rankings(tokenizer):
  row = records.Ranking('r', '', '', '', 'Ann.', ASKED, ['A', 'Bcd'], [2, 1])
  [example] = encode.rankings([row], tokenizer, 40)
  prompt = ids(tokenizer, 'Human: Ann.\n\nWhy?\n\nAssistant:')
  for tokens, length, text in zip(example['tokens'], example['lengths'], (' A', ' Bcd')):
    np.testing.assert_array_equal(tokens[:length], prompt + ids(tokenizer, text) + [1])
    assert (tokens[length:] == tokenizer.pad_id).all()
  assert example['ranks'].tolist() == [2, 1] and example['index'].tolist() == [0, 0]
  assert example['begins'].tolist() == [len(prompt)] * 2
  assert example['confidence'].tolist() == [1, 1]


def test_prompts_are_left_padded(tokenizer):
  [example] = encode.prompts([records.Prompt('p', '', '', ASKED, {})], tokenizer, 40)
  prompt = ids(tokenizer, 'Human: Why?\n\nAssistant:')
  np.testing.assert_array_equal(example['tokens'], [0] * (40 - len(prompt)) + prompt)
  np.testing.assert_array_equal(example['mask'], np.arange(40) >= 40 - len(prompt))


def test_a_prompt_may_fill_its_row():
  example = encode.left_padded([5, 6], 2, 0, 3)
  assert example['tokens'].tolist() == [5, 6] and example['mask'].all() and example['index'] == 3


@pytest.mark.parametrize('overlong', ['drop', 'truncate_left'])
def test_a_response_is_never_cut(tokenizer, overlong):
  with pytest.raises(UserError, match='no demonstration fits 8 tokens; raise max_length'):
    encode.demonstrations([demonstration('A long response.')], tokenizer, 8, overlong)


def demonstration_of(text):
  return demonstration('No.', [{'role': 'user', 'content': text}])


def ranking_of(text):
  messages = [{'role': 'user', 'content': text}]
  return records.Ranking('r', '', '', '', '', messages, ['A', 'Bcd'], [2, 1])


def prompt_of(text):
  return records.Prompt('p', '', '', [{'role': 'user', 'content': text}], {})


CASES = {
  'demonstration': (encode.demonstrations, demonstration_of),
  'ranking': (encode.rankings, ranking_of),
  'prompt': (encode.prompts, prompt_of),
}


@pytest.mark.parametrize('kind', CASES)
def test_what_does_not_fit(tokenizer, capsys, kind):
  encoder, make_record = CASES[kind]
  rows = [make_record('Why?'), make_record('W' * 60)]
  kept = encoder(rows, tokenizer, 40, 'drop')
  assert len(kept) == 1
  message = f'1 of 2 {kind}s are longer than 40 tokens and were left out'
  assert message in capsys.readouterr().err
  with pytest.raises(UserError, match=f'{kind} .*: .* tokens do not fit the limit of 40'):
    encoder(rows, tokenizer, 40, 'error')
  cut = encoder(rows, tokenizer, 40, 'truncate_left')[1]
  if kind == 'demonstration':
    assert len(cut['tokens']) == 40 and cut['targets'].sum() == len(tokenizer.response('No.'))
  elif kind == 'ranking':
    assert cut['lengths'].max() == 40 and cut['tokens'][1, 39] == tokenizer.eos_id
  else:
    assert cut['mask'].all() and cut['tokens'].tolist() == tokenizer.prompt(rows[1].messages)[-40:]
  with pytest.raises(UserError, match='overlong: expected one of drop, truncate_left, error'):
    encoder(rows, tokenizer, 40, 'cut')
  with pytest.raises(UserError, match=f'no {kind} fits 5 tokens'):
    encoder(rows, tokenizer, 5, 'drop')


TURNS = [*ASKED, {'role': 'assistant', 'content': 'No.'}, {'role': 'user', 'content': 'Oh?'}]


def target_text(tokenizer, example):
  return tokenizer.core.decode(
    example['tokens'][example['targets'] > 0].tolist(), skip_special_tokens=False
  )


def test_every_turn_of_the_assistant_can_be_a_target(tokenizer):
  rows = [demonstration('Yes.', TURNS)]
  [last] = encode.demonstrations(rows, tokenizer, 128)
  [every] = encode.demonstrations(rows, tokenizer, 128, targets='all')
  np.testing.assert_array_equal(last['tokens'], every['tokens'])
  assert target_text(tokenizer, last) == ' Yes.<eos>'
  assert target_text(tokenizer, every) == ' No.<eos> Yes.<eos>'
  # OpenAI's mark of a message that is not learned
  unlearned = [TURNS[0], {**TURNS[1], 'weight': 0}, TURNS[2]]
  [marked] = encode.demonstrations(
    [demonstration('Yes.', unlearned)], tokenizer, 128, targets='all'
  )
  assert target_text(tokenizer, marked) == ' Yes.<eos>'
  with pytest.raises(UserError, match="^targets: expected one of last, all, got 'some'"):
    encode.demonstrations(rows, tokenizer, 128, targets='some')


def test_what_is_cut_from_the_left_keeps_the_targets_in_place():
  tokenizer = with_beginning()
  rows = [demonstration('Yes.', TURNS)]
  [whole] = encode.demonstrations(rows, tokenizer, 128, targets='all')
  for length in (20, 30, 40):
    [cut] = encode.demonstrations(rows, tokenizer, length, 'truncate_left', targets='all')
    np.testing.assert_array_equal(cut['tokens'][1:], whole['tokens'][1 - length :])
    np.testing.assert_array_equal(cut['targets'][1:], whole['targets'][1 - length :])
    assert cut['tokens'][0] == tokenizer.bos_id and cut['targets'][0] == 0


def test_a_record_that_the_template_refuses_is_named_by_its_place(tokenizer):
  picky = tokenizer.with_template(
    "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}"
    + tokenizer.template
  )
  asked = [{'role': 'system', 'content': 'Be brief.'}, *ASKED]

  def read(kind, **fields):
    return [records.parse_record(kind, {**fields, 'messages': asked, 'id': 'x'}, 'f.jsonl:3')]

  for use in (
    lambda: encode.demonstrations(read('demonstration', response='a'), picky, 64),
    lambda: encode.demonstrations(read('demonstration', response='a'), picky, 64, targets='all'),
    lambda: encode.rankings(read('ranking', chosen='a', rejected='b'), picky, 64),
    lambda: encode.prompts(read('prompt'), picky, 64),
  ):
    with pytest.raises(UserError, match='^f.jsonl:3: chat template: No system'):
      use()


def test_comparisons_that_teach_nothing_are_counted(tokenizer, capsys):
  rows = [
    records.Ranking('1', '', '', '', '', ASKED, ['same', 'same'], [1, 2]),
    records.Ranking('2', '', '', '', '', ASKED, ['a', 'b'], [1, 1]),
    records.Ranking('3', '', '', '', '', ASKED, ['    return', 'return'], [1, 2]),
    records.Ranking('4', '', '', '', '', ASKED, ['alone'], [1]),
  ]
  examples = encode.rankings(rows, tokenizer, 64)
  assert not np.array_equal(*examples[2]['tokens'])  # the indentation is kept
  assert capsys.readouterr().err.splitlines() == [
    '1 of 4 rankings compare equal tokens and teach no order',
    '1 of 4 rankings are ties and teach no order',
  ]
