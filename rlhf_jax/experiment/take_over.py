"""Takes over finished stages of another run, so that a sweep trains its common stages once."""

from collections.abc import Iterator, Mapping, Sequence
import json
from pathlib import Path
import shutil
from typing import Any

from rlhf_jax import files, fingerprints
from rlhf_jax.errors import UserError
from rlhf_jax.experiment import config as configs
from rlhf_jax.report import kept_responses
from rlhf_jax.runtime import hosts

# Keys on which every stage depends; `mesh`, `evaluation` and `export` change no training.
COMMON_KEYS = ('seed', 'data', 'model', 'tokenizer')


def take_over(config: Any, workdir: Path, source: Path, defaults: Mapping[str, Any]) -> list[str]:
  """Copies the stages of another run that this run would repeat.

  These are the finished stages whose section is the same in both runs, and that use no stage
  which is not taken over. A stage that has begun here already stays as it is.

  Args:
    config: the config of this run, with {workdir} in it.
    workdir: the folder of this run.
    source: the workdir of the other run.
    defaults: the common sections with their defaults, which the config of an older
      version may lack.

  Returns:
    The names of the stages that were copied, in order.

  Raises:
    UserError: there is no such run, or its common sections differ.
  """
  path = source / 'config.json'
  if not path.is_file():
    raise UserError(f'--from={source}: expected the workdir of a run, but it has no config.json')
  old, lacking = configs.complete(fingerprints.read_json(path), config, defaults)
  new = json.loads(configs.as_json(config))
  changed = configs.differences(_common(old), _common(new))
  if changed:
    raise UserError(f'--from={source}: its stages cannot be used here, as {"; ".join(changed[:3])}')
  if lacking:
    hosts.say(f'--from={source}: {configs.describe_lacking(lacking)}')
  same: list[str] = []  # what this run would repeat
  for number, name in enumerate(new['stages']):
    if name not in old['stages'] or not (source / name / 'finished.json').is_file():
      continue
    uses = used_stages(new[name], new['stages'][:number])
    if old[name] == new[name] and all(used in same for used in uses):
      same.append(name)
  copied = [name for name in same if not (workdir / name).exists()]
  # First the tokenizer, as a folder of a stage says that all before it was copied.
  if copied and not (workdir / 'tokenizer' / fingerprints.LIST).is_file():
    _copy_folder(source / 'tokenizer', workdir / 'tokenizer')
  for name in copied:
    kept_responses.copy_stage(source, workdir, name)
    _copy_folder(source / name, workdir / name)
  return copied


def _common(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the keys of a config on which every stage depends."""
  return {key: config.get(key) for key in COMMON_KEYS}


def used_stages(section: Any, stages: Sequence[str]) -> list[str]:
  """Returns those of the earlier stages whose models or files a section names."""
  texts = list(_texts(section))
  return [
    name
    for name in stages
    if any(text == name or text.startswith(f'{{workdir}}/{name}/') for text in texts)
  ]


def _texts(value: Any) -> Iterator[str]:
  """Yields all texts in nested lists and dicts."""
  if isinstance(value, str):
    yield value
  elif isinstance(value, Mapping):
    for key, item in value.items():
      if key != 'kind':  # mostly the stage's own name
        yield from _texts(item)
  elif isinstance(value, list):
    for item in value:
      yield from _texts(item)


def _copy_folder(source: Path, target: Path) -> None:
  """Copies a folder, whole or not at all."""
  with files.replacing_folder(target) as temporary:
    shutil.copytree(source, temporary, dirs_exist_ok=True)
