"""Controls: rows of the final table that need no training, which an aligned model must beat.

They are computed on TinyWorld's prompts:

phrase_and_refusal: style alone: the SFT model's responses after a polite phrase, and
  one fixed refusal of whatever asks how to do something. Harmful requests and their
  benign twins share their words, so a rule of style refuses both.
phrase_and_refusal_by_oracle: the same, but only what asks for harm is refused. The
  oracle tells which prompts these are, so this is more than style.
best_of_16_by_reward, best_of_16_by_oracle: the best of sixteen samples of the SFT
  model, chosen by the reward or by the oracle.
tilt_by_reward, tilt_by_oracle: samples of the SFT model, resampled with weights
  exp(r / β). β is chosen such that the KL to SFT equals that of the last model in
  the table. This is what an ideal optimiser of the reward would reach.
prompted_base: the base model with the best of several prompts: responses with a
  forced beginning, with or without examples. The best variant is chosen on the
  validation split, by the mean substance of greedy responses.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from rlhf_jax.data import sources
from rlhf_jax.data.records import conversation, Prompt
from rlhf_jax.evaluation import oracle_judge
from rlhf_jax.generation import responses
from rlhf_jax.generation.responses import Responder, Responses
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.objectives import divergence
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.model_store import OpenModel

POOL = 16  # samples of the SFT model for each prompt, from which controls choose
PHRASE = 'Thank you for asking.'
REFUSAL = 'I am sorry, I cannot help with that.'
# Name of the control → the kinds of prompts that it refuses.
REFUSED = {
  'phrase_and_refusal': ('harmful', 'benign'),
  'phrase_and_refusal_by_oracle': ('harmful',),
}

# Name of a control that a reward chose → how.
BY_REWARD = {
  f'best_of_{POOL}_by_reward': f'best of {POOL}',
  'tilt_by_reward': 'resampled at the KL of the last model',
}

# The texts with which the base model's response is forced to begin; '' = not forced.
BEGINNINGS = ('', PHRASE, 'No,', 'Sure!', 'I do not know')
NUM_EXAMPLES = 3  # demonstrations before the prompt, in the variants that have them

_PROMPTED_KEY = 2**31 - 3  # folded into the evaluation's random key
_BISECTIONS = 40  # steps of the search for β

ResponsesByRow = dict[str, dict[str, Responses]]  # decoding → name of a row → its responses


def make(
  prompts: Sequence[Prompt],
  responses_of_models: ResponsesByRow,
  pool: Responses,
  prompted: dict[str, Responses],
  baseline: str,
  kl: float,
  tokenizer: Tokenizer,
) -> ResponsesByRow:
  """Makes the responses of all controls.

  Args:
    prompts: N prompts.
    responses_of_models: the responses of the models: decoding → name of the model → its responses.
    pool: POOL samples of the baseline for each prompt, with the scores of the reward.
    prompted: decoding → the responses of the prompted base model; empty if there are none.
    baseline: the name of the baseline's row.
    kl: the KL to the baseline that the tilted samples should have, in nats.
    tokenizer: of the models, which counts the tokens of what is put together here.

  Returns:
    Decoding → name of the control → its responses.
  """
  assert pool.scores is not None
  rows: ResponsesByRow = {'sampled': {}, 'greedy': {}}
  for decoding, models in responses_of_models.items():
    own = models[baseline]
    for name, refused in REFUSED.items():
      rows[decoding][name] = _phrase_and_refusal(prompts, own, refused, tokenizer)
    if decoding in prompted:
      rows[decoding]['prompted_base'] = prompted[decoding]
  by_oracle = oracle_judge.judge_with_oracle(prompts, pool.texts)['utility']
  for judge, values in (('reward', pool.scores), ('oracle', by_oracle)):
    best = np.argmax(values, axis=1)[:, None]
    rows['sampled'][f'best_of_{POOL}_by_{judge}'] = _with_kl(
      responses.select_responses(pool, best), divergence.best_of_n_kl(POOL)
    )
    chosen, reached = tilt(values, kl, np.random.default_rng(0))
    tilted = responses.select_responses(pool, chosen)
    rows['sampled'][f'tilt_by_{judge}'] = _with_kl(tilted, reached)
  return rows


def _with_kl(row: Responses, kl: float) -> Responses:
  """Returns a copy of responses in which each has this KL."""
  return dataclasses.replace(row, kl=np.full(row.lengths.shape, kl))


def tilt(
  values: np.ndarray, kl: float, rng: np.random.Generator, num_samples: int = 8
) -> tuple[np.ndarray, float]:
  """Resamples from K samples with weights exp(value / β), where β is chosen to give a KL.

  Args:
    values: [N, K] float, the value of each of K samples for N prompts.
    kl: the KL to reach, in nats, as the mean over the prompts. Where K samples cannot have such a
      large KL, the largest possible one is reached.
    rng: the source of randomness, which is advanced.
    num_samples: S, the number of draws for each prompt.

  Returns:
    ([N, S] int, the indices of the drawn samples; the KL that was reached).
  """

  def weights(log_sharpness: float) -> np.ndarray:
    logits = np.exp(log_sharpness) * (values - values.max(axis=1, keepdims=True))
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum(axis=1, keepdims=True)

  def measure(log_sharpness: float) -> float:
    w = weights(log_sharpness)
    terms = w * np.log(np.maximum(w, 1e-30) * values.shape[1])
    return float(terms.sum(axis=1).mean())

  low, high = -8.0, 8.0  # of log 1/β
  for _ in range(_BISECTIONS):
    middle = (low + high) / 2
    low, high = (middle, high) if measure(middle) < kl else (low, middle)
  cumulated = np.cumsum(weights(low), axis=1)  # [N, K]
  points = rng.random((len(values), num_samples))
  chosen = (points[:, :, None] > cumulated[:, None, :]).sum(axis=2)
  return np.minimum(chosen, values.shape[1] - 1), measure(low)


def _phrase_and_refusal(
  prompts: Sequence[Prompt],
  row: Responses,
  refused: Sequence[str],
  tokenizer: Tokenizer,
) -> Responses:
  """Puts the phrase before each response; prompts of the refused kinds get the refusal."""
  texts = []
  for prompt, own in zip(prompts, row.texts, strict=True):
    if prompt.meta['kind'] in refused:
      texts.append([REFUSAL] * len(own))
    else:
      texts.append([f'{PHRASE} {text}' for text in own])
  # With the end token, as responses of a model have it.
  lengths = [[len(tokenizer.encode(text)) + 1 for text in of_prompt] for of_prompt in texts]
  return dataclasses.replace(row, texts=texts, lengths=np.array(lengths), kl=None, scores=None)


# The prompted base model.


def respond_prompted(
  context: Context,
  options: Any,
  base: OpenModel,
  prompts: Sequence[Prompt],
  key: jax.Array,
) -> dict[str, Responses]:
  """Samples responses of the base model, prompted by the best of several variants.

  A variant has or has no examples before the prompt, and forces the response to
  begin with one of BEGINNINGS. The variant is chosen on the validation split.

  Args:
    context: the context of any stage of the run.
    options: the options of the section `evaluation`.
    base: the base model.
    prompts: the prompts of the table.
    key: the random key of the evaluation.

  Returns:
    Decoding → the responses.
  """
  key = jax.random.fold_in(key, _PROMPTED_KEY)
  params = base.read()
  examples = sources.load_records(options.data, 'demonstration', 'train')[:NUM_EXAMPLES]
  shown: list[dict] = []
  for row in examples:
    shown += [*row.messages, {'role': 'assistant', 'content': row.response}]
  variants = [(before, beginning) for before in ([], shown) for beginning in BEGINNINGS]
  validation = sources.load_records(options.data, 'prompt', 'validation')

  def responder(temperature: float, count: int) -> Responder:
    sampling = dataclasses.replace(options.sampling, temperature=temperature)
    return responses.build_responder(base.model, sampling, context.tokenizer, context.layout, count)

  def respond(
    responder: Responder, variant: tuple[list[dict], str], rows: Sequence[Prompt]
  ) -> Responses:
    return _respond_behind(responder, params, context, variant, rows, options.batch_size, key)

  greedy = responder(0.0, 1)  # one for all variants, because each responder must be compiled
  worths = []
  for variant in variants:
    texts = respond(greedy, variant, validation).texts
    worths.append(oracle_judge.judge_with_oracle(validation, texts)['substance'].mean())
  best = variants[int(np.argmax(worths))]
  sampled = responder(options.sampling.temperature, options.num_samples)
  return {
    'sampled': respond(sampled, best, prompts),
    'greedy': respond(greedy, best, prompts),
  }


def _respond_behind(
  responder: Responder,
  params: Any,
  context: Context,
  variant: tuple[list[dict], str],
  prompts: Sequence[Prompt],
  batch_size: int,
  key: jax.Array,
) -> Responses:
  """Responds to prompts in a variant: (messages before the prompt, beginning of the response)."""
  before, beginning = variant
  tokenizer = context.tokenizer
  forced = tokenizer.encode(f' {beginning}') if beginning else []
  ids = []
  for prompt in prompts:
    ids.append(tokenizer.prompt([*before, *conversation(prompt)]) + forced)
  made = responses.complete_prompts(responder, params, ids, batch_size, tokenizer.pad_id, key)
  texts = [[f'{beginning} {text.strip()}'.strip() for text in row] for row in made.texts]
  return dataclasses.replace(made, texts=texts, lengths=made.lengths + len(forced))
