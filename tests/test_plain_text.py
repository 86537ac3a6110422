from rlhf_jax import plain_text


def test_what_a_terminal_would_obey_is_escaped():
  text = 'é\t\x1b]0;title\x07\x9b1m\u202e\ud800\x00'
  assert plain_text.visible(text) == 'é\t\\x1b]0;title\\x07\\x9b1m\\u202e\\ud800\\x00'
  plain_text.visible(text).encode()  # any stream can write it


def test_one_line():
  assert plain_text.one_line('a\n\n b\r\nc') == 'a b c'
  assert plain_text.one_line('x' * 50, 10) == 'xxxxx … xxxxx'
  assert plain_text.describe_error(ValueError('a\nb')) == 'ValueError: a b'
  assert plain_text.describe_error(KeyError()) == 'KeyError'
