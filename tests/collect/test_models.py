"""Models in the application: sampling into the queue, selection, replies; in real processes."""

import json
import re
import time

import httpx
import jax
import pytest
from server_process import command, rank_fields, Server, TOKEN, write_lines
import sqlalchemy

from rlhf_jax import testing
from rlhf_jax.collect import database, tables
from rlhf_jax.interop import pretrained
from rlhf_jax.models import transformer


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """A tiny language model (lm) and a tiny reward model (rm), random."""
  folder = tmp_path_factory.mktemp('models')
  tokenizer = testing.make_tokenizer()
  for name, head in (('lm', False), ('rm', True)):
    config = transformer.ModelConfig(
      vocab_size=tokenizer.vocab_size,
      embed=16,
      layers=1,
      heads=2,
      kv_heads=1,
      head_dim=8,
      mlp=32,
      max_length=96,
      head=head,
    )
    params = transformer.build_model(config).init(jax.random.key(1))
    pretrained.export_model(folder / name, config, params, tokenizer)
  return folder


def test_sample_select_converse_and_export(models, tmp_path):
  workdir = tmp_path / 'work'
  workdir.mkdir()
  (workdir / 'collect.toml').write_text('people_per_item = 1\nconverse_turns = 1\n')
  prompts = [{'messages': [{'role': 'user', 'content': f'Where is {n}?'}]} for n in range(3)]
  path = write_lines(tmp_path / 'prompts.jsonl', prompts)
  words = [f'--models={models / "lm"}', f'--input={path}', '--samples=2', '--max_new_tokens=8']
  assert '3 new items' in command(workdir, 'sample', *words)
  assert '0 new items' in command(workdir, 'sample', *words)  # the same draws: nothing doubled
  talks = write_lines(tmp_path / 'talks.jsonl', [{'id': 'talk'}])
  command(workdir, 'add', f'--input={talks}', '--task=converse')
  printed = command(workdir, 'select', f'--reward={models / "rm"}', '--batch_size=8')
  assert printed.startswith('3 items ordered')
  store = database.open_database(workdir)
  with store.reading() as connection:
    rows = connection.execute(sqlalchemy.select(tables.items).where(tables.items.c.task == 'rank'))
    priorities = {item.id: item.priority for item in rows}
  assert all(0 < value <= 0.6932 for value in priorities.values())
  server = Server(workdir, f'--models={models / "lm"}', '--max_new_tokens=8')
  try:
    rank_and_talk(server, workdir, max(priorities, key=priorities.get))
  finally:
    server.stop()
  command(workdir, 'export', f'--output={tmp_path / "out.jsonl"}')
  lines = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
  assert len(lines) == 2 and lines[1]['messages'] == [{'role': 'user', 'content': 'Hello'}]
  assert lines[1]['models'] == [str(models / 'lm')] * 2
  assert 'pairs ordered alike' in command(workdir, 'status')


def rank_and_talk(server, workdir, doubtful):
  """A person ranks one item, then talks with the model."""
  link = command(workdir, 'invite', f'--public_url={server.base}').strip()
  with httpx.Client(base_url=server.base, follow_redirects=True, timeout=60) as http:
    http.post(link, data={'consent': 'yes'})
    page = http.get('/next?task=rank')
    http.post(page.url.path, data=rank_fields(page.text)).raise_for_status()
    store = database.open_database(workdir)
    with store.reading() as connection:
      (judgement,) = connection.execute(sqlalchemy.select(tables.judgements))
    assert judgement.item_id == doubtful  # what the reward model is least sure of comes first
    page = http.get('/next?task=converse')
    address = page.url.path
    fields = {'form_token': TOKEN.search(page.text).group(1), 'message': 'Hello'}
    http.post(f'{address}/say', data=fields).raise_for_status()
    for _ in range(600):
      if http.get(f'{address}/turn').json()['state'] != 'waiting':
        break
      time.sleep(0.1)
    page = http.get(address)
    turn = re.search(r'name="turn" value="(\d+)"', page.text)
    assert turn is not None, page.text
    fields = rank_fields(page.text) | {'turn': turn.group(1)}
    http.post(address, data=fields).raise_for_status()
