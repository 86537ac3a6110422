"""Runs what a config names, stage after stage, and ends with a table of every model on held-out prompts.

  workdir/config.json            the whole config
          tokenizer/             one for all stages
          STAGE/                 checkpoints/, metrics.jsonl, samples.jsonl, events, export/, done.json
          results.json, report.html, report.png
"""

import json
import os
from pathlib import Path
import sys
import time

import jax
import numpy as np

from rlhf_jax import config as configs
from rlhf_jax.data import batches, encode, sources
from rlhf_jax.data.tinyworld import vocabulary
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import oracle_judge, report, table
from rlhf_jax.generation import responses
from rlhf_jax.generation import sampler
from rlhf_jax.interop import pretrained
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.runtime import hosts, mesh
from rlhf_jax.stages import STAGES
from rlhf_jax.stages.shared import common, model_sources, rollout

DEFAULTS = dict(
    seed=0,  # of everything random
    stages=(),  # sections to run, in order
    data='',  # what {data} stands for in paths: the folder of an experiment's files
    model=dict(  # the shape of a model that starts at random, and how every model computes
        embed=128, layers=4, heads=4, kv_heads=2, head_dim=32, mlp=384, norm_eps=1e-5, rope_theta=10000.0, tied=True,
        max_length=2048, dtype='float32', remat='none', attention='auto'),
    export=dict(dtype='float32', shard_gigabytes=5.0, merged=True),  # of the Hugging Face directories that stages leave;
    # merged: a stage of adapters leaves the whole model too
    tokenizer=dict(
        init='train',  # train (on documents), or where to take it from: 'smollm2', a directory
        chat_template='',  # jinja2, in place of the one found there
        vocab_size=1024,
        documents=4000,  # how many to train on
        data=dict(sources.DEFAULTS)),
    mesh=dict(mesh.DEFAULTS),
    evaluation=dict(  # the last table; without models there is none
        models=dict(),  # its rows: name → stage
        baseline='sft',  # the stage all are compared with, in win rate and KL
        versus=(),  # rows with which all are compared too, in win rate
        judge='oracle',  # who says which answer is better: oracle (of the embedded world), a reward stage or program
        best_of=dict(),  # row → N: its answers are the best of N by `reward`, or by the judge where it is a reward
        reward='reward',
        num_samples=1,  # answers to each prompt
        batch_size=64,
        max_length=48,  # tokens of a prompt at most
        data=dict(sources.DEFAULTS),
        sampling=dict(sampler.DEFAULTS)),
)


def load_config(path: str, overrides=()):
  """The whole config of an experiment's file (see config.load)."""
  return configs.load(path, overrides, defaults=DEFAULTS,
                      stage_defaults={kind: module.DEFAULTS for kind, module in STAGES.items()})


def run(config, workdir) -> dict:
  """Runs every stage that is not done yet, then evaluates.

  Returns:
    What results.json holds.

  Raises:
    UserError: whatever is wrong with config, data, mesh or workdir.
  """
  workdir = Path(workdir)
  cache_compilations()
  layout = mesh.make_layout(config.mesh, need=model_sources.mesh_need(configs.resolve(config, workdir=workdir, data=config.data))
                     if config.mesh.preset == 'auto' else None)
  check(config, layout)
  claim(config, workdir)
  if layout.why:
    say(layout.why)
  hosts.barrier('claimed')
  config = configs.resolve(config, workdir=workdir, data=config.data)
  tokenizer = open_tokenizer(config, workdir)
  hosts.barrier('tokenizer')
  for number, name in enumerate(config.stages, 1):
    context = common.Context(config, name, workdir, layout, tokenizer)
    if finished(context) is None:
      say(f'— {number}/{len(config.stages)} {name} ' + '—' * 40)
      started = time.monotonic()
      STAGES[config[name].kind].run(context)
      hosts.barrier(f'{name} ran')
      trained = context.directory / 'done.json'  # knows the time before a resume too
      seconds = json.loads(trained.read_text())['seconds'] if trained.is_file() else time.monotonic() - started
      common.write_text(context.directory / 'finished.json', json.dumps({'seconds': seconds}) + '\n')
      hosts.barrier(f'{name} finished')
  return evaluate(config, workdir, layout, tokenizer)


def cache_compilations() -> None:
  """What was compiled once is found again in the user's cache directory, unless JAX_COMPILATION_CACHE_DIR says where."""
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    root = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    jax.config.update('jax_compilation_cache_dir', str(root / 'rlhf_jax' / 'compiled'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def shown_models(config) -> dict[str, str]:
  """The rows of the last table, name → stage: of the stages that are run, none if the baseline is not among them."""
  rows = {name: stage for name, stage in config.evaluation.models.items() if stage in config.stages}
  return rows if config.evaluation.baseline in rows.values() else {}


def baseline_row(config) -> str | None:
  """The row of the last table that all are compared with: the baseline as it is, not the best of several."""
  said = config.evaluation
  return next((name for name, stage in said.models.items() if stage == said.baseline and name not in said.best_of), None)


def check(config, layout) -> None:
  """Raises UserError for what would be wrong with the last table, before hours of training."""
  said = config.evaluation
  if not len(said.models):
    return
  for name, stage in said.models.items():
    if not isinstance(stage, str) or getattr(config.get(stage), 'kind', None) is None:
      raise UserError(f'config.evaluation.models.{name}: {stage!r} is no stage of the experiment')
  for name in said.versus:
    if name not in said.models:
      raise UserError(f'config.evaluation.versus: {name!r} is no row of models; there are {", ".join(said.models)}')
  if baseline_row(config) is None:
    raise UserError(f'config.evaluation.models: expected a row for the baseline {said.baseline!r}')
  for name, count in said.best_of.items():
    if name not in said.models or not isinstance(count, int) or count < 1:
      raise UserError(f'config.evaluation.best_of.{name}: expected a row of models and a number from 1, got {count!r}')
  if said.batch_size < 1 or said.batch_size % layout.batch_shards:
    raise UserError(f'config.evaluation: a batch of {said.batch_size} rows does not divide over the '
                    f'{layout.batch_shards} device(s) of the mesh axes data, fsdp and expert')


def claim(config, workdir: Path) -> None:
  """Writes config.json, or checks that what is in the workdir was made with this config. A mistake can be corrected:
  the section of a stage that has not begun may change (the evaluation's, while there are no results), such stages may
  come and go, the mesh may always change, and before any has begun everything may.

  Raises:
    UserError: it belongs to another one; the first differences are named.
  """
  path, text = workdir / 'config.json', configs.as_json(config)
  old, new = json.loads(path.read_text()) if path.is_file() else {}, json.loads(text)
  begun = [name for name in old.get('stages', ()) if any(
      any((workdir / name).glob(made)) for made in ('checkpoints/*', 'train.jsonl', 'finished.json'))]
  if begun:
    free = {*old['stages'], *new['stages'], 'evaluation', 'mesh'} - {*begun}
    if {*begun} <= {*new['stages']}:
      free.add('stages')
    if (workdir / 'results.json').is_file():
      free -= {'evaluation'}
    changed = configs.differences(*({k: v for k, v in one.items() if k not in free} for one in (old, new)))
    if changed:
      more = f' and {len(changed) - 3} more' if len(changed) > 3 else ''
      raise UserError(f'{path}: this workdir was begun with another config: {"; ".join(changed[:3])}{more}; '
                      'give another --workdir, or the same config')
    if old == new:
      return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if not begun:
      (workdir / 'tokenizer' / 'ready.json').unlink(missing_ok=True)
    common.write_text(path, text)
  except OSError as error:
    raise UserError(f'--workdir={workdir}: cannot write there: {error.strerror}') from None


def open_tokenizer(config, workdir: Path) -> Tokenizer:
  """The tokenizer of the run: the one in the workdir, else made as the config says and left there."""
  directory, said = workdir / 'tokenizer', config.tokenizer
  if (directory / 'ready.json').is_file():
    return Tokenizer.load(directory)
  if said.init == 'train':
    documents = sources.load_records(said.data, 'document', 'train')[:said.documents]
    core = vocabulary.train((document.text for document in documents), said.vocab_size)
    tokenizer = Tokenizer(core, vocabulary.CHAT_TEMPLATE, eos='<eos>', pad='<pad>')
  else:
    tokenizer = pretrained.open_tokenizer(said.init)
  if said.chat_template:
    tokenizer = tokenizer.with_template(said.chat_template)
  if jax.process_index() == 0:
    tokenizer.save(directory)
    common.write_text(directory / 'ready.json', '{}\n')
  return tokenizer


def finished(context) -> float | None:
  """The seconds a finished stage took, None where it is not."""
  path = context.directory / 'finished.json'
  return json.loads(path.read_text())['seconds'] if path.is_file() else None


def evaluate(config, workdir: Path, layout, tokenizer) -> dict:
  """The table of all models; written as results.json, report.html and report.png, and printed."""
  contexts = {name: common.Context(config, name, workdir, layout, tokenizer) for name in config.stages}
  done = workdir / 'results.json'
  if done.is_file():
    results = json.loads(done.read_text())
    say(results['table'])
    return results
  started = time.monotonic()
  results = {'models': {}, 'reward': {}, 'seconds': {}}
  shown, prompts = {}, []
  if shown_models(config):
    say('— evaluation ' + '—' * 40)
    results['models'], shown, prompts = compare(config, next(iter(contexts.values())))
  curves = {name: report.read_metrics(context.directory) for name, context in contexts.items()}
  for name, lines in curves.items():
    last = next((line for line in reversed(lines) if any(key.startswith('eval/') for key in line)), {})
    values = {key.removeprefix('eval/'): value for key, value in last.items() if key.startswith('eval/')}
    if values:
      results['reward' if config[name].kind == 'reward' else name] = values
  results['seconds'] = {name: finished(context) for name, context in contexts.items()}
  results['seconds']['evaluation'] = time.monotonic() - started
  lines = [table.format_table(results['models'])] if results['models'] else []
  if 'accuracy' in results['reward']:
    lines.append(f'reward model: {results["reward"]["accuracy"]:.1%} of {results["reward"]["pairs"]:.0f} held-out pairs '
                 f'(the longer response: {results["reward"]["length_accuracy"]:.1%})')
  lines.append('seconds: ' + ', '.join(f'{name} {seconds:.0f}' for name, seconds in results['seconds'].items()))
  results['table'] = '\n'.join(lines)
  if jax.process_index() == 0:
    image = report.draw_picture(curves, results['models'])
    (workdir / 'report.png').write_bytes(image)
    talks = {name: report.read_transcripts(context.directory) for name, context in contexts.items()}
    common.write_text(workdir / 'report.html', report.format_page(workdir.name, results['table'], image, shown, prompts, talks))
  common.write_text(done, json.dumps(results, indent=2) + '\n')
  say(results['table'])
  say(f'\nReport: {workdir / "report.html"}')
  return results


def compare(config, context):
  """(rows of the table, a few answers by model, their prompts)."""
  section, tokenizer = config.evaluation, context.tokenizer
  records = sources.load_records(section.data, 'prompt', 'validation')
  examples = encode.prompts(records, tokenizer, section.max_length)
  prompts = [records[int(example['index'])] for example in examples]
  scored = section.judge != 'oracle'
  name = section.judge if scored else section.reward
  of = rollout.open_score(context, name) if scored or len(section.best_of) else None
  score = lambda asked, samples: of(asked, samples, records)[0]
  baseline_model, read_baseline = common.open_model(context, section.baseline)
  baseline, given, judged = read_baseline(), {}, {}
  key = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 2)
  rows = sorted(shown_models(config).items(), key=lambda row: list(config.stages).index(row[1]))
  for number, (name, stage) in enumerate(rows):
    model, read = common.open_model(context, stage)
    count = section.best_of.get(name)
    answer = responses.build_responder(model, section.sampling, tokenizer, context.layout, section.num_samples * (count or 1),
                           baseline_model, score if scored or count else None)
    answered = answer(read(), batches.prompts_once(examples, section.batch_size), jax.random.fold_in(key, number),
                      None if count else baseline)
    given[name] = responses.select_best_of(answered, count) if count else answered
    judged[name] = {'utility': given[name].scores} if scored else oracle_judge.judge_with_oracle(prompts, given[name].texts)
  utility = judged[baseline_row(config)]['utility']
  others = {name: judged[name]['utility'] for name in section.versus if name in judged}
  table_rows = {name: table.make_row(given[name], judged[name], utility, others) for name, _ in rows}
  few = np.linspace(0, len(prompts) - 1, min(24, len(prompts))).astype(int)
  return (table_rows, {name: [given[name].texts[i][0] for i in few] for name, _ in rows},
          [prompts[i].messages[-1]['content'] for i in few])


def say(text: str) -> None:
  """To the user, from the first process."""
  if jax.process_index() == 0:
    print(text, flush=True, file=sys.stdout)
