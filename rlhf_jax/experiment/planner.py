"""Plans an experiment for devices that this machine need not have, on one mesh or on many.

A plan of a mesh has the plans of all stages; planning/ makes those.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
from pathlib import Path
import tempfile
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from rlhf_jax import options as options_lib
from rlhf_jax.errors import UserError
from rlhf_jax.experiment import config as configs
from rlhf_jax.experiment import pipeline
from rlhf_jax.interop import pretrained
from rlhf_jax.planning import chips, measure
from rlhf_jax.runtime import compilation, mesh
from rlhf_jax.stages.shared import mesh_need
from rlhf_jax.stages.shared.context import Context


@dataclasses.dataclass(frozen=True)
class MeshPlan:
  """The plan of an experiment on one mesh."""

  mesh: str  # the sizes of its axes, as text
  why: str  # a line that names the mesh, with the reasons if `auto` chose it
  stages: list[measure.StageCost]  # the costs of the stages, in the order in which they run

  @property
  def fits(self) -> bool:
    """Whether every stage fits."""
    return all(cost.fits for cost in self.stages)

  @property
  def seconds(self) -> float:
    """The seconds of one step of every stage together."""
    return sum(cost.seconds for cost in self.stages)


@dataclasses.dataclass(frozen=True)
class ExperimentPlan:
  """The plan of an experiment on a topology."""

  topology: str  # its name
  devices: int  # the number of devices
  compiled: bool  # whether programs were compiled; otherwise costs are estimated from shapes
  plans: list[MeshPlan]  # for the config's mesh; after a sweep for every mesh, the best first

  @property
  def fits(self) -> bool:
    """Whether every stage fits, on the best mesh."""
    return self.plans[0].fits


def plan_experiment(
  path: str,
  overrides: Sequence[str],
  topology: str,
  *,
  stage: str | None = None,
  analytic: bool = False,
  sweep: bool = False,
  say: Callable[[str], None] = print,
) -> ExperimentPlan:
  """Plans an experiment and prints the plan.

  Args:
    path: the experiment's file, as --config takes it.
    overrides: texts 'section.key=value'.
    topology: the devices, see planning/chips.py.
    stage: the only stage to plan; None for all.
    analytic: estimate from shapes alone, without a compiler.
    sweep: compare all meshes of `candidate_meshes` instead of using the config's.
    say: prints a line.

  Raises:
    UserError: something is wrong with the config, the topology or the mesh.
  """
  # first of all, as it sets how many CPU devices JAX has
  where = chips.open_topology(topology, compiles=not analytic)
  config = pipeline.load_config(path, overrides)
  compilation.request_exact_products()  # as a run does
  if stage and stage not in config.stages:
    names = ', '.join(config.stages)
    raise UserError(f'--stage={stage}: the experiment has {names}')
  compiles = not (analytic or where.missing)
  say(
    f'{topology}: {len(where.devices)} devices of {where.chip.memory / measure.GIB:.3g} GiB, '
    f'{where.chip.flops / 1e12:.3g} TFLOP/s'
  )
  if where.missing:
    say(f'Estimated from shapes alone: the compiler for these devices is missing ({where.missing})')
  plan_on = functools.partial(
    plan_mesh,
    where=where,
    stage=stage,
    compiles=compiles,
    say=say,
  )
  with chips.assume_cudnn() as has_cudnn:
    config = _choose_attention(config, where, has_cudnn, say)
    plans = _sweep_meshes(config, where, plan_on, say) if sweep else [plan_on(config)]
  if not sweep:
    say(plans[0].why)
    for cost in plans[0].stages:
      say(measure.format_stage(cost))
  return ExperimentPlan(topology, len(where.devices), compiles, plans)


def plan_mesh(
  config: ConfigDict,
  where: chips.Topology,
  stage: str | None,
  compiles: bool,
  say: Callable[[str], None],
) -> MeshPlan:
  """Plans every stage, or one, on the mesh of the config.

  Args:
    config: the whole config of the experiment.
    where: the devices.
    stage: the only stage to plan; None for all.
    compiles: whether programs are compiled; otherwise costs are estimated from shapes.
    say: reports progress, such as what is being compiled.

  Raises:
    UserError: the mesh does not fit the devices or the stages' batches.
  """
  # A stage writes the shape of its model there, for later stages to read.
  with tempfile.TemporaryDirectory() as folder:
    workdir = Path(folder)
    config = configs.resolve(config, workdir=workdir, data=config.data)
    layout = _abstract_layout(config, where)
    tokenizer = open_tokenizer(config)
    costs = []
    for name in config.stages:
      context = Context(config, name, workdir, layout, tokenizer)
      if stage in (None, name):
        plan = configs.kind_of(config, name).plan(context)
        costs.append(measure.measure_stage(context, plan, where, compiles, say))
        if stage:
          break
      elif 'optimizer' in context.section:  # it trains a model with which a later stage may begin
        configs.kind_of(config, name).plan(context)
  sizes = {**dict(layout.mesh.shape), 'rollout_tensor': layout.rollout_tensor}
  text = _format_sizes(sizes)
  return MeshPlan(mesh=text, why=layout.why or f'mesh: {text}', stages=costs)


def open_tokenizer(config: ConfigDict) -> Any:
  """Opens the tokenizer of an experiment, or a stand-in for one that the run would train."""
  if config.tokenizer.init != 'train':
    return pretrained.open_pretrained(config.tokenizer.init).tokenizer
  vocab_size = config.tokenizer.vocab_size
  return SimpleNamespace(vocab_size=vocab_size, eos_id=1, stop_ids=(1,), pad_id=0, bos_id=None)


def candidate_meshes(devices: int) -> list[dict[str, int]]:
  """Returns the meshes that a sweep compares, as axis → size.

  The sizes of data, fsdp and tensor are powers of two, that of tensor at most 8.
  With fsdp > 1, decoding keeps the training layout (rollout_tensor 0), shards
  parameters over tensor only, or shards them over at most 8 devices.
  """
  powers = [2**i for i in range(devices.bit_length()) if devices % 2**i == 0]
  meshes = []
  for tensor in powers[:4]:  # at most 8: larger groups rarely share a fast interconnect
    for fsdp in powers:
      if devices % (fsdp * tensor):
        continue
      decoding = {0, tensor, min(8, fsdp * tensor)} if fsdp > 1 else {0}
      for rollout_tensor in sorted(decoding):
        sizes = dict(
          data=devices // (fsdp * tensor),
          fsdp=fsdp,
          tensor=tensor,
          rollout_tensor=rollout_tensor,
        )
        meshes.append(sizes)
  return meshes


def _sweep_meshes(
  config: ConfigDict,
  where: chips.Topology,
  plan_on: Callable[[ConfigDict], MeshPlan],
  say: Callable[[str], None],
) -> list[MeshPlan]:
  """Plans every candidate mesh; returns those that fit first, and the fastest of them first."""
  plans = []
  for sizes in candidate_meshes(len(where.devices)):
    try:
      plan = plan_on(_replace_in_section(config, 'mesh', preset='', **sizes))
    except UserError as error:  # a batch or the heads do not divide over it
      name = _format_sizes({**config.mesh.to_dict(), **sizes})
      say(f'{name}: left out: {error}')
      continue
    plans.append(plan)
    for cost in plan.stages:
      say(f'{plan.mesh}: {measure.format_line(cost)}')
  if not plans:
    raise UserError('--sweep: no mesh fits this experiment; change batch_size')
  plans.sort(key=_rank)
  say(f'best: {plans[0].mesh}')
  return plans


def _rank(plan: MeshPlan) -> tuple[bool, float]:
  """Returns the sort key of a plan: those that fit come first, then the fastest."""
  return not plan.fits, plan.seconds


def _choose_attention(
  config: ConfigDict,
  where: chips.Topology,
  has_cudnn: bool,
  say: Callable[[str], None],
) -> ConfigDict:
  """Returns the config with an attention that XLA can compile without the device."""
  attention = config.model.attention
  if where.platform == 'cpu' and attention == 'auto':
    attention = 'plain'  # what `auto` chooses on a CPU
  if where.platform == 'gpu' and attention in ('auto', 'cudnn') and not has_cudnn:
    attention = 'plain'
    say(
      "attention: plain, as this version of JAX cannot compile cuDNN's kernel without a GPU; a "
      'run with cuDNN needs less memory'
    )
  return _replace_in_section(config, 'model', attention=attention)


def _abstract_layout(config: ConfigDict, where: chips.Topology) -> mesh.Layout:
  """Returns the layout of the config's mesh, with abstract arrays in place of real ones."""
  need = None
  if config.mesh.preset == 'auto':
    need = mesh_need.compute_mesh_need(config)
  # the memory of a device is passed for `auto`, as a device that is not here cannot report it
  options = options_lib.from_section(mesh.MeshOptions, config.mesh)
  layout = mesh.make_layout(options, where.devices, need, where.chip.memory)
  return dataclasses.replace(layout, abstract=True)


def _format_sizes(sizes: dict[str, Any]) -> str:
  """Formats the sizes of a mesh; except for data, default sizes are left out."""
  parts = []
  for name, size in _without_preset(sizes):
    default = 0 if name == 'rollout_tensor' else 1  # 0: decoding uses the training layout
    if name == 'data' or size > default:
      parts.append(f'{name} {size}')
  return ' × '.join(parts)


def _without_preset(sizes: dict[str, Any]) -> Iterable[tuple[str, int]]:
  """Returns (axis, size) for each axis of a mesh config."""
  return [(name, size) for name, size in sizes.items() if name != 'preset']


def _replace_in_section(config: ConfigDict, section: str, **changes: Any) -> ConfigDict:
  """Returns the config with other values in one section."""
  values = config.to_dict()
  values[section] = {**values[section], **changes}
  return ConfigDict(values).lock()
