"""IFEval's instructions: for each a response that follows it and some that do not."""

from pathlib import Path
import sys

import pytest

from rlhf_jax.data import records
from rlhf_jax.errors import UserError
from rlhf_jax.rewards.builtin import instructions

PROMPTS = Path(__file__).resolve().parents[3] / 'shared' / 'data'
ENGLISH = 'the town lies by a river, and many people who live there work in the old harbour'
GERMAN = (
  'Die Stadt liegt an einem Fluss, und viele Menschen, die dort wohnen, arbeiten im alten Hafen.'
)
# instruction → kwargs, responses that follow it, responses that do not
CASES = {
  'change_case:capital_word_frequency': (
    dict(capital_relation='at least', capital_frequency=2),
    ['I say NO.', 'WELL-KNOWN U.S. law'],
    ['I say no', 'Well, A'],
  ),
  'change_case:english_capital': ({}, [ENGLISH.upper() + '.'], [ENGLISH, GERMAN.upper(), '123!']),
  'change_case:english_lowercase': (
    {},
    [ENGLISH + '.'],
    ['T' + ENGLISH[1:], GERMAN.lower(), '123!'],
  ),
  'combination:repeat_prompt': (
    dict(prompt_to_repeat='Say it. '),
    ['say IT. It.', '\n Say it.'],
    ['It.', 'I say it. It.'],
  ),
  'combination:two_responses': (
    {},
    ['one\n******\ntwo', '******one******two******'],
    ['one', 'one****** one', 'a******b******c', 'one******', 'one************two'],
  ),
  'detectable_content:number_placeholders': (
    dict(num_placeholders=2),
    ['[name], [age]', '[][]'],
    ['[name]', '[a\n] [b'],
  ),
  'detectable_content:postscript': (
    dict(postscript_marker='P.P.S'),
    ['Bye\np. p. s. more', 'P.P.S'],
    ['P.S. more'],
  ),
  'detectable_format:constrained_response': (
    {},
    ['My answer is no.', 'Well: My answer is maybe.'],
    ['No.', 'my answer is no'],
  ),
  'detectable_format:json_format': (
    {},
    ['{"a": [1]}', '```json\n{"a": 1}\n```', '```\n[]```'],
    ['{a: 1}', 'Here: {"a": 1}', '[' * 50000, '9' * 5000],
  ),
  'detectable_format:multiple_sections': (
    dict(section_spliter='Section', num_sections=2),
    ['Section 1\na\nSection 2', 'Section1 Section 2 Section 3'],
    ['Section 1', 'SECTION 1 SECTION 2', 'Section one, Section two'],
  ),
  'detectable_format:number_bullet_lists': (
    dict(num_bullets=2),
    ['* a\n* b', 'List:\n  - a\n* b'],
    ['* a', '* a\n* b\n- c', '**a**\n**b**', 'a * b'],
  ),
  'detectable_format:number_highlighted_sections': (
    dict(num_highlights=2),
    ['*a* and *b*', '**a** *b c*'],
    ['*a*', '**a**', '* * ** **', '*a\nb* *c\nd*'],
  ),
  'detectable_format:title': (
    {},
    ['<<Ode>>\nOh', '<<a>> <<b>>'],
    ['<Ode>', '<<>>', '<< >>', '<<a\nb>>'],
  ),
  'keywords:existence': (
    dict(keywords=['war', 'C++']),
    ['Warm c++', 'C++ war'],
    ['war', 'C war', 'ccc war'],
  ),
  'keywords:forbidden_words': (
    dict(forbidden_words=['war', 'big deal']),
    ['warm', 'a big  deal'],
    ['War!', 'no BIG DEAL'],
  ),
  'keywords:frequency': (
    dict(keyword='a.b', relation='less than', frequency=2),
    ['a.b axb', 'none'],
    ['A.B xa.bx'],
  ),
  'keywords:letter_frequency': (
    dict(letter='e', let_relation='at least', let_frequency=3),
    ['Eee', 'even pEace'],
    ['ee', 'é' * 9],
  ),
  'language:response_language': (dict(language='de'), [GERMAN], [ENGLISH, '123!', '?']),
  'length_constraints:nth_paragraph_first_word': (
    dict(num_paragraphs=2, nth_paragraph=2, first_word='it'),
    ['a\n\n"It\'s b', '\n\na b\n\n\n\nIT, yes'],
    ['It\n\na', 'a\nIt', 'a\n\nIt\n\nb', 'a\n\nItem', 'It'],
  ),
  'length_constraints:number_paragraphs': (
    dict(num_paragraphs=2),
    ['a\n***\nb', '***a\n\nc *** b***'],
    ['a\n\nb', 'a***', 'a***b***c', 'a******b', '***'],
  ),
  'length_constraints:number_sentences': (
    dict(relation='less than', num_sentences=3),
    ['One. Two!', 'Dr. J. Smith, e.g., was paid 3.50. Was he?', 'one\ntwo\n3'],
    ['One. Two! Three?', '"One." (Two.) *Three!*', 'One.\nTwo.\nthree', 'a. b! ' * 999],
  ),
  'length_constraints:number_words': (
    dict(relation='at least', num_words=3),
    ['a b c', "it's-b"],
    ['a b', '- . a'],
  ),
  'punctuation:no_comma': ({}, ['a; b'], ['a, b', '1,000']),
  'startend:end_checker': (
    dict(end_phrase='Any other questions?'),
    ['a. any other questions?\n', '"Any other questions?"'],
    ['Any other questions? No.', 'questions?'],
  ),
  'startend:quotation': ({}, ['"a"', ' "a" b"\n'], ['a', '"', '"a', '“a”']),
}


def prompt(*pairs):
  return records.Prompt(
    'p1',
    '',
    '',
    [],
    {'instruction_id_list': [name for name, _ in pairs], 'kwargs': [given for _, given in pairs]},
  )


def test_every_check_has_a_case():
  assert set(CASES) == set(instructions.CHECKS)


@pytest.mark.parametrize('name', CASES)
def test_check(name):
  if name.startswith('language') or 'english' in name:
    pytest.importorskip('langdetect')
  given, right, wrong = CASES[name]
  record = prompt((name, {**given, 'a kwarg of another check': None}))
  for response in [*right, *wrong, '', ' \n']:
    value = instructions.follows([[]], [response], [record])[0]
    assert (
      value == instructions.follows_all([[]], [response], [record])[0] == float(response in right)
    ), response


def test_shares():
  record = prompt(
    ('punctuation:no_comma', None),
    ('startend:quotation', {}),
    ('keywords:existence', dict(keywords=['a'])),
  )
  responses = ['"a"', '"a, b"', 'b, c', '']
  assert instructions.follows([], responses, [record] * 4) == pytest.approx([1, 2 / 3, 0, 0])
  assert instructions.follows_all([], responses, [record] * 4) == [1, 0, 0, 0]


@pytest.mark.parametrize(
  'ids, kwargs, said',
  [
    (None, None, 'needs "instruction_id_list"'),
    ([], [], 'as many "kwargs"'),
    (['punctuation:no_comma'], [], 'as many "kwargs"'),
    (['punctuation:no_dot'], [{}], "'punctuation:no_dot': no such check"),
    (['keywords:existence'], [{'keywords': None}], "'keywords:existence': kwargs lack 'keywords'"),
    (
      ['keywords:frequency'],
      [dict(keyword='a', relation='twice', frequency=2)],
      "'keywords:frequency': .*'twice'",
    ),
    (['startend:end_checker'], [{'end_phrase': 3}], "'startend:end_checker': "),
  ],
)
def test_records_that_cannot_be_checked(ids, kwargs, said):
  record = records.Prompt('p1', '', '', [], {'instruction_id_list': ids, 'kwargs': kwargs})
  with pytest.raises(UserError, match=f'record p1: .*{said}'):
    instructions.follows([], ['a'], [record])


def test_the_missing_library_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'langdetect', None)
  with pytest.raises(
    UserError, match=r'langdetect is not installed, run: pip install rlhf_jax\[ifeval\]'
  ):
    instructions.follows([], ['a'], [prompt(('language:response_language', dict(language='en')))])


@pytest.mark.skipif(not PROMPTS.is_dir(), reason='the shared data are not here')
def test_every_shared_record_can_be_checked():
  pytest.importorskip('langdetect')
  files = [PROMPTS / f'prompts.{split}.jsonl.gz' for split in ('train', 'validation')]
  rows = [
    row for file in files for row in records.read_records(file, 'prompt') if row.source == 'ifeval'
  ]
  assert len(rows) == 407
  assert {name for row in rows for name in row.meta['instruction_id_list']} == set(
    instructions.CHECKS
  )
  values = instructions.follows([], [row.messages[-1]['content'] for row in rows], rows)
  assert 0.2 < sum(values) / len(values) < 0.6
