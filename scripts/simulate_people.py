"""Runs an experiment in which simulated people of TinyWorld rank over HTTP.

  python scripts/simulate_people.py --config=experiments/people.py --workdir=runs/people

The script serves the collection in WORKDIR/collect at a free port, lets simulated people sign in
and rank, and runs `python -m rlhf_jax` with all further arguments. People read the pages and send
the pages' own forms; they get no other information. Each rates what it reads as the simulated
annotators of `feedback.source='simulated'` do (rlhf_jax/data/tinyworld/people.py).
"""

import argparse
import html.parser
from pathlib import Path
import subprocess
import sys
import threading

import httpx
import numpy as np

from rlhf_jax.data import records
from rlhf_jax.data.records import Prompt
from rlhf_jax.data.tinyworld import people, requests
from rlhf_jax.data.tinyworld.people import Annotator
from rlhf_jax.data.tinyworld.world import draw_world
from rlhf_jax.experiment import pipeline

_PAUSE = 2.0  # seconds after which a person looks for new items again
_SETTINGS = """\
title = "TinyWorld"
people_per_item = 1
requests_per_minute = 1000000
"""


class RankPage(html.parser.HTMLParser):
  """What a person reads on a page with responses to rank.

  Attributes:
    prompt: the text of the conversation.
    letters: the letter of each response, in the order on the page.
    texts: the text of each response, in the same order.
    fields: the hidden fields of the form.
  """

  def __init__(self, page: str):
    super().__init__()
    self.prompt = ''
    self.letters: list[str] = []
    self.texts: list[str] = []
    self.fields: dict[str, str] = {}
    self._depth = 0  # of the elements inside the text that is being read; 0 = none is
    self._in_form = False
    self.feed(page)
    self.prompt = _join_words(self.prompt)
    self.texts = [_join_words(text) for text in self.texts]

  def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    """Notes forms, cards and hidden fields, and where a text begins."""
    values = dict(attrs)
    kind = values.get('class') or ''
    if tag == 'form':
      self._in_form = values.get('id') == 'answer'
    if tag == 'input' and values.get('type') == 'hidden' and self._in_form:
      self.fields[str(values['name'])] = values.get('value') or ''
    if kind == 'card':
      self.letters.append(str(values['data-letter']))
      self.texts.append('')
    begins = tag == 'div' and kind in ('text', 'response')
    if begins or (self._depth and tag == 'div'):
      self._depth += 1

  def handle_endtag(self, tag: str) -> None:
    """Notes where a text ends."""
    if tag == 'div' and self._depth:
      self._depth -= 1

  def handle_data(self, data: str) -> None:
    """Adds to the text that is being read."""
    if not self._depth:
      return
    if self.letters:
      self.texts[-1] += data
    else:
      self.prompt += data


class Crowd:
  """Simulated people, each in a thread of its own.

  Attributes:
    answers: the number of rankings that the server has confirmed.
    problems: what went wrong.
  """

  def __init__(self, address: str, link: str, annotators: list[Annotator], world: int):
    self._prompts = prompts_by_text(world)
    self._stop = threading.Event()
    self._lock = threading.Lock()
    self.answers = 0
    self.problems: list[str] = []
    self._threads = []
    for number, annotator in enumerate(annotators):
      arguments = (address, link, annotator, np.random.default_rng([world, number]))
      thread = threading.Thread(target=self._work, args=arguments, daemon=True)
      thread.start()
      self._threads.append(thread)

  def stop(self) -> None:
    """Tells all people to stop, and waits until they have."""
    self._stop.set()
    for thread in self._threads:
      thread.join()

  def _work(
    self,
    address: str,
    link: str,
    annotator: Annotator,
    rng: np.random.Generator,
  ) -> None:
    """Signs a person in, who ranks whatever there is until `stop`."""
    try:
      with httpx.Client(base_url=address, follow_redirects=True, timeout=60) as browser:
        browser.post(link, data={'consent': 'yes'}).raise_for_status()
        while not self._stop.is_set():
          page = browser.get('/next?task=rank')
          if '/item/' not in str(page.url):
            self._stop.wait(_PAUSE)
            continue
          form = self._answer(page.text, annotator, rng)
          # not redirected, so that the confirmation is this answer's own
          sent = browser.post(page.url.path, data=form, follow_redirects=False)
          if sent.status_code != 303:
            raise ValueError(f'an answer was refused: {sent.status_code}')
          with self._lock:
            self.answers += 1
    except (httpx.HTTPError, ValueError, KeyError) as error:
      self.problems.append(f'{type(error).__name__}: {error}')

  def _answer(
    self,
    text: str,
    annotator: Annotator,
    rng: np.random.Generator,
  ) -> dict[str, str]:
    """Returns the form of a page, filled in by an annotator."""
    page = RankPage(text)
    prompt = self._prompts[page.prompt]
    ranks = people.rank_responses(prompt, page.texts, annotator, rng)
    form = dict(page.fields)
    for letter, rank in zip(page.letters, ranks, strict=True):
      form[f'overall.{letter}'] = str(rank)
    return form


def prompts_by_text(world: int) -> dict[str, Prompt]:
  """Returns the prompts of a world by the text that a page shows of them."""
  found = {}
  for split in ('train', 'validation'):
    for prompt in requests.prompts(draw_world(world), split):
      text = ' '.join(message['content'] for message in records.conversation(prompt))
      found[_join_words(text)] = prompt
  return found


def serve(workdir: Path) -> tuple[subprocess.Popen, str]:
  """Starts the server of a collection, and returns it with its address."""
  process = subprocess.Popen(
    [sys.executable, '-m', 'rlhf_jax.collect', f'--workdir={workdir}', '--port=0'],
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout is not None
  line = process.stdout.readline()  # lead: ADDRESS/join/TOKEN
  if not line:
    raise SystemExit('the server did not start')
  return process, line.split()[1].split('/join/')[0]


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--config', required=True)
  parser.add_argument('--workdir', required=True, type=Path)
  options, overrides = parser.parse_known_args()
  config = pipeline.load_config(
    options.config, [each.removeprefix('--config.') for each in overrides]
  )
  annotators = people.draw_annotators(5, config.seed)
  collection = options.workdir / 'collect'
  collection.mkdir(parents=True, exist_ok=True)
  if not (collection / 'collect.toml').exists():
    (collection / 'collect.toml').write_text(_SETTINGS, encoding='utf-8')
  server, address = serve(collection)
  try:
    link = subprocess.run(
      [sys.executable, '-m', 'rlhf_jax.collect', 'invite', f'--workdir={collection}']
      + [f'--places={len(annotators)}', f'--public_url={address}'],
      check=True,
      capture_output=True,
      text=True,
    ).stdout.strip()
    crowd = Crowd(address, link, annotators, config.seed)
    command = [sys.executable, '-m', 'rlhf_jax', f'--config={options.config}']
    code = subprocess.run([*command, f'--workdir={options.workdir}', *overrides]).returncode
    crowd.stop()
  finally:
    server.terminate()
    server.wait()
  print(f'{crowd.answers} rankings were sent over HTTP')
  for problem in crowd.problems:
    print(problem, file=sys.stderr)
  return code or int(bool(crowd.problems))


def _join_words(text: str) -> str:
  """Returns a text with single spaces between its words, as a browser shows it."""
  return ' '.join(text.split())


if __name__ == '__main__':
  raise SystemExit(main())
