import dataclasses

import ml_collections

from rlhf_jax import options


@dataclasses.dataclass(frozen=True)
class Inner:
  size: int = 3


@dataclasses.dataclass(frozen=True)
class Outer:
  name: str = 'a'
  inner: Inner = Inner()
  other: Inner | None = None
  table: dict = dataclasses.field(default_factory=lambda: {'x': 1})


def test_defaults_are_nested_dicts():
  expected = {'name': 'a', 'inner': {'size': 3}, 'other': None, 'table': {'x': 1}}
  assert options.defaults(Outer) == expected


def test_tables_are_copied():
  outer = Outer()
  options.as_dict(outer)['table']['x'] = 2
  assert outer.table == {'x': 1}


def test_a_section_becomes_options():
  section = {'kind': 'stage', 'name': 'b', 'inner': {'size': 4}, 'other': {'size': 5}, 'table': {}}
  expected = Outer(name='b', inner=Inner(4), other=Inner(5), table={})
  assert options.from_section(Outer, section) == expected
  config = ml_collections.ConfigDict(section)
  made = options.from_section(Outer, config)
  assert made == expected and type(made.table) is dict


def test_missing_keys_keep_their_defaults():
  assert options.from_section(Outer, {'inner': {}}) == Outer()
  assert options.from_section(Outer, options.defaults(Outer)) == Outer()


@dataclasses.dataclass(frozen=True)
class Lists:
  names: tuple[str, ...] = ()
  weights: options.Weights = ()
  table: dict[str, str] = dataclasses.field(default_factory=dict)


def test_elements_have_the_type_of_their_list_or_table():
  right = Lists(('a',), (1, 0.5), {'a': 'b'})
  assert not options.find_mistakes(right, Lists(), 'config')
  wrong = Lists((1,), ('a',), {'a': 2})
  assert options.find_mistakes(wrong, Lists(), 'config') == [
    'config.names: expected str for each element, got int 1 at 0',
    "config.weights: expected float for each element, got str 'a' at 0",
    "config.table: expected str for each element, got int 2 as 'a'",
  ]
