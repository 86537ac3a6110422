"""Functions by their names in a config."""

import os
import sys
import textwrap

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.named_functions import find_function


@pytest.fixture
def module(tmp_path, monkeypatch):
  """A module in the current directory, which is not on the path."""
  code = """
    LIMIT = 3

    def greet(name, mark='!', times=1):
      return f'Hello {name}{mark * times}'

    def no_argument():
      return ''
  """
  (tmp_path / 'broken_functions.py').write_text('LIMIT = 3\ndef greet(name)\n')
  (tmp_path / 'stopping_functions.py').write_text('LIMIT = 1 / 0\n')
  (tmp_path / 'own_functions.py').write_text(textwrap.dedent(code))
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', [path for path in sys.path if path != os.getcwd()])
  monkeypatch.delitem(sys.modules, 'own_functions', raising=False)
  return 'own_functions'


def test_with_options_and_without(module):
  assert find_function(f'{module}:greet', 'judge', ['name'])('you') == 'Hello you!'
  bound = find_function(f"{module}:greet(mark='?', times=2)", 'judge', ['name'])
  assert bound('you') == 'Hello you??' and bound.keywords == {'mark': '?', 'times': 2}
  assert find_function('os.path:basename', 'judge', ['name'])('a/b') == 'b'


@pytest.mark.parametrize(
  'name, message',
  [
    ('own_functions:nothing', 'nothing'),
    ('own_functions:LIMIT', "got 'LIMIT' is 3"),
    ('own_functions:no_argument', 'can be called with (name), got one of (): too many'),
    ('own_functions:greet(marc=1)', "unexpected keyword argument 'marc'"),
    ('broken_functions:greet', 'broken_functions.py, line 2'),
    ('stopping_functions:greet', 'stopping_functions.py:1: ZeroDivisionError'),
    ('nowhere:f', 'nowhere'),
    (':f', 'Empty module name'),
    ('own_functions:', 'expected a function of the module'),
    ('own_functions:greet(3)', 'options must be given by name'),
    ('own_functions:greet(**{})', 'options must be given by name'),
    ('own_functions:greet(mark=open)', 'expected module:function(option=value'),
    ('own_functions:greet(mark=', 'expected module:function(option=value'),
    ('own_functions:greet()+1', 'expected module:function(option=value'),
  ],
)
def test_what_is_wrong_is_named(module, name, message):
  with pytest.raises(UserError) as error:
    find_function(name, 'judge', ['name'])
  assert str(error.value).startswith(f'judge {name!r}: ')
  assert message in str(error.value) and '\n' not in str(error.value)
