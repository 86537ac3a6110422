"""Answers to a file of prompts.

  python -m rlhf_jax.generate --model=DIR --input=prompts.jsonl --output=out.jsonl --samples=4 --temperature=0.7

A line is {"text": …}, which is gone on with as it stands, {"prompt": …} or {"messages": …}, which are put into the model's
chat template, or {"tokens": [ids]}, which needs no tokenizer. Added are `responses`, K texts; of a model without a tokenizer
`response_tokens`; with --logprobs both, and `logprobs`: natural logarithms under the sampling temperature, float32.
"""

import sys

import jax
import ml_collections

from rlhf_jax.commands import lines
from rlhf_jax.data import batches, encode
from rlhf_jax.errors import UserError
from rlhf_jax.generation import sampler


def main(arguments=None) -> int:
  """The exit code: 0 done, 2 a user's mistake."""
  parser = lines.parser('generate', __doc__)
  add = parser.add_argument
  add('--samples', type=int, default=1, metavar='K', help='answers to each prompt; default 1')
  add('--max_new_tokens', type=int, default=256, help='an answer is cut there; default 256')
  add('--temperature', type=float, default=1.0, help='0 = greedy; default 1')
  add('--top_k', type=int, default=0, help='choose among the k likeliest tokens; default all')
  add('--top_p', type=float, default=1.0, help='choose among the fewest tokens with this probability; default all')
  add('--seed', type=int, default=0)
  add('--logprobs', action='store_true', help='log-probabilities and token ids too')
  return lines.run(generate, parser.parse_args(arguments))


def generate(options) -> None:
  """Writes --output."""
  (rows, places), opened = lines.read(options.input), lines.open_model(options)
  tokenizer, B, K = opened.tokenizer, options.batch_size, options.samples
  if K < 1:
    raise UserError(f'--samples: expected 1 or more, got {K}')
  if opened.model.config.head:
    raise UserError(f'--model: {options.model} is a reward model: it scores, it does not answer')
  ids = lines.encode(rows, places, opened, whole=False, room=options.max_new_tokens)
  settings = {name: getattr(options, name) for name in sampler.DEFAULTS}
  stop, pad = (-1, 0) if tokenizer is None else (tokenizer.eos_id, tokenizer.pad_id)
  sample = sampler.build_sampler(opened.model, ml_collections.ConfigDict(settings), (stop,), pad, K, layout=opened.layout)

  def work(numbers, length, key):
    prompts, = batches.prompts_once([encode.left_padded(ids[number], length, pad, number) for number in numbers], B)
    samples = jax.device_get(sample(opened.params, opened.layout.place(prompts), key))
    made = []
    for row in range(len(numbers)):
      given = [(samples.tokens[i][samples.mask[i]].tolist(), samples.logprobs[i][samples.mask[i]])
               for i in range(row * K, (row + 1) * K)]
      added = {} if tokenizer is None else dict(responses=[tokenizer.decode(answer) for answer, _ in given])
      if tokenizer is None or options.logprobs:
        added['response_tokens'] = [answer for answer, _ in given]
      if options.logprobs:
        added['logprobs'] = [[lines.number(x) for x in values] for _, values in given]
      made.append(added)
    return made

  lines.process(options, dict(settings, command='generate', samples=K, seed=options.seed, logprobs=options.logprobs),
                rows, ids, work, lines.limit(opened.model.config, options.max_new_tokens))


if __name__ == '__main__':
  sys.exit(main())
