"""Rows in the shapes in which public data sets ship, and what each is read as."""

import json

import pytest

from rlhf_jax.data import records, shapes
from rlhf_jax.errors import UserError


def user(text):
  return {'role': 'user', 'content': text}


def assistant(text):
  return {'role': 'assistant', 'content': text}


SYSTEM = {'role': 'system', 'content': 'Be brief.'}
Q, A, B = user('Where?'), 'There.', 'No.'
TURNS = [user('Hi'), assistant('Hello'), Q]
HUMAN = '\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Where?\n\nAssistant:'
TOOL = {'type': 'function', 'function': {'name': 'find', 'parameters': {}}}
CALL = {
  'role': 'assistant',
  'content': None,
  'tool_calls': [{'type': 'function', 'function': {'name': 'find', 'arguments': {'what': 'key'}}}],
}
RESULT = {'role': 'tool', 'content': 'shelf', 'tool_call_id': '1'}

# (name, row, messages, response)
DEMONSTRATIONS = [
  ('own', {'messages': [Q], 'response': A}, [Q], A),
  ('messages', {'messages': [*TURNS, assistant(A)]}, TURNS, A),
  ('messages with a system message', {'messages': [SYSTEM, Q, assistant(A)]}, [SYSTEM, Q], A),
  ('two users in a row', {'messages': [Q, Q, assistant(A)]}, [Q, Q], A),
  (
    'messages with tools',
    {'messages': [Q, CALL, RESULT, assistant(A)], 'tools': [TOOL]},
    [Q, CALL, RESULT],
    A,
  ),
  ('messages that end with a call', {'messages': [Q, CALL], 'tools': '[]'}, [Q], CALL),
  (
    'messages with parts',
    {'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 'Where?'}]}, assistant(A)]},
    [Q],
    A,
  ),
  (
    'no_robots',
    {'prompt': 'Hi', 'prompt_id': 'x', 'messages': [*TURNS, assistant(A)], 'category': 'Chat'},
    TURNS,
    A,
  ),
  ('TRL', {'prompt': 'Where?', 'completion': A}, [Q], A),
  ('TRL messages', {'prompt': TURNS, 'completion': [assistant(A)]}, TURNS, A),
  (
    'TRL messages of a tool',
    {'prompt': [Q], 'completion': [CALL, RESULT, assistant(A)]},
    [Q, CALL, RESULT],
    A,
  ),
  ('prompt and response', {'prompt': 'Where?', 'response': A}, [Q], A),
  (
    'ShareGPT',
    {'conversations': [{'from': 'human', 'value': 'Where?'}, {'from': 'gpt', 'value': A}]},
    [Q],
    A,
  ),
  (
    'ShareGPT with a system field',
    {
      'system': 'Be brief.',
      'conversations': [{'from': 'human', 'value': 'Where?'}, {'from': 'gpt', 'value': A}],
    },
    [SYSTEM, Q],
    A,
  ),
  (
    'ShareGPT with calls',
    {
      'conversations': [
        {'from': 'human', 'value': 'Where?'},
        {'from': 'function_call', 'value': '{"name": "find", "arguments": {"what": "key"}}'},
        {'from': 'observation', 'value': 'shelf'},
        {'from': 'gpt', 'value': A},
      ],
      'tools': '[{"type": "function", "function": {"name": "find", "parameters": {}}}]',
    },
    [Q, CALL, {'role': 'tool', 'content': 'shelf'}],
    A,
  ),
  ('Alpaca', {'instruction': 'Where?', 'input': '', 'output': A}, [Q], A),
  (
    'Alpaca with input',
    {'instruction': 'Say where.', 'input': 'key', 'output': A},
    [user('Say where.\n\nkey')],
    A,
  ),
  (
    'Alpaca with history',
    {'instruction': 'Where?', 'input': '', 'output': A, 'history': [['Hi', 'Hello']]},
    TURNS,
    A,
  ),
  (
    'Dolly',
    {'instruction': 'Where?', 'context': 'A shelf.', 'response': A, 'category': 'qa'},
    [user('A shelf.\n\nWhere?')],
    A,
  ),
  (
    'OpenOrca',
    {'id': 'x', 'system_prompt': 'Be brief.', 'question': 'Where?', 'response': A},
    [SYSTEM, Q],
    A,
  ),
  ('GSM8K', {'question': 'Where?', 'answer': A}, [Q], A),
  ('MetaMath', {'query': 'Where?', 'response': A, 'type': 'x'}, [Q], A),
  ('MATH', {'problem': 'Where?', 'solution': A, 'level': 'Level 1'}, [Q], A),
  ('OpenR1', {'problem': 'Where?', 'solution': A, 'answer': '4'}, [Q], A),
  (
    'NuminaMath',
    {'problem': 'Where?', 'solution': B, 'messages': [Q, assistant(A)]},
    [Q],
    A,  # the conversation counts; a solution beside it is for rewards
  ),
  (
    'Magpie',
    {
      'instruction': 'Where?',
      'response': A,
      'conversations': [{'from': 'human', 'value': 'Where?'}, {'from': 'gpt', 'value': A}],
    },
    [Q],
    A,
  ),
  (
    'Capybara',
    {'conversation': [{'input': 'Hi', 'output': 'Hello'}, {'input': 'Where?', 'output': A}]},
    TURNS,
    A,
  ),
  ('LIMA', {'conversations': ['Where?', A], 'source': 'stackexchange'}, [Q], A),
  ('Guanaco', {'text': f'### Human: Where?### Assistant: {A}'}, [Q], A),
  ('messages as JSON', {'messages': json.dumps([Q, assistant(A)])}, [Q], A),
  (
    'roles in capitals',
    {'messages': [{'role': 'User', 'content': 'Where?'}, {'role': 'Assistant', 'content': A}]},
    [Q],
    A,
  ),
  (
    "OpenAI's older calls",
    {
      'messages': [
        Q,
        {'role': 'assistant', 'content': None, 'function_call': CALL['tool_calls'][0]['function']},
        {'role': 'function', 'content': 'shelf', 'tool_call_id': '1'},
        assistant(A),
      ],
      'functions': [TOOL['function']],
    },
    [Q, CALL, RESULT],
    A,
  ),
  ('FLAN', {'inputs': 'Where?', 'targets': A}, [Q], A),
  ('hh-rlhf as messages', {'prompt': HUMAN, 'response': A}, TURNS, A),
  (
    'xLAM',
    {
      'id': 3,
      'query': 'Where?',
      'answers': '[{"name": "find", "arguments": {"what": "key"}}]',
      'tools': '[{"name": "find", "parameters": {}}]',
    },
    [Q],
    CALL,
  ),
  ('KTO, a good one by number', {'prompt': 'Where?', 'completion': A, 'label': 1}, [Q], A),
  ('best of a ranking', {'messages': [Q], 'responses': [B, A], 'ranks': [2, 1]}, [Q], A),
  ('KTO, a good one', {'prompt': 'Where?', 'completion': A, 'label': True}, [Q], A),
]

# (name, row, messages, responses, ranks)
RANKINGS = [
  ('own pair', {'messages': [Q], 'chosen': A, 'rejected': B}, [Q], [A, B], [1, 2]),
  (
    'own ranking',
    {'messages': [Q], 'responses': [B, A, B], 'ranks': [2, 1, 2]},
    [Q],
    [B, A, B],
    [2, 1, 2],
  ),
  ('TRL', {'prompt': 'Where?', 'chosen': A, 'rejected': B}, [Q], [A, B], [1, 2]),
  (
    'TRL messages',
    {'prompt': TURNS, 'chosen': [assistant(A)], 'rejected': [assistant(B)]},
    TURNS,
    [A, B],
    [1, 2],
  ),
  (
    'TRL implicit prompt',
    {'chosen': [*TURNS, assistant(A)], 'rejected': [*TURNS, assistant(B)]},
    TURNS,
    [A, B],
    [1, 2],
  ),
  (
    'UltraFeedback binarized',
    {
      'prompt': 'Where?',
      'prompt_id': 'x',
      'messages': [Q, assistant(A)],
      'chosen': [Q, assistant(A)],
      'rejected': [Q, assistant(B)],
      'score_chosen': 8.5,
      'score_rejected': 3.0,
    },
    [Q],
    [A, B],
    [1, 2],
  ),
  (
    'UltraFeedback',
    {
      'instruction': 'Where?',
      'completions': [
        {'response': B, 'overall_score': 3.0},
        {'response': A, 'overall_score': 8.5},
        {'response': 'Eh.', 'overall_score': 3.0},
      ],
    },
    [Q],
    [B, A, 'Eh.'],
    [2, 1, 2],
  ),
  ('hh-rlhf', {'chosen': f'{HUMAN} {A}', 'rejected': f'{HUMAN} {B}'}, TURNS, [A, B], [1, 2]),
  (
    'Orca pairs',
    {'system': 'Be brief.', 'question': 'Where?', 'chosen': A, 'rejected': B},
    [SYSTEM, Q],
    [A, B],
    [1, 2],
  ),
  (
    'a chosen call',
    {'messages': [Q], 'chosen': CALL, 'rejected': assistant(B), 'tools': [TOOL]},
    [Q],
    [CALL, B],
    [1, 2],
  ),
  (
    'LLaMA-Factory',
    {
      'conversations': [{'from': 'human', 'value': 'Where?'}],
      'chosen': {'from': 'gpt', 'value': A},
      'rejected': {'from': 'gpt', 'value': B},
    },
    [Q],
    [A, B],
    [1, 2],
  ),
  (
    'OpenAI',
    {
      'input': {'messages': [Q], 'tools': []},
      'preferred_output': [assistant(A)],
      'non_preferred_output': [assistant(B)],
    },
    [Q],
    [A, B],
    [1, 2],
  ),
  (
    'PKU-SafeRLHF',
    {'prompt': 'Where?', 'response_0': B, 'response_1': A, 'better_response_id': 1},
    [Q],
    [B, A],
    [2, 1],
  ),
  (
    'a winner',
    {'prompt': 'Where?', 'response_a': A, 'response_b': B, 'winner': 'model_a'},
    [Q],
    [A, B],
    [1, 2],
  ),
  (
    'Chatbot Arena, a tie',
    {
      'conversation_a': [Q, assistant(A)],
      'conversation_b': [Q, assistant(B)],
      'winner': 'tie (bothbad)',
    },
    [Q],
    [A, B],
    [1, 1],
  ),
  (
    'SHP',
    {'history': 'Where?', 'human_ref_A': B, 'human_ref_B': A, 'labels': 0},
    [Q],
    [B, A],
    [2, 1],
  ),
  (
    'WebGPT',
    {
      'question': {'full_text': 'Where?'},
      'answer_0': B,
      'answer_1': A,
      'score_0': -1,
      'score_1': 1.0,
    },
    [Q],
    [B, A],
    [2, 1],
  ),
  (
    'TL;DR',
    {'info': {'post': 'It is there.'}, 'summaries': [{'text': A}, {'text': B}], 'choice': 0},
    [user('It is there.\n\nTL;DR:')],
    [A, B],
    [1, 2],
  ),
  (
    'Nectar',
    {
      'prompt': HUMAN + ' ',
      'answers': [{'answer': B, 'rank': 2.0}, {'answer': A, 'rank': 1.0}],
    },
    TURNS,
    [B, A],
    [2, 1],
  ),
  (
    'Stack Exchange',
    {'question': 'Where?', 'answers': [{'text': A, 'pm_score': 4}, {'text': B, 'pm_score': 0}]},
    [Q],
    [A, B],
    [1, 2],
  ),
  ('KTO', {'prompt': 'Where?', 'completion': B, 'label': False}, [Q], [B], [2]),
  (
    'KTO messages',
    {'prompt': [Q], 'completion': [assistant(A)], 'label': True},
    [Q],
    [A],
    [1],
  ),
  ('a rated conversation', {'messages': [Q, assistant(B)], 'label': False}, [Q], [B], [2]),
  (
    'SWIFT',
    {'messages': [Q, assistant(A)], 'rejected_response': B},
    [Q],
    [A, B],
    [1, 2],
  ),
  (
    'SWIFT messages',
    {'messages': [*TURNS, assistant(A)], 'rejected_messages': [*TURNS, assistant(B)]},
    TURNS,
    [A, B],
    [1, 2],
  ),
  (
    'Stack Exchange pairs',
    {'question': 'Where?', 'response_j': A, 'response_k': B, 'qid': 3},
    [Q],
    [A, B],
    [1, 2],
  ),
  (
    'HelpSteer3',
    {'context': TURNS, 'response1': B, 'response2': A, 'overall_preference': 2},
    TURNS,
    [B, A],
    [2, 1],
  ),
  (
    'HelpSteer3, a tie',
    {'context': [Q], 'response1': B, 'response2': A, 'overall_preference': 0},
    [Q],
    [B, A],
    [1, 1],
  ),
  (
    'fine-grained UltraFeedback',
    {
      'instruction': 'Where?',
      'completions': [
        {'response': B, 'fine-grained_score': 2.5, 'overall_score': 9},
        {'response': A, 'fine-grained_score': 4.5, 'overall_score': 7},
      ],
    },
    [Q],
    [B, A],
    [2, 1],
  ),
  (
    'distilabel',
    {'instruction': 'Where?', 'generations': [B, A], 'ratings': [1.0, 5.0]},
    [Q],
    [B, A],
    [2, 1],
  ),
  (
    'what generate and score wrote',
    {'prompt': 'Where?', 'responses': [B, A], 'scores': [0.5, 0.5]},
    [Q],
    [B, A],
    [1, 1],
  ),
  (
    'Chatbot Arena, turns in JSON',
    {
      'id': 30192,
      'model_a': 'x',
      'model_b': 'y',
      'prompt': '["Hi", "Where?"]',
      'response_a': '["Hello", "No."]',
      'response_b': '["Hello", "There."]',
      'winner_model_a': 0,
      'winner_model_b': 1,
      'winner_tie': 0,
    },
    TURNS,
    [B, A],
    [2, 1],
  ),
  (
    'HelpSteer2',
    {
      'split': 'train',
      'prompt': 'Where?',
      'response_1': A,
      'response_2': B,
      'preference_strength': -2,
      'preference_statement': 'Response 1 is better.',
    },
    [Q],
    [A, B],
    [1, 2],
  ),
  (
    'AlpacaFarm',
    {'instruction': 'Where?', 'input': '', 'output_1': B, 'output_2': A, 'preference': 2},
    [Q],
    [B, A],
    [2, 1],
  ),
  (
    'RewardBench 2',
    {'id': '0', 'prompt': 'Where?', 'chosen': [A], 'rejected': [B, 'Eh.', 'Oh.'], 'subset': 'Math'},
    [Q],
    [A, B, 'Eh.', 'Oh.'],
    [1, 2, 2, 2],
  ),
  ('KTO by number', {'prompt': 'Where?', 'completion': B, 'label': 0}, [Q], [B], [2]),
  ("LLaMA-Factory's KTO", {'messages': [Q, assistant(A)], 'kto_tag': True}, [Q], [A], [1]),
  (
    'a first question beside conversations',
    {'prompt': 'Hi', 'chosen': [*TURNS, assistant(A)], 'rejected': [*TURNS, assistant(B)]},
    TURNS,
    [A, B],
    [1, 2],
  ),
  ('own rating', {'messages': [Q], 'response': A, 'desirable': True}, [Q], [A], [1]),
]

# (name, row, messages, meta)
PROMPTS = [
  ('own', {'messages': [Q], 'meta': {'final': '4'}}, [Q], {'final': '4'}),
  ('a prompt', {'prompt': 'Where?'}, [Q], {}),
  ('TRL', {'prompt': [Q], 'solution': '4'}, [Q], {'solution': '4'}),
  (
    'verl',
    {'prompt': [Q], 'reward_model': {'ground_truth': '4'}, 'data_source': 'gsm8k'},
    [Q],
    {'reward_model': {'ground_truth': '4'}, 'data_source': 'gsm8k'},
  ),
  ('GSM8K', {'question': 'Where?', 'answer': A}, [Q], {'answer': A}),
  ('a conversation', {'messages': [*TURNS, assistant(A)]}, TURNS, {'response': A}),
  ('of a pair', {'chosen': f'{HUMAN} {A}', 'rejected': f'{HUMAN} {B}'}, TURNS, {'response': A}),
  (
    'SQuAD',
    {'question': 'Where?', 'context': 'A shelf.', 'answers': {'text': ['There']}},
    [user('A shelf.\n\nWhere?')],
    {'answers': {'text': ['There']}},
  ),
]


def named(cases):
  return pytest.mark.parametrize('case', cases, ids=[case[0] for case in cases])


@named(DEMONSTRATIONS)
def test_demonstrations(case):
  _, row, messages, response = case
  parsed = records.parse_record('demonstration', row, 'f:1')
  assert (parsed.messages, parsed.response) == (messages, response)


@named(RANKINGS)
def test_rankings(case):
  _, row, messages, responses, ranks = case
  parsed = records.parse_record('ranking', row, 'f:1')
  assert (parsed.messages, parsed.responses, parsed.ranks) == (messages, responses, ranks)


@named(PROMPTS)
def test_prompts(case):
  _, row, messages, meta = case
  parsed = records.parse_record('prompt', row, 'f:1')
  assert (parsed.messages, parsed.meta) == (messages, meta)


def test_tools_may_be_written_as_json():
  row = {'prompt': 'Where?', 'tools': '[{"type": "function"}]'}
  assert records.parse_record('prompt', row, 'f:1').tools == [{'type': 'function'}]


def test_functions_beside_calls_in_json_are_tools():
  row = {'query': 'Hi', 'answers': '[{"name": "find"}]', 'tools': '[{"name": "find"}]'}
  parsed = records.parse_record('demonstration', row, 'f:1')
  assert parsed.tools == [{'type': 'function', 'function': {'name': 'find'}}]


def test_turns_of_one_speaker_are_one_message():
  # hh-rlhf has them
  first = '\n\nHuman: Hi\n\nAssistant: One.\n\nTwo.\n\nAssistant: Three.'
  second = '\n\nHuman: Hi\n\nAssistant: No.'
  row = records.parse_record('preference', {'chosen': first, 'rejected': second}, 'f:1')
  assert (row.messages, row.chosen) == ([user('Hi')], 'One.\n\nTwo.\n\nThree.')


def test_a_question_that_only_looks_like_a_dialogue_stays_one():
  text = 'Human: what does this mean?'
  assert records.parse_record('prompt', {'prompt': text}, 'f:1').messages == [user(text)]


def test_the_shape_has_a_name_for_the_log():
  row = {'chosen': [Q, assistant(A)], 'rejected': [Q, assistant(B)]}
  assert shapes.parse_row(row, 'f:1').name == 'pairs of full conversations'
  row = {'instruction': 'Where?', 'output': A}
  assert shapes.parse_row(row, 'f:1').name == 'instructions with the field output'


@pytest.mark.parametrize(
  'kind, row, message',
  [
    (
      'demonstration',
      {'prompt': 'Hi', 'messages': [Q, assistant(A)]},
      'the fields "prompt" and "messages" say different things; remove one of them',
    ),
    (
      'ranking',
      {'prompt': 'Hi', 'chosen': [Q, assistant(A)], 'rejected': [Q, assistant(B)]},
      'field "prompt": it is not the prompt of the conversations in this row',
    ),
    (
      'ranking',
      {'chosen': [Q, assistant(A)], 'rejected': [user('Ho'), assistant(B)]},
      'fields "chosen" and "rejected": expected conversations that differ in the last response',
    ),
    ('ranking', {'chosen': A, 'rejected': B}, 'a pair without "messages" or "prompt"'),
    ('ranking', {'prompt': 'Hi', 'chosen': A, 'rejected': 3}, 'field "rejected": expected a text'),
    (
      'ranking',
      {'prompt': 'Hi', 'response': A},
      'a ranking needs the field "responses"; got the fields prompt, response',
    ),
    ('demonstration', {'prompt': 'Hi'}, 'a demonstration needs the field "response"'),
    (
      'demonstration',
      {'prompt': 'Hi', 'completion': A, 'label': 2},
      'field "label": expected true or false, got 2',
    ),
    (
      'demonstration',
      {'message_id': 'a', 'parent_id': None, 'message_tree_id': 'a', 'text': 'Hi', 'role': 'user'},
      'a row is one message of a tree ("message_id", "parent_id"); expected a whole conversation',
    ),
    (
      'demonstration',
      {'system': 'SYSTEM: Be brief.', 'chat': 'USER: Hi\n\n\nASSISTANT: Hello <|endoftext|>'},
      'field "chat": a transcript of "USER:" and "ASSISTANT:" turns is not read',
    ),
    (
      'demonstration',
      {'query': 'Hi', 'answers': '[find]', 'tools': '[]'},
      'field "answers": not JSON',
    ),
    (
      'ranking',
      {
        'prompt': '["Hi"]',
        'response_a': '[null]',
        'response_b': '["No."]',
        'winner_model_a': 1,
        'winner_model_b': 0,
        'winner_tie': 0,
      },
      'field "response_a": expected texts, got None',
    ),
    (
      'ranking',
      {'prompt': 'Hi', 'chosen': ['Hi', A], 'rejected': ['Hi', B]},
      'expected lists of responses, got the prompt as the first text',
    ),
    (
      'demonstration',
      {'messages': [user([{'type': 'image', 'image': 'x'}]), assistant(A)]},
      'field "messages": message 1: "content": expected parts of text, got \'image\'',
    ),
    ('prompt', {'conversations': [{'from': 'dog', 'value': 'Wau'}]}, "got 'dog'"),
    ('prompt', {'prompt': 'Hi', 'tools': 'find'}, 'field "tools": not JSON'),
    (
      'ranking',
      {'prompt': 'Hi', 'response_0': A, 'response_1': B, 'better_response_id': 2},
      'field "better_response_id": expected one of 0, 1, got 2',
    ),
    (
      'ranking',
      {'prompt': 'Hi', 'completions': [{'response': A}]},
      'field "completions": item 1: expected one of the texts response, text and one of the',
    ),
    (
      'demonstration',
      {'messages': [Q, assistant(A)], 'response': B},
      'field "response": it is not the response with which the messages end',
    ),
    ('demonstration', {'prompt': '<image>?', 'response': A, 'images': ['x.png']}, 'field "images"'),
    ('prompt', {'question': 'Where?', 'context': ['A', 'B']}, 'field "context": expected a text'),
    (
      'ranking',
      {'prompt': 'Hi', 'responses': [A, B], 'scores': [1, float('nan')]},
      'field "scores": expected a number, got nan',
    ),
    (
      'ranking',
      {'prompt': 'Hi', 'responses': [A, B], 'scores': [1]},
      'fields "responses" and "scores": expected lists of one length',
    ),
    (
      'ranking',
      {'messages': [Q, assistant(A)], 'rejected_messages': [user('Ho'), assistant(B)]},
      'field "rejected_messages": expected another response to the same messages',
    ),
    ('prompt', {'prompt': ''} | {'prompt': []}, 'expected at least one message, got none'),
  ],
)
def test_rows_that_say_nothing_clear_are_refused(kind, row, message):
  with pytest.raises(UserError) as error:
    records.parse_record(kind, row, 'f:1')
  assert str(error.value).startswith('f:1: ') and message in str(error.value)
  assert '\n' not in str(error.value)
