"""Loads the config of an experiment: the defaults of its stages, with the experiment's changes.

An experiment's file defines `get_config() → ConfigDict`, which sets only what
differs from the defaults. The keys of a config are `model, tokenizer, mesh,
evaluation, export, seed, stages, data`, and one section for each name in
`stages`. A section's `kind` is the kind of stage that it configures (by default
its own name), so that one experiment can run the same kind twice. The config is
checked before anything is compiled.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
import difflib
import importlib.util
import inspect
import json
import math
from pathlib import Path
import sys
import traceback
from types import ModuleType
from typing import Any

import ml_collections

from rlhf_jax import options as options_lib
from rlhf_jax import plain_text, stages
from rlhf_jax.errors import UserError, UserErrors
from rlhf_jax.stages.shared.kind import StageKind

TINY = 'tiny'  # FILE:tiny means the smallest form of an experiment

# The common sections of the tiny form, for experiments whose get_config has no argument `tiny`.
TINY_COMMON: dict[str, Any] = {
  'model': {
    'embed': 32,
    'layers': 2,
    'heads': 2,
    'kv_heads': 1,
    'head_dim': 16,
    'mlp': 64,
  },
  'tokenizer': {'documents': 400},
  'evaluation': {'data': {'count': 16}, 'batch_size': 16},
}


def load(
  path: str,
  overrides: Iterable[str] = (),
  *,
  defaults: Mapping[str, Any],
) -> ml_collections.ConfigDict:
  """Loads the full, locked config of an experiment.

  Args:
    path: the experiment's file; `FILE:tiny` is its tiny form.
    overrides: texts 'section.key=value', which take precedence over the file.
    defaults: the common sections with their defaults, as nested dicts.

  Returns:
    A locked ConfigDict with every key of every section.

  Raises:
    UserError: the file is missing, a key is unknown (the message suggests a similar
      one), or a value has the wrong type.
  """
  overrides = list(overrides)
  changes = _read_experiment(path)
  names = _check_stage_names(changes.get('stages', ()), path)
  override_changes = [_parse_override(override) for override in overrides]
  all_defaults = dict(defaults)
  for name in names:
    all_defaults[name] = _section_defaults(name, [changes, *override_changes])
  # Two sections may share a nested dict of defaults, but must not share changes of it.
  config = ml_collections.ConfigDict(_copy(all_defaults))
  mistakes = list(_merge(config, changes, 'config', path))
  for override, values in zip(overrides, override_changes, strict=True):
    mistakes += _merge(config, values, 'config', f'--config.{override}')
  raise_mistakes(mistakes)
  _check_stages(config, names, all_defaults)
  return config.lock()


def load_plain(path: str, overrides: Iterable[str] = ()) -> ml_collections.ConfigDict:
  """Loads a config without stages, such as that of a reproduction: it has no defaults.

  Args:
    path: the file; `FILE:SIZE` calls `get_config(SIZE)`.
    overrides: texts 'section.key=value' of keys that the file sets.

  Returns:
    A locked ConfigDict.

  Raises:
    UserError: the file, a key or a value is wrong.
  """
  file, _, size = path.partition(':')
  if not Path(file).is_file():
    raise UserError(f'--config={path}: no such file')
  try:
    get_config = _import_file(file).get_config
    config = get_config(size) if size else get_config()
  except (Exception, SystemExit) as error:  # a size that it does not have is one of them
    raise UserError(f'{_place_of(error, file)}: {plain_text.describe_error(error)}') from error
  mistakes: list[str] = []
  for override in overrides:
    mistakes += _merge(config, _parse_override(override), 'config', f'--config.{override}')
  raise_mistakes(mistakes)
  return config.lock()


def default_values(
  config: ml_collections.ConfigDict, defaults: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns a config with the same stages and choices in which all else is the default.

  Args:
    config: a loaded config.
    defaults: the common sections with their defaults, as nested dicts.
  """
  values = config.to_dict()
  usual = {**defaults, 'stages': values['stages']}
  for name in config.stages:
    usual[name] = _section_defaults(name, [values])
    # The choices too: their defaults would have other settings.
    for field in stages.find(config[name].kind).choices:
      usual[name][field] = values[name][field]
  return usual


def _section_defaults(name: str, all_changes: list[dict[str, Any]]) -> dict[str, Any]:
  """Returns the defaults of a stage's section, including the settings of its choices.

  A choice is a field such as `loss`, whose value brings settings of its own.

  Args:
    name: the name of the section.
    all_changes: changes of the whole config, as nested dicts; later ones take precedence.

  Returns:
    The section with its `kind`, as nested dicts.

  Raises:
    UserError: there is no such kind of stage, or no such choice.
  """
  section_changes = [
    changes[name] for changes in all_changes if isinstance(changes.get(name), dict)
  ]
  kind = name
  if section_changes:
    kind = section_changes[0].get('kind', name)
  if not isinstance(kind, str) or kind not in stages.kinds():
    hint = nearest_name(str(kind), stages.kinds())
    raise UserError(f'config.{name}.kind: no stage is called {kind!r}{hint}')
  stage = stages.find(kind)
  section = {'kind': kind, **options_lib.defaults(stage.options)}
  for field, settings in stage.choices.items():
    # The settings depend on the choice, so it is looked up before the changes are merged.
    choice = section[field]
    for changes in section_changes:
      choice = changes.get(field, choice)
    section |= options_lib.defaults(_settings_of(settings, choice, f'config.{name}.{field}'))
  return section


def _check_stage_names(names: Any, where: str) -> tuple[str, ...]:
  """Returns the names of stages; raises UserError unless they are several texts, all different."""
  known = ', '.join(stages.kinds())
  if isinstance(names, str):  # a single name needs no brackets
    names = (names,)
  if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
    raise UserError(f'{where}: config.stages: expected names such as {known}, got {names!r:.80}')
  if not names:
    raise UserError(f'{where}: config.stages names no stage; expected some of {known}')
  if len({*names}) < len(names):
    raise UserError(f'{where}: config.stages names a stage twice: {names!r:.200}')
  return tuple(names)


def check_values(config: ml_collections.ConfigDict, common: type) -> None:
  """Checks every number of a config, and refuses settings that have no effect.

  Args:
    config: the config, with all changes.
    common: the options class of the keys beside the stages' sections.

  Raises:
    UserError: something is wrong; it names all mistakes.
  """
  given: Any = options_lib.from_section(common, config)
  mistakes = options_lib.find_mistakes(given, common(), 'config')
  for name in dict.fromkeys(config.stages):
    stage = kind_of(config, name)
    section = config[name]
    options_classes = [stage.options]
    for field, settings in stage.choices.items():
      options_classes.append(settings[section[field]])
    for options_class in options_classes:
      given = options_lib.from_section(options_class, section)
      mistakes += options_lib.find_mistakes(given, options_class(), f'config.{name}')
  raise_mistakes(mistakes)


def raise_mistakes(mistakes: Sequence[str]) -> None:
  """Raises a UserError with all mistakes; returns if there are none."""
  distinct = list(dict.fromkeys(mistakes))
  if len(distinct) > 1:
    raise UserErrors(distinct)
  if distinct:
    raise UserError(distinct[0])


def _settings_of(settings: Mapping[str, type], choice: Any, where: str) -> type:
  """Returns the settings class of a choice; raises UserError if there is no such choice."""
  if not isinstance(choice, str) or choice not in settings:
    raise UserError(f'{where}: expected one of {", ".join(settings)}, got {choice!r}')
  return settings[choice]


def _check_stages(
  config: ml_collections.ConfigDict,
  names: Iterable[str],
  all_defaults: Mapping[str, Any],
) -> None:
  """Checks that an override has neither added a stage nor changed the kind of one.

  Args:
    config: the config with all changes.
    names: the stages in the experiment's file; an override may drop or repeat them.
    all_defaults: the config before the changes.

  Raises:
    UserError: it has.
  """
  names = list(names)
  for name in _check_stage_names(config.stages, '--config.stages'):
    if name not in names:
      hint = nearest_name(str(name), names)
      if ',' in name:  # a list that was read as one text
        hint = f'; several are written as "--config.stages={tuple(names[:2])}"'
      raise UserError(f'config.stages: the experiment has no stage {name!r}{hint}')
    if config[name].kind != all_defaults[name]['kind']:
      raise UserError(
        f'--config.{name}.kind={config[name].kind}: the kind of a stage can be given in the '
        'experiment only'
      )


# The experiment's file.


def _read_experiment(path: str) -> dict[str, Any]:
  """Runs an experiment's file and returns its changes to the defaults, as nested dicts."""
  path, _, variant = path.partition(':')
  if variant not in ('', TINY):
    raise UserError(f'--config={path}:{variant}: expected nothing or "tiny" after the colon')
  if not Path(path).is_file():
    raise UserError(f'--config={path}: no such file')
  wants_tiny = variant == TINY
  try:
    config, is_tiny = _call_experiment(_import_file(path), wants_tiny)
  except (Exception, SystemExit) as error:  # the user's own code may raise anything
    raise UserError(f'{_place_of(error, path)}: {plain_text.describe_error(error)}') from error
  if not isinstance(config, ml_collections.ConfigDict):
    kind = type(config).__name__
    raise UserError(f'{path}: get_config(): expected a ConfigDict, got {kind}')
  changes = config.to_dict()
  return shrink(changes) if wants_tiny and not is_tiny else changes


def _call_experiment(module: ModuleType, wants_tiny: bool) -> tuple[Any, bool]:
  """Calls an experiment's get_config; returns its result, and whether that is tiny already."""
  get_config = getattr(module, 'get_config', None)
  if not callable(get_config):
    raise UserError('expected a function get_config() that returns a ConfigDict')
  if TINY in inspect.signature(get_config).parameters:
    return get_config(tiny=wants_tiny), wants_tiny
  return get_config(), False


def _place_of(error: BaseException, path: str) -> str:
  """Returns the line of an experiment's file that an error comes from, 'FILE:LINE'."""
  if isinstance(error, SyntaxError) and error.lineno:
    return f'{error.filename or path}:{error.lineno}'
  for frame in reversed(traceback.extract_tb(error.__traceback__)):
    if frame.filename == path:
      return f'{path}:{frame.lineno}'
  return path


def _import_file(path: str) -> ModuleType:
  """Imports an experiment's file, which may import other files of its folder."""
  spec = importlib.util.spec_from_file_location('experiment', path)
  if spec is None or spec.loader is None:
    raise UserError('expected a Python file, whose name ends in .py')
  module = importlib.util.module_from_spec(spec)
  sys.path.insert(0, str(Path(path).resolve().parent))
  try:
    spec.loader.exec_module(module)
  finally:
    sys.path.pop(0)  # later imports must not look in that folder
  return module


def shrink(changes: Mapping[str, Any]) -> dict[str, Any]:
  """Makes the tiny form of an experiment: the tiny form of each of its stages, and a tiny model.

  Args:
    changes: the experiment's changes to the defaults, as nested dicts.

  Returns:
    The changes, with those of the tiny form merged over them.
  """
  small = _overlay(changes, TINY_COMMON)
  for name in changes.get('stages', ()):
    section = changes.get(name, {})
    kind = section.get('kind', name)
    if kind in stages.kinds():  # `load` refuses an unknown one with a better message
      small[name] = _overlay(section, stages.find(kind).tiny)
  return small


def _overlay(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
  """Merges nested changes over nested values, into a new dict."""
  result = dict(values)
  for key, change in changes.items():
    nested = isinstance(change, Mapping) and isinstance(result.get(key, {}), Mapping)
    result[key] = _overlay(result.get(key, {}), change) if nested else change
  return result


def _parse_override(override: str) -> dict[str, Any]:
  """Parses 'a.b=value' into {'a': {'b': value}}; a value that is not a Python literal is a text."""
  key, equals, text = override.partition('=')
  if not equals:
    raise UserError(f'--config.{override}: expected --config.{key}=VALUE')
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):  # a bare word, such as dpo
    value = text
  for part in reversed(key.split('.')):  # from the innermost dict outwards
    value = {part: value}
  return value


# Merging changes into defaults.


def _copy(value: Any) -> Any:
  """Copies nested dicts."""
  if isinstance(value, dict):
    return {key: _copy(item) for key, item in value.items()}
  return value


def _merge(
  config: ml_collections.ConfigDict,
  changes: Mapping[str, Any],
  name: str,
  where: str,
) -> Iterator[str]:
  """Merges changes into a config, in place, and yields a message for each mistake in them.

  Args:
    config: the defaults, changed in place.
    changes: nested dicts.
    name: the name of this part of the config, for error messages.
    where: the file or the command-line argument that the changes come from.

  Yields:
    Messages: the config does not have a key, or a value has the wrong type.
  """
  for key, value in changes.items():
    full_name = f'{name}.{key}'
    if key not in config:
      hint = nearest_name(key, config)
      yield f'{where}: {full_name} is no known key{hint}'
      continue
    # An empty ConfigDict is an open table, whose keys the user chooses.
    is_section = isinstance(config[key], ml_collections.ConfigDict) and len(config[key]) > 0
    if not is_section:
      try:
        config[key] = _as_type_of(config[key], value, full_name, where)
      except UserError as error:
        yield str(error)
    elif isinstance(value, dict):
      yield from _merge(config[key], value, full_name, where)
    else:
      yield f'{where}: {full_name} is a section, got {value!r}'


def _as_type_of(default: Any, value: Any, name: str, where: str) -> Any:
  """Converts a value to the type of its default.

  Args:
    default: of this key.
    value: the new value.
    name: the full name of the key, for error messages.
    where: the file or the command-line argument that the value comes from.

  Raises:
    UserError: the value has another type, and cannot be converted without a loss.
  """
  kind = type(default)
  if kind is ml_collections.ConfigDict:  # an open table, empty by default
    kind = dict
  # type() rather than isinstance, which would accept True as an int.
  if kind is float and type(value) in (int, float) and not _is_finite(value):
    raise UserError(f'{where}: {name} must be a finite number, got {value!r:.40}')
  if kind is int and type(value) is int and value.bit_length() > 63:
    raise UserError(f'{where}: {name} must be a number of 64 bits, got {value!r:.40}')
  if kind is float and type(value) is int:
    return float(value)
  if kind is tuple and type(value) is str:  # a single name needs no brackets
    return (value,)
  if kind is tuple and type(value) is list:  # JSON has no tuples
    return tuple(value)
  if type(value) is not kind:
    expected = ', True or False' if kind is bool else ''
    raise UserError(
      f'{where}: {name} must be {kind.__name__}{expected}, got {type(value).__name__} {value!r}'
    )
  return value


def _is_finite(value: float) -> bool:
  """Tells whether a number is one that a float can hold."""
  try:
    return math.isfinite(value)
  except OverflowError:  # an int
    return False


def nearest_name(name: str, known: Iterable[str]) -> str:
  """Returns a hint to append to an error message: '; did you mean …?', or all known names."""
  known = list(known)
  close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  if close:
    return f'; did you mean {close[0]!r}?'
  return f'; known here: {", ".join(sorted(known))}'


# Reading and comparing loaded configs.


def resolve(config: ml_collections.ConfigDict, **places: Any) -> ml_collections.ConfigDict:
  """Replaces placeholders such as {workdir} in all texts of a config.

  A seed of data that is -1 becomes the seed of the run.

  Args:
    config: with all changes merged.
    **places: name → what {name} is replaced by.

  Returns:
    A new, locked config.
  """
  # str.replace rather than str.format, as texts may have other braces.

  def replace(value: Any) -> Any:
    if isinstance(value, dict):
      return {key: seed_of_run(key, replace(item)) for key, item in value.items()}
    if isinstance(value, tuple):
      return tuple(replace(item) for item in value)
    if isinstance(value, str):
      for name, place in places.items():
        value = value.replace('{' + name + '}', str(place))
    return value

  def seed_of_run(key: str, value: Any) -> Any:
    return config.seed if (key, value) == ('seed', -1) else value

  return ml_collections.ConfigDict(replace(config.to_dict())).lock()


def as_json(config: ml_collections.ConfigDict) -> str:
  """Returns the config as JSON; equal configs give equal texts."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True, default=list) + '\n'


def differences(old: Mapping[str, Any], new: Mapping[str, Any], name: str = 'config') -> list[str]:
  """Lists the differences of two configs read from JSON, as texts 'key: old → new'."""
  lines = []
  for key in sorted({*old, *new}):
    before = old.get(key)
    after = new.get(key)
    if isinstance(before, dict) and isinstance(after, dict):
      lines += differences(before, after, f'{name}.{key}')
    elif before != after:
      lines.append(f'{name}.{key}: {before!r} → {after!r}')
  return lines


def complete(
  old: Mapping[str, Any],
  config: ml_collections.ConfigDict,
  defaults: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
  """Gives the config of an older version those later settings that are left at their defaults.

  The default of a new setting means what the code did before there was the setting, so a
  run without it and one with its default are the same. A setting with any other
  value stays missing, and so does one that only the old config has: they differ.

  Args:
    old: a config read from JSON; it is not changed.
    config: the config of this run, in which every setting has a value.
    defaults: the common sections with their defaults, as nested dicts.

  Returns:
    (the completed config, the settings that it lacked, such as 'config.model.numerics').
  """
  usual = default_values(config, defaults)
  for name in config.stages:
    stage = stages.find(config[name].kind)
    for field in stage.choices:  # a new choice meant its default too, whatever this run chooses
      usual[name][field] = options_lib.defaults(stage.options)[field]
  usual = {key: value for key, value in usual.items() if key not in config.stages or key in old}
  completed = json.loads(json.dumps(old))
  new = json.loads(as_json(config))
  lacking = _add_defaults(completed, new, json.loads(json.dumps(usual, default=list)), 'config')
  return completed, list(lacking)


def describe_lacking(names: Sequence[str]) -> str:
  """Says in one phrase that an older config lacks these settings."""
  more = f' and {len(names) - 3} more' if len(names) > 3 else ''
  settings = f'{", ".join(names[:3])}{more}'
  return f'an older version wrote it, without {settings}; the defaults count'


def _add_defaults(
  old: dict[str, Any], new: Mapping[str, Any], usual: Mapping[str, Any], name: str
) -> Iterator[str]:
  """Adds to `old`, in place, what it lacks and `new` has as usual; yields the names."""
  for key in sorted({*new} & {*usual}):
    full_name = f'{name}.{key}'
    # Empty tables, whose keys the user chooses, are values.
    if isinstance(usual[key], dict) and usual[key]:
      section = old.setdefault(key, {})
      if isinstance(section, dict):
        yield from _add_defaults(section, new[key], usual[key], full_name)
    elif key not in old and new[key] == usual[key]:
      old[key] = new[key]
      yield full_name


def kind_of(config: ml_collections.ConfigDict, name: str) -> StageKind:
  """Returns the kind of a stage of the config."""
  return stages.find(config[name].kind)
