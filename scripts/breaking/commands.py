"""Experiments, overrides, values of the config, words of the commands, files of a workdir."""

from collections.abc import Iterator, Sequence
import functools
import importlib
from pathlib import Path
import shutil
import subprocess
import sys
from typing import Any

from breaking.cases import Case, flips, odd_files

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = str(ROOT / 'experiments/quickstart.py')
SMALL = """
import ml_collections

def get_config(tiny=False):
  c = ml_collections.ConfigDict()
  c.stages = ('pretrain', 'sft')
  c.model = dict(embed=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp=16)
  c.tokenizer = dict(vocab_size=300, documents=50, data=dict(count=50))
  loop = dict(steps=2, log_every=1, save_every=1)
  c.pretrain = dict(batch_size=8, eval_records=4, shown_responses=0, data=dict(count=50), loop=loop)
  c.sft = dict(
    batch_size=8, max_length=128, eval_records=4, shown_responses=0, data=dict(count=20), loop=loop
  )
  return c
"""
EXPERIMENTS = (
  '',
  'def get_config(',
  'get_config = 5',
  'def get_config(a): return 1',
  'def get_config(): return 1',
  'def get_config(): return None',
  'def get_config(): return {}',
  'def get_config(): return {"stages": ("sft",)}',
  'def get_config(): raise ValueError("x")',
  'def get_config(): raise SystemExit(0)',
  'def get_config(): raise KeyError',
  'import nothing_like_this',
  'import sys; sys.exit(0)',
  'import sys; sys.exit()',
  'raise RuntimeError("\\x1b[31m")',
  '1 / 0',
  'def get_config(): return get_config()',
  'x = "\\ud800"; raise ValueError(x)',
  b'\xff\xfe\x00',
  b'\x00',
  'async def get_config(): pass',
  'def get_config(): yield 1',
  *(
    f'import ml_collections\ndef get_config():\n  return ml_collections.ConfigDict({values})'
    for values in (
      '{}',
      'dict(stages=5)',
      'dict(stages=())',
      'dict(stages=("nothing",))',
      'dict(stages=(5,))',
      'dict(stages=(("sft",),))',
      'dict(stages=None)',
      'dict(stages="sftt")',
      'dict(stages=("sft",), sft=5)',
      'dict(stages=("sft",), sft=dict(kind=5))',
      'dict(stages=("sft",), sft=dict(kind=("a",)))',
      'dict(stages=("sft",), sft=dict(kind="nothing"))',
      'dict(stages=("sft",), sft=dict(nothing=5))',
      'dict(stages=("sft",), model=5)',
      'dict(stages=("sft",), seed="x")',
      'dict(stages=("sft",), nothing=1)',
      'dict(stages=("dpo",), dpo=dict(kind="preference", loss="nothing"))',
      'dict(stages=("dpo",), dpo=dict(kind="preference", loss=5))',
      'dict(stages=("dpo",), dpo=dict(kind="preference", loss=["dpo"]))',
      'dict(stages=("sft", "sft"))',
      'dict(stages=("../x",))',
      'dict(stages=("model",))',
      'dict(stages=("checkpoints",))',
    )
  ),
)
OVERRIDES = (
  '',
  '=',
  '.',
  '=5',
  'seed',
  'seed=',
  'seed=x',
  'seed=1.5',
  'seed=[',
  'seed=(1,)',
  'seed=True',
  'seed=None',
  'seed=1e999',
  'seed=' + '9' * 5000,
  'seed=' + '(' * 5000,
  'seed=' + '[' * 300 + ']' * 300,
  'seed=-' * 2000 + '1',
  'seed={1: 2}',
  'seed="\ud800"',
  'seed=\x1b[31m',
  'seed=b"x"',
  'seed=...',
  'seeed=1',
  'seed.x=1',
  '.seed=1',
  'seed.=1',
  'ppo=5',
  'ppo={}',
  "ppo={'x': 1}",
  'ppo.x=1',
  'ppo..x=1',
  'ppo.kind=sft',
  'ppo.loop.steps=x',
  'ppo.loop=5',
  'stages=5',
  "stages=('nothing',)",
  'stages=(5,)',
  'stages=None',
  'stages=()',
  "stages={'a': 1}",
  'model.embed=x',
  'evaluation.models=5',
  "evaluation.models={'a': 5}",
  "evaluation.best_of={'a': 'b'}",
  'mesh.data=x',
  'data=5',
)


def experiment_cases() -> Iterator[Case]:
  """Yields experiments' files and overrides."""
  for number, source in enumerate(EXPERIMENTS):
    yield _experiment(f'file {number}: {source[:50]!r}', source)
  for name in (
    'no_such.py',
    '.',
    'x.py:nothing',
    ':',
    '',
    'x\x00y',
    'x' * 5000,
    '/dev/null',
    '/proc/1/mem',
  ):
    yield Case(
      'experiments, overrides', f'--config={name!r:.30}', functools.partial(_load, name, ()), ''
    )
  for override in OVERRIDES:
    refuse = override not in ('ppo={}',)
    yield Case(
      'experiments, overrides',
      f'--config.{override:.40}',
      functools.partial(_load, QUICKSTART, (override,)),
      'config',
      refuse,
    )


def _experiment(name: str, source: str | bytes) -> Case:
  def run(folder: Path) -> None:
    path = folder / 'experiment.py'
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
    _load(str(path), (), folder)

  return Case('experiments, overrides', name, run, 'experiment.py|config.')


def _load(path: str, overrides: tuple[str, ...], folder: Path) -> None:
  from rlhf_jax import testing
  from rlhf_jax.experiment import final_table, pipeline

  del folder
  final_table.check(pipeline.load_config(path, overrides), testing.make_layout())


def value_cases() -> Iterator[Case]:
  """Yields every key of an experiment with values of a wrong type, and numbers that are none."""
  from rlhf_jax.experiment import pipeline

  config = pipeline.load_config(QUICKSTART).to_dict()
  for key, value in sorted(_leaves(config)):
    wrong: list[Any] = ["'x'" if not isinstance(value, (str, tuple)) else '5', 'None']
    wrong.append('(1,)' if not isinstance(value, tuple) else '{}')
    if isinstance(value, (int, float)) and not isinstance(value, bool):
      wrong += ["float('x')", '[]', 'True']
    for text in wrong:
      yield _value(key, text)
    if isinstance(value, float):
      yield _value(key, '-1e999')
      yield _value(key, '1e999')


def _leaves(values: dict, prefix: str = '') -> Iterator[tuple[str, Any]]:
  """Yields the keys of a nested dict with their values; open tables have none."""
  for key, value in values.items():
    if isinstance(value, dict):
      yield from _leaves(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def _value(key: str, text: str, refuse: bool = True) -> Case:
  run = functools.partial(_load, QUICKSTART, (f'{key}={text}',))
  return Case('config values', f'{key}={text}', run, key, refuse)


NUMBERS = (
  'seed=-1',
  'model.embed=0',
  'model.embed=-8',
  'model.layers=0',
  'model.heads=0',
  'model.heads=3',
  'model.kv_heads=0',
  'model.head_dim=0',
  'model.head_dim=7',
  'model.mlp=0',
  'model.norm_eps=-1.0',
  'model.rope_theta=0.0',
  'model.max_length=0',
  'model.dtype=int8',
  'model.remat=x',
  'model.attention=x',
  'tokenizer.vocab_size=0',
  'tokenizer.vocab_size=-5',
  'tokenizer.documents=0',
  'tokenizer.init=nowhere',
  'tokenizer.chat_template={{',
  'tokenizer.data.count=-1',
  'export.dtype=int8',
  'export.shard_gigabytes=0.0',
  'export.shard_gigabytes=-1.0',
  'mesh.data=0',
  'mesh.data=99',
  'mesh.preset=x',
  'evaluation.split=x',
  'pretrain.batch_size=0',
  'pretrain.batch_size=-8',
  'pretrain.microbatches=0',
  'pretrain.max_length=0',
  'pretrain.max_length=99999',
  'pretrain.loop.steps=0',
  'pretrain.loop.steps=-1',
  'pretrain.loop.log_every=-1',
  'pretrain.loop.eval_every=-1',
  'pretrain.loop.save_every=-1',
  'pretrain.loop.keep=0',
  'pretrain.eval_records=-1',
  'pretrain.shown_responses=-1',
  'pretrain.optimizer.learning_rate=-1.0',
  'pretrain.optimizer.clip_norm=-1.0',
  'pretrain.optimizer.warmup_steps=-1',
  'pretrain.optimizer.weight_decay=-1.0',
  'pretrain.optimizer.schedule=x',
  'pretrain.optimizer.name=x',
  'pretrain.data.source=x',
  'pretrain.data.people=0',
  'pretrain.data.seed=-2',
  'pretrain.init=nowhere',
)


def number_cases(base: Path) -> Iterator[Case]:
  """Yields numbers out of their range, by the command itself."""
  del base
  for override in NUMBERS:

    def run(folder: Path, override: str = override) -> int:
      from rlhf_jax.errors import UserError
      from rlhf_jax.experiment import pipeline

      key = override.partition('=')[0]

      (folder / 'small.py').write_text(SMALL)
      config = pipeline.load_config(str(folder / 'small.py'))
      section: Any = config
      for part in key.split('.'):
        if part not in section:  # no such key in this version
          raise UserError(f'{key}: no such key')
        section = section[part]
      return _train(folder / 'small.py', folder / 'run', "stages=('pretrain',)", override)

    section = override.partition('.')[0].partition('=')[0]
    place = f'{section}|out of memory'  # of a length that is too large, not before
    yield Case('config values', f'run with {override}', run, place, True, 120.0)


WORDS = (
  ('train', ()),
  ('train', ('--config',)),
  ('train', ('--config=x',)),
  ('train', ('--workdir=x',)),
  ('train', (f'--config={QUICKSTART}', '--workdir=')),
  ('train', (f'--config={QUICKSTART}', '--workdir=/dev/null/x')),
  ('train', (f'--config={QUICKSTART}', '--workdir=/proc/x')),
  ('train', (f'--config={QUICKSTART}', '--workdir=a{split}')),
  ('train', (f'--config={QUICKSTART}', '--workdir=x', '--processes=0')),
  ('train', (f'--config={QUICKSTART}', '--workdir=x', '--processes=x')),
  ('train', (f'--config={QUICKSTART}', '--workdir=x', '--process=1')),
  ('train', (f'--config={QUICKSTART}', '--workdir=x', '--coordinator=x')),
  ('train', (f'--config={QUICKSTART}', '--workdir=x', '--coordinator=x:1', '--processes=2')),
  ('train', (f'--config={QUICKSTART}', '--workdir=x', 'word')),
  ('train', (f'--config={QUICKSTART}', '--workdir=x', '--nothing')),
  ('train', (f'--config={QUICKSTART}', '--workdir=x', '--nothing=\x1b[31m\ud800')),
  ('train', (f'--config={QUICKSTART}', '--workdir=x', '--config.seed')),
  ('train', (f'--config={QUICKSTART}', '--workdir=x', '--show=1')),
  *(
    (command, words)
    for command in ('generate', 'score')
    for words in (
      (),
      ('--model=x',),
      ('--model=nowhere', '--input=IN', '--output=out'),
      ('--model=', '--input=IN', '--output=out'),
      ('--model=.', '--input=IN', '--output=out'),
      ('--model=IN', '--input=IN', '--output=out'),
      ('--model=MODEL', '--input=no', '--output=out'),
      ('--model=MODEL', '--input=.', '--output=out'),
      ('--model=MODEL', '--input=IN', '--output=.'),
      ('--model=MODEL', '--input=IN', '--output=/dev/full'),
      ('--model=MODEL', '--input=IN', '--output=/proc/x'),
      ('--model=MODEL', '--input=IN', '--output=IN'),
      ('--model=MODEL', '--input=IN', '--output=out.gz'),
      ('--model=MODEL', '--input=IN', '--output=out', '--batch_size=0'),
      ('--model=MODEL', '--input=IN', '--output=out', '--batch_size=-1'),
      ('--model=MODEL', '--input=IN', '--output=out', '--batch_size=x'),
      ('--model=MODEL', '--input=IN', '--output=out', '--dtype=x'),
      ('--model=MODEL', '--input=IN', '--output=out', '--mesh=x'),
      ('--model=MODEL', '--input=IN', '--output=out', '--mesh=data=99'),
      ('--model=MODEL', '--input=IN', '--output=out', '--mesh=data=-5'),
      ('--model=MODEL', '--input=IN', '--output=out', '--mesh=data'),
      ('--model=MODEL', '--input=IN', '--output=out', '--nothing=1'),
    )
  ),
  *(
    ('generate', ('--model=MODEL', '--input=IN', '--output=out', word))
    for word in (
      '--samples=0',
      '--samples=x',
      '--max_new_tokens=0',
      '--max_new_tokens=-1',
      '--max_new_tokens=99999',
      '--temperature=-1',
      '--temperature=nan',
      '--temperature=x',
      '--top_k=-1',
      '--top_p=0',
      '--top_p=2',
      '--top_p=nan',
      '--seed=x',
      '--seed=-1',
      '--seed=99999999999999999999',
    )
  ),
  *(
    ('plan', words)
    for words in (
      (),
      (f'--config={QUICKSTART}',),
      *(
        (f'--config={QUICKSTART}', '--analytic', f'--topology={topology}')
        for topology in (
          '',
          'x',
          'v5p',
          'v5p:',
          'v5p:0x0',
          'v5p:4x4x4x4',
          'gpu:8',
          'cpu:0',
          'cpu:x',
          '9*',
          '-1*cpu:8',
          'v5p:99999999x9',
        )
      ),
      (f'--config={QUICKSTART}', '--analytic', '--topology=cpu:8', '--stage=x'),
      (f'--config={QUICKSTART}', '--analytic', '--topology=cpu:8', '--nothing'),
    )
  ),
  *(
    ('collect', words)
    for words in (
      (),
      ('nothing',),
      ('add',),
      ('add', '--workdir=x', '--input=no'),
      ('add', '--workdir=x', '--input=IN', '--task=x'),
      ('add', '--workdir=/proc/x', '--input=IN'),
      ('export', '--workdir=x', '--output=o', '--kind=x'),
      ('export', '--workdir=no', '--output=o'),
      ('sample', '--workdir=x', '--models=no', '--input=IN'),
      ('select', '--workdir=x', '--reward=no'),
    )
  ),
)


def word_cases(base: Path) -> Iterator[Case]:
  """Yields words of the commands."""
  for command, words in WORDS:

    def run(folder: Path, command: str = command, words: tuple[str, ...] = words) -> int:
      (folder / 'in.jsonl').write_text('{"tokens": [1, 2, 3]}\n')
      places = {'IN': str(folder / 'in.jsonl'), 'MODEL': str(base / 'run/sft/export')}
      given = []
      for word in words:
        flag, equals, value = word.partition('=')
        given.append(f'{flag}{equals}{places.get(value, value)}')
      return _call_main(command, given)

    refuse = not (command == 'generate' and words[-1:] == ('--seed=-1',))
    yield Case('CLI words', f'{command} {" ".join(words)[-70:]}', run, '', refuse, 60.0)


def _call_main(command: str, words: Sequence[str]) -> int:
  """Runs a command in this process; returns its exit code."""
  module = importlib.import_module(f'rlhf_jax.commands.{command}')
  try:
    return module.main(words)
  except SystemExit as stop:  # of argparse
    return int(stop.code or 0)


def _train(experiment: Path, workdir: Path, *overrides: str) -> int:
  words = [f'--config.{override}' for override in overrides]
  return _call_main('train', [f'--config={experiment}', f'--workdir={workdir}', *words])


def make_base(folder: Path) -> None:
  """Trains the small experiment, in a process of its own, unless the folder has it already."""
  if (folder / 'run/results.json').is_file():
    return
  folder.mkdir(exist_ok=True)
  (folder / 'small.py').write_text(SMALL)
  command = [sys.executable, '-m', 'rlhf_jax', f'--config={folder}/small.py']
  subprocess.run([*command, f'--workdir={folder}/run'], check=True, capture_output=True)


# Files of a finished workdir, and who reads them.
TRAIN_READS = ('config.json', 'started.json', 'results.json', 'tokenizer/tokenizer.json')
MODEL_READS = ('finished.json', 'model.json')


def small_file_cases(base: Path) -> Iterator[Case]:
  """Yields workdirs of which one file is damaged."""
  run_folder = base / 'run'
  names = [
    *TRAIN_READS,
    'tokenizer/fingerprints.json',
    'tokenizer/tokenizer_config.json',
    'tokenizer/chat_template.jinja',
    'pretrain/finished.json',
    'sft/finished.json',
  ]
  for name in names:
    for what, data in _damages(run_folder / name):
      refuse = data is not None or name == 'config.json'
      yield _workdir(base, name, what, data, refuse)
  for name in ('model.json', 'finished.json'):
    for what, data in _damages(run_folder / 'sft' / name):
      yield _stage(base, f'sft/{name}', what, data, data is not None)
  for path in sorted((run_folder / 'sft/export').iterdir()):
    name = f'sft/export/{path.name}'
    for what, data in _damages(run_folder / name):
      refuse = data is not None and path.name != 'README.md'
      yield _export(base, name, what, data, refuse)
  checkpoint = run_folder / 'sft/checkpoints/2'
  for path in sorted(checkpoint.rglob('*')):
    if path.is_file() and path.stat().st_size:
      name = str(path.relative_to(run_folder))
      for what, data in list(_damages(path))[:6]:
        yield _stage(base, name, what, data, False)


def _damages(path: Path) -> Iterator[tuple[str, bytes | None]]:
  data = path.read_bytes()
  yield 'gone', None
  yield 'cut in half', data[: len(data) // 2]
  yield 'one byte short', data[:-2]
  for what, changed in flips(data, 5):
    yield what, changed
  for what, odd in odd_files():
    yield what, odd


def _damaged_copy(base: Path, folder: Path, name: str, data: bytes | None) -> Path:
  run_folder = folder / 'run'
  shutil.copytree(base / 'run', run_folder)
  path = run_folder / name
  path.unlink()
  if data is not None:
    path.write_bytes(data)
  return run_folder


def _workdir(base: Path, name: str, what: str, data: bytes | None, refuse: bool) -> Case:
  def run(folder: Path) -> int:
    run_folder = _damaged_copy(base, folder, name, data)
    return _train(base / 'small.py', run_folder)

  return Case('small files', f'{name}: {what}', run, name, refuse, 120.0)


def _stage(base: Path, name: str, what: str, data: bytes | None, refuse: bool) -> Case:
  def run(folder: Path) -> None:
    import jax

    run_folder = _damaged_copy(base, folder, name, data)
    got = _load_model(run_folder / 'sft')
    want = _load_model(base / 'run/sft')
    if not all(map(lambda a, b: (a == b).all(), jax.tree.leaves(got), jax.tree.leaves(want))):
      raise AssertionError('other parameters were read')

  return Case('small files', f'{name}: {what}', run, 'sft', refuse, 60.0)


def _export(base: Path, name: str, what: str, data: bytes | None, refuse: bool) -> Case:
  def run(folder: Path) -> None:
    run_folder = _damaged_copy(base, folder, name, data)
    _load_model(run_folder / 'sft/export').copy()

  return Case('small files', f'{name}: {what}', run, 'export', refuse, 60.0)


def _load_model(folder: Path) -> Any:
  from rlhf_jax import testing
  from rlhf_jax.models import transformer
  from rlhf_jax.stages.shared import model_sources, model_store

  source = model_sources.find_model(str(folder))
  source.tokenizer()
  layout = testing.make_layout()
  params = model_store.read_parameters(source, layout, 'float32', {})
  model = transformer.build_model(source.config)
  shardings = model_store.model_shardings(model, layout)
  return model_store.complete_parameters(params, model.init, shardings, layout)
