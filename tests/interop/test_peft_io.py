"""Adapters in PEFT's format, beside what PEFT computed for them: scripts/record_references.py."""

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
from rlhf_jax.stages.shared import model_sources
from rlhf_jax.types import merge_params

QUERY_A = 'base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight'


def with_adapters(case, head=False):
  """Returns a family's shape with adapters on all that it has, random adapters and a score."""
  base = pretrained.read_config(DATA / case)
  config = dataclasses.replace(
    base,
    lora_rank=3,
    lora_alpha=6.0,
    lora_targets=base.matrices,
    head=head,
  )
  shapes = jax.eval_shape(transformer.build_model(config).init, jax.random.key(0))
  adapters, _ = lora.split_trainable(shapes)
  rng = np.random.default_rng(0)
  return config, jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32),
    adapters,
  )


@pytest.mark.parametrize('case', sorted(path.name for path in ADAPTERS.iterdir()))
def test_peft_computed_the_same(case):
  """Ranks and scales by pattern, rank-stabilised scales, transposed and fused matrices."""
  source = model_sources.find_model(str(ADAPTERS / case))
  reference = np.load(ADAPTERS / case / 'logits.npz')['right']
  for on in (layout(jax.devices()[:1]), layout(data=1, fsdp=4, tensor=2)):
    params = model_sources.read_parameters(source, on, 'float32', {})
    hidden = hidden_states(source.config, params, TOKENS, MASK)
    logits = heads.next_token_logits(transformer.build_model(source.config), params, hidden)
    np.testing.assert_allclose(logits[MASK], reference[MASK], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize('case', CASES)
def test_what_is_written_comes_back_bit_for_bit(case, tmp_path):
  for head in (False, True):
    config, adapters = with_adapters(case, head)
    peft_io.save_adapters(tmp_path / 'out', config, adapters, str(DATA / case))
    assert peft_io.base_model_of(tmp_path / 'out') == str(DATA / case)
    again = peft_io.adapter_model_config(tmp_path / 'out', pretrained.read_config(DATA / case))
    assert again == config
    places = shardings(again, layout(jax.devices()[:1]))
    assert_same(peft_io.load_adapters(tmp_path / 'out', again, places), adapters)


@pytest.mark.parametrize('head', [False, True])
@pytest.mark.parametrize('case', ['llama', 'gpt2', 'gemma2', 'phi3', 'mixtral', 'qwen3_moe'])
def test_peft_opens_what_is_written(case, head, tmp_path):
  torch = pytest.importorskip('torch')
  peft = pytest.importorskip('peft')
  import transformers

  config, adapters = with_adapters(case, head)
  peft_io.save_adapters(tmp_path / 'out', config, adapters, str(DATA / case))
  kind = transformers.AutoModelForCausalLM
  options = {}
  if head:
    kind = transformers.AutoModelForSequenceClassification
    options = {'num_labels': 1}
  theirs = kind.from_pretrained(
    DATA / case,
    dtype=torch.float32,
    attn_implementation='eager',
    **options,
  )
  theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / 'out')).eval()
  with torch.no_grad():
    want = theirs(torch.tensor(TOKENS[:1])).logits.numpy()
  base = pretrained.load_parameters(DATA / case, pretrained.read_config(DATA / case))
  params = merge_params(adapters, base)
  hidden = hidden_states(config, params, TOKENS[:1], MASK[:1])
  if head:
    got = heads.scalar_scores(params, hidden)[:, -1:] - params['score']['bias']
  else:
    got = heads.next_token_logits(transformer.build_model(config), params, hidden)
  np.testing.assert_allclose(got, want, atol=2e-4, rtol=1e-4)


def copy_adapters(folder, changes=None, without=None, more=None):
  """Copies the adapters on llama: with other keys of the config, without or with more tensors."""
  shutil.rmtree(folder, ignore_errors=True)
  shutil.copytree(ADAPTERS / 'llama', folder)
  config = json.loads((folder / 'adapter_config.json').read_text())
  config |= {'base_model_name_or_path': str(DATA / 'llama'), **(changes or {})}
  (folder / 'adapter_config.json').write_text(json.dumps(config))
  tensors = safetensors.numpy.load_file(folder / 'adapter_model.safetensors')
  tensors.pop(without, None)
  tensors.update(more or {})
  safetensors.numpy.save_file(tensors, folder / 'adapter_model.safetensors')
  return str(folder)


@pytest.mark.parametrize(
  'change, message',
  [
    (
      dict(changes={'use_dora': True}),
      'adapter_config.json: use_dora is True, expected False',
    ),
    (
      dict(changes={'peft_type': 'IA3'}),
      "adapter_config.json: peft_type is 'IA3', expected 'LORA'",
    ),
    (
      dict(changes={'modules_to_save': ['embed_tokens']}),
      'adapter_config.json: modules_to_save is .*, expected None',
    ),
    (
      dict(changes={'base_model_name_or_path': None}),
      'json: expected a base_model_name_or_path, got None',
    ),
    (
      dict(changes={'base_model_name_or_path': 'no/where'}),
      "json: base_model_name_or_path 'no/where' is not here",
    ),
    (
      dict(without=QUERY_A),
      f'adapters on matrices of every layer of a llama; missing {QUERY_A}',
    ),
    (
      dict(more={QUERY_A.replace('q_proj', 'lm_head'): np.zeros(2)}),
      'unknown base_model.model.model.layers.1.self_attn.lm_head',
    ),
  ],
)
def test_what_is_not_read_is_refused(change, message, tmp_path):
  with pytest.raises(UserError, match=message):
    model_sources.find_model(copy_adapters(tmp_path / 'bad', **change))


def test_files_that_cannot_be_read_are_named(tmp_path):
  folder = copy_adapters(tmp_path / 'bad')
  path = Path(folder) / 'adapter_model.safetensors'
  path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(UserError, match='adapter_model.safetensors: damaged'):
    model_sources.find_model(folder)
  path.rename(path.with_suffix('.bin'))
  message = 'adapter_model.safetensors: not found; a pickled .bin is not read'
  with pytest.raises(UserError, match=message):
    model_sources.find_model(folder)
