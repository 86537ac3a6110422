"""Data and models behind URLs are copied to this machine, and read there."""

import functools
import gzip
import http.server
import json
import threading
import uuid

import fsspec
import jax
import numpy as np
import pyarrow as pa
from pyarrow import parquet
import pytest

from rlhf_jax import files, storage, testing
from rlhf_jax.data import sources
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.errors import UserError
from rlhf_jax.experiment import data_files
from rlhf_jax.interop import pretrained
from rlhf_jax.stages.shared import model_sources


@pytest.fixture
def url(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  return f'memory://{uuid.uuid4().hex}'


def put(url, data):
  fsspec.filesystem('memory').pipe_file(url, data)


def rows(count, word='a'):
  return [{'prompt': f'{word} {n}', 'response': word} for n in range(count)]


def lines(values):
  return ''.join(json.dumps(value) + '\n' for value in values).encode()


def load(path, split='train', **changes):
  options = DataOptions(source='jsonl', path=(path,), **changes)
  return [
    row.messages[-1]['content'] for row in sources.load_records(options, 'demonstration', split)
  ]


def test_files_globs_and_folders(url, tmp_path):
  want = [row['prompt'] for row in rows(3)]
  put(f'{url}/a.jsonl', lines(rows(3)))
  put(f'{url}/b.jsonl.gz', gzip.compress(lines(rows(3))))
  parquet.write_table(pa.Table.from_pylist(rows(3)), tmp_path / 'c.parquet')
  put(f'{url}/c.parquet', (tmp_path / 'c.parquet').read_bytes())
  put(f'{url}/folder/train.jsonl', lines(rows(2)))
  put(f'{url}/folder/validation.jsonl', lines(rows(1, 'v')))
  put(f'{url}/folder/weights.bin', b'not needed')
  for name in ('a.jsonl', 'b.jsonl.gz', 'c.parquet'):
    assert load(f'{url}/{name}') == want
  assert load(f'{url}/*.jsonl') == want
  assert load(f'{url}/folder') == want[:2] and load(f'{url}/folder', 'validation') == ['v 0']
  assert load(f'{url}/folder/{{split}}.jsonl', 'validation') == ['v 0']
  assert not list((tmp_path / 'cache').rglob('weights.bin'))
  assert len(load(f'{url}/a.jsonl', hold_out=0.34)) == 2
  assert load(f'file://{tmp_path}/c.parquet') == want
  with pytest.raises(UserError, match=f'^data.path: {url}/none.jsonl: no such file$'):
    load(f'{url}/none.jsonl')


def test_a_copy_is_renewed_where_the_original_has_changed(url, monkeypatch):
  path = f'{url}/a.jsonl'
  put(path, lines(rows(1)))
  copied = []
  original = storage.download
  monkeypatch.setattr(storage, 'download', lambda *a: (copied.append(a[1]), original(*a)))
  assert load(path) == load(path) == ['a 0'] and len(copied) == 1
  put(path, lines(rows(2)))
  assert load(path) == ['a 0', 'a 1'] and len(copied) == 2


def test_data_have_fingerprints_by_their_url(context_section, url, tmp_path, monkeypatch):
  """Another machine, with another cache, finds the data unchanged."""
  put(f'{url}/folder/train.jsonl', lines(rows(2)))
  section = context_section(f'{url}/folder')
  before = data_files.fingerprint_data(section, tmp_path)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'other'))
  assert data_files.fingerprint_data(section, tmp_path) == before
  assert list(before) == [f'{url}/folder: train.jsonl']


@pytest.fixture
def context_section():
  import ml_collections

  def make(path):
    data = {'source': 'jsonl', 'path': (path,), 'splits': {}}
    return ml_collections.ConfigDict({'data': data})

  return make


def export(folder):
  model = testing.make_model(head=False)
  params = testing.make_params(model)
  tokenizer = testing.make_tokenizer()
  config = model.config
  params['embedding'] = np.tile(np.asarray(params['embedding']), (6, 1))  # of the tokenizer's ids
  config = testing.dataclasses.replace(config, vocab_size=384)
  pretrained.export_model(folder, config, params, tokenizer, 'float32', 10**9, 'card')
  return params


def check_model(name, params):
  source = model_sources.find_model(name)
  assert source.name == name and source.config.vocab_size == 384
  layout = testing.make_layout()
  model = testing.transformer.build_model(source.config, layout)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  read = source.load(shapes, layout.shardings(model.axes, shapes))
  np.testing.assert_array_equal(read['embedding'], params['embedding'])
  assert source.tokenizer().vocab_size == testing.make_tokenizer().vocab_size


def test_a_hugging_face_directory(url, tmp_path):
  params = export(tmp_path / 'model')
  for path in (tmp_path / 'model').iterdir():
    put(f'{url}/model/{path.name}', path.read_bytes())
  put(f'{url}/model/pytorch_model.bin', b'not needed')
  check_model(f'{url}/model', params)
  assert not list((tmp_path / 'cache').rglob('*.bin'))
  with pytest.raises(UserError, match='model: .*/none: no such file'):
    model_sources.find_model(f'{url}/none')
  with pytest.raises(UserError, match='model: s4://x/y: s4:// is an unknown scheme'):
    model_sources.find_model('s4://x/y')


def test_over_http(url, tmp_path):
  pytest.importorskip('aiohttp')
  params = export(tmp_path / 'served/model')
  (tmp_path / 'served/a.jsonl').write_bytes(lines(rows(3)))
  handler = functools.partial(Quiet, directory=tmp_path / 'served')
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    address = f'http://127.0.0.1:{server.server_port}'
    assert load(f'{address}/a.jsonl') == ['a 0', 'a 1', 'a 2']
    check_model(f'{address}/model/', params)
    with pytest.raises(UserError, match='data.path: .*no such file'):
      load(f'{address}/none.jsonl')
  finally:
    server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *_):
    pass


@pytest.mark.parametrize('path', ['gs://bucket/run/x.json', 'gs:/bucket/run/x.json'])
def test_nothing_becomes_a_local_folder_of_the_name_of_a_scheme(path, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for write in (lambda: files.write_text(path, ''), lambda: files.open_text(path)):
    with pytest.raises(OSError, match='expected a local path, not a URL'):
      write()
  with pytest.raises(OSError, match='expected a local path'):
    with files.replacing_folder(path):
      pass
  assert not list(tmp_path.iterdir())
