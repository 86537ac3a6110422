"""GGUF files that llama.cpp wrote, compared with what transformers computed for their models.

scripts/record_gguf.py recorded both.
"""

from interop_cases import assert_same, GGUF, hidden_states, layout, MASK, shardings, TOKENS
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.interop import gguf_io, gguf_tokenizer, pretrained
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.models import heads, transformer

gguf = pytest.importorskip('gguf')

CASES = sorted(path.stem for path in GGUF.glob('*.gguf'))


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
  config, whole, _ = pretrained.load_gguf_parameters(GGUF / f'{case}.gguf')
  places = shardings(config, layout(data=1, fsdp=4, tensor=2))
  _, parts, _ = pretrained.load_gguf_parameters(GGUF / f'{case}.gguf', places)
  assert_same(parts, whole)


def test_every_architecture_has_a_file():
  fields = [gguf.GGUFReader(GGUF / f'{case}.gguf').fields for case in CASES]
  names = {field['general.architecture'].contents() for field in fields}
  assert names == set(gguf_io.ARCHITECTURES)


def add_window(writer):
  writer.add_sliding_window(4)


def add_yarn(writer):
  writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)


def add_clamp(writer):
  writer.add_clamp_kqv(8.0)


def add_value_length(writer):
  writer.add_value_length(8)


def add_frequencies(writer):
  writer.add_tensor('rope_freqs.weight', np.arange(1, 9, dtype=np.float32))


def add_bias(writer):
  writer.add_tensor('blk.0.attn_v.bias', np.zeros(32, np.float32))


def add_nothing(writer):
  del writer


WITH_MORE = [  # file, what is added, message
  ('qwen2', add_window, 'qwen2.attention.sliding_window is 4, expected no such key'),
  ('olmo2', add_yarn, "rotary scaling 'yarn' in a GG"),
  ('olmoe', add_clamp, 'olmoe.attention.clamp_kqv is 8.0, expected no such key'),
  ('qwen3', add_value_length, 'qwen3.attention.value_length is 8, expected 16'),
  ('llama3', add_frequencies, 'rope_freqs.weight are not the factors of a llama3 scaling'),
  ('qwen3', add_bias, 'unknown blk.0.attn_v'),
  ('mamba', add_nothing, "GGUF architecture 'mamba', expected one of llama, smollm3"),
]


@pytest.mark.parametrize('case, add, message', WITH_MORE)
def test_what_is_not_read_is_refused(case, add, message, tmp_path):
  """A file with one thing more."""
  path = tmp_path / 'm.gguf'
  if case == 'mamba':
    copy_with_more(GGUF / 'qwen3.gguf', path, add, architecture='mamba')
  else:
    copy_with_more(GGUF / f'{case}.gguf', path, add)
  with pytest.raises(UserError, match=message):
    pretrained.load_gguf_parameters(path)


def copy_with_more(source, target, add, architecture=None):
  reader = gguf.GGUFReader(source)
  if architecture is None:
    architecture = reader.fields['general.architecture'].contents()
  writer = gguf.GGUFWriter(target, architecture)
  add(writer)
  added_keys = {key for part in writer.kv_data for key in part}
  added_tensors = {name for part in writer.tensors for name in part}
  for key, field in reader.fields.items():
    if key in added_keys or key.startswith('GGUF.'):
      continue
    kind, *item_kind = field.types
    writer.add_key_value(key, field.contents(), kind, *(item_kind or [None]))
  for tensor in reader.tensors:
    if tensor.name not in added_tensors:
      data = np.array(tensor.data)
      writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


# A file's `tokenizer.ggml.pre`, and how "ab're 1234 !!" is cut.
CUTS = {
  'smollm': ['ab', "'re", 'Ġ', '1', '2', '3', '4', 'Ġ!!'],
  'gpt-2': ['ab', "'re", 'Ġ1234', 'Ġ!!'],
  'llama-bpe': ['ab', "'re", 'Ġ', '123', '4', 'Ġ!!'],
  'qwen2': ['ab', "'re", 'Ġ', '1', '2', '3', '4', 'Ġ!!'],
}


def gguf_metadata(pre):
  values = {
    'model': 'gpt2',
    'pre': pre,
    'tokens': ['<s>', '</s>', '<pad>', *'abĠ1', 'ab'],
    'merges': ['a b'],
    'token_type': [3] * 3 + [1] * 5,
    'bos_token_id': 0,
    'eos_token_id': 1,
    'padding_token_id': 2,
  }
  return {'tokenizer.ggml.' + key: value for key, value in values.items()}


def test_every_pre_tokenizer_is_tested():
  assert set(CUTS) == set(gguf_tokenizer.PRE_TOKENIZERS)


@pytest.mark.parametrize('pre', CUTS)
def test_texts_are_split_as_the_files_pre_tokenizer_says(pre):
  tokenizer = Tokenizer.from_gguf(gguf_metadata(pre))
  pieces = tokenizer.core.pre_tokenizer.pre_tokenize_str("ab're 1234 !!")
  assert [piece for piece, _ in pieces] == CUTS[pre]
  assert (tokenizer.text('a')[0] == 0) == (pre == 'llama-bpe')


def test_a_tokenizer_of_another_kind_is_not_read():
  assert Tokenizer.from_gguf(gguf_metadata('deepseek-llm')) is None
  assert Tokenizer.from_gguf({'tokenizer.ggml.model': 'llama'}) is None
