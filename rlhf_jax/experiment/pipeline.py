"""Runs the stages that a config names, one after the other, and makes the final table.

workdir/config.json   the whole config
        run.lock      who is running
        tokenizer/    one for all stages
        STAGE/        checkpoints/, metrics.jsonl, samples.jsonl, events, export/, data.json,
                      finished.json
        evaluation/   responses.jsonl
        sessions.json, results.json, report.html
"""

from collections.abc import Callable, Iterable
import contextlib
import dataclasses
import datetime
import functools
import json
import os
from pathlib import Path
import time
from typing import Any

from rlhf_jax import file_lock, fingerprints, storage
from rlhf_jax import options as options_lib
from rlhf_jax.data import sources
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.data.tinyworld import vocabulary
from rlhf_jax.errors import UserError
from rlhf_jax.experiment import (
  agreement,
  continuation,
  data_files,
  final_table,
  preflight,
  remote_workdir,
  take_over,
)
from rlhf_jax.experiment import config as configs
from rlhf_jax.experiment.remote_workdir import RemoteWorkdir
from rlhf_jax.interop import chat_template, pretrained
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.models.model_config import DTYPES
from rlhf_jax.options import Count, Positive, Seed
from rlhf_jax.report import refresh, sessions
from rlhf_jax.runtime import checkpoint, compilation, hosts, loop, mesh
from rlhf_jax.runtime.mesh import Layout, MeshOptions
from rlhf_jax.stages.shared import mesh_need, model_sources
from rlhf_jax.stages.shared.context import Context


@dataclasses.dataclass(frozen=True)
class ModelOptions:
  """The section `model`: the shape of a freshly initialised model, and how all models compute."""

  embed: Count = 128  # width of the hidden states
  layers: Count = 4
  heads: Count = 4  # of the queries
  kv_heads: Count = 2  # of keys and values; divides heads
  head_dim: Count = 32  # width of a head
  mlp: Count = 384  # hidden width of the MLP
  norm_eps: Positive = 1e-5  # added to the mean square in RMSNorm
  rope_theta: Positive = 10000.0  # base of the rotary frequencies
  tied: bool = True  # the output matrix is the transposed embedding
  max_length: Count = 2048  # of a sequence, in tokens
  dtype: str = 'float32'  # of the computation; parameters are float32
  # What the backward pass recomputes: none; dots = all but matrix products; full = everything.
  remat: str = 'none'
  attention: str = 'auto'  # the implementation: auto, plain, cudnn, splash
  # fast; exact = sampler and training agree to the bit (float32 on a CPU)
  numerics: str = 'fast'


@dataclasses.dataclass(frozen=True)
class ExportOptions:
  """The section `export`: the Hugging Face directories to which stages export their models."""

  dtype: str = 'float32'  # of the exported parameters
  shard_gigabytes: Positive = 5.0  # maximum size of a file
  merged: bool = True  # for adapters, also export the model with the adapters merged into it


@dataclasses.dataclass(frozen=True)
class TokenizerOptions:
  """The section `tokenizer`."""

  init: str = 'train'  # 'train' = train a new one on `data`; else smollm2, or a directory
  chat_template: str = ''  # in jinja2; '' = the tokenizer's own
  vocab_size: Count = 1024  # of a new tokenizer
  documents: Count = 4000  # the number of documents that a new tokenizer is trained on
  data: DataOptions = DataOptions()

  def unread(self) -> dict[str, str]:
    """Returns the settings that are not read with these values, and why."""
    if self.init == 'train':
      return {}
    return dict.fromkeys(('vocab_size', 'documents', 'data'), f'init is {self.init!r}')


@dataclasses.dataclass(frozen=True)
class CommonOptions:
  """The keys that every config has, in addition to the sections of its stages."""

  seed: Seed = 0  # of all randomness
  stages: tuple[str, ...] = ()  # the names of the sections to run, in this order
  data: str = ''  # replaces {data} in paths: the folder of an experiment's data files
  model: ModelOptions = ModelOptions()
  export: ExportOptions = ExportOptions()
  tokenizer: TokenizerOptions = TokenizerOptions()
  mesh: MeshOptions = MeshOptions()
  evaluation: final_table.Options = final_table.Options()


def load_config(path: str, overrides: Iterable[str] = ()) -> Any:
  """Loads the full config of an experiment.

  Args:
    path: the experiment's file; `FILE:tiny` is its tiny form.
    overrides: texts 'section.key=value', which take precedence over the file.

  Returns:
    A locked ConfigDict with every key of every section.

  Raises:
    UserError: the file, a key or a value is wrong.
  """
  config = configs.load(path, overrides, defaults=common_defaults())
  configs.check_values(config, CommonOptions)
  return config


def common_defaults() -> dict[str, Any]:
  """Returns the defaults of the common sections, as nested dicts."""
  return options_lib.defaults(CommonOptions)


@dataclasses.dataclass(frozen=True)
class RunOptions:
  """What a run is asked to do, beside its config.

  Attributes:
    only_check: stop before the first stage.
    take_from: the workdir of another run, whose finished stages are copied where
      their sections are the same (take_over.py); '' = none.
    baseline: the workdir of another run, whose models get rows in the final table.
    extend: go on with finished stages whose loop.steps are more now.
    evaluate_again: make the final table anew; the old results.json is kept beside it.
    accept_changed_data: resume a stage even if its data files are no longer those
      that it began with.
  """

  only_check: bool = False
  take_from: str = ''
  baseline: str = ''
  extend: bool = False
  evaluate_again: bool = False
  accept_changed_data: bool = False


def run(config: Any, workdir: str | os.PathLike, **options: Any) -> dict[str, Any]:
  """Checks all stages, runs every one that is not finished, then makes the final table.

  Args:
    config: from `load_config`.
    workdir: the folder to which the run writes everything, or a URL (remote_workdir.py).
      With the workdir of an interrupted run, that run is resumed.
    **options: fields of RunOptions.

  Returns:
    The contents of results.json, see final_table.make; {} if only checked.

  Raises:
    UserError: something is wrong with the config, the data, the mesh or the workdir.
  """
  asked = RunOptions(**options)
  name = storage.as_local_path(str(workdir))
  if name is None:
    with remote_workdir.opened(str(workdir)) as remote:
      return _run(config, remote.folder, asked, remote)
  return _run(config, Path(name), asked, None)


def _run(
  config: Any,
  workdir: Path,
  asked: RunOptions,
  remote: RemoteWorkdir | None,
) -> dict[str, Any]:
  """Does the work of `run` in a folder, which is uploaded where it is that of a URL."""
  if '{' in str(workdir):
    raise UserError(f'--workdir={workdir}: expected a name without {{, which begins a placeholder')
  # Orbax looks for its own files by patterns that begin with the path of their folder.
  if any(mark in str(workdir.absolute()) for mark in '*?['):
    raise UserError(f'--workdir={workdir.absolute()}: expected a path without *, ? and [')
  if asked.baseline:
    config = continuation.with_baseline(config, asked.baseline)
  # First of all, as processes with different configs might wait for each other for ever.
  agreement.check_processes('config', json.loads(configs.as_json(config)))
  agreement.check_processes('code', agreement.describe_code(config))
  agreement.check_processes('command line', dataclasses.asdict(asked))
  compilation.cache_compilations()
  compilation.request_exact_products()
  layout = make_layout(config, workdir)
  final_table.check(config, layout)  # now, rather than after all training
  check_common(config)
  with lock_workdir(workdir):
    return _run_locked(config, workdir, layout, asked, remote)


def _run_locked(
  config: Any,
  workdir: Path,
  layout: Layout,
  asked: RunOptions,
  remote: RemoteWorkdir | None,
) -> dict[str, Any]:
  """Does the work of `run`, in a workdir that no other run uses."""
  meet = functools.partial(remote_workdir.meet, remote)
  if asked.evaluate_again and (workdir / continuation.RESULTS).is_file():
    # Before the results that are there are put aside.
    _check_finished(config, workdir, layout)
  _continue_finished(config, workdir, asked, meet)
  claim_workdir(config, workdir)
  _write_date(workdir)
  if layout.why:  # the preset `auto` explains its choice
    hosts.say(layout.why)
  if asked.take_from and hosts.is_first_process():
    source = asked.take_from
    folder = storage.as_local_path(source)
    other = remote_workdir.fetch(source, '--from') if folder is None else Path(folder)
    copied = take_over.take_over(config, workdir, other, common_defaults())
    hosts.say(f'taken over from {source}: {", ".join(copied) or "nothing"}')
  # The other processes read what the first one writes, so they wait for it.
  meet('claimed')
  agreement.check_processes('workdir', {'date of its beginning': _read_date(workdir)})
  _fix_date(workdir)
  # Not before claim_workdir: config.json keeps {workdir}, so that the folder can be moved.
  config = configs.resolve(config, workdir=workdir, data=config.data)
  tokenizer = open_tokenizer(config, workdir)
  meet('tokenizer')
  agreement.check_processes('tokenizer', {'tokenizer': tokenizer.core.to_str()})
  on_saved, url = None, ''
  if remote is not None:
    on_saved, url = remote.publish, remote.url
  contexts = {
    name: Context(config, name, workdir, layout, tokenizer, on_saved, url, meet)
    for name in config.stages
  }
  finished = [name for name, context in contexts.items() if finished_seconds(context) is not None]
  if len(finished) < len(contexts):
    hosts.say(preflight.check_experiment(contexts, finished))
    note = preflight.note_unread_shape(config, common_defaults()['model'])
    if note:
      hosts.say(note)
  if asked.only_check:
    return {}
  if len(finished) < len(contexts):
    _begin_report(config, workdir)
  for number, context in enumerate(contexts.values(), start=1):
    if finished_seconds(context) is None:
      hosts.say(f'— {number}/{len(contexts)} {context.name} ' + '—' * 40)
      check_data(context, asked.accept_changed_data)
      run_stage(context)
      if hosts.is_first_process():
        refresh.write(workdir)
      if on_saved:
        on_saved()  # the report too
  seconds = {name: finished_seconds(context) for name, context in contexts.items()}
  return final_table.make(contexts, seconds)


def _begin_report(config: Any, workdir: Path) -> None:
  """Notes how the run was started, and writes a first report; only the first process does."""
  if not hosts.is_first_process():
    return
  usual = configs.default_values(config, common_defaults())
  sessions.note_session(workdir, usual)
  refresh.write(workdir)


def _continue_finished(
  config: Any, workdir: Path, asked: RunOptions, meet: Callable[[str], None]
) -> None:
  """Prepares what is finished to be continued, in the first process; the others wait."""
  if not asked.extend and not asked.evaluate_again:
    return
  if hosts.is_first_process():
    if asked.extend:
      names = continuation.extend(config, workdir, common_defaults())
      hosts.say(f'extended: {", ".join(names)}')
    if asked.evaluate_again:
      kept = continuation.put_results_aside(workdir)
      hosts.say(f'evaluation: again; the earlier results are in {kept or "no file"}')
  meet('continued')


def _check_finished(config: Any, workdir: Path, layout: Layout) -> None:
  """Checks what is left to do in a workdir that has results: its table, and new stages."""
  config = configs.resolve(config, workdir=workdir, data=config.data)
  tokenizer = open_tokenizer(config, workdir)
  contexts = {name: Context(config, name, workdir, layout, tokenizer) for name in config.stages}
  finished = [name for name, context in contexts.items() if finished_seconds(context) is not None]
  preflight.check_experiment(contexts, finished)


def check_common(config: Any) -> None:
  """Checks the section `export`; raises UserError for a dtype that no export can have."""
  dtype = config.export.dtype
  if dtype not in DTYPES:
    raise UserError(f'config.export.dtype: expected one of {", ".join(DTYPES)}, got {dtype!r}')


def lock_workdir(workdir: Path) -> contextlib.AbstractContextManager[Any]:
  """Locks the workdir for this run; only the first process does.

  Raises:
    UserError: another run is using it, or it cannot be written.
  """
  if not hosts.is_first_process():
    return contextlib.nullcontext()
  return file_lock.lock_folder(workdir, 'run.lock')


def check_data(context: Context, accept_changed: bool) -> None:
  """Compares the data files of a stage over all processes, and with those that it began with.

  Raises:
    UserError: they differ.
  """
  prints = data_files.fingerprint_data(context.section, context.workdir)
  agreement.check_processes('data', prints)
  path = context.directory / data_files.RECORD
  if _has_begun(context.directory):
    data_files.check_unchanged(path, prints, accept_changed)
  hosts.barrier(f'{context.name} data')  # all have read the record
  if hosts.is_first_process():
    fingerprints.write_json(path, prints)


def make_layout(config: Any, workdir: Path) -> Layout:
  """Makes the mesh of a config; for the preset `auto`, from the memory that the models need."""
  need = None
  if config.mesh.preset == 'auto':
    resolved = configs.resolve(config, workdir=workdir, data=config.data)
    need = mesh_need.compute_mesh_need(resolved)
  options = options_lib.from_section(MeshOptions, config.mesh)
  return mesh.make_layout(options, need=need)


def run_stage(context: Context) -> None:
  """Runs a stage and marks it finished."""
  started = time.monotonic()
  configs.kind_of(context.config, context.name).run(context)
  context.meet(f'{context.name} ran')
  seconds = time.monotonic() - started
  # The training loop writes done.json. Unlike the clock above, it includes the
  # time before an interruption; but it leaves out what was done before the loop.
  trained = context.directory / loop.DONE
  if trained.is_file():
    seconds = max(seconds, fingerprints.read_json(trained)['seconds'])
  # Whoever reads the stage's model later reads this checkpoint or none.
  weights = checkpoint.newest(context.directory / 'checkpoints')
  if hosts.is_first_process():
    fingerprints.write_json(
      context.directory / model_sources.FINISHED,
      {'seconds': seconds, 'checkpoint': weights},
    )
  context.meet(f'{context.name} finished')


def finished_seconds(context: Context) -> float | None:
  """Returns the seconds that a stage took; None if it is not finished."""
  path = context.directory / model_sources.FINISHED
  return fingerprints.read_json(path)['seconds'] if path.is_file() else None


# The workdir.


def _write_date(workdir: Path) -> None:
  """Writes the date of a new run, which chat templates see whenever the run is resumed."""
  path = workdir / 'started.json'
  if not path.is_file():
    # Not what another run in this process began with.
    date = datetime.datetime.now().isoformat()
    if hosts.is_first_process():
      fingerprints.write_json(path, {'date': date})


def _read_date(workdir: Path) -> str:
  """Reads when the run began, to the microsecond; '' where the folder has no such run."""
  path = workdir / 'started.json'
  return fingerprints.read_json(path)['date'] if path.is_file() else ''


def _fix_date(workdir: Path) -> None:
  """Makes chat templates see the date at which the run began, on every process."""
  started = fingerprints.read_json(workdir / 'started.json')
  chat_template.fix_date(datetime.datetime.fromisoformat(started['date']))


def claim_workdir(config: Any, workdir: Path) -> None:
  """Writes config.json, or checks that the workdir was begun with this config.

  As long as no stage has begun, the config may change in any way. After that,
  only these may change: the sections of stages that have not begun, and whether
  they are in `stages`; `evaluation`, as long as there are no results; and `mesh`.
  A setting that an older version did not have counts as its default.

  Raises:
    UserError: the workdir was begun with another config (the message names the first
      differences), its config.json is gone or damaged, or it cannot be written.
  """
  path = workdir / 'config.json'
  new = json.loads(configs.as_json(config))
  old: dict[str, Any] = {}
  # Asked first: the first process may write both files before this one looks again.
  has_started = (workdir / 'started.json').exists()
  if path.is_file():
    old = fingerprints.read_json(path, 'restore it, or give another --workdir')
  elif has_started or any(_has_begun(workdir / name) for name in new['stages']):
    raise UserError(
      f'{path}: is gone, but a run has begun in this folder; restore it, or give another --workdir'
    )
  begun = [name for name in old.get('stages', ()) if _has_begun(workdir / name)]
  if begun:
    completed, lacking = configs.complete(old, config, common_defaults())
    _check_unchanged(completed, new, begun, workdir)
    if lacking:
      hosts.say(f'{path}: {configs.describe_lacking(lacking)}')
    if old == new:
      return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if not begun:
      # A tokenizer may be left from another config.
      (workdir / 'tokenizer' / fingerprints.LIST).unlink(missing_ok=True)
    if hosts.is_first_process():
      fingerprints.write_json(path, new)
  except OSError as error:
    raise UserError(f'--workdir={workdir}: cannot write there: {error.strerror}') from None


def _has_begun(directory: Path) -> bool:
  """Tells whether a stage has written files that depend on its config."""
  patterns = ('checkpoints/*', 'train.jsonl', 'finished.json')
  return any(any(directory.glob(pattern)) for pattern in patterns)


def _check_unchanged(
  old: dict[str, Any],
  new: dict[str, Any],
  begun: list[str],
  workdir: Path,
) -> None:
  """Raises UserError if two configs differ in keys that must not change any more.

  Args:
    old: the config of the workdir.
    new: the config of this run.
    begun: the stages that have begun.
    workdir: for the error message.
  """
  may_change = {*old['stages'], *new['stages'], 'evaluation', 'mesh'} - {*begun}
  # Stages may be added and removed, except those that have begun.
  if {*begun} <= {*new['stages']}:
    may_change.add('stages')
  if (workdir / 'results.json').is_file():  # it depends on the old evaluation
    may_change.discard('evaluation')
  old_fixed = {key: value for key, value in old.items() if key not in may_change}
  new_fixed = {key: value for key, value in new.items() if key not in may_change}
  changed = configs.differences(old_fixed, new_fixed)
  if changed:
    more = f' and {len(changed) - 3} more' if len(changed) > 3 else ''
    raise UserError(
      f'{workdir / "config.json"}: this workdir was begun with another config: '
      f'{"; ".join(changed[:3])}{more}; give another --workdir, or the same config'
    )


def open_tokenizer(config: Any, workdir: Path) -> Tokenizer:
  """Opens the tokenizer of the run: the workdir's, or a new one, which is saved in the workdir."""
  directory = workdir / 'tokenizer'
  if (directory / fingerprints.LIST).is_file():
    fingerprints.check_folder(directory)
    return Tokenizer.load(directory)
  options = options_lib.from_section(TokenizerOptions, config.tokenizer)
  if options.init == 'train':
    tokenizer = train_tokenizer(options)
  else:
    tokenizer = pretrained.open_tokenizer(options.init)
  if options.chat_template:
    # Checked here, as a run without conversations would never compile it.
    chat_template.check_source(options.chat_template, 'config.tokenizer.chat_template')
    tokenizer = tokenizer.with_template(options.chat_template)
  if hosts.is_first_process():
    tokenizer.save(directory)
    # Written last: without the list, the folder may be incomplete and is made again.
    fingerprints.record_files(directory)
  return tokenizer


def train_tokenizer(options: TokenizerOptions) -> Tokenizer:
  """Trains a new tokenizer on documents."""
  documents = sources.load_records(options.data, 'document', 'train')[: options.documents]
  texts = (document.text for document in documents)
  core = vocabulary.train_tokenizer(texts, options.vocab_size)
  return Tokenizer(core, vocabulary.CHAT_TEMPLATE, eos='<eos>', pad='<pad>')
