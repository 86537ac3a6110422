"""Fifty people at once, servers that are killed, and two servers on one database."""

import collections
import os
from pathlib import Path
import random
import shutil
import subprocess
import tempfile
import threading
import time

import httpx
import numpy as np
from people_client import ranking
import pytest
from server_process import command, rank_fields, Server, write_lines
import sqlalchemy

from rlhf_jax.collect import database, tables

PEOPLE = 50


class Crowd:
  """People in threads who rank until they are told to stop; at any of several servers.

  With `patient`, whoever loses the connection goes on at the next server.
  """

  def __init__(self, link_path, bases, people=PEOPLE, pause=0.0, patient=False):
    self._bases = bases
    self._pause = pause  # mean seconds that a person reads
    self._patient = patient
    self.acknowledged = []  # addresses of items whose answers the server has confirmed
    self.seconds = []  # of each request
    self.errors = []
    self._stop = threading.Event()
    self._threads = []
    for number in range(people):
      thread = threading.Thread(target=self._work, args=(number, link_path))
      self._threads.append(thread)
      thread.start()

  def stop(self):
    self._stop.set()
    for thread in self._threads:
      thread.join()

  def _work(self, number, link_path):
    base = self._bases[number % len(self._bases)]
    with httpx.Client(base_url=base, follow_redirects=True, timeout=60) as http:
      joined = False
      while not self._stop.is_set():
        try:
          if not joined:
            http.post(link_path, data={'consent': 'yes'}).raise_for_status()
            joined = True
          if not self._rank_one(http):
            return
        except httpx.TransportError as error:
          if not self._patient:
            self.errors.append(type(error).__name__)
            return
          number += 1
          http.base_url = self._bases[number % len(self._bases)]

  def _rank_one(self, http):
    """Ranks the next item; False where nothing is left."""
    page = self._timed(http.get, '/next?task=rank')
    if '/item/' not in str(page.url):
      return False
    address = page.url.path
    self._stop.wait(random.uniform(0, 2 * self._pause))
    # without the redirect, so that the confirmation is this answer's own
    answer = self._timed(http.post, address, data=rank_fields(page.text), follow_redirects=False)
    if answer.status_code == 303:
      self.acknowledged.append(address.removeprefix('/item/'))
    else:
      self.errors.append(answer.status_code)
    return True

  def _timed(self, call, *words, **options):
    began = time.perf_counter()
    answer = call(*words, **options)
    self.seconds.append(time.perf_counter() - began)
    return answer


def check_nothing_lost(store, acknowledged, per_item):
  """Each acknowledged answer is there once, and no item has more than were wanted."""
  judgements, leases = tables.judgements, tables.leases
  with store.reading() as connection:
    query = sqlalchemy.select(leases.c.token).select_from(judgements.join(leases))
    saved = collections.Counter(connection.scalars(query))
    per = collections.Counter(connection.scalars(sqlalchemy.select(judgements.c.item_id)))
    counted = connection.execute(sqlalchemy.select(tables.items.c.id, tables.items.c.answers)).all()
  assert set(acknowledged) <= set(saved)
  assert max(saved.values(), default=1) == 1
  assert max(per.values(), default=0) <= per_item
  assert all(answers == per[number] for number, answers in counted)


def prepare(tmp_path, items, *words):
  workdir = tmp_path / 'work'
  workdir.mkdir()
  (workdir / 'collect.toml').write_text('people_per_item = 3\nrequests_per_minute = 100000\n')
  lines = (ranking(n, ['x', 'y', 'z', 'w']) for n in range(items))
  command(workdir, 'add', f'--input={write_lines(tmp_path / "items.jsonl", lines)}', *words)
  link = command(workdir, 'invite', f'--places={10 * PEOPLE}', *words)
  return workdir, link.strip()[len('http://127.0.0.1:8321') :]


def test_a_killed_server_has_lost_nothing_that_it_confirmed(tmp_path):
  workdir, link = prepare(tmp_path, 300)
  server = Server(workdir)
  crowd = Crowd(link, [server.base], people=8)
  while len(crowd.acknowledged) < 20 and not crowd.errors:
    time.sleep(0.02)
  server.kill()  # SIGKILL, in the middle of requests
  crowd.stop()
  assert len(crowd.acknowledged) >= 20
  store = database.open_database(workdir)
  check_nothing_lost(store, crowd.acknowledged, 3)
  server.start()  # and people go on
  more = Crowd(link, [server.base], people=4)
  while len(more.acknowledged) < 5 and not more.errors:
    time.sleep(0.02)
  more.stop()
  server.stop()
  assert not more.errors
  check_nothing_lost(store, crowd.acknowledged + more.acknowledged, 3)


def most_people_at_once(store):
  """The largest number of people who have an item now, or have answered it."""
  leases = tables.leases
  held = sqlalchemy.or_(
    leases.c.state == 'answered',
    sqlalchemy.and_(leases.c.state == 'open', leases.c.expires > time.time()),
  )
  query = sqlalchemy.select(sqlalchemy.func.count()).where(held).group_by(leases.c.item_id)
  with store.reading() as connection:
    return max(connection.scalars(query), default=0)


def measure(workdir, link, servers, url='', seconds=120, pause=4.0, kill=False):
  """Lets the crowd work for some time, and states rate and latency.

  With `kill`, the first server is killed (SIGKILL) after half of the time.
  """
  bases = [server.base for server in servers]
  store = database.open_database(workdir, url)
  crowd = Crowd(link, bases, pause=pause, patient=kill)
  killed = False
  began = time.monotonic()
  while time.monotonic() < began + seconds:
    time.sleep(1)
    assert most_people_at_once(store) <= 3
    if kill and not killed and time.monotonic() > began + seconds / 2:
      servers.pop(0).kill()
      killed = True
  per_hour = len(crowd.acknowledged) / (time.monotonic() - began) * 3600
  crowd.stop()
  for server in servers:
    server.stop()
  assert not crowd.errors
  check_nothing_lost(store, crowd.acknowledged, 3)
  p95 = np.quantile(crowd.seconds, 0.95)
  print(
    f'{per_hour:.0f} rankings an hour, p95 of a request {p95:.3f} s, {PEOPLE} people, '
    f'{pause} s to read, {len(bases)} servers{", one killed" if kill else ""}'
  )
  assert per_hour >= 5000


@pytest.mark.slow
@pytest.mark.parametrize('servers, pause, seconds', [(1, 4.0, 120), (1, 0.0, 30), (2, 4.0, 120)])
def test_fifty_people_on_sqlite(tmp_path, servers, pause, seconds):
  workdir, link = prepare(tmp_path, 20_000)
  started = [Server(workdir) for _ in range(servers)]
  measure(workdir, link, started, seconds=seconds, pause=pause, kill=servers == 2)


@pytest.fixture
def postgresql():
  """A PostgreSQL of the test's own, at a socket in its folder."""
  pytest.importorskip('psycopg')
  programs = sorted(
    os.path.dirname(path)
    for path in subprocess.run(
      'ls /usr/lib/postgresql/*/bin/initdb', shell=True, capture_output=True, text=True
    ).stdout.split()
  )
  if not programs:
    pytest.skip("needs Debian's postgresql")
  folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
  as_user = []
  if os.getuid() == 0:  # PostgreSQL does not run as root
    shutil.chown(folder, 'nobody')
    as_user = ['runuser', '-u', 'nobody', '--']
  data = folder / 'data'

  def run(program, *words):
    subprocess.run([*as_user, f'{programs[-1]}/{program}', *words], check=True, cwd=folder)

  run('initdb', '-D', str(data), '-U', 'collect', '-A', 'trust')
  flags = f'-k {folder} -c listen_addresses= -c max_connections=200'
  run('pg_ctl', '-D', str(data), '-o', flags, '-l', str(folder / 'log'), '-w', 'start')
  yield f'postgresql+psycopg://collect@/postgres?host={folder}'
  run('pg_ctl', '-D', str(data), '-m', 'immediate', 'stop')
  shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize('kill', [False, True])
def test_fifty_people_and_two_servers_on_postgresql(tmp_path, postgresql, kill):
  words = [f'--database={postgresql}']
  workdir, link = prepare(tmp_path, 20_000, *words)
  servers = [Server(workdir, *words) for _ in range(2)]
  measure(workdir, link, servers, postgresql, kill=kill)
