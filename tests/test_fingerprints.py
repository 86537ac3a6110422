import json

import pytest

from rlhf_jax import fingerprints
from rlhf_jax.errors import UserError


def test_a_json_file_is_verified(tmp_path):
  path = tmp_path / 'a.json'
  fingerprints.write_json(path, {'a': (1, 2.5), 'ä': None})
  assert fingerprints.read_json(path) == {'a': [1, 2.5], 'ä': None}
  text = path.read_text()
  for damaged in (text.replace('2.5', '2.6'), text[:-5], '[]', '{}', '', '{"a": 1}'):
    path.write_text(damaged)
    with pytest.raises(UserError, match='a.json: damaged.*restore it'):
      fingerprints.read_json(path)
  path.unlink()
  with pytest.raises(UserError, match='a.json: cannot read'):
    fingerprints.read_json(path)


def test_listed_files_are_verified_and_others_are_not(tmp_path):
  for name in ('a', 'b', 'c'):
    (tmp_path / name).write_text(name)
  fingerprints.record_files(tmp_path, ['a'])
  fingerprints.record_files(tmp_path, ['b'])  # the entry of a stays
  fingerprints.check_folder(tmp_path)
  for name in ('a', 'b', 'c'):
    (tmp_path / name).write_text('other')
  fingerprints.check_file(tmp_path / 'c')
  for name in ('a', 'b'):
    with pytest.raises(UserError, match=f'{name}: changed or damaged'):
      fingerprints.check_file(tmp_path / name)
  (tmp_path / 'a').unlink()
  with pytest.raises(UserError, match='a: cannot read: No such file'):
    fingerprints.check_folder(tmp_path)
  (tmp_path / fingerprints.LIST).write_text(json.dumps({'a': {}}))
  with pytest.raises(UserError, match='fingerprints.json: damaged'):
    fingerprints.check_file(tmp_path / 'b')


def test_a_huge_file_is_sampled(tmp_path, monkeypatch):
  monkeypatch.setattr(fingerprints, 'WHOLE', 1000)
  monkeypatch.setattr(fingerprints, 'BLOCK', 10)
  path = tmp_path / 'huge'
  data = bytes(range(256)) * 40
  path.write_bytes(data)
  whole = fingerprints.of_file(path)
  assert whole['size'] == len(data)
  for changed in (b'x' + data[1:], data[:-1] + b'x', data + b'x'):
    path.write_bytes(changed)
    assert fingerprints.of_file(path) != whole
