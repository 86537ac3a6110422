"""What the stages that learn from their own answers share: prompts, scores, the forward over answers, evaluation."""

import functools
from typing import Any, Callable, NamedTuple

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import ml_collections
import numpy as np

from rlhf_jax.data import batches, encode, records, sources
from rlhf_jax.errors import UserError
from rlhf_jax.generation import responses
from rlhf_jax.feedback import language_judge
from rlhf_jax.rewards import functions
from rlhf_jax.models import heads, lora
from rlhf_jax.runtime import hosts
from rlhf_jax.stages import reward
from rlhf_jax.stages.shared import common

DEFAULTS = dict(  # of a section, beside what the method needs
    init='sft',
    lora=dict(lora.DEFAULTS),  # adapters beside frozen matrices, in place of training all parameters
    reference='sft',  # the KL penalty is against this one; it stays as it is
    reward=('reward',),  # each a stage that trained a reward model, its folder, a directory, 'module:function' on texts
    # (docs/rewards.md), or 'scorer:MODEL', a language model that grades (direct RLAIF)
    reward_weights=(),  # of several rewards, in their order; 1 each unless said
    standardise_rewards=False,  # each of several rewards to mean 0 and variance 1 over the batch before they are added
    reward_functions=dict(functions.DEFAULTS),  # how rewards that are programs are run
    scorer=dict(language_judge.SCORER),  # how a language model grades
    batch_size=64,  # prompts of a step, over all devices
    num_samples=1,  # answers to each prompt
    max_length=48,  # tokens of a prompt at most
    overlong='drop',  # a longer prompt: drop (counted), truncate_left, error
    minibatches=2,  # updates in a pass
    microbatches=1,  # parts of a minibatch, one after the other, to save memory
    missing_eos=True,  # an answer without an end token scores missing_eos_score, whatever the reward says
    missing_eos_score=-1.0,
    eval_records=64,  # held-out prompts
    shown_responses=4,  # answers written at each evaluation
    data=dict(sources.DEFAULTS),
)

_SCORER = 'scorer:'


class RolloutParts(NamedTuple):
  """What a step of a stage that learns from its own answers is made of.

  Attributes:
    model, reference_model: definitions of the policy and of the model that the KL is against.
    init: () → the state before the first step.
    generate: (params, Prompts, key) → Samples.
    update: the compiled rest of a step, after the scores; its arguments are the method's.
    read_reference: () → the reference's parameters.
  """
  model: Any
  init: Callable[[], Any]
  generate: Callable[..., Any]
  update: Callable[..., Any]
  reference_model: Any
  read_reference: Callable[[], Any]


def check_batch(context: common.Context) -> None:
  """Raises UserError where the answers of a step do not divide over minibatches, micro-batches and devices."""
  section = context.section
  common.check_batch(context, section.batch_size * section.num_samples, section.minibatches * section.microbatches)
  common.check_batch(context, parts=1)


def read_prompts(context: common.Context):
  """(records, examples) of the training prompts, and of the held-out ones."""
  section = context.section
  train, held_out = (sources.load_records(section.data, 'prompt', split) for split in ('train', 'validation'))
  return tuple((rows, encode.prompts(rows, context.tokenizer, section.max_length, section.overlong))
               for rows in (train, sources.spread_evenly(held_out, section.eval_records)))


def build_scores(context: common.Context, *records) -> list:
  """score(Prompts, Samples) → ([B * K] float32 on the mesh, metrics), of the section's reward or weighted rewards: one
  function for each list of records that Prompts.index may point at.

  Metrics: `reward/failed`, the share of answers on which a program failed; of several rewards the mean of each.

  Raises:
    UserError: no such reward, or other than one weight for each.
  """
  section = context.section
  names = tuple(section.reward)
  weights = tuple(section.reward_weights) or (1.0,) * len(names)
  if not names or len(weights) != len(names):
    raise UserError(f'config.{context.name}.reward_weights: expected {len(names)} numbers, got {len(weights)}')
  parts = section.minibatches * section.microbatches
  each = [open_score(context, name, parts, section.reward_functions, section.scorer) for name in names]

  @jax.jit
  def combined(values):
    white = lambda x: (x - jnp.mean(x)) * jax.lax.rsqrt(jnp.var(x) + 1e-8) if section.standardise_rewards else x
    return (sum(weight * white(value) for weight, value in zip(weights, values)),
            {f'reward/{name}': jnp.mean(value) for name, value in zip(names, values)} if len(names) > 1 else {})

  def score(prompts, samples, rows):
    values, failed = zip(*(one(prompts, samples, rows) for one in each))
    total, metrics = combined(values)
    return total, {**metrics, 'reward/failed': np.float32(sum(failed) / len(total))}

  return [functools.partial(score, rows=rows) for rows in records]


def open_score(context: common.Context, name: str, parts: int = 1, programs=None, scorer=None):
  """score(Prompts, Samples, records) → ([B * K] float32 on the mesh, how many failed), of a reward by its name.

  Args:
    parts: a reward model reads the answers in so many, to save memory.
    programs: how a program is run, like functions.DEFAULTS.
    scorer: how a language model grades, like language_judge.SCORER.
  """
  tokenizer = context.tokenizer
  if name.startswith(_SCORER):
    grader, read, own = common.open_reader(context, name.removeprefix(_SCORER))
    grade = language_judge.build_scorer(grader, read(), own, context.layout,
                                        scorer or ml_collections.ConfigDict(language_judge.SCORER))
    program = lambda conversations, texts, asked: (grade(conversations, texts), 0)
  elif functions.is_function_name(name):
    run = functions.build_reward_function(name, programs)

    def program(conversations, texts, asked):  # each process runs it on its share, and all know what it gave
      here = slice(jax.process_index(), None, jax.process_count())
      values = np.zeros(len(texts) + 1, np.float32)
      values[:-1][here], values[-1] = run(conversations[here], texts[here], asked[here])
      if jax.process_count() > 1:
        values = multihost_utils.process_allgather(values).sum(axis=0)
      return values[:-1], int(values[-1])
  else:
    model, read = common.open_model(context, name, head=True)
    params, of = read(), reward.build_score(model, parts)
    return lambda prompts, samples, rows: (of(params, prompts, samples), 0)

  def score(prompts, samples, rows):
    index, tokens, mask = hosts.to_host((prompts.index, samples.tokens, samples.mask))
    asked = [rows[max(i, 0)] for i in np.repeat(index, len(tokens) // len(index))]
    texts = [tokenizer.decode(row[seen].tolist()) for row, seen in zip(tokens, mask)]
    values, failed = program([records.conversation(row) for row in asked], texts, asked)
    return context.layout.place(values), failed

  return score


def forward(model, params, sequences, R: int, temperature: float):
  """Logprobs and entropies of the last R tokens of each sequence, at the sampling temperature: two of [N, R] float32,
  and the hidden states before them, [N, R, D]."""
  hidden, _ = model.apply(params, sequences.tokens, sequences.positions, sequences.segment_ids)
  before = hidden[:, -R - 1:-1]
  logprobs, entropies = heads.token_logprobs(model, params, before, sequences.tokens[:, -R:], temperature)
  return logprobs, entropies, before


def final_scores(ended, scores, config):
  """The scores [N], with missing_eos_score in place of those of answers without an end token, if the section says so."""
  return jnp.where(ended, scores, config.missing_eos_score) if config.missing_eos else scores


def shuffled_minibatches(layout, batch, order, count: int):
  """[N, …] → [count, N / count, …] in a new order, each part on all devices."""
  cut = jax.tree.map(lambda x: x[order].reshape(count, -1, *x.shape[1:]), batch)
  return jax.tree.map(lambda x: layout.constrain(x, (None, 'batch') + (None,) * (x.ndim - 2)), cut)


def build_evaluation(context: common.Context, parts: RolloutParts, reference, score, rows, examples):
  """evaluate(state) → (score, KL, length and EOS rate on held-out prompts, some answers)."""
  section = context.section
  answer = responses.build_responder(parts.model, section.sampling, context.tokenizer, context.layout, 1, parts.reference_model,
                         lambda *given: score(*given)[0])

  def evaluate(state):
    given = answer(state.params, batches.prompts_once(examples, section.batch_size), context.key(), reference)
    values = {'reward/score': given.scores.mean(), 'kl': given.kl.mean(), 'response/length': given.lengths.mean(),
              'response/eos_rate': given.ended.mean()}
    shown = zip(examples[:section.shown_responses], given.texts, given.scores)
    return values, [{'prompt': rows[int(example['index'])].messages[-1]['content'], 'response': texts[0],
                     'score': float(scores[0])} for example, texts, scores in shown]

  return evaluate


def rollout_metrics(samples, sequences, logprobs, entropies, kl, scores) -> dict:
  """Metrics of a rollout, before the update; `kl` [N, R] is 0 outside the mask."""
  mask = samples.mask
  count = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
  return {
      'reward/score': jnp.mean(scores), 'reward/score_std': jnp.std(scores), 'kl': jnp.mean(jnp.sum(kl, axis=1)),
      'policy/rollout_entropy': jnp.sum(jnp.where(mask, entropies, 0.0)) / count,
      'policy/sampler_gap': jnp.max(jnp.where(mask, jnp.abs(logprobs - samples.logprobs), 0.0)),
      'response/length': jnp.mean(jnp.sum(mask, axis=1, dtype=jnp.float32)),
      'response/eos_rate': jnp.mean(samples.ended.astype(jnp.float32)),
      'tokens': jnp.sum(sequences.segment_ids > 0, dtype=jnp.float32)}
