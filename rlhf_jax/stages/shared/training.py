"""Provides what all stages that train share: optimizer, state, checkpoints and export."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from rlhf_jax import files, fingerprints
from rlhf_jax import options as options_lib
from rlhf_jax.data import records
from rlhf_jax.data.records import Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.generation import responses
from rlhf_jax.generation.responses import Responses
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.interop import card, peft_io, pretrained
from rlhf_jax.models import lora
from rlhf_jax.models.transformer import Model
from rlhf_jax.report import kept_responses, refresh, run_files
from rlhf_jax.runtime import hosts, loop, metrics, optimizers
from rlhf_jax.runtime import step as steps
from rlhf_jax.runtime.mesh import Layout
from rlhf_jax.stages.shared import model_sources, response_judge
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.model_store import ModelStore, with_adapters
from rlhf_jax.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class Definitions:
  """The definitions that a train step of one model is compiled with; they hold no arrays.

  Attributes:
    model: the model that is trained.
    optimizer: its optimizer.
    layout: how arrays lie on the mesh.
  """

  model: Model  # its functions and its shape; the parameters are in the state
  optimizer: optax.GradientTransformation
  layout: Layout


@dataclasses.dataclass(frozen=True)
class Trainable:
  """What a stage trains, before any parameter is read.

  Attributes:
    definitions: for its train step.
    init: () → the TrainState before the first step.
  """

  definitions: Definitions
  init: Callable[[], TrainState]


def open_trainable(
  context: Context, options: Any, head: bool = False, likelihood: bool = False
) -> Trainable:
  """Opens the one model that a stage trains, and leaves its shape in the stage's folder.

  Args:
    context: the context of the stage.
    options: the stage's, with init, lora, optimizer, loop, batch_size and
      microbatches.
    head: give the model a scalar head.
    likelihood: that head sees how likely the response is.

  Raises:
    UserError: the batch does not divide over the mesh, or the model cannot be opened.
  """
  check_batch(context, options.batch_size, options.microbatches)
  store = ModelStore(context, options.lora)
  policy = store.open(options.init, head=head, trained=True, likelihood=likelihood)
  optimizer = optimizers.make_optimizer(options.optimizer, options.loop.steps)
  write_model_json(context, policy.model)

  def init() -> TrainState:
    return create_state(context, policy.read(), optimizer)

  return Trainable(Definitions(policy.model, optimizer, context.layout), init)


def create_state(
  context: Context,
  params: Params,
  optimizer: optax.GradientTransformation,
) -> TrainState:
  """Creates the state before the first step, which trains the adapters of `params` or all of it."""
  trained, frozen = lora.split_trainable(params)
  return steps.create_train_state(trained, optimizer, context.key(), context.layout, frozen)


def train_and_export(context: Context, training: loop.Training, options: loop.LoopOptions) -> None:
  """Trains a model; leaves checkpoints and a Hugging Face directory in the stage's folder."""
  page = refresh.Refresher(context.workdir)
  training = dataclasses.replace(
    training,
    learning_rate=_read_schedule(context),
    described=_describe_run(context),
    evaluated=page.refresh,
  )
  meta = {'stage': context.name}
  state = loop.run(training, options, context.directory, meta, context.on_saved)
  context.meet(f'{context.name} trained')  # the export reads model.json
  export(context, state.params)


def _read_schedule(context: Context) -> Callable[[int], float] | None:
  """Returns the function from a number of steps to the learning rate of the next one.

  None for a stage without an optimizer, such as `frozen_reward`.
  """
  section = context.section
  if 'optimizer' not in section:
    return None
  updates = section.get('epochs', 1) * section.get('minibatches', 1)  # of a step
  options = options_lib.from_section(optimizers.OptimizerOptions, section.optimizer)
  # The schedule counts updates, of which a step of some stages makes several.
  schedule = optimizers.make_schedule(options, section.loop.steps * updates)

  def learning_rate(step: int) -> float:
    return float(schedule(step * updates))

  return learning_rate


def _describe_run(context: Context) -> metrics.RunDescription:
  """Describes the run of a stage for trackers."""
  place = context.url or str(context.workdir.absolute())
  group = place.rstrip('/').rpartition('/')[2]
  # Not the sections of other stages, which are runs of their own.
  whole = context.config.to_dict()
  read = (context.name, 'seed', 'data', 'model', 'mesh', 'tokenizer')
  return metrics.RunDescription(
    name=f'{group}/{context.name}',
    group=group,
    identity=f'{place}/{context.name}',
    config={name: whole[name] for name in read},
  )


def check_batch(context: Context, rows: int, parts: int) -> None:
  """Checks that a batch can be cut into parts and over devices.

  Args:
    context: the context of the stage.
    rows: rows of the batch, over all devices.
    parts: parts of it that are computed one after the other.

  Raises:
    UserError: it does not divide.
  """
  shards = context.layout.batch_shards
  # Every part must give each shard of the batch the same number of rows.
  divides = rows >= 1 and parts >= 1 and rows % parts == 0 and rows // parts % shards == 0
  if not divides:
    raise UserError(
      f'{context.where}: a batch of {rows} rows in {parts} parts does not divide over the '
      f'{shards} device(s) of the mesh axes data, fsdp and expert'
    )


def write_model_json(context: Context, model: Model) -> None:
  """Leaves the model's shape, and the base of its adapters, in the stage's folder."""
  base = ''  # '' = a complete model; what `init` names otherwise
  if model.config.lora_rank:
    stages = context.config.stages
    base = model_sources.adapter_base_name(context.section.init, context.workdir, stages)
  values = {**dataclasses.asdict(model.config), 'base_model': base}
  if hosts.is_first_process():
    fingerprints.write_json(context.directory / model_sources.MODEL_JSON, values)


def write_records(context: Context, name: str, rows: Iterable[Any]) -> None:
  """Writes rows as JSON Lines to the stage's folder, with their fingerprint, on process 0 only."""
  if hosts.is_first_process():
    records.write_records(context.directory / name, rows)
    fingerprints.record_files(context.directory, [name])


def write_on_first_process(path: Path, text: str) -> None:
  """Writes a small file, complete or not at all, in the first process of a run only."""
  if hosts.is_first_process():
    files.write_text(path, text)


def export(context: Context, params: Params) -> None:
  """Exports a stage's model for other libraries, with a model card.

  `export/` is a Hugging Face directory. Adapters are left in PEFT's format,
  `adapter/`, too, and merged into the matrices of the export (none is written if
  config.export.merged is False). A reward model whose head sees likelihoods has
  no export, which is said.
  """
  settings = context.config.export
  # From model.json, so that a run that was cut before the export makes the same one.
  source = model_sources.find_model(context.name, context.workdir, context.config.stages)
  config = source.config
  if config.likelihood_head:
    hosts.say(
      f'{context.name}: no Hugging Face export, as no class of transformers scores by the '
      "likelihood of a response; this library's stages and `score` read "
      f'{context.directory}'
    )
    return
  text = _model_card(context, source)
  if config.lora_rank:
    _export_adapters(context, source, params, text)
    if not settings.merged:
      return
    params = jax.jit(functools.partial(lora.merge_adapters, config))(params)
    config = with_adapters(config, None, context.where)  # the shape without adapters
  pretrained.export_model(
    context.directory / 'export',
    config,
    params,
    context.tokenizer,
    settings.dtype,
    int(settings.shard_gigabytes * 10**9),
    text,
  )


def _export_adapters(
  context: Context,
  source: model_sources.ModelSource,
  params: Params,
  text: str,
) -> None:
  """Exports adapters in PEFT's format, on their base's export where the base is a stage."""
  assert source.base is not None  # there are adapters, so they have a base
  base = Path(source.base.name)
  # Other libraries cannot read a stage's checkpoints, but its export.
  is_stage = (base / model_sources.MODEL_JSON).is_file()
  peft_io.save_adapters(
    context.directory / 'adapter',
    source.config,
    params,
    str(base / 'export' if is_stage else base),
    context.config.export.dtype,
    text,
    context.tokenizer,
  )


def _model_card(context: Context, source: model_sources.ModelSource) -> str:
  """Returns the text of the model card: what was trained, on what, and how it evaluates."""
  section = context.section.to_dict()
  data = {}
  for name, value in section.items():
    # A section with a source is a DataOptions, whatever its field is called.
    if isinstance(value, dict) and 'source' in value:
      paths = map(str, value.get('path', ()))
      data[name] = ', '.join([value['source'], *paths])
  text = card.write_card(
    source.config,
    context.name,
    section['kind'],
    section.get('init', ''),
    data,
    _last_evaluation(context.directory),
    section,
  )
  # The paths of this machine mean nothing where the model is downloaded.
  return text.replace(str(context.workdir), '{workdir}')


def _last_evaluation(directory: Path) -> dict[str, float]:
  """Returns the numbers of a stage's last evaluation."""
  values = run_files.last_evaluation(run_files.read_metrics(directory))
  return {key: value for key, value in values.items() if isinstance(value, (int, float))}


def build_show_responses(
  context: Context,
  model: Model,
  prompts: Sequence[Sequence[int]],
  options: Any,
  asked: Sequence[Prompt] = (),
  reference: Any = None,
) -> Callable[[TrainState], list[dict[str, str]]]:
  """Builds the function that writes a few responses at every evaluation.

  The same prompts are answered with the same keys every time, so that texts can be
  compared. All responses are kept, with what the judge of the final table says of them
  where it needs no model (response_judge.py).

  Args:
    context: the context of the stage.
    model: the definition of the policy.
    prompts: token ids of prompts; the first `options.shown_responses` are answered.
    options: the stage's, with sampling, shown_responses and data.
    asked: the records of these prompts; () where they are no conversations.
    reference: has `model` and `params`, from which the KL is measured; None = no KL.

  Returns:
    show(state) → a dict {prompt, response} for each prompt.
  """
  tokenizer = context.tokenizer
  layout = context.layout
  chosen = prompts[: options.shown_responses]
  if not chosen:
    return _show_nothing
  reference_model, reference_params = None, None
  if reference is not None:
    reference_model, reference_params = reference.model, reference.params
  respond = responses.build_responder(
    model, options.sampling, tokenizer, layout, reference_model=reference_model
  )
  asked = asked[: len(chosen)]
  judge = response_judge.open_judge(context, asked, options.data)
  # Rounded up to what divides over the mesh; the rows that are added are not shown.
  rows = -(-len(chosen) // layout.batch_shards) * layout.batch_shards

  def show(state: TrainState) -> list[dict[str, str]]:
    key = context.key('shown responses')
    completed = responses.complete_prompts(
      respond, state.params, chosen, rows, tokenizer.pad_id, key, reference_params
    )
    shown = []
    for tokens, texts in zip(chosen, completed.texts, strict=True):
      # `core` keeps the special tokens, so that the chat template can be seen.
      prompt = tokenizer.core.decode(np.asarray(tokens).tolist())
      shown.append({'prompt': prompt, 'response': texts[0]})
    texts = [row['prompt'] for row in shown]
    ids = [record.id for record in asked]
    if asked:
      texts = [record.messages[-1]['content'] or '' for record in asked]
    verdicts = judge(completed.texts)
    keep_responses(context, state, options.sampling, completed, texts, ids, verdicts)
    return shown

  return show


def keep_responses(
  context: Context,
  state: TrainState,
  sampling: SamplingOptions,
  completed: Responses,
  prompts: Sequence[str],
  prompt_ids: Sequence[str] = (),
  verdicts: Mapping[str, np.ndarray] | None = None,
  tokens: Mapping[int, Mapping[str, list]] | None = None,
) -> None:
  """Keeps the responses of a stage's evaluation (report/kept_responses.py), on process 0.

  Args:
    context: the context of the stage.
    state: whose policy responded.
    sampling: how.
    completed: S responses to each of N prompts.
    prompts: [N] texts.
    prompt_ids: [N], of the prompts' records; () where they have none.
    verdicts: measure → [N, S] float.
    tokens: number of a prompt → columns of its response's tokens.
  """
  if not hosts.is_first_process():
    return
  rows = kept_responses.make_rows(
    completed,
    prompts,
    prompt_ids or [''] * len(prompts),
    verdicts,
    tokens,
    evaluation=kept_responses.TRAINING,
    stage=context.name,
    step=int(jax.device_get(state.step)),
    model='',
    decoding='sampled' if sampling.temperature else 'greedy',
  )
  kept_responses.keep(context.workdir, rows)


def _show_nothing(state: TrainState) -> list[dict[str, str]]:
  del state
  return []


def compile_train_step(
  train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
  definitions: Any,
  options: Any,
  donate: bool = True,
) -> steps.CompiledStep:
  """Compiles a stage's train step over its mesh.

  This is where the definitions and options become constants of the program, and
  where jit, donation of the state and shardings are applied (runtime/step.py).

  Args:
    train_step: (state, batch, …, definitions=, options=) → (state, metrics).
    definitions: what the step is made of, with a `layout`.
    options: the stage's options.
    donate: give the buffers of the old state to the new one.

  Returns:
    step(state, batch, …) → (state, metrics).
  """
  # Bound by name: what remains is a function of arrays, which jit can trace.
  step = functools.partial(train_step, definitions=definitions, options=options)
  return steps.compile_step(step, definitions.layout, donate=donate)
