"""Adapters in PEFT's format, compared with what PEFT computed for them.

scripts/record_references.py recorded it.
"""

import dataclasses
import json
from pathlib import Path
import shutil

from interop_cases import (
  ADAPTERS,
  assert_same,
  CASES,
  DATA,
  hidden_states,
  layout,
  MASK,
  shardings,
  TOKENS,
)
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rlhf_jax.errors import UserError
from rlhf_jax.interop import peft_io, pretrained
from rlhf_jax.models import heads, lora, transformer
from rlhf_jax.stages.shared import model_sources, model_store
from rlhf_jax.types import merge_params


def adapted(case, head=False):
  """Returns the shape of a family with adapters on all matrices, and random adapters and score."""
  base = pretrained.read_config(DATA / case)
  config = dataclasses.replace(
    base,
    lora_rank=3,
    lora_alpha=6.0,
    lora_targets=base.matrices,
    head=head,
  )
  shapes = jax.eval_shape(transformer.build_model(config).init, jax.random.key(0))
  rng = np.random.default_rng(0)
  trained, _ = lora.split_trainable(shapes)
  trained = jax.tree.map(lambda leaf: random_leaf(rng, leaf.shape), trained)
  return config, trained


def random_leaf(rng, shape):
  return jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32)


def one_device():
  return layout(jax.devices()[:1])


def eight_devices():
  return layout(data=1, fsdp=4, tensor=2)


@pytest.mark.parametrize('case', sorted(path.name for path in ADAPTERS.iterdir()))
def test_peft_computed_the_same(case):
  """Ranks and scales by pattern, rank-stabilised scales, transposed and fused matrices."""
  source = model_sources.find_model(str(ADAPTERS / case))
  reference = np.load(ADAPTERS / case / 'logits.npz')['right']
  model = transformer.build_model(source.config)
  for on in (one_device(), eight_devices()):
    params = model_store.read_parameters(source, on, 'float32', {})
    hidden = hidden_states(source.config, params, TOKENS, MASK)
    logits = heads.next_token_logits(model, params, hidden)
    np.testing.assert_allclose(logits[MASK], reference[MASK], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize('case', CASES)
def test_what_is_written_comes_back_bit_for_bit(case, tmp_path):
  directory = tmp_path / 'out'
  base = str(DATA / case)
  for head in (False, True):
    config, trained = adapted(case, head)
    peft_io.save_adapters(directory, config, trained, base)
    assert peft_io.base_model_of(directory) == base
    again = peft_io.adapter_model_config(directory, pretrained.read_config(base))
    assert again == config
    places = shardings(again, one_device())
    assert_same(peft_io.load_adapters(directory, again, places), trained)


@pytest.mark.parametrize('head', [False, True])
@pytest.mark.parametrize('case', ['llama', 'gpt2', 'gemma2', 'phi3', 'mixtral', 'qwen3_moe'])
def test_peft_opens_what_is_written(case, head, tmp_path):
  torch = pytest.importorskip('torch')
  peft = pytest.importorskip('peft')
  import transformers

  config, trained = adapted(case, head)
  peft_io.save_adapters(tmp_path / 'out', config, trained, str(DATA / case))
  auto = transformers.AutoModelForCausalLM
  labels = {}
  if head:
    auto = transformers.AutoModelForSequenceClassification
    labels = {'num_labels': 1}
  theirs = auto.from_pretrained(
    DATA / case,
    **labels,
    dtype=torch.float32,
    attn_implementation='eager',
  )
  theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / 'out')).eval()
  with torch.no_grad():
    expected = theirs(torch.tensor(TOKENS[:1])).logits.numpy()

  base = pretrained.load_parameters(DATA / case, pretrained.read_config(DATA / case))
  params = merge_params(trained, base)
  hidden = hidden_states(config, params, TOKENS[:1], MASK[:1])
  if head:
    ours = heads.scalar_scores(params, hidden)[:, -1:] - params['score']['bias']
  else:
    ours = heads.next_token_logits(transformer.build_model(config), params, hidden)
  np.testing.assert_allclose(ours, expected, atol=2e-4, rtol=1e-4)


def copy_llama(folder, changed_config=None, change_tensors=None):
  """Copies the adapters of `llama`, with changes, and returns the name of the copy."""
  shutil.copytree(ADAPTERS / 'llama', folder)
  path = folder / 'adapter_config.json'
  values = json.loads(path.read_text())
  values['base_model_name_or_path'] = str(DATA / 'llama')
  values.update(changed_config or {})
  path.write_text(json.dumps(values))
  if change_tensors is not None:
    path = folder / 'adapter_model.safetensors'
    tensors = safetensors.numpy.load_file(path)
    change_tensors(tensors)
    safetensors.numpy.save_file(tensors, path)
  return str(folder)


UNREADABLE_CONFIGS = [  # changed keys, message
  ({'r': True}, 'r is True, expected a whole number from 1'),
  ({'lora_alpha': '8'}, "lora_alpha is '8', expected a number above 0"),
  ({'target_modules': None}, 'target_modules is None, expected a text or a list of texts'),
  ({'use_newest_lora': True}, 'use_newest_lora is True, expected no such key'),
  ({'task_type': 'SEQ_2_SEQ_LM'}, "task_type is 'SEQ_2_SEQ_LM', expected 'CAUSAL_LM'"),
  ({'revision': 'v2'}, "revision is 'v2', expected None"),
  ({'lora_bias': True}, 'lora_bias is True, expected False'),
  ({'layers_pattern': ['layers']}, 'layers_pattern is'),
  ({'target_parameters': ['mlp.experts']}, 'target_parameters is'),
  ({'trainable_token_indices': [3]}, 'trainable_token_indices is'),
  ({'ensure_weight_tying': True}, 'ensure_weight_tying is True'),
  ({'init_lora_weights': 'pissa'}, "init_lora_weights is 'pissa', expected True"),
  ({'init_lora_weights': 'pissa_niter_16'}, "init_lora_weights is 'pissa_niter_16'"),
  ({'init_lora_weights': 'olora'}, "init_lora_weights is 'olora', expected True"),
  ({'init_lora_weights': 'loftq'}, "init_lora_weights is 'loftq', expected True"),
  ({'init_lora_weights': 'mica'}, "init_lora_weights is 'mica', expected True"),
  ({'corda_config': {}}, 'corda_config is'),
  ({'lora_ga_config': {}}, 'lora_ga_config is'),
  ({'loftq_config': {'loftq_bits': 4}}, 'loftq_config is'),
  ({'kasa_config': {}}, 'kasa_config is'),
  ({'monteclora_config': {}}, 'monteclora_config is'),
  ({'velora_config': {}}, 'velora_config is'),
  ({'megatron_config': {}}, 'megatron_config is'),
  ({'merge_weights': True}, 'merge_weights is True'),
  ({'enable_lora': [True]}, 'enable_lora is'),
  ({'peft_type': 'IA3'}, "peft_type is 'IA3', expected 'LORA'"),
  ({'bias': 'all'}, "bias is 'all', expected 'none'"),
  ({'use_dora': True}, 'use_dora is True, expected False'),
  ({'layers_to_transform': [0]}, r'layers_to_transform is \[0\], expected None'),
  ({'layer_replication': [[0, 2]]}, r'layer_replication is \[\[0, 2\]\], expected None'),
  ({'modules_to_save': ['lm_head']}, r"modules_to_save is \['lm_head'\], expected None"),
  ({'alora_invocation_tokens': [1]}, r'alora_invocation_tokens is \[1\], expected None'),
  ({'arrow_config': {}}, r'arrow_config is \{\}, expected None'),
  ({'use_bdlora': {}}, r'use_bdlora is \{\}, expected None'),
  ({'use_qalora': True}, 'use_qalora is True, expected False'),
  ({'base_model_name_or_path': None}, 'expected a base_model_name_or_path, got None'),
  (
    {'base_model_name_or_path': 'no/where'},
    "base_model_name_or_path 'no/where' is not here",
  ),
]


@pytest.mark.parametrize('changed, message', UNREADABLE_CONFIGS)
def test_a_config_that_cannot_be_read_is_named(changed, message, tmp_path):
  name = copy_llama(tmp_path / 'bad', changed_config=changed)
  with pytest.raises(UserError, match='adapter_config.json: ' + message):
    model_sources.find_model(name)


def test_every_checked_key_is_tested():
  changed = {key for values, _ in UNREADABLE_CONFIGS for key in values}
  assert set(peft_io.KNOWN_KEYS.only) <= changed


QUERY_A = 'base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight'


def remove_query(tensors):
  del tensors[QUERY_A]


def add_output_matrix(tensors):
  tensors[QUERY_A.replace('q_proj', 'lm_head')] = np.zeros(2)


def one_row(tensors):
  tensors[QUERY_A] = tensors[QUERY_A][:1]  # would broadcast over the four of the others


def put_nan(tensors):
  tensors[QUERY_A] = np.full_like(tensors[QUERY_A], np.nan)


def make_whole(tensors):
  tensors[QUERY_A] = tensors[QUERY_A].astype(np.int32)


def add_score(tensors):
  tensors['base_model.model.score.weight'] = np.zeros((1, 32), np.float32)


@pytest.mark.parametrize(
  'change, message',
  [
    (one_row, r'q_proj.lora_A.weight is \[1, 32\], expected \[4, 32\]'),
    (put_nan, 'q_proj.lora_A.weight has numbers that are not finite'),
    (make_whole, 'q_proj.lora_A.weight is of I32, expected one of F64'),
    (add_score, r'score.weight; expected it with modules_to_save: \["score"\]'),
    (
      remove_query,
      f'adapters on matrices of every layer of a llama; missing {QUERY_A}',
    ),
    (
      add_output_matrix,
      'unknown base_model.model.model.layers.1.self_attn.lm_head',
    ),
  ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
  name = copy_llama(tmp_path / 'bad', change_tensors=change)
  with pytest.raises(UserError, match=message):
    model_sources.find_model(name)


def test_damaged_and_pickled_weights_are_named(tmp_path):
  name = copy_llama(tmp_path / 'bad')
  path = Path(name) / 'adapter_model.safetensors'
  path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(UserError, match='adapter_model.safetensors: damaged'):
    model_sources.find_model(name)
  path.rename(path.with_suffix('.bin'))
  with pytest.raises(
    UserError,
    match='adapter_model.safetensors: not found; a pickled .bin is not read',
  ):
    model_sources.find_model(name)


def test_adapters_that_peft_would_leave_alone_are_named(tmp_path):
  """PEFT passes over tensors of modules that target_modules does not name."""
  name = copy_llama(tmp_path / 'bad', changed_config={'target_modules': ['q_proj', 'v_proj']})
  with pytest.raises(UserError, match='o_proj.lora_A.weight is no adapter to PEFT: target_modules'):
    model_sources.find_model(name)
