"""Counts the FLOPs and the collectives of a compiled program, from its text (HLO).

XLA's own cost analysis counts the body of a loop once; here every instruction
counts as often as its loops iterate. Left out: custom kernels (splash attention,
cuDNN), whose products are not in the text.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
import math
import re
from typing import NamedTuple

import numpy as np

BITS = dict(  # HLO's name of a dtype → bits of an element
  pred=8,
  s4=4,
  u4=4,
  s8=8,
  u8=8,
  s16=16,
  u16=16,
  s32=32,
  u32=32,
  s64=64,
  u64=64,
  f8e4m3fn=8,
  f8e5m2=8,
  bf16=16,
  f16=16,
  f32=32,
  f64=64,
  c64=64,
  c128=128,
)
COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
  'collective-broadcast',
  'ragged-all-to-all',
)

# these instructions call their computation once for each element; it has no matrix products
_ELEMENTWISE = (
  'reduce',
  'all-reduce',
  'all-reduce-start',
  'reduce-scatter',
  'scatter',
  'sort',
  'reduce-window',
  'select-and-scatter',
  'map',
)
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\]')  # bf16[4,64]
_COMPUTATION_HEAD = re.compile(r'^(?:ENTRY )?%?([\w.\-]+)(?: \(.*)? ?(?:->.*)?\{$')
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = (\(?.*?\)?) ([a-z][\w\-]*)\((.*)$')
_CALLED = re.compile(
  r'(body|calls|to_apply|branch_computations|true_computation|false_computation|'
  r'called_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)'
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective of a compiled program."""

  kind: str  # one of COLLECTIVES, or send
  size: float  # bytes of its operands or its results on one device, whichever is larger
  group: int  # the number of devices that take part
  across: bool  # whether a group spans several slices or hosts
  times: int  # how often it runs in one call of the program

  @property
  def sent(self) -> float:
    """Bytes that each device sends in one call of the program, if a ring is used."""
    ring = (self.group - 1) / self.group
    if self.kind == 'all-reduce':  # a reduce-scatter and an all-gather
      share = 2 * ring
    elif self.kind in ('collective-permute', 'collective-broadcast', 'send'):
      share = 1.0
    else:
      share = ring
    return self.size * share * self.times


@dataclasses.dataclass(frozen=True)
class ProgramText:
  """The FLOPs and the collectives of a compiled program."""

  flops: float  # FLOPs of all matrix products on one device, in one call
  collectives: list[Collective]  # those in which more than one device takes part


class Instruction(NamedTuple):
  """A line of HLO, `name = type op(operands), attributes`."""

  name: str  # without the percent sign
  type: str  # of its result, such as f32[16,64]{1,0}, or a tuple of types
  op: str  # such as dot or while
  rest: str  # the operands, the closing bracket, and the attributes


# name → instructions, for each fusion, loop body, …, and the entry computation
Computations = dict[str, list[Instruction]]
# callee → (caller, calls in one run of the caller)
Callers = Mapping[str, list[tuple[str, int]]]


def read_program(text: str, domains: Sequence[int] = ()) -> ProgramText:
  """Counts the FLOPs and the collectives of one call of a compiled program.

  A loop that may end early is assumed to run to its end.

  Args:
    text: from `compiled.as_text()`.
    domains: the slice or host of each device, in the order of the mesh.
  """
  computations, entry = _parse_computations(text)
  callers = _find_callers(computations)
  times = _count_runs(computations, entry, callers)
  loops = _find_loop_bodies(computations)
  flops = 0.0
  collectives: dict[tuple[str, str], Collective] = {}
  for name, instructions in computations.items():
    if not times[name]:  # it is only called for each element, as in a reduction
      continue
    types = {line.name: line.type for line in instructions}
    for line in instructions:
      if line.op.removesuffix('-start') in COLLECTIVES:
        collective = _read_collective(name, line, types, times[name], domains)
        if collective.group > 1:
          collectives[_collective_key(name, line, loops, callers)] = collective
      elif line.op == 'send' and 'megascale' in line.rest:
        # a transfer between TPU slices, through the hosts
        size = _count_bytes(_operand_types(line, types)[0])
        collectives[name, line.name] = Collective('send', size, 2, True, times[name])
      else:
        flops += times[name] * _count_flops(line, types)
  return ProgramText(flops, list(collectives.values()))


# -- computations and how often they run


def _parse_computations(text: str) -> tuple[Computations, str]:
  """Returns the computations of a module, and the name of its entry."""
  computations: Computations = {}
  entry = ''
  current = None  # the computation that is being read
  for line in text.splitlines():
    if not line.startswith((' ', '}')) and line.endswith('{') and not line.startswith('HloModule'):
      head = _COMPUTATION_HEAD.match(line)
      current = head[1] if head else None
      if current is not None:
        computations[current] = []
        if line.startswith('ENTRY'):
          entry = current
    elif current is not None:  # other lines, such as comments, do not match
      instruction = _INSTRUCTION.match(line)
      if instruction:
        computations[current].append(Instruction(*instruction.groups()))
  return computations, entry


def _find_callers(computations: Computations) -> Callers:
  """Returns the callers of each computation, and how often each of them calls it."""
  callers = collections.defaultdict(list)
  for name, instructions in computations.items():
    for line in instructions:
      if line.op in _ELEMENTWISE:
        continue
      for key, called in _CALLED.findall(line.rest):
        count = _count_trips(line, computations) if key == 'body' else 1
        for callee in called.split(', '):
          callers[callee.lstrip('%')].append((name, count))
  return callers


def _count_runs(computations: Computations, entry: str, callers: Callers) -> dict[str, int]:
  """Returns how often each computation runs in one call of the entry."""
  runs = {entry: 1}

  def count(name: str) -> int:
    if name not in runs:
      # this ends, as HLO has no recursion
      runs[name] = sum(count(caller) * calls for caller, calls in callers[name])
    return runs[name]

  return {name: count(name) for name in computations}


def _find_loop_bodies(computations: Computations) -> set[str]:
  """Returns the names of the computations that are bodies of loops."""
  bodies = set()
  for instructions in computations.values():
    for line in instructions:
      body = re.search(r'body=%?([\w.\-]+)', line.rest)
      if line.op == 'while' and body:
        bodies.add(body[1])
  return bodies


def _count_trips(loop: Instruction, computations: Computations) -> int:
  """Returns how many iterations a loop has.

  XLA annotates most loops with it. For others it is derived from the loop's
  condition, which compares a counter that begins at 0 with a limit, and from the
  counter's increment.
  """
  known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.rest)
  if known:
    return int(known[1])
  condition = _find_called(loop, 'condition', computations)
  limit = _loop_limit(condition, computations)
  index = _counter_index(condition)
  if index is None:
    return limit
  body = _find_called(loop, 'body', computations)
  counter = _operand_names(body[-1])[index]  # the body ends with the tuple of its results
  increments = [1]
  for line in body:
    if line.name == counter:  # an unrolled loop has a larger increment
      increments = list(_integer_constants(body, line)) or [1]
  return -(-limit // max(increments))


def _find_called(line: Instruction, key: str, computations: Computations) -> list[Instruction]:
  """Returns the computation that an instruction calls as its `key`, such as body."""
  name = re.search(rf'{key}=%?([\w.\-]+)', line.rest)
  assert name, f'{line.op} without {key}'
  return computations[name[1]]


def _loop_limit(condition: list[Instruction], computations: Computations) -> int:
  """Returns the limit with which a loop's condition compares its counter; 1 if it is unknown."""
  candidates = list(condition)
  for line in condition:
    if line.op == 'fusion':
      candidates += _find_called(line, 'calls', computations)
  limits: list[int] = []
  for line in candidates:
    if line.op == 'compare' and 'direction=LT' in line.rest:
      limits += _integer_constants(candidates, line)
  return max(limits or _integer_constants(candidates), default=1)


def _counter_index(condition: list[Instruction]) -> int | None:
  """Returns the index of a loop's counter in the tuple that the loop carries."""
  compared = set()
  for line in condition:
    if line.op == 'compare':
      compared.update(_operand_names(line))
  for line in condition:
    index = re.search(r'index=(\d+)', line.rest)
    if line.op == 'get-tuple-element' and line.name in compared and index:
      return int(index[1])
  return None


def _integer_constants(
  instructions: list[Instruction],
  user: Instruction | None = None,
) -> Iterator[int]:
  """Yields the integer constants among instructions; with `user`, only those of its operands."""
  names = None if user is None else _operand_names(user)
  for line in instructions:
    is_integer = line.op == 'constant' and line.type.startswith(('s32[]', 'u32[]'))
    if is_integer and (names is None or line.name in names):
      yield int(line.rest.split(')')[0])


# -- types and operands


def _array_types(text: str) -> list[tuple[int, list[int]]]:
  """Returns (bits of an element, dimensions) of each array in a type."""
  arrays = []
  for dtype, sizes in _ARRAY.findall(text):
    if dtype in BITS:
      arrays.append((BITS[dtype], _parse_integers(sizes)))
  return arrays


def _dimensions(text: str) -> list[int]:
  """Returns the dimensions of the first array in a type."""
  return _array_types(text)[0][1]


def _count_bytes(text: str) -> float:
  """Returns the bytes of all arrays in a type."""
  return sum(bits * math.prod(sizes) / 8 for bits, sizes in _array_types(text))


def _operands_text(line: Instruction) -> str:
  """Returns the operands of an instruction as text, up to the closing bracket."""
  depth = 1
  for index, letter in enumerate(line.rest):
    depth += (letter in '([{') - (letter in ')]}')
    if not depth:
      return line.rest[:index]
  return line.rest


def _operand_names(line: Instruction) -> list[str]:
  """Returns the names of an instruction's operands."""
  text = _operands_text(line)
  if '%' in text:
    return re.findall(r'%([\w.\-]+)', text)
  return [word.strip() for word in text.split(',')]


def _operand_types(line: Instruction, types: Mapping[str, str]) -> list[str]:
  """Returns the types of an instruction's operands.

  Args:
    line: the instruction.
    types: name → type of the instructions in the same computation.

  Returns:
    The types; where `types` has none of the operands, one text with all operands, which
    shows their types.
  """
  known = [types[name] for name in _operand_names(line) if name in types]
  return known or [_operands_text(line)]


def _parse_integers(text: str) -> list[int]:
  """Returns the integers of a list such as 4,2,8."""
  return [int(number) for number in text.split(',') if number]


# -- collectives


def _read_collective(
  computation: str,
  line: Instruction,
  types: Mapping[str, str],
  times: int,
  domains: Sequence[int],
) -> Collective:
  """Reads a collective: its size, its groups, and whether they span slices or hosts."""
  kind = line.op.removesuffix('-start')
  groups = _parse_groups(line.rest, len(domains))
  group = max((len(devices) for devices in groups), default=1)
  sizes_in = sum(_count_bytes(operand) for operand in _operand_types(line, types))
  if not line.op.endswith('-start'):
    size = max(sizes_in, _count_bytes(line.type))
  elif kind == 'all-gather':  # not from line.type: that of a -start also has the operands
    size = sizes_in * group
  else:
    size = sizes_in
  across = False
  if domains:  # without domains, all devices are taken to be in one slice
    across = any(len({domains[device] for device in devices}) > 1 for devices in groups)
  if computation.startswith('all-reduce-scatter'):  # a fusion in programs for TPUs
    kind = 'reduce-scatter'
  return Collective(kind, size, group, across, times)


def _collective_key(
  computation: str,
  line: Instruction,
  loops: set[str],
  callers: Callers,
) -> tuple[str, str]:
  """Returns a key that identifies a collective, so that it is counted once.

  XLA may split a collective into several fusions, each of which contains the whole
  instruction; they share the channel and the computation that calls them.
  """
  channel = re.search(r'channel_id=(\d+)', line.rest)
  if not channel:
    return computation, line.name
  caller = computation
  if computation not in loops and callers[computation]:
    caller = callers[computation][0][0]
  return channel[1], caller


def _parse_groups(text: str, devices: int) -> list[list[int]]:
  """Parses the groups of devices of a collective, in any of the forms that XLA writes.

  Args:
    text: the attributes of the collective.
    devices: the number of devices; where the text names no groups, they are one group.
  """
  tiled = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
  if tiled:
    ids = _device_order(tiled[2], tiled[3])
    return ids.reshape(_parse_integers(tiled[1])).tolist()
  mesh = re.search(
    r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? '
    r'\{([^}]*)\}',
    text,
  )
  if mesh:
    return _parse_mesh_groups(mesh)
  pairs = re.search(r'source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}', text)
  if pairs:
    both = [_parse_integers(pair) for pair in re.findall(r'\{(\d+,\d+)\}', pairs[1])]
    return [[source, target] for source, target in both if source != target]
  listed = re.search(r'replica_groups=\{((?:\{[\d,]*\},?)*)\}', text)
  if listed and listed[1]:
    return [_parse_integers(group) for group in re.findall(r'\{([\d,]+)\}', listed[1])]
  return [list(range(devices))]


def _parse_mesh_groups(match: re.Match) -> list[list[int]]:
  """Parses groups along mesh axes: mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}."""
  sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
  names = list(sizes)
  along = re.findall(r"'(\w+)'", match[4])
  if match[2]:
    ids = _device_order(match[2], match[3])
  else:
    ids = np.arange(math.prod(sizes.values()))
  axes = [names.index(name) for name in names if name not in along]
  axes += [names.index(name) for name in along]
  group = math.prod(sizes[name] for name in along)
  return ids.reshape(list(sizes.values())).transpose(axes).reshape(-1, group).tolist()


def _device_order(shape: str, permutation: str | None) -> np.ndarray:
  """Returns the ids 0, 1, … in a shape, transposed, as in [4,2]T(1,0)."""
  sizes = _parse_integers(shape)
  axes = _parse_integers(permutation) if permutation else range(len(sizes))
  return np.arange(math.prod(sizes)).reshape(sizes).transpose(axes)


# -- FLOPs of matrix products


def _count_flops(line: Instruction, types: Mapping[str, str]) -> float:
  """Counts the FLOPs of a matrix product, 2 × its multiplications; 0 for other instructions."""
  if line.op == 'convolution':
    return _count_convolution_flops(line, types)
  if line.op == 'dot':
    axes = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', line.rest)
    assert axes, f'a dot without contracting dimensions: {line.rest}'
    return _count_product_flops(line, types, _parse_integers(axes[1]))
  if line.op == 'custom-call' and re.search(r'custom_call_target="__cublas', line.rest):
    text = re.search(r'backend_config=(\{.*\})', line.rest)
    assert text, f'a cuBLAS call without its settings: {line.rest}'
    settings = json.loads(text[1])  # newer versions of XLA nest them
    settings = settings.get('gemm_backend_config', settings)
    axes = settings['dot_dimension_numbers']['lhs_contracting_dimensions']
    return _count_product_flops(line, types, [int(axis) for axis in axes])
  return 0


def _count_product_flops(
  line: Instruction,
  types: Mapping[str, str],
  contracted: Sequence[int],
) -> int:
  """Counts the FLOPs of a product; `contracted` are the axes of the left operand that it sums."""
  left = _dimensions(_operand_types(line, types)[0])
  arrays = _array_types(line.type)  # that of cuBLAS is a tuple: the result and a workspace
  results = math.prod(arrays[0][1]) if arrays else 0
  return 2 * results * math.prod(left[axis] for axis in contracted)


def _count_convolution_flops(line: Instruction, types: Mapping[str, str]) -> float:
  """Counts the FLOPs of a convolution.

  In programs for TPUs, matrix products are convolutions with batch and heads as
  window axes. Where a window reaches beyond the array, or between its dilated
  elements, nothing is multiplied.
  """
  left, kernel = (_dimensions(operand) for operand in _operand_types(line, types)[:2])
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', line.rest)
  assert labels, f'a convolution without labels: {line.rest}'
  inputs, weights, outputs = labels.groups()
  window = _parse_window(line.rest)
  result = _dimensions(line.type)
  total = 2.0 * kernel[weights.index('i')]
  for axis, letter in enumerate(outputs):
    if letter.isdigit():
      size = left[inputs.index(letter)]
      total *= _count_window_hits(window, int(letter), result[axis], size)
    else:
      total *= result[axis]
  return total


def _parse_window(text: str) -> dict[str, list[str]]:
  """Parses window={size=2x8 pad=0_0x7_7} into attribute → its value for each axis."""
  window = re.search(r'window=\{([^}]*)\}', text)
  attributes = {}
  for part in window[1].split() if window else ():
    key, _, value = part.partition('=')
    attributes[key] = value.split('x')
  return attributes


def _count_window_hits(window: dict[str, list[str]], axis: int, steps: int, size: int) -> int:
  """Counts, along one axis, the pairs of a window element and an array element that are multiplied.

  Args:
    window: its attributes, from `_parse_window`.
    axis: the axis of the window.
    steps: the number of positions of the window, which is the size of the result.
    size: the size of the array along this axis.
  """

  def attribute(name: str) -> int:
    return int(window[name][axis]) if name in window else 1

  low = int(window['pad'][axis].split('_')[0]) if 'pad' in window else 0
  dilation = attribute('lhs_dilate')
  starts = np.arange(steps)[:, None] * attribute('stride')  # [steps, 1]
  offsets = np.arange(attribute('size'))[None] * attribute('rhs_dilate')  # [1, window size]
  positions = starts + offsets - low  # in the dilated array
  inside = (positions >= 0) & (positions <= (size - 1) * dilation)
  return int((inside & (positions % dilation == 0)).sum())
