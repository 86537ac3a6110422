import ml_collections
import pytest

from rlhf_jax import fingerprints
from rlhf_jax.errors import UserError
from rlhf_jax.experiment import data_files


def test_changed_data_are_named(tmp_path):
  for name in ('train', 'validation', 'other'):
    (tmp_path / f'{name}.jsonl').write_text('{"text": "a"}\n')
  run = tmp_path / 'run'
  data = {'source': 'jsonl', 'path': (f'{tmp_path}/{{split}}.jsonl', f'{run}/own.jsonl')}
  section = ml_collections.ConfigDict({'data': {**data, 'splits': {}}, 'loop': {'steps': 1}})
  before = data_files.fingerprint_data(section, run)
  assert sorted(before) == [f'{tmp_path}/train.jsonl', f'{tmp_path}/validation.jsonl']
  record = run / 'sft/data.json'
  data_files.check_unchanged(record, before, accept=False)  # nothing is known yet
  fingerprints.write_json(record, before)
  data_files.check_unchanged(record, before, accept=False)
  (tmp_path / 'train.jsonl').write_text('{"text": "b"}\n')
  changed = data_files.fingerprint_data(section, run)
  with pytest.raises(UserError, match="train.jsonl has changed since 'sft' began.*accept_changed"):
    data_files.check_unchanged(record, changed, accept=False)
  data_files.check_unchanged(record, changed, accept=True)
  (tmp_path / 'train.jsonl').unlink()
  gone = data_files.fingerprint_data(section, run)
  with pytest.raises(UserError, match='train.jsonl is gone'):
    data_files.check_unchanged(record, gone, accept=False)
