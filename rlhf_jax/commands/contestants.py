"""The models that are compared: how the command line names each, and how it responds.

All are checked before the first one responds, so that a missing model
is found at once.
"""

import argparse
import asyncio
from collections.abc import Callable, Sequence
import dataclasses
import json
from pathlib import Path
import re
from typing import Any

import jax

from rlhf_jax import storage
from rlhf_jax.commands import collect_models, inputs, prompt_sets
from rlhf_jax.data.records import conversation, Prompt, response_text
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import http_requests
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.stages.shared import model_sources

_NAMED = re.compile(r'([\w.\-]+)=(.+)', re.DOTALL)
_STAGE = re.compile(r'(.+):(\w+(?:@\d+)?)')  # WORKDIR:STAGE or WORKDIR:STAGE@STEP
_FILES = ('.jsonl', '.json', '.jsonl.gz', '.parquet', '.arrow')
_PATH = '/chat/completions'
_CONCURRENCY = 8  # requests at the same time
_TIMEOUT = 120.0  # seconds for one request
_RETRIES = 4
_LONGEST_WAIT = 60.0  # seconds between two tries

Answers = list[list[str]]  # N lists of K texts
# (prompts, random key) → their answers
Respond = Callable[[Sequence[Prompt], jax.Array], Answers]


@dataclasses.dataclass(frozen=True)
class Contestant:
  """A model that is compared."""

  name: str  # in the table
  place: str  # where it is
  kind: str  # 'model', 'endpoint' or 'file'


def parse_contestants(words: Sequence[str]) -> list[Contestant]:
  """Reads the names and places of models.

  Raises:
    UserError: two have the same name.
  """
  parsed = [_parse(word) for word in words]
  names = [one.name for one in parsed]
  for number, name in enumerate(names):
    if name in names[:number]:
      raise UserError(
        f'two models have the name {name!r}; write NAME={words[number]}, with another NAME'
      )
  return parsed


def _parse(word: str) -> Contestant:
  """Reads one name and place."""
  name, place = '', word
  # An address may have = in its query, and a file in its name.
  named = _NAMED.fullmatch(word)
  # a path with = in it is a path, if it is there
  if named and not http_requests.is_address(word) and not Path(word).exists():
    name, place = named.groups()
  # the part behind # is never sent to a server as part of its address
  if http_requests.is_address(place):
    return Contestant(name or place.rpartition('#')[2], place, 'endpoint')
  # a folder whose name has a colon is taken as it is, and so is module:function
  stage = _STAGE.fullmatch(place)
  if stage and not Path(place).exists() and (Path(stage[1]).is_dir() or storage.is_url(place)):
    place = f'{stage[1]}/{stage[2]}'
  kind = 'file' if place.endswith(_FILES) else 'model'
  own_name = Path(place).name
  if kind == 'file':
    own_name = own_name.partition('.')[0]
  return Contestant(name or own_name, place, kind)


def find_stage(place: str) -> str:
  """Returns the folder that WORKDIR:STAGE names; any other name as it is."""
  return _parse(place).place if not http_requests.is_address(place) else place


def check_contestant(contestant: Contestant) -> None:
  """Checks that a model exists and can respond, without reading its parameters.

  Raises:
    UserError: it does not, or cannot.
  """
  if contestant.kind == 'endpoint':
    split_address(contestant.place)
  elif contestant.kind == 'file':
    if not Path(contestant.place).is_file():
      raise UserError(f'{contestant.place}: there is no such file of responses')
  else:
    check_model(contestant.place, head=False)


def check_model(place: str, head: bool) -> None:
  """Checks that there is a model of the right kind.

  Args:
    place: as `model_sources.find_model` takes it.
    head: whether it must be a reward model.

  Raises:
    UserError: there is none, or it is of the other kind.
  """
  source = model_sources.find_model(place)
  if head and not source.config.head:
    raise UserError(f'{place}: expected a reward model, got a language model')
  if not head and source.config.head:
    raise UserError(f'{place}: expected a language model, got a reward model')


def respond(
  contestant: Contestant,
  options: argparse.Namespace,
  prompts: Sequence[Prompt],
) -> Answers:
  """Returns the responses of one model to all prompts.

  Args:
    contestant: the model.
    options: the command's words: samples, max_new_tokens, temperature,
      batch_size, seed, key_env.
    prompts: N prompts.

  Raises:
    UserError: a prompt is too long, a file lacks a prompt, or a server
      fails.
  """
  if contestant.kind == 'file':
    return read_answers(Path(contestant.place), prompts)
  if contestant.kind == 'endpoint':
    return asyncio.run(_ask_server(contestant.place, options, prompts))
  sampling = SamplingOptions(
    max_new_tokens=options.max_new_tokens,
    temperature=options.temperature,
  )
  # read only now: one model is in memory at a time
  responder = collect_models.open_responder(
    contestant.place, options.samples, sampling, options.batch_size
  )
  # One key for all models: equal models give equal responses.
  conversations = [conversation(prompt) for prompt in prompts]
  return responder(conversations, jax.random.key(options.seed))


def read_answers(path: Path, prompts: Sequence[Prompt]) -> Answers:
  """Reads a file of responses, in the order of the prompts.

  Args:
    path: rows with a conversation and its responses, as `generate`
      writes them.
    prompts: N prompts, each of which must have a row with the same
      conversation.

  Raises:
    UserError: a prompt has no row.
  """
  # conversation → its responses, of all rows that have it
  found: dict[str, list[str]] = {}
  for line in inputs.read_lines(path, with_response=True):
    if line.messages is None:
      raise UserError(f'{line.place}: expected a conversation with its responses')
    texts = [response_text(response) for response in line.responses]
    found.setdefault(prompt_sets.prompt_key(line.messages), []).extend(texts)
  answers = []
  for prompt in prompts:
    key = prompt_sets.prompt_key(conversation(prompt))
    if key not in found:
      raise UserError(f'{path}: no response to the prompt {prompt.id or key!r:.80}')
    answers.append(found[key])
  counts = {len(texts) for texts in answers}
  # rows may differ in their number of responses
  fewest = min(counts)  # the same number of each, so that prompts weigh the same
  return [texts[:fewest] for texts in answers]


def split_address(place: str) -> tuple[str, str]:
  """Splits URL#NAME: (address of the chat completions, name of the model).

  Raises:
    UserError: the address is wrong, or there is no name.
  """
  url, _, model = place.partition('#')
  expected = 'expected a URL with the name of a model, such as http://localhost:8000/v1#NAME'
  if not model:
    raise UserError(f'{url}: {expected}')
  return http_requests.check_address(url, expected).removesuffix(_PATH) + _PATH, model


async def _ask_server(
  place: str, options: argparse.Namespace, prompts: Sequence[Prompt]
) -> Answers:
  """Asks a server for the responses to all prompts."""
  address, model = split_address(place)
  key = http_requests.read_key(options.key_env)
  # more requests at once would only wait in the server
  slots = asyncio.Semaphore(_CONCURRENCY)
  async with http_requests.open_client(address, key) as client:

    async def ask(prompt: Prompt, sample: int) -> str:
      request = {
        'model': model,
        'messages': conversation(prompt),
        'max_tokens': options.max_new_tokens,
        'temperature': options.temperature,
        'seed': options.seed + sample,  # servers that know no seed leave it out
      }
      async with slots:
        return await _post(client, address, key, request)

    asked = [ask(prompt, sample) for prompt in prompts for sample in range(options.samples)]
    texts = await asyncio.gather(*asked)
  return [
    list(texts[begin : begin + options.samples]) for begin in range(0, len(texts), options.samples)
  ]


async def _post(client: Any, address: str, key: str, request: dict[str, Any]) -> str:
  """Returns the text of one chat completion, trying again where that may help."""
  problem = ''
  # A refusal, such as a wrong key, will be the same next time; a busy
  # server will not.
  for tries in range(_RETRIES + 1):
    reply = await http_requests.post_json(client, address, request, _TIMEOUT)
    if reply.status == 200:
      try:
        return str.strip(json.loads(reply.body)['choices'][0]['message']['content'] or '')
      except (ValueError, LookupError, TypeError):
        problem = f'its answer is no chat completion: {http_requests.excerpt(reply.body, key)}'
    else:
      problem = http_requests.excerpt(reply.body, key)
      problem = f'it answered {reply.status}: {problem}' if reply.status else problem
    # the same request would be refused again
    if reply.is_refusal:
      break
    if tries < _RETRIES:
      delay = http_requests.retry_delay(tries, reply.pause, 1.0, _LONGEST_WAIT)
      await asyncio.sleep(delay)
  raise UserError(f'{address}: {problem}')
