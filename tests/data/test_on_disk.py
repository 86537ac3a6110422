import json

import numpy as np
import pytest

from rlhf_jax import testing
from rlhf_jax.data import batches, encode, on_disk, sources
from rlhf_jax.data.sources import DataOptions


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


def make(values):
  made = on_disk.OnDisk(lambda value: json.dumps(value).encode(), json.loads)
  made.extend(values)
  return made


def test_it_is_a_sequence_like_a_list(tmp_path):
  values = ['', 'a', 'bc', [1, 2], {'é': None}] * 3
  made = make(values)
  assert len(made) == 15 and list(made) == values and made[-1] == values[-1] and made
  for cut in (slice(2, 9, 3), slice(None, None, -1), slice(40, 50), slice(None, 3)):
    assert list(made[cut]) == values[cut]
  assert list(made[3:][1:4]) == values[4:7] and list(made.choose([4, 0])) == [values[4], values[0]]
  with pytest.raises(IndexError):
    made[15]
  made.append('more')  # after reading
  assert made[15] == 'more' and not make([])
  assert not list((tmp_path / 'cache/rlhf_jax/spool').iterdir())  # the files have no names


def write_documents(path, count):
  rng = np.random.default_rng(0)
  words = np.array([f'w{n} ' for n in range(500)])
  with path.open('w') as file:
    for _ in range(count):
      file.write(json.dumps({'text': ''.join(rng.choice(words, 250))}) + '\n')


def resident():
  """Megabytes of memory of this process."""
  with open('/proc/self/statm') as file:
    return int(file.read().split()[1]) * 4096 / 1e6


def build(path, tokenizer):
  options = DataOptions(source='jsonl', path=(str(path),))
  documents = sources.load_records(options, 'document', 'train')
  examples = encode.documents(documents, tokenizer, 96)
  made = batches.sequences(examples, 8, 96, seed=0)
  for _ in range(20):
    next(made)
  return documents, examples, made


def test_memory_does_not_grow_with_the_documents(tmp_path):
  """In memory the larger one would take about 50 MB: its texts, and two arrays for each window."""
  tokenizer = testing.make_tokenizer()
  write_documents(tmp_path / 'small.jsonl', 600)
  write_documents(tmp_path / 'large.jsonl', 6000)
  size = (tmp_path / 'large.jsonl').stat().st_size / 1e6
  kept = [build(tmp_path / 'small.jsonl', tokenizer)]
  before = resident()
  kept.append(build(tmp_path / 'large.jsonl', tokenizer))
  grown = resident() - before
  assert size > 6 and grown < 4, (size, grown)
  assert len(kept[1][0]) == 6000 and len(kept[1][1]) > 9 * len(kept[0][1])
