"""Adapters in PEFT's format, beside what PEFT computed for them: scripts/record_references.py."""

import dataclasses
import json
from pathlib import Path
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rlhf_jax.errors import UserError
from rlhf_jax.interop import peft_io, pretrained
from rlhf_jax.models import heads, lora, transformer
from rlhf_jax.runtime import mesh
from rlhf_jax.stages.shared import model_sources
from rlhf_jax.types import merge_params

HERE = Path(__file__).parent
DATA, ADAPTERS = HERE / 'data', HERE / 'adapters'
CASES = sorted(path.name for path in DATA.iterdir())
TOKENS = np.array(
  [
    [5, 9, 60, 7, 33, 2, 18, 41, 4, 11, 50, 22],
    [3, 50, 1, 27, 6, 12, 44, 19, 8, 0, 0, 0],
    [63, 10, 31, 2, 5, 0, 0, 0, 0, 0, 0, 0],
  ]
)
MASK = np.arange(12) < np.array([12, 9, 5])[:, None]


def forward(config, params, tokens, mask):
  model = transformer.build_model(config)
  positions = jnp.tile(jnp.arange(tokens.shape[1]), (len(tokens), 1))
  return model, model.apply(params, jnp.asarray(tokens), positions, jnp.asarray(mask, jnp.int32))[0]


def adapted(case, head=False):
  """(config, its base's parameters, random adapters and score) of a family with adapters on all that it has."""
  base = pretrained.read_config(DATA / case)
  config = dataclasses.replace(
    base, lora_rank=3, lora_alpha=6.0, lora_targets=base.matrices, head=head
  )
  shapes = jax.eval_shape(transformer.build_model(config).init, jax.random.key(0))
  rng = np.random.default_rng(0)
  trained = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), lora.split_trainable(shapes)[0]
  )
  return config, pretrained.load_parameters(DATA / case, base), trained


def shardings(config, axes={}):
  on = mesh.make_layout({**mesh.DEFAULTS, **axes}, jax.devices()[:1] if not axes else None)
  model = transformer.build_model(config)
  return on.shardings(model.axes, jax.eval_shape(model.init, jax.random.key(0)))


@pytest.mark.parametrize('case', sorted(path.name for path in ADAPTERS.iterdir()))
def test_peft_computed_the_same(case):
  """Ranks and scales by pattern, rank-stabilised scales, transposed and fused matrices; 1 device and 8."""
  source = model_sources.find_model(str(ADAPTERS / case))
  reference = np.load(ADAPTERS / case / 'logits.npz')['right']
  for on in (
    mesh.make_layout(mesh.DEFAULTS, jax.devices()[:1]),
    mesh.make_layout({**mesh.DEFAULTS, 'data': 1, 'fsdp': 4, 'tensor': 2}),
  ):
    params = model_sources.read_parameters(source, on, 'float32', {})
    model, hidden = forward(source.config, params, TOKENS, MASK)
    np.testing.assert_allclose(
      heads.next_token_logits(model, params, hidden)[MASK], reference[MASK], atol=1e-4, rtol=1e-5
    )


@pytest.mark.parametrize('case', CASES)
def test_what_is_written_comes_back_bit_for_bit(case, tmp_path):
  for head in (False, True):
    config, _, trained = adapted(case, head)
    peft_io.save_adapters(tmp_path / 'out', config, trained, str(DATA / case))
    assert peft_io.base_model_of(tmp_path / 'out') == str(DATA / case)
    again = peft_io.adapter_model_config(tmp_path / 'out', pretrained.read_config(DATA / case))
    assert again == config
    back = peft_io.load_adapters(tmp_path / 'out', again, shardings(again))
    assert jax.tree.structure(back) == jax.tree.structure(trained)
    jax.tree.map(
      lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), back, trained
    )


@pytest.mark.parametrize('head', [False, True])
@pytest.mark.parametrize('case', ['llama', 'gpt2', 'gemma2', 'phi3', 'mixtral', 'qwen3_moe'])
def test_peft_opens_what_is_written(case, head, tmp_path):
  torch, peft = pytest.importorskip('torch'), pytest.importorskip('peft')
  import transformers

  config, base, trained = adapted(case, head)
  peft_io.save_adapters(tmp_path / 'out', config, trained, str(DATA / case))
  kind = (
    transformers.AutoModelForSequenceClassification if head else transformers.AutoModelForCausalLM
  )
  theirs = kind.from_pretrained(
    DATA / case,
    **({'num_labels': 1} if head else {}),
    dtype=torch.float32,
    attn_implementation='eager',
  )
  theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / 'out')).eval()
  with torch.no_grad():
    want = theirs(torch.tensor(TOKENS[:1])).logits.numpy()
  params = merge_params(trained, base)
  model, hidden = forward(config, params, TOKENS[:1], MASK[:1])
  got = (
    heads.scalar_scores(params, hidden)[:, -1:] - params['score']['bias']
    if head
    else heads.next_token_logits(model, params, hidden)
  )
  np.testing.assert_allclose(got, want, atol=2e-4, rtol=1e-4)


def test_what_cannot_be_read_is_named(tmp_path):
  def copy(config=lambda said: None, change=lambda tensors: None):
    shutil.rmtree(tmp_path / 'bad', ignore_errors=True)
    shutil.copytree(ADAPTERS / 'llama', tmp_path / 'bad')
    said = json.loads((tmp_path / 'bad/adapter_config.json').read_text())
    said['base_model_name_or_path'] = str(DATA / 'llama')
    config(said)
    (tmp_path / 'bad/adapter_config.json').write_text(json.dumps(said))
    tensors = safetensors.numpy.load_file(tmp_path / 'bad/adapter_model.safetensors')
    change(tensors)
    safetensors.numpy.save_file(tensors, tmp_path / 'bad/adapter_model.safetensors')
    return str(tmp_path / 'bad')

  name = 'base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight'
  same = lambda x: None
  for config, change, message in (
    (
      lambda said: said.update(use_dora=True),
      same,
      'adapter_config.json: expected plain LoRA .* got use_dora True',
    ),
    (
      lambda said: said.update(base_model_name_or_path=None),
      same,
      'json: expected plain LoRA with a base_model_name_or_path',
    ),
    (
      lambda said: said.update(base_model_name_or_path='no/where'),
      same,
      "json: base_model_name_or_path 'no/where' is not here",
    ),
    (
      same,
      lambda tensors: tensors.pop(name),
      f'adapters on matrices of every layer of a llama; missing {name}',
    ),
    (
      same,
      lambda tensors: tensors.update({name.replace('q_proj', 'lm_head'): np.zeros(2)}),
      'unknown base_model.model.model.layers.1.self_attn.lm_head',
    ),
  ):
    with pytest.raises(UserError, match=message):
      model_sources.find_model(copy(config, change))
  fine = copy()
  path = Path(fine) / 'adapter_model.safetensors'
  path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(UserError, match='adapter_model.safetensors: damaged'):
    model_sources.find_model(fine)
  path.rename(path.with_suffix('.bin'))
  with pytest.raises(
    UserError, match='adapter_model.safetensors: not found; a pickled .bin is not read'
  ):
    model_sources.find_model(fine)
