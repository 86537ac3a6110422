"""GGUF files that llama.cpp wrote, beside what transformers computed for their models: scripts/record_gguf.py."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.interop import gguf_io, pretrained
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.models import heads, transformer
from rlhf_jax.runtime import mesh

gguf = pytest.importorskip('gguf')

FILES = Path(__file__).parent / 'gguf'
CASES = sorted(path.stem for path in FILES.glob('*.gguf'))
TOKENS = np.array(
  [
    [5, 9, 60, 7, 33, 2, 18, 41, 4, 11, 50, 22],
    [3, 50, 1, 27, 6, 12, 44, 19, 8, 0, 0, 0],
    [63, 10, 31, 2, 5, 0, 0, 0, 0, 0, 0, 0],
  ]
)
MASK = np.arange(12) < np.array([12, 9, 5])[:, None]


@pytest.mark.parametrize('case', CASES)
def test_logits_are_those_of_transformers(case):
  config, params, tokenizer = pretrained.load_gguf_parameters(FILES / f'{case}.gguf')
  assert tokenizer is None  # of no kind that is read
  model, positions = transformer.build_model(config), jnp.tile(jnp.arange(12), (3, 1))
  hidden = jax.jit(model.apply)(params, TOKENS, positions, MASK.astype(np.int32))[0]
  reference = np.load(FILES / f'{case}.npz')['right']
  np.testing.assert_allclose(
    heads.next_token_logits(model, params, hidden)[MASK], reference[MASK], atol=1e-4, rtol=1e-5
  )


@pytest.mark.parametrize('case', ['llama3', 'gpt2', 'mixtral'])
def test_the_parts_of_a_mesh_are_those_of_the_whole(case):
  config, whole, _ = pretrained.load_gguf_parameters(FILES / f'{case}.gguf')
  on = mesh.make_layout({**mesh.DEFAULTS, 'data': 1, 'fsdp': 4, 'tensor': 2})
  parts = pretrained.load_gguf_parameters(
    FILES / f'{case}.gguf', on.shardings(transformer.build_model(config).axes, whole)
  )[1]
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), parts, whole
  )


def test_every_kind_has_a_file():
  fields = [gguf.GGUFReader(FILES / f'{case}.gguf').fields for case in CASES]
  assert {one['general.architecture'].contents() for one in fields} == set(gguf_io.ARCHITECTURES)


@pytest.mark.parametrize(
  'case, more, message',
  [
    (
      'qwen2',
      lambda writer: writer.add_sliding_window(4),
      'qwen2.attention.sliding_window is 4, expected no such key',
    ),
    (
      'olmo2',
      lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
      "rotary scaling 'yarn' in a GG",
    ),
    (
      'olmoe',
      lambda writer: writer.add_clamp_kqv(8.0),
      'olmoe.attention.clamp_kqv is 8.0, expected no such key',
    ),
    (
      'qwen3',
      lambda writer: writer.add_value_length(8),
      'qwen3.attention.value_length is 8, expected 16',
    ),
    (
      'llama3',
      lambda writer: writer.add_tensor('rope_freqs.weight', np.arange(1, 9, dtype=np.float32)),
      'rope_freqs.weight are not the factors of a llama3 scaling',
    ),
    (
      'qwen3',
      lambda writer: writer.add_tensor('blk.0.attn_v.bias', np.zeros(32, np.float32)),
      'unknown blk.0.attn_v',
    ),
    ('mamba', lambda writer: None, "GGUF architecture 'mamba', expected one of llama, smollm3"),
  ],
)
def test_what_is_not_read_is_refused(case, more, message, tmp_path):
  """A file with one thing more."""
  reader = gguf.GGUFReader(FILES / f'{"qwen3" if case == "mamba" else case}.gguf')
  arch = case if case == 'mamba' else reader.fields['general.architecture'].contents()
  writer = gguf.GGUFWriter(tmp_path / 'm.gguf', arch)
  more(writer)
  said, named = (
    [name for part in writer.kv_data for name in part],
    [name for part in writer.tensors for name in part],
  )
  for name, field in reader.fields.items():
    if name not in said and not name.startswith('GGUF.'):
      writer.add_key_value(name, field.contents(), field.types[0], *(field.types[1:] or [None]))
  for tensor in reader.tensors:
    if tensor.name not in named:
      writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(UserError, match=message):
    pretrained.load_gguf_parameters(tmp_path / 'm.gguf')


@pytest.mark.parametrize(
  'pre, cut',
  [
    ('smollm', ['ab', "'re", 'Ġ', '1', '2', '3', '4', 'Ġ!!']),
    ('gpt-2', ['ab', "'re", 'Ġ1234', 'Ġ!!']),
    ('llama-bpe', ['ab', "'re", 'Ġ', '123', '4', 'Ġ!!']),
    ('qwen2', ['ab', "'re", 'Ġ', '1', '2', '3', '4', 'Ġ!!']),
  ],
)
def test_texts_are_cut_as_the_file_says(pre, cut):
  fields = {
    'model': 'gpt2',
    'pre': pre,
    'tokens': ['<s>', '</s>', '<pad>', *'abĠ1', 'ab'],
    'merges': ['a b'],
    'token_type': [3] * 3 + [1] * 5,
    'bos_token_id': 0,
    'eos_token_id': 1,
    'padding_token_id': 2,
  }
  tokenizer = Tokenizer.from_gguf({'tokenizer.ggml.' + key: value for key, value in fields.items()})
  assert [part for part, _ in tokenizer.core.pre_tokenizer.pre_tokenize_str("ab're 1234 !!")] == cut
  assert (tokenizer.text('a')[0] == 0) == (pre == 'llama-bpe')
