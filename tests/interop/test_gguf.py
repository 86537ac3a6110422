"""GGUF files that llama.cpp wrote, beside what transformers computed: scripts/record_gguf.py."""

from interop_cases import assert_same, GGUF, hidden_states, layout, MASK, shardings, TOKENS
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.interop import gguf_io, pretrained
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.models import heads, transformer

gguf = pytest.importorskip('gguf')

CASES = sorted(path.stem for path in GGUF.glob('*.gguf'))


def add_llama3_factors(writer):
  writer.add_tensor('rope_freqs.weight', np.arange(1, 9, dtype=np.float32))


def add_bias(writer):
  writer.add_tensor('blk.0.attn_v.bias', np.zeros(32, np.float32))


@pytest.mark.parametrize('case', CASES)
def test_logits_are_those_of_transformers(case):
  config, params, tokenizer = pretrained.load_gguf_parameters(GGUF / f'{case}.gguf')
  assert tokenizer is None  # of no kind that is read
  hidden = hidden_states(config, params, TOKENS, MASK)
  logits = heads.next_token_logits(transformer.build_model(config), params, hidden)
  reference = np.load(GGUF / f'{case}.npz')['right']
  np.testing.assert_allclose(logits[MASK], reference[MASK], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize('case', ['llama3', 'gpt2', 'mixtral'])
def test_the_parts_of_a_mesh_are_those_of_the_whole(case):
  path = GGUF / f'{case}.gguf'
  config, whole, _ = pretrained.load_gguf_parameters(path)
  places = shardings(config, layout(data=1, fsdp=4, tensor=2))
  _, parts, _ = pretrained.load_gguf_parameters(path, places)
  assert_same(parts, whole)


def test_every_architecture_has_a_file():
  names = set()
  for case in CASES:
    fields = gguf.GGUFReader(GGUF / f'{case}.gguf').fields
    names.add(fields['general.architecture'].contents())
  assert names == set(gguf_io.ARCHITECTURES)


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
      add_llama3_factors,
      'rope_freqs.weight are not the factors of a llama3 scaling',
    ),
    (
      'qwen3',
      add_bias,
      'unknown blk.0.attn_v',
    ),
    ('mamba', lambda writer: None, "GGUF architecture 'mamba', expected one of llama, smollm3"),
  ],
)
def test_what_is_not_read_is_refused(case, more, message, tmp_path):
  """A file with one thing more."""
  source = 'qwen3' if case == 'mamba' else case
  reader = gguf.GGUFReader(GGUF / f'{source}.gguf')
  arch = case if case == 'mamba' else reader.fields['general.architecture'].contents()
  writer = gguf.GGUFWriter(tmp_path / 'm.gguf', arch)
  more(writer)
  changed_keys = [name for part in writer.kv_data for name in part]
  changed_tensors = [name for part in writer.tensors for name in part]
  for name, field in reader.fields.items():
    if name not in changed_keys and not name.startswith('GGUF.'):
      kind, *element_kind = field.types
      writer.add_key_value(name, field.contents(), kind, *(element_kind or [None]))
  for tensor in reader.tensors:
    if tensor.name not in changed_tensors:
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
  metadata = {'tokenizer.ggml.' + key: value for key, value in fields.items()}
  tokenizer = Tokenizer.from_gguf(metadata)
  parts = tokenizer.core.pre_tokenizer.pre_tokenize_str("ab're 1234 !!")
  assert [part for part, _ in parts] == cut
  assert (tokenizer.text('a')[0] == 0) == (pre == 'llama-bpe')
