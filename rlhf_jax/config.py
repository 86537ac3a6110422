"""An experiment's config: what it says, over the defaults of its stages, checked before anything compiles.

An experiment file gives `get_config(tiny=False) → ConfigDict` and says only what it changes. Its sections: `model,
tokenizer, mesh, evaluation, seed, stages`, and one for each name in `stages`. The section's `kind` says which stage it
is (its own name by default), so that one experiment can run a stage twice. The names a stage lists in `init` and the
like are earlier sections, stage folders of other runs, or Hugging Face directories.
"""

import ast
import difflib
import importlib.util
import json
from pathlib import Path
import sys

import ml_collections

from rlhf_jax.errors import UserError


def load(path: str, overrides=(), *, defaults: dict, stage_defaults: dict) -> ml_collections.ConfigDict:
  """The full, locked config of an experiment.

  Args:
    path: the experiment's file; `path:tiny` asks for its tiny form.
    overrides: strings 'section.key=value'.
    defaults: the common sections.
    stage_defaults: kind of stage → its section.

  Raises:
    UserError: missing file, unknown key (with the nearest right one), wrong type.
  """
  said = _experiment(path)
  stages = said.get('stages', ())
  if not stages:
    raise UserError(f'{path}: config.stages names no stage; expected some of {", ".join(stage_defaults)}')
  full = dict(defaults)
  for name in stages:
    kind = said.get(name, {}).get('kind', name)
    if kind not in stage_defaults:
      raise UserError(f'config.{name}.kind: no stage is called {kind!r}{_nearest(kind, stage_defaults)}')
    full[name] = dict(kind=kind, **stage_defaults[kind])
  config = ml_collections.ConfigDict(_copy(full))  # sections that share a default must not share its changes
  _merge(config, said, 'config', path)
  for override in overrides:
    key, equals, value = override.partition('=')
    if not equals:
      raise UserError(f'--config.{override}: expected --config.{key}=VALUE')
    try:
      value = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      pass  # a bare word is a string
    for part in reversed(key.split('.')):
      value = {part: value}
    _merge(config, value, 'config', f'--config.{override}')
  for name in config.stages:
    if name not in stages:
      raise UserError(f'config.stages: the experiment has no stage {name!r}{_nearest(str(name), stages)}')
    if config[name].kind != full[name]['kind']:
      raise UserError(f'--config.{name}.kind={config[name].kind}: the kind of a stage can be said in the experiment only')
  return config.lock()


def _experiment(path):
  path, _, variant = path.partition(':')
  if variant not in ('', 'tiny'):
    raise UserError(f'--config={path}:{variant}: expected nothing or "tiny" after the colon')
  if not Path(path).is_file():
    raise UserError(f'--config={path}: no such file')
  spec = importlib.util.spec_from_file_location('experiment', path)
  module = importlib.util.module_from_spec(spec)
  sys.path.insert(0, str(Path(path).resolve().parent))  # an experiment may begin with its neighbour
  try:
    spec.loader.exec_module(module)
  finally:
    sys.path.pop(0)
  if not hasattr(module, 'get_config'):
    raise UserError(f'{path}: expected a function get_config(tiny=False) that returns a ConfigDict')
  return module.get_config(tiny=variant == 'tiny').to_dict()


def _copy(value):
  return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value


def _merge(config, said, name, where):
  """Writes said over config; both nested. A key that config lacks is an error, so is another type."""
  for key, value in said.items():
    here = f'{name}.{key}'
    if key not in config:
      raise UserError(f'{where}: {here} is no known key{_nearest(key, config)}')
    if isinstance(config[key], ml_collections.ConfigDict) and len(config[key]):
      if not isinstance(value, dict):
        raise UserError(f'{where}: {here} is a section, got {value!r}')
      _merge(config[key], value, here, where)
    else:
      config[key] = _typed(value, config[key], here, where)


def _typed(value, old, name, where):
  kind = type(old)
  if kind is ml_collections.ConfigDict:  # an open table, empty by default
    kind = dict
  if kind is float and type(value) is int:
    return float(value)
  if kind is tuple and type(value) in (list, str):
    return (value,) if type(value) is str else tuple(value)
  if type(value) is not kind:
    raise UserError(f'{where}: {name} must be {kind.__name__}, got {type(value).__name__} {value!r}')
  return value


def _nearest(key, known):
  close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
  return f'; did you mean {close[0]!r}?' if close else f'; known here: {", ".join(sorted(known))}'


def resolve(config, **places) -> ml_collections.ConfigDict:
  """The config with each {name} of `places` in its texts replaced, as {workdir}."""
  def one(value):
    if isinstance(value, dict):
      return {key: one(item) for key, item in value.items()}
    if isinstance(value, tuple):
      return tuple(map(one, value))
    if isinstance(value, str):
      for name, place in places.items():
        value = value.replace('{' + name + '}', str(place))
    return value
  return ml_collections.ConfigDict(one(config.to_dict())).lock()


def as_json(config) -> str:
  """The config as text, equal for equal configs."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True, default=list) + '\n'


def differences(old: dict, new: dict, name: str = 'config') -> list[str]:
  """'key: old → new' for each value in which two configs (as read from JSON) differ."""
  lines = []
  for key in sorted({*old, *new}):
    a, b = old.get(key), new.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      lines += differences(a, b, f'{name}.{key}')
    elif a != b:
      lines.append(f'{name}.{key}: {a!r} → {b!r}')
  return lines
