"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

PEFT keeps for a matrix an A [r, inputs] and a B [outputs, r]. Where a family fuses several of our matrices (GPT-2, Phi-3),
their adapters stand in one of a rank so many times larger, B in blocks, which is the same function.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
import re
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from rlhf_jax.errors import UserError
from rlhf_jax.interop import families, pretrained
from rlhf_jax.models import lora
from rlhf_jax.runtime.hosts import to_host
from rlhf_jax.interop.safetensors_io import read_json
from rlhf_jax.models.model_config import TARGETS

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
PREFIX, SCORE = 'base_model.model.', 'base_model.model.score.weight'
PLAIN = dict(peft_type=('LORA',), bias=('none', None), use_dora=(False, None), layers_to_transform=(None,),
             layer_replication=(None,), modules_to_save=(None, [], ['score']))


class Home(NamedTuple):
  """Where the adapters of one of our matrices stand.

  Attributes:
    module: Hugging Face's name of the matrix, `{}` for the layer.
    inputs, outputs: sizes of our axes.
    part, parts: of so many fused matrices which one.
    begin, whole: the first of our outputs among those of the fused matrix.
    fan_in: the file's matrix is [inputs, outputs].
  """
  module: str
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  part: int
  parts: int
  begin: int
  whole: int
  fan_in: bool


def base_model_of(directory) -> str:
  """The name of the model that a directory's adapters stand on.

  Raises:
    UserError: they are not adapters of this kind.
  """
  path = Path(directory) / CONFIG
  said = read_json(path)
  wrong = [f'{key} {said[key]!r}' for key, fine in PLAIN.items() if said.get(key, fine[0]) not in fine]
  name = said.get('base_model_name_or_path')
  if wrong or not name:
    raise UserError(f'{path}: expected plain LoRA with a base_model_name_or_path, got {", ".join(wrong) or "none"}')
  places = [place for place in (Path(name), Path(directory) / name) if place.exists()]
  if not places and name != pretrained.SMOLLM2:
    raise UserError(f'{path}: base_model_name_or_path {name!r} is not here; expected a directory, also one relative to this one')
  return str([*places, name][0])


def adapter_model_config(directory, base):
  """The shape of a base with a directory's adapters. Of different ranks the largest counts, the others are padded.

  Raises:
    UserError: no weights, or adapters that have no place in this family.
  """
  with _weights(directory) as file:
    found, head = _found(Path(directory), base, file), SCORE in file.keys()
  rank = max(rank for _, _, rank, _ in found.values())
  scale = next(iter(found.values()))[3]
  return dataclasses.replace(base, lora_rank=rank, lora_alpha=scale * rank, head=head or base.head,
                             lora_targets=tuple(target for target in TARGETS if target in found))


def load_adapters(directory, config, shardings):
  """The adapters, and the score where there is one, as leaves of params, float32.

  Args:
    config: of `shape`.
    shardings: a tree like params; more leaves do no harm.
  """
  place = lambda value, sharding: jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
  layers, params, L, scale = {}, {}, config.layers, config.lora_alpha / config.lora_rank
  with _weights(directory) as file:
    for target, (home, rows, rank, own) in _found(Path(directory), config, file).items():
      a = np.zeros((L, math.prod(home.inputs), config.lora_rank), np.float32)
      b = np.zeros((L, config.lora_rank, math.prod(home.outputs)), np.float32)
      for i in range(L):
        both = (file.get_tensor(_name(home, i, letter)).astype(np.float32) for letter in 'AB')
        a[i, :, :rank] = next(both)[rows].T
        b[i, :rank] = next(both)[home.begin:home.begin + b.shape[2], rows].T * np.float32(own / scale)
      layers[target + lora.A] = a.reshape(L, *home.inputs, -1)
      layers[target + lora.B] = b.reshape(L, -1, *home.outputs)
    if SCORE in file.keys():
      params['score'] = {'kernel': file.get_tensor(SCORE).astype(np.float32).reshape(-1),
                         'bias': np.asarray(float((file.metadata() or {}).get('reward_bias', 0.0)), np.float32)}
  params['layers'] = layers
  return jax.tree.map(place, params, {name: {leaf: shardings[name][leaf] for leaf in leaves}
                                      for name, leaves in params.items()})


def save_adapters(directory, config, params, base: str, dtype='float32', card='', tokenizer=None) -> None:
  """Writes the adapters of a model, whole or not at all; an earlier export there is replaced. Every process calls this,
  the first one writes. With a head its score is written too; the score's bias, for which PEFT has no place, stands in
  the weights' metadata as `reward_bias`.

  Args:
    params: with adapters; more leaves do no harm.
    base: a name by which PEFT finds the model they stand on.
    dtype: of the file.
    card: README.md, where it is not empty.
    tokenizer: with the chat template that the adapters were trained with; None: the base's.
  """
  directory, tensors, ranks, alphas = Path(directory), {}, {}, {}
  groups, r, metadata = {}, config.lora_rank, {'format': 'pt'}
  for target in config.lora_targets:
    home = _homes(config)[target]
    groups.setdefault(home.module, []).append((home, *(to_host(params['layers'][target + letter].astype(jnp.dtype(dtype)))
                                                       for letter in (lora.A, lora.B))))
  for module, members in groups.items():
    home = members[0][0]
    if home.parts > 1:
      ranks[_suffix(module)], alphas[_suffix(module)] = home.parts * r, home.parts * config.lora_alpha
    for i in range(config.layers):
      a = np.zeros((home.parts * r, math.prod(home.inputs)), members[0][1].dtype)
      b = np.zeros((home.whole, home.parts * r), a.dtype)
      for own, ours_a, ours_b in members:
        rows = slice(own.part * r, (own.part + 1) * r)
        a[rows] = ours_a[i].reshape(-1, r).T
        b[own.begin:own.begin + math.prod(own.outputs), rows] = ours_b[i].reshape(r, -1).T
      tensors[_name(home, i, 'A')], tensors[_name(home, i, 'B')] = a, b
  said = dict(peft_type='LORA', task_type='SEQ_CLS' if config.head else 'CAUSAL_LM', base_model_name_or_path=base, r=r,
              lora_alpha=config.lora_alpha, lora_dropout=0.0, bias='none', inference_mode=True, rank_pattern=ranks,
              alpha_pattern=alphas, target_modules=sorted(map(_suffix, groups)), fan_in_fan_out=members[0][0].fan_in)
  if config.head:
    tensors[SCORE] = to_host(params['score']['kernel']).reshape(1, -1).astype(a.dtype)
    said |= dict(modules_to_save=['score'])
    metadata['reward_bias'] = repr(float(to_host(params['score']['bias'])))
  if jax.process_index() > 0:
    return
  temporary = directory.with_name(directory.name + '.tmp')
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir(parents=True)
  (temporary / CONFIG).write_text(json.dumps(said, indent=2) + '\n', 'utf-8')
  if card:
    (temporary / 'README.md').write_text(card, 'utf-8')
  if tokenizer:
    tokenizer.save(temporary)
  safetensors.numpy.save_file(tensors, temporary / WEIGHTS, metadata=metadata)
  shutil.rmtree(directory, ignore_errors=True)
  os.replace(temporary, directory)


def _homes(config) -> dict[str, Home]:
  """The home of each matrix of the config's family."""
  homes = {}
  for tensor in families.list_tensors(config):
    target = tensor.path.removeprefix('layers.')
    if target in TARGETS and tensor.stacked == 'l':
      sizes = dict(zip(tensor.axes, tensor.shape(config)))
      cut = 3 if target == 'output' else 2
      inputs, outputs = tensor.axes[1:cut], tensor.axes[cut:]
      of = lambda letters: tuple(sizes.get(letter) or {'n': config.kv_heads, 'h': config.heads}[letter] for letter in letters)
      groups = tensor.matrix.split(',')
      fused = groups[tensor.fused_axis].split('|') if tensor.fused_axis is not None else [outputs]
      ends = [math.prod(of(part)) for part in fused]
      homes[target] = Home(tensor.name.removesuffix('.weight'), of(inputs), of(outputs), tensor.part, len(fused),
                           sum(ends[:tensor.part]), sum(ends), tensor.fan_in)
  return homes


def _found(directory, config, file):
  """target → (home, its rows of A, their number, its scale), of the adapters in a file."""
  said, names, found = read_json(directory / CONFIG), set(file.keys()) - {SCORE}, {}
  for target, home in _homes(config).items():
    if _name(home, 0, 'A') not in names:
      continue
    rank, rows = file.get_slice(_name(home, 0, 'A')).get_shape()[0], slice(None)
    alpha = next((value for key, value in (said.get('alpha_pattern') or {}).items()
                  if re.fullmatch(rf'(.*\.)?({key})', home.module.format(0))), said['lora_alpha'])
    scale = alpha / (math.sqrt(rank) if said.get('use_rslora') else rank)
    if home.parts > 1 and rank == home.parts * said['r'] and _suffix(home.module) in (said.get('rank_pattern') or {}):
      rank, rows = said['r'], slice(home.part * said['r'], (home.part + 1) * said['r'])  # blocks, as `save` writes them
      if not file.get_slice(_name(home, 0, 'A'))[rows].any():
        continue
    found[target] = home, rows, rank, scale
  known = {_name(home, i, letter) for home, *_ in found.values() for i in range(config.layers) for letter in 'AB'}
  unknown, missing = sorted(names - known), sorted(known - names)
  if unknown or missing or not found:
    first = lambda names: ', '.join(names[:3]) + f' and {len(names) - 3} more' * (len(names) > 3)
    raise UserError(f'{directory / WEIGHTS}: expected adapters on matrices of every layer of a {config.family}; '
                    + '; '.join([*(['unknown ' + first(unknown)] if unknown else []),
                                 *(['missing ' + first(missing)] if missing else [])] or ['there are none']))
  return found


def _weights(directory):
  path = Path(directory) / WEIGHTS
  if not path.is_file():
    pickled = path.with_suffix('.bin').is_file()
    raise UserError(f'{path}: not found' + pickled * '; a pickled .bin is not read: load and save it with PEFT')
  try:
    return safetensors.safe_open(path, 'numpy')
  except safetensors.SafetensorError as error:
    raise UserError(f'{path}: damaged ({error})') from None


def _name(home, layer, letter):
  return f'{PREFIX}{home.module.format(layer)}.lora_{letter}.weight'


def _suffix(module):
  return '.'.join(module.split('.')[-2:])
