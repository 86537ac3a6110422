"""Preference optimisation: the policy learns from people's rankings at once, without a reward model (Rafailov et al.
2023, arXiv:2305.18290) – DPO and its family, one formula each in objectives/preference.py.

  minimise E_prompt[ 1/C(K,2) Σ_{w above l} ℓ(log π(y_w|x)/π_ref(y_w|x), log π(y_l|x)/π_ref(y_l|x)) ]

Two of them are not of pairs: `plackett_luce` takes the whole order of K responses, `kto` each best and worst response
by itself, and single responses that somebody called good or bad. What the reference says of the responses is computed
once, before the first step, and kept in the stage's folder, or at every step (`reference_logprobs`). Left out: dropout.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from rlhf_jax.data import batches, encode, sources
from rlhf_jax.errors import UserError
from rlhf_jax.generation import sampler
from rlhf_jax.models import heads, lora
from rlhf_jax.objectives import masked, preference, ranking
from rlhf_jax.options import from_section
from rlhf_jax.runtime import checkpoint, hosts, loop
from rlhf_jax.runtime import step as steps
from rlhf_jax.stages.shared import common
from rlhf_jax.types import Rankings


LOSSES = preference.PREFERENCE_LOSSES
SINGLE = [name for name, loss in LOSSES.items() if loss.single_responses]
SOFT = [name for name, loss in LOSSES.items() if loss.accepts_soft_labels]
WITHOUT_REFERENCE = [name for name, loss in LOSSES.items() if not loss.needs_reference]

DEFAULTS = dict(
    init='sft',
    lora=dict(lora.DEFAULTS),  # adapters beside frozen matrices, in place of training all parameters
    reference='sft',  # a stage, its folder or a directory; '' for the losses that need none
    reference_logprobs='stored',  # stored: computed once; live: at every step, for data too large for that
    loss='dpo',  # one of LOSSES
    beta=0.1,
    label_smoothing=0.0,  # share of wrong labels: dpo (then cDPO), robust, length_normalised, dpop, cpo, simpo
    margin=0.5,  # gamma of simpo
    nll_coefficient=1.0,  # lambda of cpo and dpop
    batch_size=16,  # rows in a batch, over all devices
    responses_per_row=4,  # places in a row; whole rankings share a row, none is split
    max_length=96,  # tokens of a prompt with one response
    overlong='drop',  # a ranking with a longer response: drop (counted), truncate_left (the prompt), error
    microbatches=1,
    eval_records=200,  # held-out rankings
    shown_responses=4,  # texts written at each evaluation
    data=dict(sources.DEFAULTS),
    sampling=dict(sampler.DEFAULTS),
    optimizer=dict(steps.OPTIMIZER, learning_rate=5e-6, schedule='linear', final_scale=0.0, warmup_steps=10),
    loop=dict(loop.DEFAULTS, steps=200),
)


def run(context: common.Context) -> None:
  """Trains; leaves checkpoints and a Hugging Face directory in the stage's folder."""
  state = loop.run(build(context), context.section.loop, context.directory, {'stage': context.name})
  common.export(context, state.params)


def build(context: common.Context) -> loop.Training:
  """The stage, ready to run."""
  section, layout, tokenizer = context.section, context.layout, context.tokenizer
  check(section, f'config.{context.name}')
  if section.reference_logprobs not in ('stored', 'live'):
    raise UserError(f'config.{context.name}.reference_logprobs: expected stored or live, got '
                    f'{section.reference_logprobs!r}')
  model, optimizer, init = common.open_trainable(context)
  fit = lambda split: encode.rankings(split, tokenizer, section.max_length, section.overlong)
  read = lambda split: sources.load_records(section.data, 'ranking', split)
  examples = fit(read('train'))
  held_out = fit(sources.spread_evenly(read('validation'), section.eval_records))
  if section.loss not in SOFT and any((example['confidence'] != 1).any() for example in (*examples, *held_out)):
    raise UserError(f'config.{context.name}.loss: {section.loss} cannot learn from labels with a confidence below 1; '
                    f'expected one of {", ".join(SOFT)}, or data without')
  if section.loss not in SINGLE and any(len(example['ranks']) < 2 for example in (*examples, *held_out)):
    raise UserError(f'config.{context.name}.loss: {section.loss} compares responses, but some prompts have one only; '
                    f'expected {", ".join(SINGLE)}, or data without')
  places = section.responses_per_row
  once = lambda rows: batches.rankings_once(rows, section.batch_size, places, section.max_length)
  reference_model = reference = None
  live = lambda batch: batch
  if section.reference:
    reference_model, read_reference = common.open_model(context, section.reference)
    reference = read_reference()
    sums = jax.jit(lambda params, batch: response_logprobs(reference_model, params, batch)[0])
    if section.reference_logprobs == 'live':
      live = lambda batch: batch.replace(reference_logprobs=sums(reference, batch))
    else:
      said, of = f'{context.name}: the reference reads', checkpoint.fingerprint(reference)
      for name, rows in (('train', examples), ('validation', held_out)):
        add_reference(rows, context.directory / f'reference-{name}.npz', of, lambda rows: [
            (batch, hosts.to_host(sums(reference, layout.place(batch)))) for batch in tqdm.tqdm(
                once(rows), desc=said, unit='batch', leave=False, disable=None)])
  loss = build_loss(model, section)
  step, measured = steps.build(loss, optimizer, layout, section.microbatches), jax.jit(loss)
  anchor = None
  if section.loss in SINGLE:
    estimate = jax.jit(build_anchor(model, reference_model))
    anchor = lambda params, batch: estimate(params, reference, batch)
  prompts = [example['tokens'][0, :example['begins'][0]] for example in held_out[:max(section.shown_responses, 1)]]
  show = common.build_samples(context, model, prompts)

  def evaluate(state):
    found = [jax.device_get(measured(state.params, batch, None, anchor and anchor(state.params, batch)))
             for batch in (live(layout.place(batch)) for batch in once(held_out))]
    mean = lambda of: sum(of(one)[0] for one in found) / max(sum(of(one)[1] for one in found), 1e-9)
    values = {name: mean(lambda one, name=name: one.means[name]) for name in found[0].means}
    return {'loss': mean(lambda one: (one.total, one.weight)), **values}, show(state)

  def whole_step(state, batch):
    batch = live(layout.place(batch))
    return step(state, batch, *([anchor(state.params, batch)] if anchor else []))

  return loop.Training(
      name=context.name, init=init, evaluate=evaluate, step=whole_step,
      batches=batches.rankings(examples, section.batch_size, places, section.max_length, context.config.seed))


def check(section, where: str) -> None:
  """Raises UserError for a loss that is none, or settings it cannot have."""
  if section.loss not in LOSSES:
    raise UserError(f'{where}.loss: expected one of {", ".join(LOSSES)}, got {section.loss!r}')
  if not section.beta > 0 or not 0 <= section.label_smoothing < 0.5:
    raise UserError(f'{where}: expected beta above 0 and smoothing in [0, 0.5), got {section.beta} and '
                    f'{section.label_smoothing}')
  if not section.reference and section.loss not in WITHOUT_REFERENCE:
    raise UserError(f'{where}.reference: {section.loss} needs one; without: {", ".join(WITHOUT_REFERENCE)}')


def loss_settings(section):
  """The settings of the section's loss; dpop's lambda still bears the name of cpo's."""
  values = dict(section.items(), dpop_lambda=section.nll_coefficient)
  return from_section(LOSSES[section.loss].settings_class, values)


def response_logprobs(model, params, batch: Rankings):
  """(log π(y|x) summed over the response, |y|): two of [B, K] float32; 0 and 1 where a place is empty."""
  shape = batch.group.shape
  flat = lambda x: x.reshape(-1, x.shape[-1])
  tokens, segment_ids = flat(batch.tokens), flat(batch.segment_ids)
  hidden, _ = model.apply(params, tokens, flat(batch.positions), segment_ids)
  logprobs, _ = heads.token_logprobs(model, params, hidden[:, :-1], tokens[:, 1:])
  mask = (jnp.arange(1, tokens.shape[1]) >= batch.begins.reshape(-1, 1)) & (segment_ids[:, 1:] > 0)
  sums = jnp.sum(jnp.where(mask, logprobs, 0.0), axis=1)
  return sums.reshape(shape), jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.float32), 1.0).reshape(shape)


def build_loss(model, section):
  """loss(params, Rankings, key, anchor) → Loss, over prompts; for kto, which alone needs an anchor, over responses."""
  settings = loss_settings(section)

  def loss(params, batch: Rankings, key, anchor=None) -> steps.Loss:
    del key
    logprobs, lengths = response_logprobs(model, params, batch)
    every = preference.Response(logprobs, batch.reference_logprobs, lengths)
    labels = preference.Labels(batch.ranks, batch.group, batch.confidence, anchor)
    total, weight = LOSSES[section.loss].apply(every, labels, settings)
    pairs, (best, worst) = ranking.better_pairs(batch.ranks, batch.group), ranking.best_and_worst(batch.ranks, batch.group)
    margins = every.ratio[:, :, None] - every.ratio[:, None, :]
    count = masked.total(1.0, pairs)
    implicit = every.ratio if section.reference else every.mean
    right, _ = ranking.accuracy(implicit, batch.ranks, batch.group)
    return steps.Loss(
        total, weight,
        {'accuracy': (right, count),
         'margin': (section.beta * masked.total(margins, pairs), count),
         'logprob/best': (masked.total(logprobs, best), masked.total(1.0, best)),
         'logprob/worst': (masked.total(logprobs, worst), masked.total(1.0, worst))},
        {'tokens': jnp.sum(batch.segment_ids > 0, dtype=jnp.float32)})
  return loss


def mismatched(batch: Rankings) -> Rankings:
  """Each prompt with the response in the same place of the next row, which is of another prompt (no prompt is split over
  rows), cut at T; of a batch of one row, in the next place."""
  B, K, T = batch.tokens.shape
  far = K if B > 1 else 1
  flat = lambda x: x.reshape(B * K, -1)
  begins, lengths = flat(batch.begins), flat(batch.segment_ids).sum(1, keepdims=True)
  others, their_begins, their_lengths = (jnp.roll(x, -far, axis=0) for x in (flat(batch.tokens), begins, lengths))
  places = jnp.arange(T)[None]
  source = jnp.clip(places - begins + their_begins, 0, T - 1)
  tokens = jnp.where(places < begins, flat(batch.tokens), jnp.take_along_axis(others, source, axis=1))
  inside = places < jnp.minimum(begins + their_lengths - their_begins, T)
  there = flat(batch.group) > 0
  inside &= there & jnp.roll(there, -far, axis=0)
  shape = lambda x: x.reshape(B, K, T)
  return batch.replace(tokens=shape(jnp.where(inside, tokens, 0)), segment_ids=shape(inside.astype(jnp.int32)),
                       positions=shape(jnp.where(inside, places, 0)))


def build_anchor(model, reference_model):
  """anchor(params, reference params, Rankings) → [] float32, KTO's z."""
  def anchor(params, reference, batch):
    other = mismatched(batch)
    ratios = response_logprobs(model, params, other)[0] - response_logprobs(reference_model, reference, other)[0]
    return preference.kto_anchor(ratios, other.segment_ids.any(-1))
  return anchor


def add_reference(examples, path, of: str, compute) -> None:
  """Adds `reference_logprobs` [k] float32 to every example, from `path` or computed and left there.

  Args:
    of: the fingerprint of the reference's parameters.
    compute: examples → [(Rankings, log-probabilities [B, K])].

  Raises:
    UserError: the file is of another reference, or of other tokens: another data set or tokenizer.
  """
  counts = [len(example['ranks']) for example in examples]
  seen = hashlib.sha256()
  for example in examples:
    for name in ('tokens', 'begins', 'lengths'):
      seen.update(example[name].tobytes())
  if path.is_file():
    with np.load(path, allow_pickle=False) as kept:
      values, kept_of, kept_tokens = kept['logprobs'], str(kept['reference']), str(kept['tokens'])
    if kept_of != of:
      raise UserError(f'{path}: computed with another reference; delete it to compute it anew')
    if kept_tokens != seen.hexdigest():
      raise UserError(f'{path}: computed for other data or with another tokenizer; delete it to compute it anew')
  else:
    values = np.concatenate([found[batch.group > 0] for batch, found in compute(examples)])
    if jax.process_index() == 0:
      part = path.with_suffix('.part.npz')
      np.savez(part, logprobs=values, reference=of, tokens=seen.hexdigest())
      part.replace(path)
  for example, own in zip(examples, np.split(values.astype(np.float32), np.cumsum(counts)[:-1])):
    example['reference_logprobs'] = own
