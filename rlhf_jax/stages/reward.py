"""A reward model from human rankings (step 3 of the four; Ouyang et al. 2022, section 3.5, eq. 1).

  minimise −E_prompt[ 1/C(K,2) Σ_{w above l} log σ(r(x, y_w) − r(x, y_l)) ]

The score is a linear head on the state of a response's last token, its end of turn. All responses to a prompt are one
element of the batch. Other losses: plackett_luce, plain_pairs. After the last step a bias is subtracted, so that human
demonstrations score 0 on average. Departures from the paper: the mean is over the untied pairs; a ranking's `confidence`
below 1, an AI's label, is a soft target.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import batches, encode, records, sources
from rlhf_jax.errors import UserError
from rlhf_jax.generation import sampler
from rlhf_jax.models import heads, lora
from rlhf_jax.objectives import ranking
from rlhf_jax.runtime import loop
from rlhf_jax.runtime.hosts import to_host
from rlhf_jax.runtime import step as steps
from rlhf_jax.stages.shared import common
from rlhf_jax.types import Rankings

DEFAULTS = dict(
    init='sft',
    lora=dict(lora.DEFAULTS),  # adapters beside frozen matrices, in place of training all parameters
    loss='pairwise',  # pairwise, plackett_luce, plain_pairs
    batch_size=16,  # rows in a batch, over all devices
    responses_per_row=4,  # places in a row; whole rankings share a row, none is split
    max_length=96,  # tokens of a prompt with one response
    overlong='drop',  # a ranking with a longer response: drop (counted), truncate_left (the prompt), error
    microbatches=1,
    eval_records=400,  # held-out rankings
    centre=True,  # subtract the mean score of the demonstrations of `demonstrations`
    centre_records=256,
    data=dict(sources.DEFAULTS),
    demonstrations=dict(sources.DEFAULTS),
    optimizer=dict(steps.OPTIMIZER, learning_rate=1e-4, schedule='linear', final_scale=0.0),
    loop=dict(loop.DEFAULTS, steps=200),
)


def last_scores(model, params, tokens, positions, segment_ids):
  """The score at the last real token of each row: [..., T] → [...] float32, wherever the padding is."""
  shape = tokens.shape[:-1]
  flat = lambda x: x.reshape(-1, x.shape[-1])
  segment_ids = flat(segment_ids)
  hidden, _ = model.apply(params, flat(tokens), flat(positions), segment_ids)
  places = jnp.arange(segment_ids.shape[1])
  last = jnp.max(jnp.where(segment_ids > 0, places, 0), axis=1)
  return heads.scalar_scores(params, jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]).reshape(shape)


def build_score(model, parts: int = 1):
  """score(params, Prompts [B, P], Samples [B * K, R]) → [B * K] float32: what the reward model gives each answer."""
  @jax.jit
  def score(params, prompts, samples):
    one = lambda x: last_scores(model, params, x.tokens, x.positions, x.segment_ids)
    return steps.map_in_parts(one, sampler.join_sequences(prompts, samples), parts)
  return score


def build_loss(model, name):
  """loss(params, Rankings, key) → Loss, over prompts (or pairs: plain_pairs)."""
  if name not in ranking.REWARD_LOSSES:
    raise UserError(f'reward.loss: expected one of {", ".join(ranking.REWARD_LOSSES)}, got {name!r}')
  def loss(params, batch: Rankings, key) -> steps.Loss:
    del key
    scores = last_scores(model, params, batch.tokens, batch.positions, batch.segment_ids)
    soft = (batch.confidence,) if ranking.REWARD_LOSSES[name].accepts_soft_labels else ()
    total, weight = ranking.REWARD_LOSSES[name].function(scores, batch.ranks, batch.group, *soft)
    right, pairs = ranking.accuracy(scores, batch.ranks, batch.group)
    present = batch.group > 0
    return steps.Loss(
        total, weight, {'accuracy': (right, pairs)},
        {'pairs': pairs, 'score/sum': jnp.sum(jnp.where(present, scores, 0.0)),
         'tokens': jnp.sum(batch.segment_ids > 0, dtype=jnp.float32)})
  return loss


def run(context: common.Context) -> None:
  """Trains; leaves checkpoints and a Hugging Face directory in the stage's folder."""
  state = loop.run(build(context), context.section.loop, context.directory, {'stage': context.name})
  common.export(context, state.params)


def build(context: common.Context) -> loop.Training:
  """The stage, ready to run."""
  section, layout, tokenizer = context.section, context.layout, context.tokenizer
  model, optimizer, init = common.open_trainable(context, head=True)
  fit = lambda rows: encode.rankings(rows, tokenizer, section.max_length, section.overlong)
  read = lambda split: sources.load_records(section.data, 'ranking', split)
  train, held_out = read('train'), sources.spread_evenly(read('validation'), section.eval_records)
  if section.loss == 'plackett_luce' and any(row.confidence < 1 for row in train):
    raise UserError(f'config.{context.name}.loss: plackett_luce cannot learn from soft labels (confidence below 1); '
                    'pairwise and plain_pairs can')
  if any(len(row.responses) < 2 for row in (*train, *held_out)):
    raise UserError(f'config.{context.name}.data: a reward model learns from responses that are compared, but some prompts '
                    'have one only')
  held_out_examples = fit(held_out)
  score = jax.jit(lambda params, batch: last_scores(model, params, batch.tokens, batch.positions, batch.segment_ids))
  once = lambda examples: batches.rankings_once(
      examples, section.batch_size, section.responses_per_row, section.max_length)

  def evaluate(state):
    return accuracies(
        ((batch, to_host(score(state.params, layout.place(batch)))) for batch in once(held_out_examples)), held_out), []

  def centre(state):
    shown = sources.spread_evenly(sources.load_records(section.demonstrations, 'demonstration', 'train'), section.centre_records)
    alone = encode.rankings([records.Ranking(id=r.id, source=r.source, license=r.license, domain='', context='',
                                             messages=r.messages, responses=[r.response], ranks=[1]) for r in shown],
                            tokenizer, section.max_length, 'drop')
    found = [to_host(score(state.params, layout.place(batch)))[batch.group > 0] for batch in once(alone)]
    bias = state.trained['score']['bias'] - np.float32(np.concatenate(found).mean(dtype=np.float64))
    return state.replace(trained={**state.trained, 'score': {**state.trained['score'], 'bias': bias}})

  return loop.Training(
      name=context.name, init=init, evaluate=evaluate, finish=centre if section.centre else None,
      batches=batches.rankings(fit(train), section.batch_size, section.responses_per_row, section.max_length,
                               context.config.seed),
      step=steps.build(build_loss(model, section.loss), optimizer, layout, section.microbatches))


def accuracies(scored, held_out) -> dict[str, float]:
  """How often the score agrees with people, over all untied pairs and by source, beside the longer response's; and
  log_loss, the mean of −log σ(r_w − r_l), nats.

  Args:
    scored: (Rankings, scores [B, K]) for each batch.
    held_out: the records the batches' `index` points at.
  """
  by_source = {}
  for batch, scores in scored:
    for b in range(len(scores)):
      for i in range(scores.shape[1]):
        for j in range(scores.shape[1]):
          if batch.group[b, i] and batch.group[b, i] == batch.group[b, j] and batch.ranks[b, i] < batch.ranks[b, j]:
            source = held_out[batch.index[b, i]].source
            lengths = [int((batch.segment_ids[b, k] > 0).sum()) for k in (i, j)]
            win = lambda x, y: 0.5 + 0.5 * np.sign(x - y)
            by_source.setdefault(source, []).append((
                win(scores[b, i], scores[b, j]), win(*lengths), np.logaddexp(0, scores[b, j] - scores[b, i])))
  everything = np.array([pair for pairs in by_source.values() for pair in pairs])
  values = {'accuracy': everything[:, 0].mean(), 'length_accuracy': everything[:, 1].mean(),
            'log_loss': everything[:, 2].mean(), 'pairs': len(everything)}
  if len(by_source) > 1:
    for source, pairs in sorted(by_source.items()):
      right, longer, _ = np.mean(pairs, axis=0)
      values |= {f'accuracy/{source}': right, f'length_accuracy/{source}': longer, f'pairs/{source}': len(pairs)}
  return {name: float(value) for name, value in values.items()}
