import dataclasses
import json
from pathlib import Path

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.interop import families, hf_config, known_keys
from rlhf_jax.models import transformer

DATA = Path(__file__).parent / 'data'
CASES = {
  path.name: json.loads((path / 'config.json').read_text()) for path in sorted(DATA.iterdir())
}

SMOLLM2 = {  # config.json of SmolLM2-135M-Instruct, as published
  'architectures': ['LlamaForCausalLM'],
  'attention_bias': False,
  'attention_dropout': 0.0,
  'bos_token_id': 1,
  'eos_token_id': 2,
  'hidden_act': 'silu',
  'hidden_size': 576,
  'initializer_range': 0.041666666666666664,
  'intermediate_size': 1536,
  'is_llama_config': True,
  'max_position_embeddings': 8192,
  'mlp_bias': False,
  'model_type': 'llama',
  'num_attention_heads': 9,
  'num_hidden_layers': 30,
  'num_key_value_heads': 3,
  'pad_token_id': 2,
  'pretraining_tp': 1,
  'rms_norm_eps': 1e-05,
  'rope_interleaved': False,
  'rope_scaling': None,
  'rope_theta': 100000,
  'tie_word_embeddings': True,
  'torch_dtype': 'bfloat16',
  'vocab_size': 49152,
}
SIZES = (
  'vocab_size',
  'n_embd',
  'n_layer',
  'n_head',
  'hidden_size',
  'num_hidden_layers',
  'num_attention_heads',
  'intermediate_size',
)
CONFIG = transformer.ModelConfig(
  vocab_size=64,
  embed=32,
  layers=3,
  heads=4,
  kv_heads=2,
  head_dim=6,
  mlp=48,
  norm_eps=1e-4,
  rope_theta=500.0,
  tied=False,
  max_length=77,
)


def test_smollm2_config_is_read():
  assert hf_config.from_hf(SMOLLM2) == transformer.ModelConfig(
    vocab_size=49152,
    embed=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    mlp=1536,
    norm_eps=1e-5,
    rope_theta=100000,
    tied=True,
    max_length=8192,
  )


def test_absent_keys_mean_what_transformers_means():
  config = hf_config.from_hf(
    {
      'model_type': 'llama',
      'vocab_size': 10,
      'hidden_size': 32,
      'num_hidden_layers': 1,
      'num_attention_heads': 4,
      'intermediate_size': 8,
      'num_key_value_heads': None,
    }
  )
  assert (config.kv_heads, config.head_dim) == (4, 8)
  assert (config.norm_eps, config.rope_theta) == (1e-6, 10000.0)
  assert (config.tied, config.max_length, config.head) == (False, 2048, False)


def test_rope_theta_of_transformers_5_is_read():
  values = dict(SMOLLM2)
  del values['rope_theta']
  del values['rope_scaling']
  values['rope_parameters'] = {'rope_theta': 123.0, 'rope_type': 'default'}
  assert hf_config.from_hf(values).rope_theta == 123.0


@pytest.mark.parametrize(
  'config',
  [
    CONFIG,
    dataclasses.replace(CONFIG, tied=True),
    dataclasses.replace(CONFIG, tied=True, head=True),
  ],
)
def test_config_survives_the_way_out_and_back(config):
  assert hf_config.from_hf(hf_config.to_hf(config)) == config


@pytest.mark.parametrize(
  'change, message',
  [
    ({'model_type': 'mamba'}, "model_type is 'mamba', expected one of llama, smollm3"),
    ({'model_type': 'gpt2'}, "architecture is 'LlamaForCausalLM', expected one of GPT2LMHeadModel"),
    (
      {'architectures': ['LlamaForTokenClassification']},
      'LlamaForCausalLM, LlamaForSequenceClassification',
    ),
    (
      {'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}},
      'llama3. without low_freq_factor, high_freq_factor',
    ),
    (
      {'rope_scaling': {'type': 'dynamic', 'factor': 2.0}},
      "rotary scaling 'dynamic', expected none, linear, llama3",
    ),
    (
      {'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1.0}},
      "rotary scaling 'yarn', expected none, linear",
    ),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor is 0.5, expected 1.0'),
    ({'hidden_act': 'relu'}, "hidden_act is 'relu', expected one of silu, swish"),
    ({'quantization_config': {'bits': 4}}, 'quantization_config'),
    ({'hidden_size': None}, 'no hidden_size'),
  ],
)
def test_what_the_decoder_lacks_is_refused(change, message):
  with pytest.raises(UserError, match=message) as error:
    hf_config.from_hf({**SMOLLM2, **change}, 'd/config.json')
  assert str(error.value).startswith('d/config.json: ')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('case', CASES)
def test_every_family_survives_the_way_out_and_back(case):
  config = hf_config.from_hf(CASES[case])
  assert config.family == CASES[case]['model_type']
  again = json.loads(json.dumps(dataclasses.asdict(config)))  # as model.json of a stage keeps it
  assert transformer.ModelConfig(**again) == config
  for head in (False, True):
    shape = dataclasses.replace(config, head=head, tied=config.tied or head)
    assert hf_config.from_hf(hf_config.to_hf(shape)) == shape


@pytest.mark.parametrize('family', families.FAMILIES)
def test_absent_keys_mean_what_the_family_means(family):
  transformers = pytest.importorskip('transformers')
  full = transformers.AutoConfig.for_model(family)
  values = full.to_dict()
  sizes = {key: getattr(full, key) for key in SIZES if key in values}
  short = {'model_type': family, **sizes}
  assert hf_config.from_hf(short) == hf_config.from_hf({**values, 'architectures': None})


class Recorder(dict):
  """A dict that notes which keys were asked for."""

  def __init__(self, values):
    super().__init__(values)
    self.asked = set()

  def get(self, key, default=None):
    self.asked.add(key)
    return super().get(key, default)

  def __getitem__(self, key):
    self.asked.add(key)
    return super().__getitem__(key)


@pytest.mark.parametrize('case', CASES)
def test_every_key_that_is_read_is_in_the_table_of_known_keys(case, monkeypatch):
  family = families.FAMILIES[CASES[case]['model_type']]
  recorder = Recorder(hf_config._add_defaults(CASES[case], family))
  monkeypatch.setattr(hf_config, '_add_defaults', lambda values, family: recorder)
  hf_config.from_hf(recorder)
  unknown = {key for key in recorder.asked if key not in family.known_keys}
  assert not unknown


def test_check_keys_refuses_by_name():
  known = known_keys.KnownKeys(
    read={'a': known_keys.COUNT},
    only={'b': (1, None)},
    ignored=('c',),
    advice='; ask',
  )
  known_keys.check_keys({'a': 5, 'b': None, 'c': 7, 'd': None}, known, 'file')
  with pytest.raises(UserError, match=r'^file: a is True, expected a whole number from 1$'):
    known_keys.check_keys({'a': True}, known, 'file')
  with pytest.raises(UserError, match=r'^file: x\.b is 2, expected 1$'):
    known_keys.check_keys({'b': 2}, known, 'file', prefix='x.')
  with pytest.raises(UserError, match=r'^file: x\.b is True, expected 1$'):
    known_keys.check_keys({'b': True}, known, 'file', prefix='x.')
  with pytest.raises(UserError, match=r'^file: x\.d is 3, expected no such key; ask$'):
    known_keys.check_keys({'d': 3}, known, 'file', prefix='x.')
  lenient = dataclasses.replace(known, refuse_others=False)
  known_keys.check_keys({'d': 3}, lenient, 'file')


def test_patterns_over_layers():
  gemma3 = {**CASES['gemma3'], 'num_hidden_layers': 8, 'layer_types': None, 'sliding_window': 512}
  config = hf_config.from_hf(gemma3)
  assert config.windows == (512,) * 5 + (0,)
  assert config.layer_windows == [512] * 5 + [0, 512, 512]
  smollm3 = {
    **CASES['smollm3'],
    'num_hidden_layers': 5,
    'no_rope_layers': None,
    'layer_types': None,
    'use_sliding_window': False,
  }
  config = hf_config.from_hf(smollm3)
  assert (config.rope_layers, config.windows) == ((1, 1, 1, 0), ())
  assert hf_config.from_hf({**CASES['mistral'], 'sliding_window': None}).windows == ()
  absent = {key: value for key, value in CASES['mistral'].items() if key != 'sliding_window'}
  assert hf_config.from_hf(absent).windows == (4096,)


@pytest.mark.parametrize(
  'change, message',
  [
    ({'qk_norm': 'head'}, "'llama' has no model with qk_norm 'head'"),
    ({'windows': (4, 0)}, "'llama' has no model with windows .4, 0."),
    ({'family': 'gemma2'}, "'gemma2' has no model with norm 'rms'"),
  ],
)
def test_a_model_that_its_family_does_not_have_is_not_exported(change, message):
  with pytest.raises(UserError, match=message):
    hf_config.to_hf(dataclasses.replace(CONFIG, **change))
