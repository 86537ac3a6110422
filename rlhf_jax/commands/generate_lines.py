"""Implements the command `generate`: responses to the lines of a file.

Shape letters: B rows of a batch, P tokens of a padded prompt, K responses to
each, R tokens of a response.
"""

import argparse
from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from rlhf_jax.commands import inputs, lines
from rlhf_jax.data import batches, encode
from rlhf_jax.errors import UserError
from rlhf_jax.generation import sampler
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.models import transformer
from rlhf_jax.runtime import compilation
from rlhf_jax.types import Prompts, Samples


def generate_lines(options: argparse.Namespace) -> None:
  """Writes --output: the lines of --input with responses.

  Raises:
    UserError: whatever is wrong with options, model, input or output.
  """
  compilation.cache_compilations()
  compilation.request_exact_products()
  if options.samples < 1:
    raise UserError(f'--samples: expected 1 or more, got {options.samples}')
  if options.seed.bit_length() > 63:
    raise UserError(f'--seed: expected a number of 64 bits, got {options.seed}')
  # the input before the model, so that a mistake in it is reported at once
  lines.fix_date(options.output)
  read = inputs.read_lines(options.input, with_response=False)
  opened = lines.open_model(options)
  if opened.model.config.head:
    raise UserError(
      f'--model: {options.model} is a reward model: it scores responses and cannot generate any'
    )
  ids = lines.encode_lines(read, opened, room=options.max_new_tokens)
  # these arguments have the names of the sampler's options
  names = {field.name for field in dataclasses.fields(SamplingOptions)}
  sampling = {name: value for name, value in vars(options).items() if name in names}
  settings = dict(
    sampling,
    command='generate',
    samples=options.samples,
    seed=options.seed,
    logprobs=options.logprobs,
  )
  compute = functools.partial(
    respond_to_batch,
    options,
    opened,
    _build_sampler(options, opened, sampling),
    [text for [text] in ids],  # one of each line
  )
  lines.fill_output(
    options,
    settings,
    read,
    ids,
    compute,
    _first_result,  # no line has a list of responses
    lines.max_padded_length(opened.model.config, options.max_new_tokens),
  )


def respond_to_batch(
  options: argparse.Namespace,
  opened: lines.OpenedModel,
  generate: Callable[..., Samples],
  ids: Sequence[Sequence[int]],
  numbers: Sequence[int],
  length: int,
  key: jax.Array,
) -> list[lines.Row]:
  """Generates the responses to a batch of rows.

  Args:
    options: the parsed arguments.
    opened: the model.
    generate: (params, Prompts [B, P], key) → Samples [B * K, R].
    ids: the token ids of every row of the file.
    numbers: which rows are computed, at most B.
    length: P.
    key: a random key.

  Returns:
    The fields that are added to each of these rows.
  """
  pad_id = 0 if opened.tokenizer is None else opened.tokenizer.pad_id
  prompts = _pad_prompts(ids, numbers, length, pad_id, options.batch_size)
  # host arrays [B * K, R]
  samples = jax.device_get(generate(opened.params, opened.layout.place(prompts), key))
  rows = []
  for row in range(len(numbers)):  # the last batch also has empty rows, which are left out
    first = row * options.samples  # the K responses to a prompt are consecutive
    rows.append(_response_fields(options, opened, samples, first))
  return rows


def _first_result(results: list[lines.Row]) -> lines.Row:
  return results[0]


def _build_sampler(
  options: argparse.Namespace,
  opened: lines.OpenedModel,
  sampling: dict[str, Any],
) -> Callable[..., Samples]:
  """Builds the sampler of the model, (params, Prompts, key) → Samples."""
  tokenizer = opened.tokenizer
  model = opened.model
  if tokenizer is None:
    stop_ids: tuple[int, ...] = (-1,)  # no token has this id, so no response ends early
    pad_id = 0  # any id will do, as padding is masked
  else:
    stop_ids = tokenizer.stop_ids
    pad_id = tokenizer.pad_id
    empty_ids = tokenizer.empty_ids(model.config.vocab_size)  # are never sampled
    config = dataclasses.replace(model.config, empty_ids=empty_ids)
    model = transformer.build_model(config, opened.layout)
  return sampler.build_sampler(
    model,
    SamplingOptions(**sampling),
    stop_ids,
    pad_id,
    options.samples,
    layout=opened.layout,
  )


def _pad_prompts(
  ids: Sequence[Sequence[int]],
  numbers: Sequence[int],
  length: int,
  pad_id: int,
  batch_size: int,
) -> Prompts:
  """Returns the prompts of the rows `numbers` as a batch of B left-padded prompts."""
  padded = []
  for number in numbers:
    padded.append(encode.left_padded(ids[number], length, pad_id, number))
  # there is only one batch, as there are at most B rows
  return next(iter(batches.prompts_once(padded, batch_size)))


def _response_fields(
  options: argparse.Namespace,
  opened: lines.OpenedModel,
  samples: Samples,
  first: int,
) -> lines.Row:
  """Returns the fields added to a row; its K responses begin at row `first` of the samples."""
  tokens = []
  logprobs = []
  for index in range(first, first + options.samples):
    mask = np.asarray(samples.mask[index])  # [R]
    tokens.append(np.asarray(samples.tokens[index])[mask].tolist())
    logprobs.append(list(map(lines.round_float32, np.asarray(samples.logprobs[index])[mask])))
  added: lines.Row = {}
  if opened.tokenizer is not None:
    added['responses'] = [opened.tokenizer.decode(response) for response in tokens]
  if opened.tokenizer is None or options.logprobs:
    added['response_tokens'] = tokens  # including the stop token, if there was one
  if options.logprobs:
    added['logprobs'] = logprobs
  return added
