"""What the stages of a config compile, with the shapes and shardings of its arguments; nothing is read or computed."""

import dataclasses
from types import SimpleNamespace
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.rewards import functions
from rlhf_jax.generation import sampler
from rlhf_jax.interop import pretrained
from rlhf_jax.planning import work
from rlhf_jax.runtime import step as steps
from rlhf_jax.stages import online_preference, policy_gradient, ppo, preference, reward
from rlhf_jax.stages.shared import common, supervised
from rlhf_jax.types import Prompts, Rankings, Sequences


class Program(NamedTuple):
  """One compiled program of a step.

  Attributes:
    name: step, rollout, score or update.
    lower: () → jax.stages.Lowered.
    work: what it must do at least, see work.py.
  """
  name: str
  lower: Callable[[], Any]
  work: work.Work


class Plan(NamedTuple):
  """A stage.

  Attributes:
    resident: what lies on the devices all the time: name → tree of shapes with shardings.
    programs: in the order of a step.
    notes: what is left out.
  """
  resident: dict[str, Any]
  programs: list[Program]
  notes: list[str]


def tokenizer(config):
  """As much of the tokenizer as a plan needs."""
  if config.tokenizer.init != 'train':
    return pretrained.open_pretrained(config.tokenizer.init).tokenizer
  return SimpleNamespace(vocab_size=config.tokenizer.vocab_size, eos_id=1, pad_id=0, bos_id=None)


def of_stage(context: common.Context) -> Plan:
  """The plan of a stage, on devices that are only described."""
  return KINDS[context.section.kind](context)


def _supervised(context):
  section, layout = context.section, context.layout
  model, optimizer, init = common.open_trainable(context)
  state, batch = init(), _sequences(layout, section.batch_size, section.max_length)
  step = steps.build(supervised.build_loss(model), optimizer, layout, section.microbatches)
  rows, length = section.batch_size, section.max_length
  return Plan(_resident(state), [Program('step', lambda: step.lower(state, batch), work.training(
      model.config, layout, rows, length, length, section.microbatches, state.trained))], [])


def _sequences(layout, rows, length):
  place = _rows(layout)
  return Sequences(*(place((rows, length), dtype) for dtype in (jnp.int32,) * 3 + (jnp.float32,)))


def _rankings(layout, rows, places, length):
  place = _rows(layout)
  return Rankings(*(place((rows, places, length), jnp.int32) for _ in range(3)),
                  *(place((rows, places), dtype) for dtype in (jnp.int32,) * 4 + (jnp.float32,) * 2))


def _reward(context):
  section, layout = context.section, context.layout
  model, optimizer, init = common.open_trainable(context, head=True)
  state, batch = init(), _rankings(layout, section.batch_size, section.responses_per_row, section.max_length)
  step = steps.build(reward.build_loss(model, section.loss), optimizer, layout, section.microbatches)
  rows = section.batch_size * section.responses_per_row
  return Plan(_resident(state), [Program('step', lambda: step.lower(state, batch), work.training(
      model.config, layout, rows, section.max_length, 0, section.microbatches, state.trained))], [])


def _preference(context):
  section, layout = context.section, context.layout
  model, optimizer, init = common.open_trainable(context)
  state, batch, anchor = init(), _rankings(layout, section.batch_size, section.responses_per_row, section.max_length), []
  step = steps.build(preference.build_loss(model, section), optimizer, layout, section.microbatches)
  rows, programs, resident = section.batch_size * section.responses_per_row, [], _resident(state)
  if section.reference:
    reference_model, read = common.open_model(context, section.reference)
    resident['reference'] = reference = read()
    sums = jax.jit(lambda params, batch: preference.response_logprobs(reference_model, params, batch)[0])
    programs.append(Program('reference', lambda: sums.lower(reference, batch), work.forward(
        reference_model.config, layout, rows, section.max_length, section.max_length)))
    if section.loss == 'kto':
      anchor = [jax.ShapeDtypeStruct((), jnp.float32, sharding=layout.sharding())]
  programs.append(Program('step', lambda: step.lower(state, batch, *anchor), work.training(
      model.config, layout, rows, section.max_length, section.max_length, section.microbatches, state.trained)))
  return Plan(resident, programs, [])


def _rollout(context, define):
  """The programs of a stage that learns from its own answers."""
  section, layout = context.section, context.layout
  made = define(context)
  state, reference = made.init(), made.read_reference()
  resident, notes = {**_resident(state), 'reference': reference}, []
  B, P, R, K = section.batch_size, section.max_length, section.sampling.max_new_tokens, section.num_samples
  parts = section.minibatches * section.microbatches
  rows, N, config = _rows(layout), B * K, made.model.config
  prompts = Prompts(rows((B, P), jnp.int32), rows((B, P), bool), rows((B,), jnp.int32))
  key = jax.ShapeDtypeStruct((), state.key.dtype, sharding=layout.sharding())
  placed = lambda tree: jax.tree.map(lambda x: rows(x.shape, x.dtype), tree)
  samples = placed(jax.eval_shape(made.generate, state.params, prompts, key))
  sequences = placed(jax.eval_shape(sampler.join_sequences, prompts, samples))
  scores = rows((N,), jnp.float32)
  programs = [Program('rollout', lambda: made.generate.lower(state.params, prompts, key),
                      work.rollout(config, layout, B, P, R, K))]
  for name in section.reward:
    if ':' in name or functions.is_function_name(name):
      notes.append(f'{name} runs on the hosts')
      continue
    model, read = common.open_model(context, name, head=True)
    resident['reward'] = params = read()
    score = reward.build_score(model, parts)
    programs.append(Program('score', lambda: score.lower(params, prompts, samples), work.forward(
        model.config, layout, N // parts, P + R, 0) * parts))
  trunks = [(state.trained, R)]
  if define is ppo.define:
    pretraining = None
    if section.pretraining_coefficient:
      pretraining = _sequences(layout, N, section.pretraining_max_length)
    given = (reference, sequences, samples, scores, pretraining)
    trunks += [(state.value_trained, 0)] if section.value else []  # scalar, no vocabulary
  elif define is policy_gradient.define:
    given = (reference, sequences, samples, scores)
  else:
    given = (_rankings(layout, B, K, P + R),)
  passes = getattr(section, 'epochs', 1)
  before = [work.forward(config, layout, N // parts, P + R, head) * parts
            for head in (R, *(head for _, head in trunks))]
  training = [work.training(config, layout, N, P + R, head, parts, tree) * passes for tree, head in trunks]
  kept = sum(one.kept for one in training)  # both models' at once
  together = dataclasses.replace(sum(training, work.Work()), held=kept + max(one.held - one.kept for one in training))
  programs.append(Program('update', lambda: made.update.lower(state, *given), sum(before, work.Work()) + together))
  return Plan(resident, programs, notes)


def _answers(context):
  section, layout = context.section, context.layout
  rows, resident, programs = _rows(layout), {}, []
  for name in getattr(section, 'policies', None) or (section.model,):
    model, read = common.open_model(context, name)
    resident[name] = params = read()
    P = getattr(section, 'max_context', section.max_length)
    B, K = section.batch_size, getattr(section, 'num_samples', 1)
    prompts = Prompts(rows((B, P), jnp.int32), rows((B, P), bool), rows((B,), jnp.int32))
    tokens = context.tokenizer
    generate = sampler.build_sampler(model, section.sampling, (tokens.eos_id,), tokens.pad_id, K, layout=layout)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=layout.sharding())
    programs.append(Program(f'answers of {name}', lambda generate=generate, params=params: generate.lower(
        params, prompts, key), work.rollout(model.config, layout, B, P, section.sampling.max_new_tokens, K)))
  return Plan(resident, programs, ['judges and annotators are left out'])


KINDS = {
    'pretrain': _supervised, 'sft': _supervised, 'reward': _reward, 'preference': _preference,
    'ppo': lambda context: _rollout(context, ppo.define),
    'policy_gradient': lambda context: _rollout(context, policy_gradient.define),
    'online_preference': lambda context: _rollout(context, online_preference.define),
    'feedback': _answers, 'critique': _answers,
}


def _rows(layout):
  """(shape, dtype) → a shape whose first axis lies as a batch does."""
  return lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(('batch',)))


def _resident(state):
  """The trees of a state by what they are for."""
  trained = [getattr(state, name, {}) for name in ('trained', 'value_trained', 'sampler_trained')]
  return {'parameters': trained, 'optimizer': state.opt_state, 'frozen base': state.frozen}
