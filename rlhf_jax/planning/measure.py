"""From programs to numbers: memory by kind, seconds by what bounds them, and what to change where it does not fit."""

import collections
import re
import time

import jax

from rlhf_jax.planning import chips, hlo, programs, work

GIB = 2**30


def stage(context, topology: chips.Topology, compiles: bool, say=lambda text: None) -> dict:
  """The plan of a stage as JSON: bytes, FLOPs and seconds of one device and one step.

  Args:
    context: on a layout whose devices are described.
    compiles: ask XLA too.
    say: told what is being compiled.
  """
  plan, chip, layout = programs.of_stage(context), topology.chip, context.layout
  memory, before = {}, 0
  for number, name in enumerate(plan.resident, 1):  # what several share counts for the first
    resident = work.on_device(list(plan.resident.values())[:number])
    memory[name], before = resident - before, resident
  memory = {name: size for name, size in memory.items() if size > 0.001 * resident}
  made = []
  for program in plan.programs:
    least = program.work
    row = dict(name=program.name, flops=least.flops / layout.mesh.size, moved=least.moved, sent=least.sent,
               held=least.held)
    if compiles:
      began = time.monotonic()
      say(f'compiling {context.name}: {program.name} …')
      row |= _compiled(program, layout, topology)
      say(f'  {time.monotonic() - began:.0f} s')
    held = row['compiled']['temporary'] if 'compiled' in row else row.get('refused', row['held'])
    made.append(_timed(row, chip) | dict(total=resident + held))
  peak = max(row['total'] for row in made)
  result = dict(stage=context.name, memory=memory, resident=resident, programs=made, peak=peak, capacity=chip.memory,
                fits=peak <= chip.memory, seconds=sum(row['seconds'] for row in made), notes=plan.notes)
  useful = sum(program.work.flops for program in plan.programs) / layout.mesh.size
  result['flops_share'] = useful / chip.flops / max(result['seconds'], 1e-12)
  return result | dict(advice=advice(context, result, layout))


def _compiled(program, layout, topology) -> dict:
  """What the compiler says, `compiled`: bytes of a device, FLOPs, and by kind of collective bytes sent and how often;
  or `refused`: bytes of temporary memory for which it found no room."""
  try:
    compiled = program.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    needed = re.search(r'RESOURCE_EXHAUSTED.*?\(([\d.]+)([KMG])\)', str(error), re.DOTALL)
    if not needed:
      raise
    return dict(refused=float(needed[1]) * 2 ** {'K': 10, 'M': 20, 'G': 30}[needed[2]])
  said, place = compiled.memory_analysis(), 'slice_index' if topology.platform == 'tpu' else 'process_index'
  domains = [getattr(device, place, 0) for device in layout.mesh.devices.flat]
  read = hlo.read(compiled.as_text(), domains)
  kinds = collections.defaultdict(lambda: [0.0, 0])
  for one in read.collectives:
    entry = kinds[f'{one.kind} of {one.group}' + ' across' * one.across]
    entry[0] += one.sent
    entry[1] += one.times
  return dict(compiled=dict(
      arguments=said.argument_size_in_bytes, flops=read.flops,
      temporary=said.temp_size_in_bytes + said.output_size_in_bytes - said.alias_size_in_bytes
      + said.generated_code_size_in_bytes, collectives={name: dict(sent=sent, times=times) for name, (sent, times) in
                                                        sorted(kinds.items())}))


def _timed(row, chip) -> dict:
  """Adds seconds at the chip's limits, were each perfectly used and hidden behind the longest, which is the bound."""
  found = row.get('compiled')
  sent = {False: row['sent'], True: 0.0}
  if found:
    sent = {across: sum(one['sent'] for name, one in found['collectives'].items() if name.endswith('across') == across)
            for across in (False, True)}
  times = dict(compute=max(row['flops'], found['flops'] if found else 0.0) / chip.flops,
               memory=row['moved'] / chip.bandwidth,
               interconnect=sent[False] / chip.link + sent[True] / chip.network)
  bound = max(times, key=times.get)
  return row | dict(times=times, seconds=times[bound], bound=bound)


def advice(context, result, layout) -> list[str]:
  """What to change where a stage does not fit, or wastes its devices."""
  section, name, capacity = context.section, context.name, result['capacity']
  lines, ways = [], work.Ways(layout)
  worst = max(result['programs'], key=lambda row: row['total'])
  temporary, wide = worst['total'] - result['resident'], layout.rollout_tensor
  if result['fits']:
    if result['peak'] < 0.4 * capacity and worst['bound'] == 'interconnect':
      lines.append('less than half of the memory is used and the interconnect is the bound: a smaller fsdp, or more rows')
    return lines
  if ways.data > 1:
    lines.append(f'mesh.fsdp={ways.fsdp * ways.data}: cuts parameters and moments {ways.data} times finer')
  if result['resident'] > 0.6 * capacity:
    need = result['resident'] * layout.mesh.size / ways.data / (0.6 * capacity)
    lines.append(f'about {int(need) + 1} of these devices, for what lies on them all the time')
    if 'lora' in section and not section.lora.rank:
      lines.append('lora.rank=16, lora.base=bfloat16 in every stage: one frozen base for all models, moments of adapters')
    if 'optimizer' in section and section.optimizer.moment_dtype == 'float32':
      less = result['memory'].get('optimizer', 0) / 4
      lines.append(f'{name}.optimizer.moment_dtype=bfloat16: {_gib(less)} GiB less')
  if temporary > 0.3 * capacity:
    if worst['name'] == 'rollout' or worst['name'].startswith('answers'):
      lines.append(f'{name}.batch_size or samples lower, for the cache of {worst["name"]}')
      if wide and wide < ways.fsdp * ways.tensor:
        lines.append(f'mesh.rollout_tensor={2 * wide}: decoding keeps a smaller part of the parameters')
      elif wide:
        lines.append('mesh.rollout_tensor=0: decoding gathers layer by layer, slowly')
    elif 'microbatches' in section:
      lines.append(f'{name}.microbatches={2 * section.microbatches}: half the activations at once')
      if context.config.model.remat != 'full':
        lines.append('model.remat=full: keeps one array a layer')
  return lines or ['more devices']


def line(result: dict) -> str:
  """A stage's plan in a line."""
  return (f'{result["stage"]}: {"fits" if result["fits"] else "does not fit"}, {_gib(result["peak"])} GiB, '
          f'{_seconds(result["seconds"])}, ' + ', '.join(f'{row["name"]} {row["bound"]}' for row in result['programs']))


def text(result: dict) -> str:
  """A stage's plan to read."""
  lines = [f'{result["stage"]}: {"fits" if result["fits"] else "DOES NOT FIT"}: {_gib(result["peak"])} of '
           f'{_gib(result["capacity"])} GiB on each device, {_seconds(result["seconds"])} a step at best (products at '
           f'{result["flops_share"]:.0%} of the peak)',
           '  always there, GiB  ' + ', '.join(f'{name} {_gib(size)}' for name, size in result['memory'].items())]
  table = [('program', 'temporary', 'by shapes', 'total', 'TFLOP', 'compiled', 'compute', 'memory', 'interconnect',
            'bound')]
  for row in result['programs']:
    found = row.get('compiled', {})
    table.append((row['name'], _gib(found.get('temporary', row.get('refused'))), _gib(row['held']), _gib(row['total']),
                  f'{row["flops"] / 1e12:.3g}', f'{found["flops"] / 1e12:.3g}' if found else '–',
                  *(_seconds(row['times'][name]) for name in ('compute', 'memory', 'interconnect')), row['bound']))
  widths = [max(map(len, column)) for column in zip(*table)]
  lines += ['  ' + '  '.join(cell.rjust(width) if i else cell.ljust(width)
                             for i, (cell, width) in enumerate(zip(row, widths))) for row in table]
  for row in result['programs']:
    sends = row.get('compiled', {}).get('collectives', {}).items()
    if sends:
      lines.append(f'  {row["name"]} sends  ' + ', '.join(
          f'{kind} {_gib(one["sent"])} GiB ({one["times"]}×)' for kind, one in sends))
  lines += [f'  the compiler refuses {row["name"]}: no room for its temporary arrays' for row in result['programs']
            if 'refused' in row]
  lines += [f'  left out: {note}' for note in result['notes']]
  return '\n'.join(lines + [f'  change: {one}' for one in result['advice']])


def _gib(size):
  return '–' if size is None else f'{size / GIB:.2f}'


def _seconds(value):
  return f'{value:.3g} s' if value >= 1 else f'{1e3 * value:.3g} ms'
