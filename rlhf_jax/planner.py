"""An experiment on a topology: its mesh, then every stage; or several meshes beside each other."""

import dataclasses
from pathlib import Path
import tempfile

import ml_collections

from rlhf_jax import config as configs
from rlhf_jax import pipeline
from rlhf_jax.errors import UserError
from rlhf_jax.planning import chips, measure, programs
from rlhf_jax.runtime import mesh
from rlhf_jax.stages.shared import common, model_sources


def plan(path: str, overrides, topology: str, stage: str | None, analytic: bool, sweep: bool, say=print) -> dict:
  """Plans and prints.

  Returns:
    {'topology', 'devices', 'plans': [{'mesh', 'why', 'stages': [measure.stage]}]}, of a sweep the best first.

  Raises:
    UserError: whatever is wrong with config, topology or mesh.
  """
  where = chips.topology(topology, not analytic)
  config = pipeline.load_config(path, overrides)
  if stage and stage not in config.stages:
    raise UserError(f'--stage={stage}: the experiment has {", ".join(config.stages)}')
  say(f'{topology}: {len(where.devices)} devices of {where.chip.memory / measure.GIB:.3g} GiB, '
      f'{where.chip.flops / 1e12:.3g} TFLOP/s')
  if where.missing:
    say(f'By shapes alone: the compiler for these devices is missing ({where.missing})')
  compiles = not (analytic or where.missing)
  attention = config.model.attention
  if where.platform == 'cpu' and attention == 'auto':
    attention = 'plain'
  if where.platform == 'gpu' and attention in ('auto', 'cudnn'):
    attention = 'plain'
    say("attention: plain, as cuDNN's kernel cannot be compiled without a GPU; with it less memory is needed")
  config = _changed(config, model=dict(attention=attention))
  if not sweep:
    meshes = [config.mesh.to_dict()]
  else:
    meshes = [{**config.mesh.to_dict(), 'preset': '', **sizes} for sizes in candidates(len(where.devices))]
  found = []
  for sizes in meshes:
    try:
      one = of_mesh(_changed(config, mesh=sizes), where, stage, compiles, say)
    except UserError as error:
      if not sweep:
        raise
      say(f'{_named(sizes)}: left out: {error}')
      continue
    found.append(one)
    if not sweep:
      say(one['why'])
    for result in one['stages']:
      say(f'{one["mesh"]}: {measure.line(result)}' if sweep else measure.text(result))
  if sweep:
    if not found:
      raise UserError('--sweep: no mesh fits this experiment; change batch_size')
    found.sort(key=lambda one: (not all(result['fits'] for result in one['stages']),
                                sum(result['seconds'] for result in one['stages'])))
    say(f'best: {found[0]["mesh"]}')
  return dict(topology=topology, devices=len(where.devices), compiled=compiles, plans=found)


def of_mesh(config, where: chips.Topology, stage, compiles: bool, say) -> dict:
  """The plan of every stage (or one) on one mesh."""
  with tempfile.TemporaryDirectory() as folder:  # stages leave their models' shapes there
    workdir = Path(folder)
    config = configs.resolve(config, workdir=workdir, data=config.data)
    need = model_sources.mesh_need(config) if config.mesh.preset == 'auto' else None
    layout = mesh.make_layout(config.mesh, where.devices, need, where.chip.memory)
    layout = dataclasses.replace(layout, abstract=True)
    tokenizer = programs.tokenizer(config)
    results = []
    for name in config.stages:
      context = common.Context(config, name, workdir, layout, tokenizer)
      if stage in (None, name):
        results.append(measure.stage(context, where, compiles, say))
        if stage:
          break
      elif 'optimizer' in context.section:
        programs.of_stage(context)  # later ones stand on its model
  sizes = {**dict(layout.mesh.shape), 'rollout_tensor': layout.rollout_tensor}
  return dict(mesh=_named(sizes), why=layout.why or f'mesh: {_named(sizes)}', stages=results)


def candidates(devices: int) -> list[dict]:
  """Meshes of data, fsdp and tensor in powers of two, tensor up to 8; decoding with parameters cut or whole."""
  powers = [2**i for i in range(devices.bit_length()) if devices % 2**i == 0]
  return [dict(data=devices // (fsdp * tensor), fsdp=fsdp, tensor=tensor, rollout_tensor=wide)
          for tensor in powers[:4] for fsdp in powers if devices % (fsdp * tensor) == 0
          for wide in sorted({0, tensor, min(8, fsdp * tensor)}) if fsdp > 1 or not wide]


def _named(sizes):
  sizes = {name: size for name, size in sizes.items() if name != 'preset'}
  return ' × '.join(f'{name} {size}' for name, size in sizes.items()
                    if name == 'data' or size > (name != 'rollout_tensor'))


def _changed(config, **sections):
  said = config.to_dict()
  return ml_collections.ConfigDict(said | {name: {**said[name], **changes} for name, changes in sections.items()}).lock()
