"""Measures the plan of a stage: memory by purpose, seconds at each limit of the chip, and advice.

All bytes, FLOPs and seconds are those of one device in one training step, unless
a comment says otherwise.
"""

from collections.abc import Callable
import dataclasses
import re
import time
from typing import Any, Protocol

import jax

from rlhf_jax import text_table
from rlhf_jax.planning import chips, hlo, work
from rlhf_jax.planning.programs import Program, StagePlan
from rlhf_jax.runtime.mesh import Layout

GIB = 2**30

# Shares of a device's memory, by which `advise` decides.
_LOW_PEAK = 0.4  # with a lower peak there is room for more rows
_HIGH_RESIDENT = 0.6  # resident arrays that take more leave too little to programs
_HIGH_TEMPORARY = 0.3  # temporary arrays that take more are worth reducing


class StageContext(Protocol):
  """What a plan reads of a stage's context; stages.shared.context.Context has all of it."""

  @property
  def name(self) -> str:
    """The stage's name in the config."""

  @property
  def config(self) -> Any:
    """The whole config."""

  @property
  def section(self) -> Any:
    """The stage's section of the config."""

  @property
  def layout(self) -> Layout:
    """The mesh and its rules; its devices are only described."""


@dataclasses.dataclass(frozen=True)
class Traffic:
  """The traffic of all collectives of one kind in a step."""

  sent: float = 0.0  # bytes that a device sends
  times: int = 0  # how often they run


@dataclasses.dataclass(frozen=True)
class CompiledCost:
  """The cost of a program according to the compiler."""

  arguments: int  # bytes of its arguments
  flops: float  # FLOPs of its matrix products
  temporary: int  # bytes that it needs in addition to its arguments
  # 'KIND of GROUP_SIZE' → traffic; ' across' is appended if groups span slices or hosts
  collectives: dict[str, Traffic]


@dataclasses.dataclass(frozen=True)
class ProgramCost:
  """The cost of one program of a step."""

  name: str  # of the program
  flops: float  # of matrix products, estimated from shapes
  hbm_bytes: float  # bytes between HBM and processor, estimated from shapes
  sent: float  # bytes sent to other devices, estimated from shapes
  temporary: float  # bytes of temporary arrays, estimated from shapes
  times: dict[str, float]  # seconds at the chip's limits: compute, memory, interconnect
  seconds: float  # the longest of `times`: at best, the others overlap with it completely
  bound: str  # the limit that takes longest
  total: float  # bytes on the device while the program runs
  compiled: CompiledCost | None = None  # the compiler's numbers; None where it was not used
  # bytes of temporary memory that the compiler could not allocate; None where it could
  refused: float | None = None


@dataclasses.dataclass(frozen=True)
class StageCost:
  """The cost of a stage."""

  stage: str  # its name
  memory: dict[str, int]  # bytes of the resident arrays, by their purpose
  resident: int  # bytes of all resident arrays
  programs: list[ProgramCost]  # the programs of a step
  peak: float  # the largest `total` of a program
  capacity: float  # bytes of a device's memory
  fits: bool  # whether the peak is within the capacity
  seconds: float  # of a step, at best
  notes: list[str]  # what the plan does not include
  flops_share: float  # FLOPs estimated from shapes / the FLOPs the chip could do in `seconds`
  advice: list[str]  # what to change, one line each


def _ignore(text: str) -> None:
  """Discards a progress message."""


def measure_stage(
  context: StageContext,
  plan: StagePlan,
  topology: chips.Topology,
  compiles: bool,
  say: Callable[[str], None] = _ignore,
) -> StageCost:
  """Measures the plan of a stage.

  Args:
    context: the stage's context, with a layout whose devices are only described.
    plan: the stage's programs and resident arrays.
    topology: the devices.
    compiles: whether every program is compiled; otherwise costs are estimated from
      shapes.
    say: reports progress, such as what is being compiled.
  """
  chip = topology.chip
  layout = context.layout
  resident = work.bytes_on_device(list(plan.resident.values()))
  costs = []
  for program in plan.programs:
    compiled = None
    refused = None
    if compiles:
      started = time.monotonic()
      say(f'compiling {context.name}: {program.name} …')
      compiled, refused = _compile_program(program, layout, topology)
      say(f'  {time.monotonic() - started:.0f} s')
    costs.append(_program_cost(program, layout, chip, resident, compiled, refused))
  peak = max(cost.total for cost in costs)
  seconds = sum(cost.seconds for cost in costs)
  useful = sum(program.work.flops * program.calls for program in plan.programs)
  useful = useful / layout.mesh.size
  cost = StageCost(
    stage=context.name,
    memory=_memory_by_name(plan.resident),
    resident=resident,
    programs=costs,
    peak=peak,
    capacity=chip.memory,
    fits=peak <= chip.memory,
    seconds=seconds,
    notes=plan.notes,
    flops_share=useful / chip.flops / max(seconds, 1e-12),
    advice=[],
  )
  return dataclasses.replace(cost, advice=advise(context, cost))


def advise(context: StageContext, cost: StageCost) -> list[str]:
  """Returns advice for a stage that does not fit, or that uses its devices badly; one line each."""
  worst = max(cost.programs, key=lambda program: program.total)
  if cost.fits:
    if cost.peak < _LOW_PEAK * cost.capacity and worst.bound == 'interconnect':
      return [
        'less than half of the memory is used and the interconnect is the bound: '
        'a smaller fsdp, or more rows'
      ]
    return []
  advice = []
  parts = work.partition_of(context.layout)
  if parts.data > 1:
    advice.append(
      f'mesh.fsdp={parts.fsdp * parts.data}: cuts parameters and moments {parts.data} times finer'
    )
  if cost.resident > _HIGH_RESIDENT * cost.capacity:
    advice += _advise_on_resident(context, cost, parts)
  if worst.total - cost.resident > _HIGH_TEMPORARY * cost.capacity:
    advice += _advise_on_temporary(context, worst, parts)
  return advice or ['more devices']


def format_stage(cost: StageCost) -> str:
  """Formats the cost of a stage as several lines for a terminal."""
  verdict = 'fits' if cost.fits else 'DOES NOT FIT'
  memory = ', '.join(f'{name} {_gib(size)}' for name, size in cost.memory.items())
  lines = [
    f'{cost.stage}: {verdict}: {_gib(cost.peak)} of {_gib(cost.capacity)} GiB on each device, '
    f'{_seconds(cost.seconds)} a step at best (products at {cost.flops_share:.0%} of the peak)',
    f'  always there, GiB  {memory}',
    text_table.format_rows(_table_rows(cost.programs), indent='  '),
  ]
  for program in cost.programs:
    if program.compiled and program.compiled.collectives:
      lines.append(f'  {program.name} sends  {_format_traffic(program.compiled)}')
  for program in cost.programs:
    if program.refused is not None:
      lines.append(f'  the compiler refuses {program.name}: no room for its temporary arrays')
  lines += [f'  left out: {note}' for note in cost.notes]
  lines += [f'  change: {change}' for change in cost.advice]
  return '\n'.join(lines)


def format_line(cost: StageCost) -> str:
  """Formats the cost of a stage as one line."""
  verdict = 'fits' if cost.fits else 'does not fit'
  bounds = ', '.join(f'{program.name} {program.bound}' for program in cost.programs)
  return f'{cost.stage}: {verdict}, {_gib(cost.peak)} GiB, {_seconds(cost.seconds)}, {bounds}'


def _memory_by_name(resident: dict[str, Any]) -> dict[str, int]:
  """Returns the bytes of each resident tree; arrays that two trees share count for the first."""
  memory = {}
  trees: list[Any] = []
  before = 0
  for name, tree in resident.items():
    trees.append(tree)
    total = work.bytes_on_device(trees)
    memory[name] = total - before
    before = total
  # trees of at most a thousandth of the total are not worth printing
  return {name: size for name, size in memory.items() if size > 0.001 * before}


def _compile_program(
  program: Program,
  layout: Layout,
  topology: chips.Topology,
) -> tuple[CompiledCost | None, float | None]:
  """Compiles a program.

  Returns:
    (its cost, None); or, if the device's memory is too small, (None, the bytes of
    temporary memory that the compiler asked for).
  """
  try:
    compiled = program.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    pattern = r'RESOURCE_EXHAUSTED.*?\(([\d.]+)([KMG])\)'
    needed = re.search(pattern, str(error), re.DOTALL)
    if not needed:
      raise
    unit = {'K': 2**10, 'M': 2**20, 'G': 2**30}[needed[2]]
    return None, float(needed[1]) * unit
  memory = compiled.memory_analysis()
  text = compiled.as_text()
  assert memory is not None and text is not None, 'the platform does not analyse programs'
  # an output that reuses a donated argument's memory is counted with the arguments
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  attribute = 'slice_index' if topology.platform == 'tpu' else 'process_index'
  domains = [getattr(device, attribute, 0) for device in layout.mesh.devices.flat]
  contents = hlo.read_program(text, domains)
  cost = CompiledCost(
    arguments=memory.argument_size_in_bytes,
    flops=contents.flops * program.calls,
    temporary=memory.temp_size_in_bytes + outputs + memory.generated_code_size_in_bytes,
    collectives=_sum_traffic(contents.collectives, program.calls),
  )
  return cost, None


def _sum_traffic(collectives: list[hlo.Collective], calls: int) -> dict[str, Traffic]:
  """Adds up the traffic of the collectives of each kind, in alphabetical order."""
  kinds: dict[str, Traffic] = {}
  for collective in collectives:
    name = f'{collective.kind} of {collective.group}'
    if collective.across:
      name += ' across'
    before = kinds.get(name, Traffic())
    kinds[name] = Traffic(
      sent=before.sent + collective.sent * calls,
      times=before.times + collective.times * calls,
    )
  return dict(sorted(kinds.items()))


def _program_cost(
  program: Program,
  layout: Layout,
  chip: chips.Chip,
  resident: int,
  compiled: CompiledCost | None,
  refused: float | None,
) -> ProgramCost:
  """Computes the cost of a program, and the seconds that it takes at each limit of the chip.

  If the program was compiled, temporary memory and bytes sent are the compiler's, and
  FLOPs the larger of the compiler's and the estimate. HBM traffic is always estimated.
  """
  estimate = program.work
  flops = estimate.flops / layout.mesh.size * program.calls
  hbm_bytes = estimate.hbm_bytes * program.calls
  sent = estimate.sent * program.calls
  if compiled is not None:
    temporary: float = compiled.temporary
    products = max(flops, compiled.flops)
    sent_within, sent_across = _split_traffic(compiled.collectives)
  else:
    temporary = estimate.temporary if refused is None else refused
    products = flops
    sent_within, sent_across = sent, 0.0
  times = dict(
    compute=products / chip.flops,
    memory=hbm_bytes / chip.bandwidth,
    interconnect=sent_within / chip.link + sent_across / chip.network,
  )
  bound = max(times, key=lambda name: times[name])
  return ProgramCost(
    name=program.name,
    flops=flops,
    hbm_bytes=hbm_bytes,
    sent=sent,
    temporary=estimate.temporary,
    times=times,
    seconds=times[bound],
    bound=bound,
    total=resident + temporary,
    compiled=compiled,
    refused=refused,
  )


def _split_traffic(collectives: dict[str, Traffic]) -> tuple[float, float]:
  """Returns the bytes sent within slices or hosts, and across them."""
  within = 0.0
  across = 0.0
  for name, traffic in collectives.items():
    if name.endswith('across'):
      across += traffic.sent
    else:
      within += traffic.sent
  return within, across


def _advise_on_resident(
  context: StageContext,
  cost: StageCost,
  parts: work.Partition,
) -> list[str]:
  """Returns advice that makes resident arrays smaller."""
  section = context.section
  all_bytes = cost.resident * context.layout.mesh.size / parts.data  # of one replica
  need = all_bytes / (_HIGH_RESIDENT * cost.capacity)
  advice = [f'about {int(need) + 1} of these devices, for the arrays that stay on them']
  lora = getattr(section, 'lora', None)
  if lora is not None and not lora.rank:
    advice.append(
      'lora.rank=16, lora.base=bfloat16 in every stage: '
      'one frozen base for all models, moments only of the adapters'
    )
  optimizer = getattr(section, 'optimizer', None)
  if optimizer is not None and (optimizer.name, optimizer.moment_dtype) == ('adamw', 'float32'):
    saved = cost.memory.get('optimizer', 0) / 4  # half of the first of two moments
    advice.append(f'{context.name}.optimizer.moment_dtype=bfloat16: {_gib(saved)} GiB less')
  return advice


def _advise_on_temporary(
  context: StageContext,
  worst: ProgramCost,
  parts: work.Partition,
) -> list[str]:
  """Returns advice that makes the temporary arrays of a program smaller."""
  section = context.section
  name = context.name
  advice = []
  if worst.name == 'rollout' or worst.name.startswith('responses'):
    advice.append(f'a lower {name}.batch_size or num_samples, for the cache of {worst.name}')
    decoding_tensor = context.layout.rollout_tensor
    if decoding_tensor and decoding_tensor < parts.fsdp * parts.tensor:
      advice.append(
        f'mesh.rollout_tensor={2 * decoding_tensor}: '
        'decoding keeps a smaller part of the parameters'
      )
    elif decoding_tensor:
      advice.append('mesh.rollout_tensor=0: decoding gathers layer by layer, slowly')
  elif getattr(section, 'microbatches', None) is not None:
    advice.append(f'{name}.microbatches={2 * section.microbatches}: half the activations at once')
    if context.config.model.remat != 'full':
      advice.append('model.remat=full: saves one array a layer')
  return advice


def _table_rows(programs: list[ProgramCost]) -> list[tuple[str, ...]]:
  """Returns the rows of the table of a stage's programs; the first row has the headings."""
  rows: list[tuple[str, ...]] = [
    (
      'program',
      'temporary',
      'by shapes',
      'total',
      'TFLOP',
      'compiled',
      'compute',
      'memory',
      'interconnect',
      'bound',
    )
  ]
  for program in programs:
    temporary = program.refused
    compiled_flops = '–'
    if program.compiled is not None:
      temporary = program.compiled.temporary
      compiled_flops = f'{program.compiled.flops / 1e12:.3g}'
    rows.append(
      (
        program.name,
        _gib(temporary),
        _gib(program.temporary),
        _gib(program.total),
        f'{program.flops / 1e12:.3g}',
        compiled_flops,
        _seconds(program.times['compute']),
        _seconds(program.times['memory']),
        _seconds(program.times['interconnect']),
        program.bound,
      )
    )
  return rows


def _format_traffic(compiled: CompiledCost) -> str:
  """Formats the traffic of a program, by kind of collective."""
  return ', '.join(
    f'{kind} {_gib(traffic.sent)} GiB ({traffic.times}×)'
    for kind, traffic in compiled.collectives.items()
  )


def _gib(size: float | None) -> str:
  """Formats bytes as GiB; '–' for None."""
  return '–' if size is None else f'{size / GIB:.2f}'


def _seconds(value: float) -> str:
  """Formats a time as seconds or milliseconds, with three digits."""
  return f'{value:.3g} s' if value >= 1 else f'{1e3 * value:.3g} ms'
