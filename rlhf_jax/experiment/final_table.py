"""Makes the final table, which compares the models of an experiment on the same held-out prompts.

The table is printed; the workdir gets results.json, report.html and the responses of all models.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import sys
import time
from typing import Any

import jax
import numpy as np

from rlhf_jax import fingerprints, text_table
from rlhf_jax.data import batches, encode, sources
from rlhf_jax.data.records import Prompt
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import by_kind, downstream, oracle_judge, table
from rlhf_jax.experiment import controls, reward_agreement, reward_kinds
from rlhf_jax.generation import responses
from rlhf_jax.generation.responses import Responses
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.models.lora import LoraOptions
from rlhf_jax.options import Count, from_section
from rlhf_jax.report import kept_responses, refresh, run_files
from rlhf_jax.rewards.sources import RewardSourceOptions
from rlhf_jax.runtime import hosts
from rlhf_jax.runtime.mesh import Layout
from rlhf_jax.stages.shared import response_judge, scores
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.model_store import ModelStore
from rlhf_jax.types import Array, Prompts, Samples

ORACLE = response_judge.ORACLE

REWARD_KINDS = ('reward', 'frozen_reward')  # the stages that train reward models
DECODINGS = ('sampled', 'greedy')  # how every model responds
UNSEEN = ('family', 'fact', 'person', 'harm')  # what of a prompt training never had
POOL_KEY = 2**31 - 1  # folded into the key of samples that controls choose from

# Folded into the root key; a stage folds in a crc32 of its name instead.
_EVALUATION_KEY = 2**31 - 2


@dataclasses.dataclass(frozen=True)
class Options(RewardSourceOptions):
  """The section `evaluation`; without `models` there is no table."""

  # The rows of the table: name of the row → stage whose model it shows, or a
  # model's folder (with a / in its name) whose tokens mean the same.
  models: dict[str, str] = dataclasses.field(default_factory=dict)
  baseline: str = 'sft'  # the stage with which all models are compared, by win rate and KL
  versus: tuple[str, ...] = ()  # further rows with which all are compared, by win rate
  judge: str = ORACLE  # decides which response is better: the oracle, or a reward source
  # Row → N: the best of N responses counts, by `judge` if that is a reward
  # source, else by `reward`.
  best_of: dict[str, int] = dataclasses.field(default_factory=dict)
  reward: str = 'reward'  # the reward source that chooses the best of N, named as in PPO
  num_samples: Count = 1  # sampled responses to each prompt; one more is greedy
  # TinyWorld's prompts only: rows of what a model must beat, see controls.py, and
  # the accuracy of the reward model by kind of pair, see reward_kinds.py.
  controls: bool = False
  batch_size: Count = 64  # prompts at once, over all devices
  max_length: Count = 48  # tokens of a prompt at most
  data: DataOptions = DataOptions()
  split: str = 'validation'  # of the prompts; 'test' for the figures of a release, once
  sampling: SamplingOptions = SamplingOptions()

  def unread(self) -> dict[str, str]:
    """Returns the settings that are not read with these values, and why."""
    if not self.models:
      # Not data and batch_size, which the tiny form of every experiment sets.
      names = {field.name for field in dataclasses.fields(self)} - {'models', 'data', 'batch_size'}
      return dict.fromkeys(sorted(names), 'evaluation.models is empty')
    if self.judge != ORACLE:
      return {'reward': 'judge is a reward'} | self.unread_without([self.judge])
    if self.best_of or self.controls:
      return self.unread_without([self.reward])
    why = 'best_of is empty and the oracle judges'
    return {'reward': why} | self.unread_without([])

  @property
  def parts(self) -> int:
    """The number of parts of a batch that a reward model reads one after the other."""
    return 1

  @property
  def packed_rows(self) -> int:
    """The rows that a reward model reads at a time, in which responses share places."""
    return self.batch_size


@dataclasses.dataclass(frozen=True)
class _Asked:
  """What all models are asked, and with what they are judged."""

  context: Context
  options: Options
  store: ModelStore
  examples: Sequence[Any]  # of encode.prompts
  score: Any  # (Prompts, Samples) → [B * K]; None where no reward is needed
  root: Array  # the random key of all rows


@dataclasses.dataclass(frozen=True)
class Comparison:
  """The values of the table, and the responses that they are measured on.

  Attributes:
    rows: name of the row → decoding → values, see evaluation/table.py.
    controls: the same of what a model must beat, see controls.py.
    unseen: the same of the models, of what training never had.
    kinds: name of a model or control → decoding → kind of prompt → values, see
      evaluation/by_kind.py; {} where the oracle is not the judge.
    responses: all of them, as they are kept (report/kept_responses.py).
  """

  rows: dict[str, dict[str, dict[str, Any]]]
  controls: dict[str, dict[str, dict[str, Any]]]
  unseen: dict[str, dict[str, dict[str, Any]]]
  kinds: dict[str, dict[str, dict[str, Any]]]
  responses: list[kept_responses.Kept]


def shown_rows(config: Any) -> dict[str, str]:
  """Returns the rows of the table, name → stage.

  Stages that are not in `config.stages` have no row. If the baseline is not,
  there are no rows at all, as there is nothing to compare with.
  """
  models = config.evaluation.models
  rows = {}
  for name, stage in models.items():
    if stage in config.stages or _is_folder(stage):
      rows[name] = stage
  return rows if config.evaluation.baseline in rows.values() else {}


def _is_folder(stage: str) -> bool:
  """Says whether a row shows a model from elsewhere."""
  return '/' in stage


def baseline_row(config: Any) -> str | None:
  """Returns the name of the baseline's row (not of its best of N); None if there is none."""
  section = config.evaluation
  for name, stage in section.models.items():
    if stage == section.baseline and name not in section.best_of:
      return name
  return None


def has_controls(config: Any) -> bool:
  """Says whether the table has controls: they are asked for, and the reward's stage is run."""
  section = config.evaluation
  is_stage = getattr(config.get(section.reward), 'kind', None) is not None
  return section.controls and (not is_stage or section.reward in config.stages)


def reward_name(config: Any, options: Options) -> str:
  """Returns the reward source that judges or chooses the best of N; '' where none is needed.

  Args:
    config: the whole config.
    options: its section `evaluation`.
  """
  if options.judge != ORACLE:
    return options.judge
  return options.reward if options.best_of or has_controls(config) else ''


def check(config: Any, layout: Layout) -> None:
  """Checks the section `evaluation`, so that mistakes in it are found before training.

  Args:
    config: the whole config.
    layout: the mesh and its rules.

  Raises:
    UserError: a row, a stage or a number is wrong.
  """
  section = config.evaluation
  if not len(section.models):
    return  # no table
  for name, stage in section.models.items():
    # Any section with a `kind` is a stage, even if it is not in config.stages.
    is_stage = isinstance(stage, str) and getattr(config.get(stage), 'kind', None) is not None
    if not is_stage and not (isinstance(stage, str) and _is_folder(stage)):
      raise UserError(f'config.evaluation.models.{name}: {stage!r} is no stage of the experiment')
  for name in section.versus:
    if name not in section.models:
      known = ', '.join(section.models)
      raise UserError(f'config.evaluation.versus: {name!r} is no row of models; there are {known}')
  if baseline_row(config) is None:
    raise UserError(
      f'config.evaluation.models: expected a row for the baseline {section.baseline!r}'
    )
  for name, count in section.best_of.items():
    if name not in section.models or not isinstance(count, int) or count < 1:
      raise UserError(
        f'config.evaluation.best_of.{name}: expected a row of models and a number of 1 or more, '
        f'got {count!r}'
      )
  if section.controls and (section.judge, section.data.source) != (ORACLE, 'tinyworld'):
    raise UserError(
      f'config.evaluation.controls: expected the judge {ORACLE!r} and data of tinyworld, got '
      f'{section.judge!r} and {section.data.source!r}'
    )
  if section.split not in ('validation', 'test'):
    raise UserError(f'config.evaluation.split: expected validation or test, got {section.split!r}')
  if section.batch_size < 1 or section.batch_size % layout.batch_shards:
    raise UserError(
      f'config.evaluation: a batch of {section.batch_size} rows does not divide over the '
      f'{layout.batch_shards} device(s) of the mesh axes data, fsdp and expert'
    )


def check_prompts(options: Options, prompts: Sequence[Prompt]) -> None:
  """Raises UserError if the judge of the table does not know its prompts."""
  if options.judge == ORACLE and not all(map(oracle_judge.knows, prompts)):
    raise UserError(
      f"config.evaluation.judge: '{ORACLE}' knows the prompts of TinyWorld only; for other data "
      "expected a reward function 'module:function', a stage with a reward model, or a server"
    )


def make(contexts: Mapping[str, Context], seconds: Mapping[str, float | None]) -> dict[str, Any]:
  """Makes the table and the report, or reads the results if they exist already.

  Args:
    contexts: the context of each stage, in the order in which they run.
    seconds: the seconds that each stage took.

  Returns:
    The contents of results.json: models, controls and unseen (the rows of the table, by
    decoding), kinds (by the kind of prompt), reward (the last evaluation of the reward
    model, and its accuracy by kind), downstream (what optimising it bought),
    reward_agreement (of several reward models), seconds, table (as text), and for each
    other stage its last evaluation.
  """
  first = next(iter(contexts.values()))
  config = first.config
  path = first.workdir / 'results.json'
  if path.is_file():
    earlier = fingerprints.read_json(path, 'remove it to evaluate again')
    _say(earlier)
    return earlier
  started = time.monotonic()
  results: dict[str, Any] = {'models': {}, 'reward': {}, 'seconds': {}}
  comparison = Comparison({}, {}, {}, {}, [])
  if shown_rows(config):
    hosts.say('— evaluation ' + '—' * 40)
    comparison = compare(first)
    results['models'] = comparison.rows
    results['controls'] = comparison.controls
    results['unseen'] = comparison.unseen
    results['kinds'] = comparison.kinds
  rewards = [name for name in contexts if config[name].kind in REWARD_KINDS]
  # Of several reward models, the table is about the one that it names.
  main = config.evaluation.reward if config.evaluation.reward in rewards else ''
  main = main or (rewards[-1] if rewards else '')
  for name, context in contexts.items():
    values = run_files.last_evaluation(run_files.read_metrics(context.directory))
    if values:
      results['reward' if name == main else name] = values
  if shown_rows(config) and has_controls(config):
    results['reward']['by_kind'] = reward_kinds.measure(first)
  if main and shown_rows(config):
    results['downstream'] = _measure_downstream(config, results, main)
  results['reward_agreement'] = reward_agreement.measure(first.workdir, rewards)
  results['seconds'] = {
    **seconds,
    'evaluation': time.monotonic() - started,
  }
  results['table'] = format_results(results)
  if hosts.is_first_process():
    kept_responses.keep(first.workdir, comparison.responses)
    refresh.write(first.workdir, results)
  # Written last, as its presence means that the report is complete.
  if hosts.is_first_process():
    fingerprints.write_json(path, results)
  _say(results)
  hosts.say(f'\nReport: {first.workdir / "report.html"}')
  return results


def _measure_downstream(config: Any, results: Mapping[str, Any], reward: str) -> dict[str, Any]:
  """Returns what optimising a reward model bought, beside its accuracy.

  Args:
    config: the whole config.
    results: its models, controls and reward are read.
    reward: the stage that trained the reward model.

  Returns:
    reward; judge, who says what was gained; gains, from downstream.list_gains. The accuracy
    stands in `results['reward']`.
  """
  section = config.evaluation
  chooser = section.reward if section.judge == ORACLE else section.judge
  optimised = {}
  for name, stage in shown_rows(config).items():
    if name in section.best_of:
      if chooser == reward:
        optimised[name] = f'best of {section.best_of[name]}'
    elif stage in config.stages and reward in config[stage].get('reward', ()):
      optimised[name] = 'trained'
  if section.reward == reward:
    optimised |= controls.BY_REWARD
  rows = {}
  for part in ('models', 'controls'):
    for name, decodings in results[part].items():
      if 'sampled' in decodings:
        rows[name] = decodings['sampled']
  gains = downstream.list_gains(rows, _checked_baseline(config), optimised)
  return {'reward': reward, 'judge': section.judge, 'gains': gains}


def _say(results: Mapping[str, Any]) -> None:
  """Prints the table, in several parts where the terminal is narrow."""
  hosts.say(format_results(results, text_table.terminal_width(sys.stdout)))


def format_results(results: Mapping[str, Any], width: int = 0) -> str:
  """Formats the table, the reward model's accuracy and the seconds of every stage as text.

  Args:
    results: the contents of results.json.
    width: columns of the terminal, for which a wide table is broken; 0 = it never is.
  """
  lines = []
  for decoding in DECODINGS:
    rows = _rows_of(results, decoding)
    if rows:
      lines += [decoding, table.format_table(rows, width), '']
  reward = results['reward']
  if 'accuracy' in reward:
    lines.append(
      f'reward model: {reward["accuracy"]:.1%} of {reward["pairs"]:.0f} held-out pairs '
      f'(the longer response: {reward["length_accuracy"]:.1%})'
    )
  for group, accuracies in reward.get('by_kind', {}).items():
    kinds = ', '.join(f'{kind} {value:.0%}' for kind, value in accuracies.items())
    lines.append(f'  {group}: {kinds}')
  bought = downstream.format_gains(results.get('downstream', {}))
  if bought:
    lines += ['what optimising it bought against the baseline:', *bought]
  lines += reward_agreement.format_agreement(results.get('reward_agreement', {}))
  seconds = [f'{name} {value:.0f}' for name, value in results['seconds'].items()]
  lines.append('seconds: ' + ', '.join(seconds))
  return '\n'.join(lines)


def _rows_of(results: Mapping[str, Any], decoding: str) -> dict[str, dict[str, Any]]:
  """Returns the rows of models and controls in one decoding."""
  rows = {}
  for group in ('models', 'controls'):
    for name, decodings in results.get(group, {}).items():
      if decoding in decodings:
        rows[name] = decodings[decoding]
  return rows


def compare(context: Context) -> Comparison:
  """Generates responses of all models to the held-out prompts, and judges them.

  Every model responds at the temperature of `sampling`, and greedily.

  Args:
    context: the context of any stage; its tokenizer, mesh and workdir are used.

  Returns:
    The rows of the table, and all responses.
  """
  config = context.config
  options = from_section(Options, config.evaluation)
  records = sources.load_records(options.data, 'prompt', options.split)
  check_prompts(options, records)
  examples = encode.prompts(records, context.tokenizer, options.max_length, spread=hosts.spread)
  prompts = [records[int(example['index'])] for example in examples]
  # One store for all models, so that models with adapters share their base.
  store = ModelStore(context, _adapters(context))
  score = _open_score(context, store, options, records)
  root = jax.random.fold_in(jax.random.key(config.seed), _EVALUATION_KEY)
  asked = _Asked(context, options, store, examples, score, root)
  responses_of_models: controls.ResponsesByRow = {name: {} for name in DECODINGS}
  for number, (name, stage) in enumerate(_rows_in_order(config)):
    for decoding in DECODINGS:
      best_of = options.best_of.get(name)
      if decoding == 'greedy' and best_of:
        continue  # the same response N times
      responses_of_models[decoding][name] = _respond(asked, stage, decoding, number, best_of)
  if not has_controls(config):
    return _tabulate(config, options, prompts, responses_of_models, {})
  pool = _respond(asked, options.baseline, 'sampled', POOL_KEY, count=controls.POOL)
  base = _stage_of_base(config)
  prompted: dict[str, Responses] = {}
  if base is not None:
    prompted = controls.respond_prompted(context, options, store.open(base), prompts, root)
  kl = _kl_of_last(responses_of_models['sampled'])
  baseline = _checked_baseline(config)
  others = controls.make(
    prompts, responses_of_models, pool, prompted, baseline, kl, context.tokenizer
  )
  return _tabulate(config, options, prompts, responses_of_models, others)


def _respond(
  asked: _Asked,
  stage: str,
  decoding: str,
  number: int,
  best_of: int | None = None,
  count: int = 0,
) -> Responses:
  """Generates the responses of one model in one way.

  Args:
    asked: what all models are asked.
    stage: whose model responds.
    decoding: one of DECODINGS.
    number: of the row; its random key depends on it.
    best_of: choose the best of so many; None = take the responses as they come.
    count: responses to each prompt; 0 = as the options say.
  """
  options, context = asked.options, asked.context
  sampling = options.sampling
  num_samples = (count or options.num_samples) * (best_of or 1)
  if decoding == 'greedy':
    sampling = dataclasses.replace(sampling, temperature=0.0)
    num_samples = 1
  policy = asked.store.open(stage)
  baseline = asked.store.open(options.baseline)
  # The score of samples shows what the reward thinks of what it was optimised for.
  needs_score = decoding == 'sampled' or options.judge != ORACLE
  respond = responses.build_responder(
    policy.model,
    sampling,
    context.tokenizer,
    context.layout,
    num_samples,
    baseline.model,
    asked.score if needs_score else None,
  )
  # The best of N, or the likeliest response, is no sample of the policy, so a KL
  # estimated from it has no meaning.
  has_kl = decoding == 'sampled' and not best_of and not count
  is_baseline = stage == options.baseline
  completed = respond(
    policy.read(),
    batches.prompts_once(asked.examples, options.batch_size),
    jax.random.fold_in(asked.root, number),
    baseline.read() if has_kl and not is_baseline else None,
  )
  if has_kl and is_baseline:
    completed = dataclasses.replace(completed, kl=np.zeros(completed.lengths.shape))
  return responses.select_best_of(completed, best_of) if best_of else completed


def _rows_in_order(config: Any) -> list[tuple[str, str]]:
  """Returns (name, stage) for each row, models from elsewhere first, then as the stages run."""
  order = list(config.stages)

  def stage_number(row: tuple[str, str]) -> int:
    return order.index(row[1]) if row[1] in order else -1

  return sorted(shown_rows(config).items(), key=stage_number)


def _adapters(context: Context) -> LoraOptions | None:
  """Returns the adapter options of a stage, which say how a shared base is stored; None without."""
  if 'lora' not in context.section:
    return None
  return from_section(LoraOptions, context.section.lora)


def _open_score(
  context: Context,
  store: ModelStore,
  options: Options,
  records: Sequence[Prompt],
) -> Any:
  """Opens the reward source that judges or chooses the best of N; None where neither is needed."""
  name = reward_name(context.config, options)
  if not name:
    return None
  score_source = scores.open_score(context, store, name, options)

  def score(prompts: Prompts, samples: Samples) -> Array:
    return score_source(prompts, samples, records)[0]

  return score


def _judge(
  options: Options, prompts: Sequence[Prompt], completed: Responses
) -> dict[str, np.ndarray]:
  """Judges the S responses to each of N prompts.

  Returns:
    Name of a measure → [N, S] float; the response with the higher `utility` wins.
  """
  if options.judge == ORACLE:
    return oracle_judge.judge_with_oracle(prompts, completed.texts)
  assert completed.scores is not None  # the judge is the reward that scored them
  return {'utility': completed.scores}


def _tabulate(
  config: Any,
  options: Options,
  prompts: Sequence[Prompt],
  responses_of_models: controls.ResponsesByRow,
  control_responses: controls.ResponsesByRow,
) -> Comparison:
  """Makes the rows of the table, and of the responses that are kept."""
  kept: list[kept_responses.Kept] = []
  tables: dict[str, dict[str, dict[str, Any]]] = {
    'models': {},
    'controls': {},
    'unseen': {},
    'kinds': {},
  }
  unseen = [number for number, row in enumerate(prompts) if row.meta.get('unseen') in UNSEEN]
  for decoding in DECODINGS:
    own = responses_of_models[decoding]
    others = control_responses.get(decoding, {})
    judged = {name: _judge(options, prompts, row) for name, row in {**own, **others}.items()}
    baseline_name = _checked_baseline(config)
    make = functools.partial(_make_row, config, prompts, judged, own[baseline_name])
    for name, row in own.items():
      tables['models'].setdefault(name, {})[decoding] = make(name, row, range(len(prompts)))
      if unseen:
        tables['unseen'].setdefault(name, {})[decoding] = make(name, row, unseen)
    for name, row in others.items():
      tables['controls'].setdefault(name, {})[decoding] = make(name, row, range(len(prompts)))
    for name, row in {**own, **others}.items():
      kept += _keep(config, prompts, name, decoding, row, judged[name])
      if options.judge == ORACLE:
        tables['kinds'].setdefault(name, {})[decoding] = by_kind.make_rows(
          [prompt.meta['kind'] for prompt in prompts],
          judged[name],
          judged[baseline_name],
          _clusters(prompts),
        )
  return Comparison(
    rows=tables['models'],
    controls=tables['controls'],
    unseen=tables['unseen'],
    kinds=tables['kinds'],
    responses=kept,
  )


def _clusters(prompts: Sequence[Prompt]) -> list[str]:
  """Returns the cluster of each prompt: its family, or itself."""
  return [prompt.meta.get('family', prompt.id) for prompt in prompts]


def _keep(
  config: Any,
  prompts: Sequence[Prompt],
  name: str,
  decoding: str,
  row: Responses,
  verdicts: table.Judged,
) -> list[kept_responses.Kept]:
  """Makes the rows that are kept of the responses of one row of the table."""
  return kept_responses.make_rows(
    row,
    [prompt.messages[-1]['content'] or '' for prompt in prompts],
    [prompt.id for prompt in prompts],
    verdicts,
    evaluation=kept_responses.FINAL,
    stage=str(config.evaluation.models.get(name, name)),  # a control is named as itself
    step=None,
    model=name,
    decoding=decoding,
  )


def _make_row(
  config: Any,
  prompts: Sequence[Prompt],
  judged: Mapping[str, table.Judged],
  baseline_responses: Responses,
  name: str,
  row: Responses,
  numbers: Sequence[int],
) -> dict[str, Any]:
  """Makes a row of the table from the responses to some of the prompts.

  Args:
    config: the whole config.
    prompts: all prompts.
    judged: name of a row → what the judge says, in the decoding of this row.
    baseline_responses: of the baseline, in the decoding of this row.
    name: of the row.
    row: its responses.
    numbers: of the prompts that count.
  """
  chosen = list(numbers)
  baseline = _checked_baseline(config)

  def take(measures: table.Judged) -> table.Judged:
    return {key: values[chosen] for key, values in measures.items()}

  others = {}
  for other in config.evaluation.versus:
    if other in judged:
      others[other] = judged[other]['utility'][chosen]
  return table.make_row(
    responses.select_prompts(row, chosen),
    take(judged[name]),
    take(judged[baseline]),
    others,
    _clusters([prompts[number] for number in chosen]),
    responses.select_prompts(baseline_responses, chosen).texts,
  )


def _checked_baseline(config: Any) -> str:
  """Returns the name of the baseline's row, which is checked to exist before the first stage."""
  name = baseline_row(config)
  assert name is not None
  return name


def _stage_of_base(config: Any) -> str | None:
  """Returns the stage whose model the row 'base' shows; None without such a row."""
  return shown_rows(config).get('base')


def _kl_of_last(rows: Mapping[str, Responses]) -> float:
  """Returns the KL of the last row that has one: at which SFT's samples are tilted."""
  measured = [row.kl for row in rows.values() if row.kl is not None]
  return float(measured[-1].mean())
