"""A language model of ours as judge: what probability it gives each option as the next words.

  P(A) / (P(A) + P(B))  after  "… Options: (A) … (B) … The answer is: ("

Bai et al. 2022b (arXiv:2212.08073) §4.1, with soft labels; with `thought` its chain of thought, whose probabilities are
clamped to `clamp`. As a scorer (direct RLAIF, Lee et al. 2023, arXiv:2309.00267, §2.3) it grades one answer: the mean of
the grades' values under their probabilities.
"""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from rlhf_jax.data import batches, encode
from rlhf_jax.errors import UserError
from rlhf_jax.generation import responses
from rlhf_jax.feedback import judging
from rlhf_jax.generation import sampler
from rlhf_jax.models import heads
from rlhf_jax.runtime import hosts
from rlhf_jax.types import Prompts

DEFAULTS = dict(
    template='Consider the following conversation between a human and an assistant:\n\n{conversation}\n\n{principle}\n'
             'Options:\n(A) {first}\n(B) {second}\n',
    ending='The answer is: (',  # the option stands right behind it
    options=('A', 'B'),  # for the first, for the second answer
    close=')',  # behind the option, in examples
    chat=False,  # the template as a user's message in the model's chat template, the ending begins its answer
    examples=0,  # so many of the constitution's before the question
    thought=0,  # tokens of a chain of thought before the ending; 0 = none
    think="Let's think step by step:",  # begins it
    clamp=(0.4, 0.6),  # of a probability after a chain of thought
    batch_size=32,  # comparisons read at once, over all devices
    max_length=512,  # tokens at most; a longer comparison gets no verdict
)
SCORER = dict(
    template='Rate the answer from 1 (worst) to 9 (best).\n\n{conversation}\n\nAssistant: {response}\n\n',
    ending='Rating: ',
    options=('1', '2', '3', '4', '5', '6', '7', '8', '9'),
    grades=(-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0),
    chat=False,
    batch_size=32,
    max_length=512,
)
_BUCKET = 64  # lengths are rounded up to its multiples, so that few programs are compiled


def build_judge(model, params, tokenizer, layout, config, examples=()):
  """A judge (see judging) that is a language model.

  Args:
    model, params: the model.
    config: like DEFAULTS.
    examples: shown before every question: judging.Comparisons with which of the two is better (0 or 1), or texts.
  """
  if len(config.options) != 2 or len(config.clamp) != 2:
    raise UserError('judge: expected two options and two numbers to clamp to')
  read = build_options(model, tokenizer, layout, config)
  greedy = ml_collections.ConfigDict(dict(sampler.DEFAULTS, max_new_tokens=config.thought, temperature=0.0))
  think = responses.build_responder(model, greedy, tokenizer, layout) if config.thought else None

  def question(comparison):
    return config.template.format(conversation=judging.transcript(comparison.messages), principle=comparison.principle,
                                  first=comparison.first, second=comparison.second,
                                  question=comparison.messages[-1]['content'])

  whole = [example for example in examples if isinstance(example, str)]
  shown = [(question(example[0]), config.ending + config.options[example[1]] + config.close)
           for example in examples if not isinstance(example, str)]
  if whole and config.chat:
    raise UserError('judge.examples: expected 0 with chat=True: examples of thoughts are texts, which no chat template has')

  def prompt(text, beginning):
    if not config.chat:
      before = ''.join(f'{text}\n\n' for text in (*whole, *(asked + answer for asked, answer in shown)))
      return _start(tokenizer) + tokenizer.encode(before + text + beginning)
    turns = [message for asked, answer in shown
             for message in (dict(role='user', content=asked), dict(role='assistant', content=answer))]
    return tokenizer.prompt([*turns, dict(role='user', content=text)]) + tokenizer.encode(
        tokenizer.response_prefix + beginning)

  def judge(comparisons):
    texts = [question(comparison) for comparison in comparisons]
    thoughts = [''] * len(texts)
    if think:
      begun = [prompt(text, config.think) for text in texts]
      fits = [i for i, ids in enumerate(begun) if len(ids) + config.thought < config.max_length]
      if fits:
        given = responses.complete_prompts(think, params, [begun[i] for i in fits], config.batch_size, tokenizer.pad_id,
                                 jax.random.key(0))
        for i, row in zip(fits, given.texts):
          thoughts[i] = row[0].split(config.ending)[0].strip()
    beginnings = [f'{config.think} {thought}\n{config.ending}' if think else config.ending for thought in thoughts]
    logprobs = read(params, [prompt(text, beginning) for text, beginning in zip(texts, beginnings)])
    probabilities = 1 / (1 + np.exp(logprobs[:, 1] - logprobs[:, 0]))
    if think:
      probabilities = np.clip(probabilities, *config.clamp)  # leaves NaN as it is
    return judging.Judgements(probabilities, thoughts)

  return judge


def build_scorer(model, params, tokenizer, layout, config):
  """grade(conversations, responses) → [N] float32, the expected value of the grades; the lowest for an answer too long to
  read.

  Args:
    config: like SCORER.
  """
  if len(config.options) != len(config.grades):
    raise UserError(f'scorer.grades: expected {len(config.options)} numbers, one for each option, got '
                    f'{len(config.grades)}')
  read, values = build_options(model, tokenizer, layout, config), np.asarray(config.grades, float)

  def grade(conversations, responses):
    prompts = []
    for messages, response in zip(conversations, responses):
      text = config.template.format(conversation=judging.transcript(messages), response=response,
                                    question=messages[-1]['content'])
      prompts.append(tokenizer.prompt([dict(role='user', content=text)]) + tokenizer.encode(
          tokenizer.response_prefix + config.ending) if config.chat else
                     _start(tokenizer) + tokenizer.encode(text + config.ending))
    logprobs = read(params, prompts)
    weights = np.exp(logprobs - logprobs.max(axis=1, keepdims=True))
    grades = (weights * values).sum(axis=1) / weights.sum(axis=1)
    return np.where(np.isnan(grades), values.min(), grades).astype(np.float32)

  return grade


def build_options(model, tokenizer, layout, config):
  """log P(option | prompt) of the config's options, as texts of one or several tokens.

  Returns:
    read(params, prompts: N lists of tokens) → [N, O] float64 nats; NaN where a prompt is longer than config.max_length.
  """
  ids = [tokenizer.encode(option) for option in config.options]
  if not all(ids) or len(set(map(tuple, ids))) < len(ids):
    raise UserError(f'options: expected different texts, got {list(config.options)}')
  beginnings = sorted({tuple(option[:-1]) for option in ids})
  rows = config.batch_size
  if rows % layout.batch_shards:
    raise UserError(f'judge: a batch of {rows} does not divide over the {layout.batch_shards} device(s) of the mesh axes '
                    'data, fsdp and expert')

  @jax.jit
  def logprobs(params, prompts: Prompts, beginning, lasts):
    """Of the tokens `lasts` [F] after the prompt and `beginning` [M], with those of the beginning: [B, F]."""
    B, P = prompts.tokens.shape
    repeat = lambda x, kind: jnp.broadcast_to(x, (B, len(x))).astype(kind)
    tokens = jnp.concatenate([prompts.tokens, repeat(beginning, jnp.int32)], axis=1)
    mask = jnp.concatenate([prompts.mask, repeat(jnp.ones_like(beginning), bool)], axis=1)
    hidden, _ = model.apply(params, tokens, sampler.prompt_positions(mask), mask.astype(jnp.int32))
    before = hidden[:, P - 1:-1]
    said = heads.token_logprobs(model, params, before, tokens[:, P:])[0] if len(beginning) else jnp.zeros((B, 1))
    next_token = jax.nn.log_softmax(heads.next_token_logits(model, params, hidden[:, -1]))
    return jnp.sum(said, axis=1, keepdims=True) + next_token[:, lasts]

  def read(params, prompts):
    result = np.full((len(prompts), len(ids)), np.nan)
    widths = [-(-len(prompt) // _BUCKET) * _BUCKET for prompt in prompts]
    for width in sorted({width for prompt, width in zip(prompts, widths) if len(prompt) <= config.max_length}):
      examples = [encode.left_padded(prompt, width, tokenizer.pad_id, index)
                  for index, prompt in enumerate(prompts) if widths[index] == width and len(prompt) <= config.max_length]
      for batch in batches.prompts_once(examples, rows):
        placed, real = layout.place(batch), batch.index >= 0
        for beginning in beginnings:
          options = [i for i, option in enumerate(ids) if tuple(option[:-1]) == beginning]
          values = hosts.to_host(logprobs(params, placed, np.array(beginning, np.int32),
                                          np.array([ids[i][-1] for i in options], np.int32)))
          result[np.ix_(batch.index[real], options)] = values[real]
    return result

  return read


def _start(tokenizer):
  return [] if tokenizer.bos_id is None else [tokenizer.bos_id]
