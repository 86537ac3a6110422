"""What a compiled program says of itself, read from its text (HLO): products and collectives, with how often they run.

XLA's own cost analysis counts the body of a loop once; here each instruction counts as often as its loops turn.
"""

import collections
import json
import math
import re
from typing import NamedTuple

import numpy as np

BITS = dict(pred=8, s4=4, u4=4, s8=8, u8=8, s16=16, u16=16, s32=32, u32=32, s64=64, u64=64, f8e4m3fn=8, f8e5m2=8,
            bf16=16, f16=16, f32=32, f64=64, c64=64, c128=128)
COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute', 'collective-broadcast',
               'ragged-all-to-all')

_ELEMENTWISE = ('reduce', 'all-reduce', 'all-reduce-start', 'reduce-scatter', 'scatter', 'sort', 'reduce-window',
                'select-and-scatter', 'map')  # what they call runs once an element
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\]')
_HEAD = re.compile(r'^(?:ENTRY )?%?([\w.\-]+)(?: \(.*)? ?(?:->.*)?\{$')
_LINE = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = (\(?.*?\)?) ([a-z][\w\-]*)\((.*)$')


class Collective(NamedTuple):
  """
  Attributes:
    kind: one of COLLECTIVES, or send.
    size: bytes on one device of the larger of what goes in and what comes out.
    group: the devices that take part in one.
    across: whether a group reaches over several slices or hosts.
    times: how often it runs in one call of the program.
  """
  kind: str
  size: float
  group: int
  across: bool
  times: int

  @property
  def sent(self) -> float:
    """Bytes that leave each device in one call, in a ring."""
    rest = (self.group - 1) / self.group
    each = {'all-reduce': 2 * rest, 'collective-permute': 1.0, 'collective-broadcast': 1.0, 'send': 1.0}.get(self.kind, rest)
    return self.size * each * self.times


class Said(NamedTuple):
  """flops: of all products on one device; collectives: those with more than one device in a group."""
  flops: float
  collectives: list[Collective]


def read(text: str, domains=()) -> Said:
  """What a compiled module does in one call. A loop that may end early counts as if it did not. What kernels of other
  languages do (splash, cuDNN) is not seen.

  Args:
    text: of `compiled.as_text()`.
    domains: of each device, in the order of the mesh, which slice or host it is in.
  """
  bodies, entry = _computations(text)
  callers = _callers(bodies)
  times, loops = _times(bodies, entry, callers), _bodies_of_loops(bodies)
  flops, collectives = 0.0, {}
  for name, lines in bodies.items():
    if not times[name]:
      continue
    types = {line.name: line.type for line in lines}
    for line in lines:
      kind = line.op.removesuffix('-start')
      if kind in COLLECTIVES:
        if name.startswith('all-reduce-scatter'):  # a TPU's form of it
          kind = 'reduce-scatter'
        one = _collective(kind, line, types, times[name], domains)
        if one.group > 1:  # XLA may cut one in pieces, each in a fusion of its own that shows it whole
          channel = re.search(r'channel_id=(\d+)', line.rest)
          where = name if name in loops else next((caller for caller, _ in callers[name]), name)
          collectives[(channel[1], where) if channel else (name, line.name)] = one
      elif line.op == 'send' and 'megascale' in line.rest:  # from slice to slice of a TPU, through the hosts
        collectives[name, line.name] = Collective('send', _bytes(_operands(line, types)[0]), 2, True, times[name])
      else:
        flops += times[name] * _flops(line, types)
  return Said(flops, list(collectives.values()))


class _Line(NamedTuple):
  name: str
  type: str
  op: str
  rest: str


def _computations(text):
  bodies, entry, current = {}, None, None
  for line in text.splitlines():
    if not line.startswith((' ', '}')) and line.endswith('{') and not line.startswith('HloModule'):
      current = _HEAD.match(line)
      if current:
        current = current[1]
        bodies[current] = []
        entry = current if line.startswith('ENTRY') else entry
    elif current and (found := _LINE.match(line)):
      bodies[current].append(_Line(*found.groups()))
  return bodies, entry


def _callers(bodies):
  """computation → [(called by, how often in a call of that one)]."""
  calls = collections.defaultdict(list)
  for name, lines in bodies.items():
    for line in lines:
      if line.op in _ELEMENTWISE:
        continue
      for key, called in re.findall(r'(body|calls|to_apply|branch_computations|true_computation|false_computation|'
                                    r'called_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)', line.rest):
        count = _trips(line, bodies) if key == 'body' else 1
        for one in called.split(', '):
          calls[one.lstrip('%')].append((name, count))
  return calls


def _trips(line, bodies):
  """How often a loop turns: XLA says it, or its condition compares a counter from 0 with it."""
  known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', line.rest)
  if known:
    return int(known[1])
  called = lambda key, one: bodies[re.search(rf'{key}=%?([\w.\-]+)', one.rest)[1]]
  condition, body = called('condition', line), called('body', line)
  within = condition + [inner for one in condition if one.op == 'fusion' for inner in called('calls', one)]
  limits = [number for one in within if one.op == 'compare' and 'direction=LT' in one.rest
            for number in _constants(within, one)]
  limit = max(limits or _constants(within), default=1)
  index = next((int(found[1]) for one in condition if one.op == 'get-tuple-element' and any(
      user.op == 'compare' and one.name in _names(user) for user in condition)
      and (found := re.search(r'index=(\d+)', one.rest))), None)
  if index is None:
    return limit
  counter = _names(body[-1])[index]  # unrolled loops count in larger steps
  return -(-limit // max((number for one in body if one.name == counter for number in _constants(body, one)), default=1))


def _constants(lines, of=None):
  """The whole numbers among some lines; only those that the line `of` takes."""
  return [int(one.rest.split(')')[0]) for one in lines if one.op == 'constant'
          and one.type.startswith(('s32[]', 'u32[]')) and (of is None or one.name in _names(of))]


def _times(bodies, entry, callers):
  """How often each computation runs in one call of the entry."""
  memo = {entry: 1}

  def count(name):
    if name not in memo:
      memo[name] = sum(count(caller) * each for caller, each in callers[name])
    return memo[name]
  return {name: count(name) for name in bodies}


def _bodies_of_loops(bodies):
  return {found[1] for lines in bodies.values() for line in lines if line.op == 'while'
          and (found := re.search(r'body=%?([\w.\-]+)', line.rest))}


def _arrays(text):
  """[(bits an element, dimensions)] of a type."""
  return [(BITS[dtype], [int(n) for n in sizes.split(',') if n]) for dtype, sizes in _ARRAY.findall(text)
          if dtype in BITS]


def _bytes(text):
  return sum(bits * math.prod(sizes) / 8 for bits, sizes in _arrays(text))


def _inside(line):
  """What stands between the brackets of an instruction."""
  depth = 1
  for place, letter in enumerate(line.rest):
    depth += (letter in '([{') - (letter in ')]}')
    if not depth:
      return line.rest[:place]
  return line.rest


def _names(line):
  """The names of its operands."""
  inside = _inside(line)
  return re.findall(r'%([\w.\-]+)', inside) if '%' in inside else [word.strip() for word in inside.split(',')]


def _operands(line, types):
  """The types of its operands, which the lines before it say, or its own text."""
  return [types[name] for name in _names(line) if name in types] or [_inside(line)]


def _collective(kind, line, types, times, domains):
  size = max(sum(map(_bytes, _operands(line, types))), _bytes(line.type) if not line.op.endswith('-start') else 0)
  groups = _groups(line.rest, len(domains))
  across = bool(domains) and any(len({domains[one] for one in group}) > 1 for group in groups)
  count = max(map(len, groups), default=1)
  if line.op.endswith('-start') and kind == 'all-gather':
    size = sum(map(_bytes, _operands(line, types))) * count
  return Collective(kind, size, count, across, times)


def _groups(text, devices):
  """The groups of devices of a collective, in each of the ways that XLA writes them."""
  tiled = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
                   r"\{([^}]*)\}", text)
  pairs = re.search(r'source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}', text)
  named = re.search(r'replica_groups=\{((?:\{[\d,]*\},?)*)\}', text)
  numbers = lambda text: [int(n) for n in text.split(',')]
  order = lambda shape, turned: np.arange(math.prod(shape)).reshape(shape).transpose(
      numbers(turned) if turned else range(len(shape)))
  if tiled:
    return order(numbers(tiled[2]), tiled[3]).reshape(numbers(tiled[1])).tolist()
  if mesh:
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    along = re.findall(r"'(\w+)'", mesh[4])
    ids = order(numbers(mesh[2]), mesh[3]) if mesh[2] else np.arange(math.prod(sizes.values()))
    axes = [i for i, name in enumerate(sizes) if name not in along] + [list(sizes).index(name) for name in along]
    return ids.reshape(list(sizes.values())).transpose(axes).reshape(
        -1, math.prod(sizes[name] for name in along)).tolist()
  if pairs:
    return [pair for pair in map(numbers, re.findall(r'\{(\d+,\d+)\}', pairs[1])) if pair[0] != pair[1]]
  if named and named[1]:
    return [numbers(group) for group in re.findall(r'\{([\d,]+)\}', named[1])]
  return [list(range(devices))]


def _flops(line, types):
  """2 × multiplications of a product."""
  out = math.prod(_arrays(line.type)[0][1]) if _arrays(line.type) else 0
  if line.op == 'dot':
    left = _arrays(_operands(line, types)[0])[0][1]
    axes = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', line.rest)[1]
    return 2 * out * math.prod(left[int(axis)] for axis in axes.split(',') if axis)
  if line.op == 'convolution':
    return _convolution(line, types)
  if line.op == 'custom-call' and re.search(r'custom_call_target="__cublas', line.rest):
    said = json.loads(re.search(r'backend_config=(\{.*\})', line.rest)[1])
    dims = said.get('gemm_backend_config', said)['dot_dimension_numbers']
    left = _arrays(_operands(line, types)[0])[0][1]
    return 2 * out * math.prod(left[int(axis)] for axis in dims['lhs_contracting_dimensions'])
  return 0


def _convolution(line, types):
  """TPUs write products as convolutions, batches and heads as windows; places outside of the array do not count."""
  left, kernel = (_arrays(one)[0][1] for one in _operands(line, types)[:2])
  inputs, weights, outputs = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', line.rest).groups()
  window = re.search(r'window=\{([^}]*)\}', line.rest)
  said = dict(part.split('=') for part in window[1].split()) if window else {}
  result, total = _arrays(line.type)[0][1], 2.0 * kernel[weights.index('i')]
  for axis, letter in enumerate(outputs):
    if not letter.isdigit():
      total *= result[axis]
      continue
    of = lambda key, default: int((said[key].split('x') if key in said else {int(letter): default})[int(letter)])
    low = int(said['pad'].split('x')[int(letter)].split('_')[0]) if 'pad' in said else 0
    dilated, long = of('lhs_dilate', 1), left[inputs.index(letter)]
    place = (np.arange(result[axis])[:, None] * of('stride', 1)
             + np.arange(of('size', 1))[None] * of('rhs_dilate', 1) - low)
    total *= int(((place >= 0) & (place <= (long - 1) * dilated) & (place % dilated == 0)).sum())
  return total
