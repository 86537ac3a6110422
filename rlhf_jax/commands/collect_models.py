"""What `collect` does with models: sample responses, reply to conversations, score.

Letters: N prompts, K responses to each.
"""

import argparse
from collections.abc import Callable, Sequence
import functools
import secrets

import jax
import numpy as np

from rlhf_jax.collect import items
from rlhf_jax.collect.selection import Score
from rlhf_jax.commands import lines, score_lines
from rlhf_jax.data.records import conversation, Message, Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.generation import responses
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.runtime import compilation

# (conversations, key) → N lists of K texts
Respond = Callable[[Sequence[Sequence[Message]], jax.Array], list[list[str]]]


def sample_items(options: argparse.Namespace, prompts: Sequence[Prompt]) -> list[items.NewItem]:
  """Lets each model respond to all prompts, and makes an item of each prompt.

  Args:
    options: the command's words.
    prompts: N prompts.

  Returns:
    N items with `samples` responses each, the same number of every model.

  Raises:
    UserError: a model cannot be opened, or the samples do not divide among the models.
  """
  names = [name.strip() for name in options.models.split(',') if name.strip()]
  if not names or options.samples < 1 or options.samples % len(names):
    raise UserError(
      f'--samples: expected a multiple of the {len(names)} models, got {options.samples}'
    )
  sampling = SamplingOptions(
    max_new_tokens=options.max_new_tokens,
    temperature=options.temperature,
  )
  conversations = [conversation(prompt) for prompt in prompts]
  collected: list[list[items.Response]] = [[] for _ in prompts]
  root = jax.random.key(options.seed)
  for number, name in enumerate(names):
    respond = open_responder(name, options.samples // len(names), sampling, options.batch_size)
    texts = respond(conversations, jax.random.fold_in(root, number))
    for own, new in zip(collected, texts, strict=True):
      own += [{'text': text, 'model': name} for text in new]
  new_items = []
  for prompt, own in zip(prompts, collected, strict=True):
    item = items.NewItem(
      task=options.task,
      messages=conversation(prompt),
      responses=own,
      batch=options.batch,
      record={
        'id': prompt.id,
        'source': prompt.source,
        'license': prompt.license,
        'meta': prompt.meta,
      },
    )
    new_items.append(items.check_item(item, f'prompt {prompt.id}'))
  return new_items


def open_responder(
  name: str,
  count: int,
  sampling: SamplingOptions,
  batch_size: int,
) -> Respond:
  """Opens a model that responds.

  Args:
    name: a directory; see `lines.open_model`.
    count: K.
    sampling: how tokens are chosen.
    batch_size: prompts at once.
  """
  opened = _open(name, batch_size)
  tokenizer = opened.tokenizer
  if tokenizer is None:
    raise UserError(f'--models: {name} has no tokenizer')
  if opened.model.config.head:
    raise UserError(f'--models: {name} is a reward model: it scores, it does not respond')
  responder = responses.build_responder(
    opened.model,
    sampling,
    tokenizer,
    opened.layout,
    count,
  )
  room = opened.model.config.max_length - sampling.max_new_tokens

  def respond(conversations: Sequence[Sequence[Message]], key: jax.Array) -> list[list[str]]:
    prompts = [tokenizer.prompt(list(messages)) for messages in conversations]
    for number, tokens in enumerate(prompts, start=1):
      if not 0 < len(tokens) <= room:
        raise UserError(f'prompt {number}: {len(tokens)} tokens, expected 1 to {room}')
    completed = responses.complete_prompts(
      responder,
      opened.params,
      prompts,
      batch_size,
      tokenizer.pad_id,
      key,
    )
    return completed.texts

  return respond


def open_score(name: str, batch_size: int) -> Score:
  """Opens a reward model that scores responses.

  Args:
    name: a directory; see `lines.open_model`.
    batch_size: responses at once.
  """
  opened = _open(name, batch_size)
  if not opened.model.config.head or opened.tokenizer is None:
    raise UserError(f'--reward: {name} is no reward model with a tokenizer')
  tokenizer = opened.tokenizer
  read = jax.jit(functools.partial(score_lines.read_tokens, opened.model))
  limit = lines.max_padded_length(opened.model.config)

  def score(
    conversations: Sequence[Sequence[Message]],
    texts: Sequence[Sequence[str]],
  ) -> list[np.ndarray]:
    ids: list[list[int]] = []
    response_lengths: list[int] = []
    places: list[int] = []  # of each response in `ids`, where equal ones stand once
    for messages, own in zip(conversations, texts, strict=True):
      prompt = tokenizer.prompt(list(messages))
      known: dict[str, int] = {}
      for text in own:
        if text not in known:
          known[text] = len(ids)
          response = tokenizer.response(text)
          ids.append(prompt + response)
          response_lengths.append(len(response))
        places.append(known[text])
    values = np.zeros(len(ids))
    # neighbours in length share a batch
    by_length = sorted(range(len(ids)), key=list(map(len, ids)).__getitem__)
    for first in range(0, len(ids), batch_size):
      batch = by_length[first : first + batch_size]
      length = int(min(lines.bucket_length(len(ids[batch[-1]])), limit))
      rows = score_lines.score_batch(
        opened,
        read,
        batch_size,
        ids,
        response_lengths,
        batch,
        length,
        jax.random.key(0),  # nothing is random
      )
      values[batch] = [row['score'] for row in rows]
    ends = np.cumsum([len(own) for own in texts])
    return np.split(values[places], ends[:-1])

  return score


def open_replies(names: Sequence[str], max_new_tokens: int) -> Callable:
  """Opens models that reply in conversations, in turn: (messages, K) → K responses."""
  sampling = SamplingOptions(max_new_tokens=max_new_tokens)
  # one response at a time of each, so that any K is compiled once
  responders = [open_responder(name, 1, sampling, _devices()) for name in names]

  def reply(messages: Sequence[Message], count: int) -> list[items.Response]:
    made = []
    for number in range(count):
      which = number % len(names)
      key = jax.random.key(secrets.randbits(31))  # no two replies are the same draw
      text = responders[which]([messages], key)[0][0]
      made.append({'text': text, 'model': names[which]})
    return made

  return reply


def _open(name: str, batch_size: int) -> lines.OpenedModel:
  """Opens a model on all devices."""
  compilation.cache_compilations()
  compilation.request_exact_products()
  options = argparse.Namespace(model=name, mesh='', batch_size=batch_size, dtype='float32')
  return lines.open_model(options)


def _devices() -> int:
  """Returns the number of devices, the smallest batch."""
  return jax.device_count()
