import errno
import gzip

import pytest

from rlhf_jax import files


def test_text_is_utf_8_and_compressed_by_its_name(tmp_path):
  for name in ('a.txt', 'a.txt.gz'):
    files.write_text(tmp_path / name, 'é\n')
    with files.open_text(tmp_path / name) as file:
      assert file.read() == 'é\n'
    with files.open_bytes(tmp_path / name) as file:
      assert file.read() == 'é\n'.encode()
  assert gzip.decompress((tmp_path / 'a.txt.gz').read_bytes()) == 'é\n'.encode()


def test_half_of_a_surrogate_pair_is_written_as_its_escape(tmp_path):
  files.write_text(tmp_path / 'a.txt', 'a\ud800')
  assert (tmp_path / 'a.txt').read_text() == 'a\\ud800'


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path):
  path = tmp_path / 'new' / 'a.txt'
  files.write_text(path, 'old')
  with pytest.raises(RuntimeError), files.replacing(path) as temporary:
    temporary.write_text('ha')
    assert path.read_text() == 'old'
    raise RuntimeError
  assert path.read_text() == 'old'
  with files.replacing(path) as temporary:
    temporary.write_text('new')
  assert path.read_text() == 'new'
  assert [found.name for found in path.parent.iterdir()] == ['a.txt']


def test_a_folder_is_replaced_with_all_its_files(tmp_path):
  path = tmp_path / 'folder'
  for name in ('old', 'new'):
    with files.replacing_folder(path) as temporary:
      (temporary / name).write_text(name)
  assert [found.name for found in path.iterdir()] == ['new']
  with pytest.raises(RuntimeError), files.replacing_folder(path):
    raise RuntimeError
  assert [found.name for found in path.iterdir()] == ['new']
  assert [found.name for found in tmp_path.iterdir()] == ['folder']


@pytest.mark.parametrize('replacing', [files.replacing, files.replacing_folder])
def test_a_full_disk_names_what_was_written(tmp_path, replacing):
  path = tmp_path / 'a'
  with pytest.raises(OSError) as raised, replacing(path), open('/dev/full', 'w') as full:
    full.write('x')
  assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(path))
  assert not list(tmp_path.iterdir())
