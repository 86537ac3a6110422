"""Odd configs and adapters: the same numbers as transformers and PEFT, or refused by name.

scripts/record_odd_files.py recorded them, and what transformers and PEFT compute.
"""

import json
import shutil

from interop_cases import DATA, HERE, LENGTHS, MASK, TOKENS
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.interop import pretrained
from rlhf_jax.models import heads, transformer
from rlhf_jax.runtime import mesh
from rlhf_jax.stages.shared import model_sources, model_store

ODD = HERE / 'odd'
RECORDS = json.loads((ODD / 'cases.json').read_text())
CONFIGS = [record for record in RECORDS if 'case' in record]
ADAPTERS = [record for record in RECORDS if 'adapter' in record]
LOGITS = np.load(ODD / 'logits.npz')
REMOVED = '-'  # in place of the value of a key that is taken out


def describe(record):
  changes = record.get('changes', record.get('adapter'))
  return f'{record.get("case", "adapter")}-{json.dumps(changes)[:60]}'


def change_config(path, changes):
  values = {**json.loads(path.read_text()), **changes}
  path.write_text(json.dumps({key: value for key, value in values.items() if value != REMOVED}))


def last_logits(config, params):
  """Returns the logits of the last token of the three texts: [3, 64].

  They were recorded each alone, and are computed in one batch, where neighbours change nothing.
  Operation by operation: a config that differs in a number would compile another program.
  """
  model = transformer.build_model(config)
  positions = jnp.tile(jnp.arange(12), (3, 1))
  segments = jnp.asarray(MASK, jnp.int32)
  with jax.disable_jit():
    hidden = model.apply(params, jnp.asarray(TOKENS), positions, segments)[0]
  return heads.next_token_logits(model, params, hidden[jnp.arange(3), LENGTHS - 1])


@pytest.mark.parametrize('record', CONFIGS, ids=describe)
def test_a_config_is_computed_as_transformers_does_or_refused_by_name(record, tmp_path):
  """Never read as something else: what is computed is the same, what is refused is named."""
  shutil.copy(DATA / record['case'] / 'config.json', tmp_path)
  change_config(tmp_path / 'config.json', record['changes'])
  try:
    config = pretrained.read_config(tmp_path)
    params = pretrained.load_parameters(DATA / record['case'], config)
  except UserError as error:
    assert '\n' not in str(error)
    assert any(name in str(error) for name in names_in(record['changes'])), str(error)
    return
  if 'error' in record:
    assert (record['case'], record['changes']) in READ_ALL_THE_SAME
    return
  np.testing.assert_allclose(last_logits(config, params), LOGITS[record['name']], atol=1e-4)


# transformers refuses these, in which nothing is open to doubt.
READ_ALL_THE_SAME = (
  ('llama', {'rms_norm_eps': 1}),  # a whole number
  ('gemma2', {'sliding_window': None, 'layer_types': ['full_attention', 'full_attention']}),
)


def names_in(changes):
  """Yields the keys that were changed, in nested tables too, and the names of kinds."""
  for key, value in changes.items():
    yield {'architectures': 'architecture', 'num_hidden_layers': 'layers.1.'}.get(key, key)
    if isinstance(value, dict):
      yield from names_in(value)
      yield str(value.get('rope_type'))


@pytest.mark.parametrize('record', ADAPTERS, ids=describe)
def test_adapters_are_computed_as_peft_does_or_refused_by_name(record):
  directory = ODD / record['name']
  if not directory.is_dir():
    pytest.skip('PEFT itself does not write it')
  try:
    source = model_sources.find_model(str(directory))
  except UserError as error:
    named = [*record['adapter'], 'lora_', 'adapter_model.safetensors']
    assert any(name in str(error) for name in named), str(error)
    return
  one_device = mesh.make_layout(mesh.MeshOptions(), jax.devices()[:1])
  params = model_store.read_parameters(source, one_device, 'float32', {})
  expected = LOGITS[record['name']]
  np.testing.assert_allclose(last_logits(source.config, params), expected, atol=1e-4)


def test_most_of_what_can_be_computed_is():
  """The refusals above are not all: these odd but meaningful files are read."""
  read = [
    ('mistral', {'layer_types': ['full_attention', 'sliding_attention']}, 'windows', (0, 4)),
    ('phi3', {'attention_dropout': 0.1, 'resid_pdrop': 0.1}, 'windows', (4,)),
    ('llama', {'rope_scaling': {'rope_type': 'default', 'rope_theta': 7.0}}, 'rope_theta', 7.0),
  ]
  for case, changes, field, value in read:
    values = json.loads((DATA / case / 'config.json').read_text())
    config = pretrained.hf_config.from_hf({**values, **changes})
    assert getattr(config, field) == value
