import dataclasses
import functools

import jax
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models import families, hf_config, transformer

SMOLLM2 = {  # config.json of SmolLM2-135M-Instruct, as published
    'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0, 'bos_token_id': 1,
    'eos_token_id': 2, 'hidden_act': 'silu', 'hidden_size': 576, 'initializer_range': 0.041666666666666664,
    'intermediate_size': 1536, 'is_llama_config': True, 'max_position_embeddings': 8192, 'mlp_bias': False,
    'model_type': 'llama', 'num_attention_heads': 9, 'num_hidden_layers': 30, 'num_key_value_heads': 3,
    'pad_token_id': 2, 'pretraining_tp': 1, 'rms_norm_eps': 1e-05, 'rope_interleaved': False, 'rope_scaling': None,
    'rope_theta': 100000, 'tie_word_embeddings': True, 'torch_dtype': 'bfloat16', 'vocab_size': 49152}
CONFIG = transformer.ModelConfig(
    vocab_size=64, embed=32, layers=3, heads=4, kv_heads=2, head_dim=6, mlp=48, norm_eps=1e-4, rope_theta=500.0,
    tied=False, max_length=77)


def test_smollm2_config_is_read():
  assert hf_config.from_hf(SMOLLM2) == transformer.ModelConfig(
      vocab_size=49152, embed=576, layers=30, heads=9, kv_heads=3, head_dim=64, mlp=1536, norm_eps=1e-5,
      rope_theta=100000, tied=True, max_length=8192)


def test_absent_keys_mean_what_transformers_means():
  config = hf_config.from_hf({'model_type': 'llama', 'vocab_size': 10, 'hidden_size': 32, 'num_hidden_layers': 1,
                             'num_attention_heads': 4, 'intermediate_size': 8, 'num_key_value_heads': None})
  assert (config.kv_heads, config.head_dim, config.norm_eps, config.rope_theta) == (4, 8, 1e-6, 10000.0)
  assert (config.tied, config.max_length, config.head) == (False, 2048, False)


def test_rope_theta_of_transformers_5_is_read():
  values = {key: value for key, value in SMOLLM2.items() if key not in ('rope_theta', 'rope_scaling')}
  values['rope_parameters'] = {'rope_theta': 123.0, 'rope_type': 'default'}
  assert hf_config.from_hf(values).rope_theta == 123.0


@pytest.mark.parametrize('config', [CONFIG, dataclasses.replace(CONFIG, tied=True),
                                    dataclasses.replace(CONFIG, tied=True, head=True)])
def test_config_survives_the_way_out_and_back(config):
  assert hf_config.from_hf(hf_config.to_hf(config)) == config


@pytest.mark.parametrize('change, message', [
    ({'model_type': 'gpt2'}, "model_type is 'gpt2', expected one of llama"),
    ({'architectures': ['LlamaForTokenClassification']}, 'LlamaForCausalLM, LlamaForSequenceClassification'),
    ({'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, "rotary scaling 'llama3', expected none"),
    ({'rope_scaling': {'type': 'linear', 'factor': 2.0}}, "rotary scaling 'linear', expected none"),
    ({'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1.0}}, "rotary scaling 'yarn', expected none"),
    ({'attention_bias': True}, 'attention_bias is True, expected False'),
    ({'hidden_act': 'gelu'}, "hidden_act is 'gelu', expected 'silu'"),
    ({'quantization_config': {'bits': 4}}, 'quantization_config'),
    ({'hidden_size': None}, 'no hidden_size'),
])
def test_what_the_decoder_lacks_is_refused(change, message):
  with pytest.raises(UserError, match=message) as error:
    hf_config.from_hf({**SMOLLM2, **change}, 'd/config.json')
  assert str(error.value).startswith('d/config.json: ') and '\n' not in str(error.value)


@pytest.mark.parametrize('change', [{}, {'tied': True}, {'head': True}])
def test_the_table_has_the_leaves_of_the_model(change):
  config = dataclasses.replace(CONFIG, **change)
  made = jax.eval_shape(transformer.build(config).init, jax.random.key(0))
  if config.head:
    del made['score']['bias']  # Hugging Face has none
  for tensor in families.tensors(config):
    leaf = functools.reduce(lambda tree, key: tree[key], tensor.path, made)
    assert leaf.shape[1 if tensor.path[0] == 'layers' else 0:] == tensor.shape(config), tensor.path
  assert len(families.tensors(config)) == len(jax.tree.leaves(made))


def test_every_leaf_comes_back_whole_and_in_parts():
  random = np.random.default_rng(0)
  for tensor in families.tensors(dataclasses.replace(CONFIG, head=True)):
    leaf = random.normal(size=tensor.shape(CONFIG))
    matrix = tensor.write(CONFIG, leaf)
    assert matrix.shape == tensor.file_shape(CONFIG)
    np.testing.assert_array_equal(tensor.read(CONFIG, matrix.__getitem__), leaf)
    index = tuple(slice(size // 2, size) for size in leaf.shape)
    np.testing.assert_array_equal(tensor.read(CONFIG, matrix.__getitem__, index), leaf[index])


def test_query_rows_are_heads_and_gguf_pairs_are_undone():
  query = next(tensor for tensor in families.tensors(CONFIG) if tensor.path[-1] == 'query')
  rows = np.repeat(np.arange(24.0)[:, None], 32, 1)  # 4 heads of 6: row r is head r // 6, place r % 6
  assert query.read(CONFIG, rows.__getitem__)[0, 1].tolist() == [6, 7, 8, 9, 10, 11]
  paired = rows.copy()
  paired[:6] = rows[[0, 3, 1, 4, 2, 5]]  # llama.cpp's order of the first head
  for i in range(1, 4):
    paired[6 * i:6 * i + 6] = paired[:6] + 6 * i
  np.testing.assert_array_equal(query.unpair(CONFIG, paired), rows)
