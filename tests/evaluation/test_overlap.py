from rlhf_jax.evaluation import overlap

PROMPTS = [
  'What is the capital of Spain?',
  'Where does Mira live?',
  'Tell me a long story about a dog that walks through all the streets of a town at night.',
  '???',
]


def test_copies_and_runs_are_found():
  training = [
    'what is the CAPITAL of spain',  # the same words
    'I know where does Mira live, she said.',  # contains a whole short prompt
    'He saw a dog that walks through all the streets of a town at night and fled.',
    '!!!',
  ]
  found = overlap.find_overlap(PROMPTS, iter(training))
  assert found.copies == [0] and found.contained == [0, 1, 2] and found.prompts == 4


def test_a_shorter_run_is_no_overlap():
  training = ['a dog that walks through all the streets', 'the capital of Spain']
  assert overlap.find_overlap(PROMPTS, training).contained == []
  assert overlap.find_overlap(PROMPTS, training, window=5).contained == [2]
