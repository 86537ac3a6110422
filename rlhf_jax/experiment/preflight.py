"""Checks every stage of an experiment before the first one runs, and describes them.

All options, models, data, rewards and judges are resolved; no parameters are
read. Of each data set a sample is encoded. All mistakes are reported together.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import io
import math
from pathlib import Path
import re
import shutil
import sys
import tempfile
import textwrap
from typing import Any

import jax

from rlhf_jax import options as options_lib
from rlhf_jax.data import encode, sources
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.errors import UserError
from rlhf_jax.experiment import config as configs
from rlhf_jax.experiment import final_table
from rlhf_jax.rewards import functions
from rlhf_jax.rewards.sources import parse_reward_source
from rlhf_jax.stages.shared import model_sources, model_store, scores
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.kind import DataUse

TINYWORLD = 'tinyworld'  # where data are from by default
# Settings of `model` that count for every model; the others are the shape of a new one.
COMPUTATION = ('dtype', 'remat', 'attention', 'numerics')
SAMPLE = 64  # records of a data set and split that are encoded
SHOWN_EXAMPLES = 2  # of each stage
_EXAMPLE_CHARACTERS = 400  # of an example; of a longer one, the middle is left out
_MARKS = ('⟦', '⟧')  # around targets
_GUTTER = '    │ '  # before each line of an example

# (options, kind of records, split) → the records
Load = Callable[[DataOptions, str, str], Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class StageCheck:
  """What was found out about a stage."""

  mistakes: list[str]
  lines: list[str]  # that describe it
  has_model: bool  # whether its model has a shape that later stages can begin with


def check_experiment(contexts: Mapping[str, Context], finished: Sequence[str]) -> str:
  """Checks the stages that have not finished, and describes them.

  Args:
    contexts: the context of each stage, in the order in which they run.
    finished: the stages that need no check, as they are done.

  Returns:
    The description: devices, and for each stage its parameters, data and two examples.

  Raises:
    UserError: something is wrong; it names all mistakes.
  """
  lines = [_describe_devices(next(iter(contexts.values())))]
  mistakes: list[str] = []
  failed: list[str] = []  # stages whose model is not known, so that errors about it say nothing
  load = _remember(sources.load_records)
  # A plan writes the shape of each stage's model into its folder, for later stages.
  with tempfile.TemporaryDirectory() as folder:
    for name, context in contexts.items():
      planned = dataclasses.replace(
        context,
        workdir=Path(folder),
        layout=dataclasses.replace(context.layout, abstract=True),
      )
      if name in finished:
        _copy_shape(context, planned)
        continue
      checked = _check_stage(context, planned, load)
      mistakes += [text for text in checked.mistakes if not _is_about(text, context, failed)]
      lines += checked.lines
      if not checked.has_model:
        failed.append(name)
    evaluation = _check_evaluation(planned, load, workdir=context.workdir)
    mistakes += [text for text in evaluation if not _is_about(text, context, failed)]
  configs.raise_mistakes(mistakes)
  lines += _note_default_data(contexts)
  if sys.stdout.isatty():
    lines = [part for line in lines for part in _wrap(line)]
  return '\n'.join(lines)


def _check_stage(context: Context, planned: Context, load: Load) -> StageCheck:
  """Checks a stage; `planned` is its context on an abstract layout, in a folder of its own."""
  stage = configs.kind_of(context.config, context.name)
  options = context.read_options(stage)
  mistakes: list[str] = []
  lines = ['', f'{context.name} ({context.section.kind})']
  with _collect_mistakes(mistakes, context, planned):
    stage.check(planned)
  with _collect_mistakes(mistakes, context, planned):
    plan = stage.plan(planned)
    trained = plan.resident.get('parameters')
    if trained is not None:
      frozen = _count_parameters(plan.resident) - _count_parameters(plan.resident['optimizer'])
      lines.append(
        f'  parameters: {_count_parameters(trained):,} trained, '
        f'{frozen - _count_parameters(trained):,} read only'
      )
  for name in _foreign_models(context):
    with _collect_mistakes(mistakes, context, planned):
      model_sources.check_weights(name)
  has_model = (planned.directory / model_sources.MODEL_JSON).is_file()
  for use in stage.data(options, context.tokenizer):
    with _collect_mistakes(mistakes, context, planned, use.field):
      lines += _check_data(context, use, load)
  return StageCheck(mistakes, lines, has_model)


def _check_evaluation(planned: Context, load: Load, workdir: Path) -> list[str]:
  """Checks the prompts and the reward of the final table, which is made after all training."""
  config = planned.config
  options = options_lib.from_section(final_table.Options, config.evaluation)
  if not final_table.shown_rows(config):
    if not options.models or options.split == final_table.Options.split:
      return []
    return ['config.evaluation.split: it has no effect, as no model of evaluation.models is there']
  context = dataclasses.replace(planned, name='evaluation', workdir=workdir)
  mistakes: list[str] = []
  sample: Sequence[Any] = ()
  with _collect_mistakes(mistakes, context, planned):
    rows = load(options.data, 'prompt', options.split)
    final_table.check_prompts(options, rows)
    sample = sources.spread_evenly(rows, SAMPLE)
    encode.prompts(sample, context.tokenizer, options.max_length)
  with _collect_mistakes(mistakes, context, planned):
    reward = final_table.reward_name(config, options)
    if reward:
      scores.check_score(dataclasses.replace(planned, name='evaluation'), reward, options)
      functions.check_prompts(reward, sample)
  return mistakes


def _foreign_models(context: Context) -> list[str]:
  """Returns the models that a stage begins with or asks, without the stages of this run."""
  section = context.section
  names = [section.get(key) or '' for key in ('init', 'reference', 'value')]
  if isinstance(section.get('reward'), tuple):
    names += [parse_reward_source(name).model_name or '' for name in _reward_names(context)]
  known = {'', model_store.RANDOM, *context.config.stages}
  return sorted({*names} - known)


def _reward_names(context: Context) -> tuple[str, ...]:
  """Returns the rewards of a section, which has several, one or none."""
  names = context.section.get('reward', ())
  return (names,) if isinstance(names, str) else tuple(names)


@contextlib.contextmanager
def _collect_mistakes(
  mistakes: list[str], context: Context, planned: Context, field: str = 'data'
) -> Iterator[None]:
  """Adds the message of a UserError to a list, with the run's folder and the key.

  Args:
    mistakes: the list.
    context: of the stage.
    planned: the same in the folder of the plan.
    field: the key of the data that are read, in the stage's section.
  """
  try:
    with contextlib.redirect_stderr(io.StringIO()):  # what was read is said by the stage
      yield
  except UserError as error:
    message = str(error).replace(str(planned.workdir), str(context.workdir))
    message = _name_key(message, context, field)
    if message not in mistakes:
      mistakes.append(message)


def _name_key(message: str, context: Context, field: str) -> str:
  """Returns a message about a section with the key that it is about before it.

  What finds models, files and functions by name knows no keys. Such messages begin with the
  name, which is looked up in the section; if several keys have it, all are named.
  """
  about = message.removeprefix(f'{context.where}: ')
  if about.startswith('config.'):
    return message
  named = about.removeprefix(f'{context.workdir}/')  # a stage, by its folder
  keys: dict[str, list[str]] = {}  # what it may begin with → the keys of that
  for key, value in _texts(context.section, context.where):
    if re.match(rf'(\w+ )?([\'"]?){re.escape(value)}\2(?![\w.-])', named):
      keys.setdefault(value, []).append(key)
  if keys:
    return f'{", ".join(keys[max(keys, key=len)])}: {about}'
  first = re.match(r'\w+(?=[.: ])', about)
  if first is None or first[0] not in context.section:
    return f'{context.where}: {about}'
  if first[0] == 'data':  # what reads data does not know which of a section's they are
    about = field + about.removeprefix('data')
  return f'{context.where}.{about}'


def _texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
  """Yields the texts of a section with their keys; those of a tuple have one key."""
  if isinstance(value, str) and value:
    yield name, value
  elif isinstance(value, (tuple, list)):
    for element in value:
      yield from _texts(element, name)
  elif hasattr(value, 'items'):
    for key, element in value.items():
      yield from _texts(element, f'{name}.{key}')


def _is_about(message: str, context: Context, failed: Sequence[str]) -> bool:
  """Says whether a message only follows from the mistakes of earlier stages."""
  missing = [f'{context.workdir / name} holds no model yet' for name in failed]
  return any(text in message for text in missing)


def _copy_shape(context: Context, planned: Context) -> None:
  """Copies the shape of a finished stage's model."""
  source = context.directory / model_sources.MODEL_JSON
  if source.is_file():
    planned.directory.mkdir(parents=True)
    shutil.copy(source, planned.directory)


# Data.


def _check_data(context: Context, use: DataUse, load: Load) -> list[str]:
  """Opens the data of a field, encodes a sample, and describes both."""
  maker = _find_maker(context, use)
  if maker:
    return [f'  {use.field}: made by {maker}']
  lines = []
  for split in use.splits:
    rows = load(use.options, use.kind, split)
    sample = sources.spread_evenly(rows, SAMPLE)
    examples = use.encode(sample, use.overlong)
    if use.kind == 'prompt':
      for name in _reward_names(context):
        functions.check_prompts(name, sample)
    too_long = _count_too_long(use, sample)
    share = f', {too_long / len(sample):.0%} too long ({use.overlong})' if too_long else ''
    where = ' '.join([use.options.source, *map(str, use.options.path)])
    lines.append(f'  {use.field}: {len(rows):,} {use.kind}s of {where}, {split}{share}')
    if split == use.splits[0] and use.field == 'data':
      for example in examples[:SHOWN_EXAMPLES]:
        lines += _show_example(context, example)
  _check_splits(context, use)  # last, as other mistakes are nearer
  return lines


def note_unread_shape(config: Any, usual: Mapping[str, Any]) -> str:
  """Names the given settings of a new model's shape that nothing reads; '' if there are none.

  Args:
    config: the whole config.
    usual: its section `model` with the defaults.
  """
  for name in config.stages:
    section = config[name]
    if model_store.RANDOM in [section.get(key) for key in ('init', 'reference', 'value')]:
      return ''  # a stage makes a new model
  given = []
  for key, value in config.model.items():
    if key not in COMPUTATION and value != usual[key]:
      given.append(f'config.model.{key}')
  if not given:
    return ''
  return f'note: not read, as no stage begins with a new model: {", ".join(given)}'


def _note_default_data(contexts: Mapping[str, Context]) -> list[str]:
  """Returns lines that name what is read from TinyWorld, the default, beside a user's own data."""
  first = next(iter(contexts.values()))
  config = first.config
  common = {}
  if config.tokenizer.init == 'train':
    common['config.tokenizer.data'] = config.tokenizer.data
  if final_table.shown_rows(config):
    common['config.evaluation.data'] = config.evaluation.data
  fields = {name: options_lib.from_section(DataOptions, data) for name, data in common.items()}
  for context in contexts.values():
    stage = configs.kind_of(config, context.name)
    for use in stage.data(context.read_options(stage), context.tokenizer):
      fields[f'{context.where}.{use.field}'] = use.options
  of_world = [name for name, data in fields.items() if data.source == TINYWORLD and not data.path]
  made_here = str(first.workdir)  # by earlier stages
  own = [
    name
    for name, data in fields.items()
    if name not in of_world and not any(str(path).startswith(made_here) for path in data.path)
  ]
  if not own or not of_world:
    return []
  return ['', f"note: TinyWorld's, as the config names no other data: {', '.join(of_world)}"]


def _check_splits(context: Context, use: DataUse) -> None:
  """Refuses to train on the records that are held out."""
  options = use.options
  if len(use.splits) < 2 or options.source != 'jsonl' or options.hold_out:
    return
  for path in options.path:
    if sources.has_one_split(str(path)):
      raise UserError(
        f'{context.where}.{use.field}.path: {path} has no {{split}}, so that training and held-out '
        f'records would be the same; expected {{split}} in it, or a share of the records as '
        f'{use.field}.hold_out, such as 0.05'
      )


def _count_too_long(use: DataUse, sample: Sequence[Any]) -> int:
  """Counts the records of a sample that do not fit."""
  try:
    return max(0, len(sample) - len(use.encode(sample, 'drop')))
  except UserError:  # none fits
    return len(sample)


def _find_maker(context: Context, use: DataUse) -> str:
  """Returns the earlier stage that makes the data of a field; '' if none does.

  Raises:
    UserError: a path leads into the folder of a stage that does not make it before.
  """
  names = list(context.config.stages)
  earlier = names[: names.index(context.name)]
  for path in use.options.path:
    folder = Path(str(path)).parent
    if folder.parent != context.workdir or folder.name not in names:
      continue
    if folder.name not in earlier:
      raise UserError(
        f'{context.where}.{use.field}.path: {path}: {folder.name!r} runs later; expected a file of '
        'an earlier stage'
      )
    files = configs.kind_of(context.config, folder.name).files
    for split in use.splits:
      file = Path(str(path).replace('{split}', split))
      if file.name not in files and not file.is_file():
        raise UserError(
          f'{context.where}.{use.field}.path: {path}: {folder.name!r} leaves '
          f'{", ".join(files) or "no data"}'
        )
    if not all(Path(str(path).replace('{split}', split)).is_file() for split in use.splits):
      return folder.name
  return ''


def _remember(load: Load) -> Load:
  """Returns a function that loads each data set once."""
  loaded: list[tuple[tuple, Sequence[Any]]] = []

  def load_once(options: DataOptions, kind: str, split: str) -> Sequence[Any]:
    asked = (options, kind, split)
    for earlier, rows in loaded:
      if earlier == asked:
        return rows
    rows = load(options, kind, split)
    loaded.append((asked, rows))
    return rows

  return load_once


# The description.


def _describe_devices(context: Context) -> str:
  """Returns a line about the devices, the mesh and the vocabulary."""
  devices = context.layout.mesh.devices.ravel()
  sizes = [f'{axis} {size}' for axis, size in context.layout.mesh.shape.items() if size > 1]
  mesh = f' as {" × ".join(sizes)}' if sizes else ''
  processes = f' of {jax.process_count()} processes' if jax.process_count() > 1 else ''
  return (
    f'devices: {len(devices)} {devices[0].device_kind}{mesh}{processes}; vocabulary: '
    f'{context.tokenizer.vocab_size:,} tokens'
  )


def _count_parameters(tree: Any) -> int:
  """Counts the elements of all arrays of a tree."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _show_example(context: Context, example: Mapping[str, Any]) -> list[str]:
  """Returns the lines of an example as text, its targets in brackets."""
  if 'begins' in example:  # a ranking; its first response
    length = int(example['lengths'][0])
    ids = example['tokens'][0][:length]
    targets = [place >= int(example['begins'][0]) for place in range(length)]
  elif 'mask' in example:  # a prompt, padded on the left
    ids = example['tokens'][example['mask']]
    targets = [False] * len(ids)
  else:
    ids = example['tokens']
    targets = [bool(target) for target in example['targets']]
  text = ''
  begin = 0
  for place in range(1, len(ids) + 1):
    if place < len(ids) and targets[place] == targets[begin]:
      continue
    part = context.tokenizer.core.decode(
      list(map(int, ids[begin:place])), skip_special_tokens=False
    )
    text += f'{_MARKS[0]}{part}{_MARKS[1]}' if targets[begin] else part
    begin = place
  if len(text) > _EXAMPLE_CHARACTERS:
    half = _EXAMPLE_CHARACTERS // 2
    text = f'{text[:half]} {_left_out(text[half:-half])} {text[-half:]}'
  return ['  example:', *(f'{_GUTTER}{line}' for line in text.splitlines())]


def _left_out(text: str) -> str:
  """Returns what stands for the middle of an example: an ellipsis, and a mark that it held."""
  begins, ends = (text.count(mark) for mark in _MARKS)
  if begins == ends:
    return '…'
  return f'… {_MARKS[0]}' if begins > ends else f'…{_MARKS[1]}'


def _wrap(line: str) -> list[str]:
  """Wraps a line of the description at the width of the terminal, under its own indent."""
  width = min(shutil.get_terminal_size().columns, 120)
  if len(line) <= width:
    return [line]
  before = _GUTTER if line.startswith(_GUTTER) else ' ' * (len(line) - len(line.lstrip()) + 2)
  return textwrap.wrap(line, width, subsequent_indent=before, break_on_hyphens=False)
