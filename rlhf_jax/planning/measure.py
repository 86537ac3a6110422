"""Turns a stage's programs into numbers: memory by kind, seconds by bound, and advice.

All bytes, FLOPs and seconds are of one device and one training step, unless a comment
says else.
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

_ROOMY = 0.4  # below this share of the memory there is room for more rows
_CROWDED = 0.6  # resident arrays should leave the rest to programs
_LARGE = 0.3  # temporary arrays above this share are worth making smaller


class StageContext(Protocol):
  """What a plan needs to know of a stage's surroundings; stages' own contexts are such."""

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
    """The mesh, of devices that are only described."""


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What the collectives of one kind send in a step."""

  sent: float = 0.0  # bytes that leave a device
  times: int = 0  # how often they run


@dataclasses.dataclass(frozen=True)
class CompiledCost:
  """What the compiler says of a program."""

  arguments: int  # bytes of its arguments
  flops: float  # FLOPs of its matrix products
  temporary: int  # bytes that it needs beside its arguments
  # by kind, size of the group, and whether it spans slices or hosts (' across')
  collectives: dict[str, Traffic]


@dataclasses.dataclass(frozen=True)
class ProgramCost:
  """One program of a step."""

  name: str  # see Program
  flops: float  # of matrix products, estimated from shapes
  moved: float  # bytes between HBM and processor, estimated
  sent: float  # bytes sent to other devices, estimated
  held: float  # bytes of temporary arrays, estimated
  times: dict[str, float]  # seconds at the chip's limits: compute, memory, interconnect
  seconds: float  # the longest of them; the others hide behind it at best
  bound: str  # its name
  total: float  # bytes on the device while the program runs
  compiled: CompiledCost | None = None  # what the compiler says; None where it was not asked
  # bytes of temporary memory for which the compiler found no room; None where it did
  refused: float | None = None


@dataclasses.dataclass(frozen=True)
class StageCost:
  """The plan of a stage in numbers."""

  stage: str  # its name
  memory: dict[str, int]  # bytes of what is resident, by what it is for
  resident: int  # bytes of all of it
  programs: list[ProgramCost]  # the programs of a step
  peak: float  # the largest total of a program
  capacity: float  # bytes of a device
  fits: bool  # whether the peak is within the capacity
  seconds: float  # of a step at best
  notes: list[str]  # what the plan leaves out
  flops_share: float  # FLOPs from shapes, of those that the device could do in these seconds
  advice: list[str]  # what to change, one line each


def _ignore(text: str) -> None:
  """Reports progress to nobody."""


def measure_stage(
  context: StageContext,
  plan: StagePlan,
  topology: chips.Topology,
  compiles: bool,
  say: Callable[[str], None] = _ignore,
) -> StageCost:
  """Measures the plan of a stage.

  Args:
    context: the stage's surroundings, on a layout whose devices are only described.
    plan: its programs and what is resident.
    topology: the devices.
    compiles: compile every program too; otherwise only shapes are used.
    say: is told what is being compiled.
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
    costs.append(_cost_of(program, layout, chip, resident, compiled, refused))
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
  """Returns what to change where a stage does not fit, or does not use its devices well."""
  worst = max(cost.programs, key=lambda program: program.total)
  if cost.fits:
    if cost.peak < _ROOMY * cost.capacity and worst.bound == 'interconnect':
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
  if cost.resident > _CROWDED * cost.capacity:
    advice += _advise_on_resident(context, cost, parts)
  if worst.total - cost.resident > _LARGE * cost.capacity:
    advice += _advise_on_temporary(context, worst, parts)
  return advice or ['more devices']


def format_stage(cost: StageCost) -> str:
  """Returns a stage's plan as several lines for a terminal."""
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
  """Returns a stage's plan in one line."""
  verdict = 'fits' if cost.fits else 'does not fit'
  bounds = ', '.join(f'{program.name} {program.bound}' for program in cost.programs)
  return f'{cost.stage}: {verdict}, {_gib(cost.peak)} GiB, {_seconds(cost.seconds)}, {bounds}'


def _memory_by_name(resident: dict[str, Any]) -> dict[str, int]:
  """Returns the bytes of each resident tree; shared arrays count for the first one."""
  memory = {}
  trees: list[Any] = []
  before = 0
  for name, tree in resident.items():
    trees.append(tree)
    total = work.bytes_on_device(trees)
    memory[name] = total - before
    before = total
  # a thousandth and less, such as the moments' counters, would only fill the line
  return {name: size for name, size in memory.items() if size > 0.001 * before}


def _compile_program(
  program: Program,
  layout: Layout,
  topology: chips.Topology,
) -> tuple[CompiledCost | None, float | None]:
  """Compiles a program.

  Returns:
    (its cost, None), or (None, the bytes of temporary memory for which there was no
    room).
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
  # a donated argument is also an output, and counts once
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  place = 'slice_index' if topology.platform == 'tpu' else 'process_index'
  domains = [getattr(device, place, 0) for device in layout.mesh.devices.flat]
  contents = hlo.read_program(text, domains)
  cost = CompiledCost(
    arguments=memory.argument_size_in_bytes,
    flops=contents.flops * program.calls,
    temporary=memory.temp_size_in_bytes + outputs + memory.generated_code_size_in_bytes,
    collectives=_sum_traffic(contents.collectives, program.calls),
  )
  return cost, None


def _sum_traffic(collectives: list[hlo.Collective], calls: int) -> dict[str, Traffic]:
  """Returns what the collectives of each kind send together, in alphabetical order."""
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


def _cost_of(
  program: Program,
  layout: Layout,
  chip: chips.Chip,
  resident: int,
  compiled: CompiledCost | None,
  refused: float | None,
) -> ProgramCost:
  """Returns the cost of a program, with the seconds that each limit of the chip asks for.

  The compiler's numbers replace the estimates of FLOPs and of bytes sent, where they
  are larger and where there are any; bytes from HBM are always estimated.
  """
  least = program.work
  flops = least.flops / layout.mesh.size * program.calls
  moved = least.moved * program.calls
  sent = least.sent * program.calls
  if compiled is not None:
    temporary: float = compiled.temporary
    products = max(flops, compiled.flops)
    sent_within, sent_across = _split_traffic(compiled.collectives)
  else:
    temporary = least.held if refused is None else refused
    products = flops
    sent_within, sent_across = sent, 0.0
  times = dict(
    compute=products / chip.flops,
    memory=moved / chip.bandwidth,
    interconnect=sent_within / chip.link + sent_across / chip.network,
  )
  bound = max(times, key=lambda name: times[name])
  return ProgramCost(
    name=program.name,
    flops=flops,
    moved=moved,
    sent=sent,
    held=least.held,
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
  """Returns what makes resident arrays smaller."""
  section = context.section
  everything = cost.resident * context.layout.mesh.size / parts.data
  need = everything / (_CROWDED * cost.capacity)
  advice = [f'about {int(need) + 1} of these devices, for what lies on them all the time']
  lora = getattr(section, 'lora', None)
  if lora is not None and not lora.rank:
    advice.append(
      'lora.rank=16, lora.base=bfloat16 in every stage: '
      'one frozen base for all models, moments of adapters'
    )
  optimizer = getattr(section, 'optimizer', None)
  if optimizer is not None and optimizer.moment_dtype == 'float32':
    saved = cost.memory.get('optimizer', 0) / 4  # the first of two moments, halved
    advice.append(f'{context.name}.optimizer.moment_dtype=bfloat16: {_gib(saved)} GiB less')
  return advice


def _advise_on_temporary(
  context: StageContext,
  worst: ProgramCost,
  parts: work.Partition,
) -> list[str]:
  """Returns what makes the temporary arrays of a program smaller."""
  section = context.section
  name = context.name
  advice = []
  if worst.name == 'rollout' or worst.name.startswith('responses'):
    advice.append(f'{name}.batch_size or num_samples lower, for the cache of {worst.name}')
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
      advice.append('model.remat=full: keeps one array a layer')
  return advice


def _table_rows(programs: list[ProgramCost]) -> list[tuple[str, ...]]:
  """Returns the table of a stage's programs, headings first."""
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
        _gib(program.held),
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
  """Returns what a program sends, by kind of collective."""
  return ', '.join(
    f'{kind} {_gib(traffic.sent)} GiB ({traffic.times}×)'
    for kind, traffic in compiled.collectives.items()
  )


def _gib(size: float | None) -> str:
  """Returns bytes as GiB, – for None."""
  return '–' if size is None else f'{size / GIB:.2f}'


def _seconds(value: float) -> str:
  """Returns seconds or milliseconds with three digits."""
  return f'{value:.3g} s' if value >= 1 else f'{1e3 * value:.3g} ms'
