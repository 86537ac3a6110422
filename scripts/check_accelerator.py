"""Checks the project on an accelerator: limits, correctness, speed, memory.

  bash scripts/check_accelerator.sh OUT [--tiny]      # all steps, with time limits, and a table
  python scripts/check_accelerator.py STEP --out=OUT  # one of the steps below

Each result is a line of JSON in OUT/results.jsonl. The file is an experiment too, so that a plan
can be made of the very steps that are timed here:

  python -m rlhf_jax.plan --config=scripts/check_accelerator.py --topology=gpu:1xh100 --stage=sft

It runs anywhere; --tiny makes everything small enough for a CPU.

Letters: B rows, T places, H query heads, N key-value heads, C head_dim, P places of a prompt, R of
a response.
"""

import argparse
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import json
import os
from pathlib import Path
import re
import subprocess
import sys
import time
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from rlhf_jax import config as configs
from rlhf_jax import options as options_lib
from rlhf_jax import pipeline, planner, testing
from rlhf_jax.errors import UserError
from rlhf_jax.generation import sampler
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.models import attention, transformer
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.runtime import compilation, mesh
from rlhf_jax.runtime.mesh import Layout, MeshOptions
from rlhf_jax.stages import online_preference, policy_gradient, ppo, preference, reward, sft
from rlhf_jax.stages.shared import rollout, scores, training
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.model_store import ModelStore
from rlhf_jax.types import Params, Prompts, Sequences

HERE = Path(__file__).resolve()
SHAPES = {  # those of SmolLM2
  '360m': dict(embed=960, layers=32, heads=15, kv_heads=5, head_dim=64, mlp=2560),
  '1.7b': dict(embed=2048, layers=24, heads=32, kv_heads=32, head_dim=64, mlp=8192),
  'tiny': dict(embed=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=128),
}
EXACT = 1e-4  # two devices may differ by so much after a train step in float32
LENGTH = 7  # tokens of the responses of the train steps that are compared

Attend = Callable[..., jax.Array]  # (query, key, value, mask) → [B, T, H, C]


# The experiment that is timed and planned.


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment whose steps are timed and planned; tiny: a small shape, short rows."""
  config = ml_collections.ConfigDict()
  config.stages = ('sft', 'reward', 'ppo', 'grpo')
  config.model = dict(SHAPES['tiny' if tiny else '360m'], dtype='bfloat16', remat='dots')
  config.tokenizer = dict(vocab_size=256 if tiny else 49152)
  rows = 8 if tiny else 64
  length = 16 if tiny else 256  # of prompts, and of responses
  config.sft = dict(
    init='random',
    batch_size=8,
    max_length=(4 if tiny else 8) * length,
  )
  config.reward = dict(init='random', batch_size=8, max_length=2 * length)
  from_responses = dict(
    init='random',
    reference='random',
    reward=('random',),
    max_length=length,
    sampling=dict(max_new_tokens=length),
  )
  config.ppo = dict(
    from_responses,
    value='random',
    batch_size=rows,
    minibatches=2,
    epochs=1,
  )
  config.grpo = dict(
    from_responses,
    kind='policy_gradient',
    batch_size=rows // 4,
    num_samples=8,
    minibatches=4,
    advantage='standardised',
    reduce='sequence_mean',
    kl_place='loss',
  )
  return config


def shape_overrides(words: argparse.Namespace) -> list[str]:
  """Returns the overrides of the experiment that ask for the shape of --shape."""
  if words.tiny:
    return []
  return [f'model.{name}={value}' for name, value in SHAPES[words.shape].items()]


def make_context(stage: str, words: argparse.Namespace, overrides: list[str]) -> Context:
  """Opens a stage of the experiment above on the first device."""
  path = f'{HERE}:tiny' if words.tiny else str(HERE)
  workdir = words.out / 'work'
  config = pipeline.load_config(path, overrides)
  config = configs.resolve(config, workdir=workdir, data='')
  options = options_lib.from_section(MeshOptions, config.mesh)
  layout = mesh.make_layout(options, jax.devices()[:1])
  return Context(config, stage, workdir, layout, planner.open_tokenizer(config))


# Results.


def record(words: argparse.Namespace, step: str, **values: Any) -> None:
  """Appends a result to the file, and prints it."""
  device = jax.devices()[0].device_kind
  row = dict(step=step, device=device, jax=jax.__version__, tiny=words.tiny, **values)
  append_row(words, row)


def append_row(words: argparse.Namespace, row: dict[str, Any]) -> None:
  """Appends a line to OUT/results.jsonl at once, as the next step may be cut."""
  text = json.dumps(row, default=float) + '\n'
  with open(words.out / 'results.jsonl', 'a', encoding='utf-8') as file:
    file.write(text)
  print(text, end='', flush=True)


@contextlib.contextmanager
def recorded(words: argparse.Namespace, step: str, **values: Any) -> Iterator[dict[str, Any]]:
  """Records what the block adds to these values; an error is a result, and does not stop others.

  Yields:
    The dict to which results are added.
  """
  results: dict[str, Any] = {}
  try:
    yield results
  except Exception as error:  # a refusal of a kernel or too little memory, for example
    message = f'{type(error).__name__}: {error}'
    results = dict(error=message.splitlines()[0][:300])
  record(words, step, **values, **results)


def read_results(words: argparse.Namespace) -> list[dict[str, Any]]:
  """Reads what was recorded so far."""
  path = words.out / 'results.jsonl'
  if not path.is_file():
    return []
  return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def share_of_limit(words: argparse.Namespace, limit: str, value: float) -> float | None:
  """Returns which part of a limit a rate is; None where the step `limits` was not run."""
  measured = [
    row['value'] for row in read_results(words) if row['step'] == 'limits' and row['what'] == limit
  ]
  return value / measured[-1] if measured else None


def median_seconds(function: Callable[[], Any], repeats: int = 5, at_once: int = 1) -> float:
  """Times a call: the median of several, after one that compiles and one that warms up.

  Args:
    function: what is timed.
    repeats: how often.
    at_once: calls that are given to the device before any of them is waited for.

  Returns:
    Seconds of one call.
  """
  jax.block_until_ready(function())
  jax.block_until_ready(function())
  times = []
  for _ in range(repeats):
    began = time.perf_counter()
    last = [function() for _ in range(at_once)][-1]
    jax.block_until_ready(last)
    times.append((time.perf_counter() - began) / at_once)
  return float(np.median(times))


def first_seconds(function: Callable[[], Any]) -> float:
  """Times the first call of a function, which compiles it."""
  began = time.perf_counter()
  jax.block_until_ready(function())
  return time.perf_counter() - began


def peak_gib() -> float | None:
  """Returns how much of the device's memory this process has used at most; None if not known."""
  stats = jax.devices()[0].memory_stats() or {}
  peak = stats.get('peak_bytes_in_use')
  return None if peak is None else peak / 2**30


# Limits.


def check_limits(words: argparse.Namespace) -> None:
  """Measures matrix products and bandwidth on random data."""
  size = 256 if words.tiny else 8192
  count = 2**16 if words.tiny else 2**29
  for name, dtype, precision in (
    ('bfloat16', jnp.bfloat16, None),
    ('float32', jnp.float32, 'highest'),
    ('float32 as JAX has it', jnp.float32, 'default'),
  ):
    left, right = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    multiply = jax.jit(functools.partial(jnp.matmul, precision=precision))
    seconds = median_seconds(functools.partial(multiply, left, right), at_once=10)
    record(words, 'limits', what=name, value=2 * size**3 / seconds, unit='FLOP/s')
  x = jax.random.normal(jax.random.key(0), (count,))
  # A maximum reads every element and writes one.
  seconds = median_seconds(functools.partial(jax.jit(jnp.max), x), at_once=10)
  record(words, 'limits', what='read', value=x.nbytes / seconds, unit='B/s')
  increment = jax.jit(lambda x: x + 1)
  seconds = median_seconds(functools.partial(increment, x), at_once=10)
  record(words, 'limits', what='copy', value=2 * x.nbytes / seconds, unit='B/s')


# Correctness: attention.


def check_attention(words: argparse.Namespace) -> None:
  """Compares attention by the library, and the plain one in bfloat16, with exact float32."""
  T = 64 if words.tiny else 512
  for name, places, H, N, C, window in (
    ('causal, segments', T, 8, 8, 64, 0),
    ('grouped heads', T, 15, 5, 64, 0),
    ('window', T, 8, 4, 64, T // 4),
    ('heads of 128', T, 4, 2, 128, 0),
    ('short rows', 58, 4, 1, 32, 0),
    ('odd rows', 57, 4, 2, 32, 0),
    ('heads of 24', T, 4, 2, 24, 0),
  ):
    with recorded(words, 'attention', case=name, T=places) as results:
      results |= compare_attention(places, H, N, C, window)
  for name, changes, places in (
    ('cap, auto', dict(attention_cap=30.0), 64),
    ('cap, cudnn', dict(attention_cap=30.0, attention='cudnn'), 64),
    ('odd rows, auto', dict(), 57),
    ('windows, auto', dict(windows=(16, 0)), 64),
    ('float16, auto', dict(dtype='float16'), 64),
  ):
    with recorded(words, 'attention', case=f'model: {name}') as results:
      values: dict[str, Any] = {'dtype': 'bfloat16', **changes}
      config = dataclasses.replace(testing.MODEL_CONFIG, **values)
      platform = jax.default_backend()
      results['way'] = attention.choose_implementation(config, places, False, platform)
      results |= compare_models(config, places)


def library_attention() -> Attend:
  """Returns attention by the library: cuDNN's on a GPU, XLA's elsewhere."""
  implementation: Any = 'cudnn' if jax.default_backend() == 'gpu' else 'xla'
  return functools.partial(attention.attend_with_library, implementation=implementation)


def segments_of_every_kind(T: int) -> np.ndarray:
  """Makes segments [4, T]: whole, padded on the right, on the left, packed and padded."""
  segments = np.ones((4, T), np.int32)
  segments[1, 3 * T // 4 :] = 0
  segments[2, : T // 5] = 0
  segments[3, T // 3 :] = 2
  segments[3, 9 * T // 10 :] = 0
  return segments


def compare_attention(T: int, H: int, N: int, C: int, window: int) -> dict[str, float]:
  """Measures errors of output and gradients over real places, relative in norm."""
  rng = np.random.default_rng(0)
  segments = jnp.asarray(segments_of_every_kind(T))
  query, key, value, slope = (
    jnp.asarray(rng.normal(size=(4, T, heads, C)), jnp.bfloat16) for heads in (H, N, N, H)
  )
  mask = attention.causal_mask(segments, segments)
  if window:
    mask = mask & (attention.distances(T, T) < window)
  is_real = (segments > 0)[:, :, None, None]

  def run(attend: Attend, *inputs: jax.Array) -> tuple[jax.Array, ...]:
    out, backward = jax.vjp(lambda *inputs: attend(*inputs, mask), *inputs)
    slopes = jnp.where(is_real, slope, 0).astype(out.dtype)
    return (jnp.where(is_real, out, 0), *backward(slopes))

  plain = jax.jit(functools.partial(run, attention.attend))
  library = jax.jit(functools.partial(run, library_attention()))
  with jax.default_matmul_precision('highest'):
    exact = plain(*(x.astype(jnp.float32) for x in (query, key, value)))
  results = {}
  for name, compiled in (('library', library), ('plain', plain)):
    outputs = compiled(query, key, value)
    errors = [relative_error(a, b) for a, b in zip(outputs, exact, strict=True)]
    results[f'{name}_forward'] = errors[0]
    results[f'{name}_gradient'] = max(errors[1:])
  return results


def relative_error(got: jax.Array, want: jax.Array) -> float:
  """Computes ‖got − want‖ / ‖want‖."""
  got64 = np.asarray(got, np.float64)
  want64 = np.asarray(want, np.float64)
  error = float(np.linalg.norm(got64 - want64))
  return error / max(float(np.linalg.norm(want64)), 1e-30)


def compare_models(config: ModelConfig, T: int) -> dict[str, float]:
  """Measures how far hidden states and gradients of a model are from those in exact float32."""
  segments = segments_of_every_kind(T)
  tokens = np.random.default_rng(1).integers(2, config.vocab_size, segments.shape)
  positions = np.tile(np.arange(T, dtype=np.int32), (4, 1))
  exact_config = dataclasses.replace(config, dtype='float32', attention='plain')
  exact_model = transformer.build_model(exact_config)
  params = testing.make_params(exact_model)

  def run(model: transformer.Model) -> tuple[jax.Array, jax.Array]:
    def total(params: Params) -> tuple[jax.Array, jax.Array]:
      hidden, _ = model.apply(params, tokens.astype(np.int32), positions, segments)
      hidden = jnp.where(segments[..., None] > 0, hidden, 0).astype(jnp.float32)
      return jnp.sum(jnp.sin(hidden)), hidden

    gradients, hidden = jax.jit(jax.grad(total, has_aux=True))(params)
    leaves = [leaf.ravel() for leaf in jax.tree.leaves(gradients)]
    return hidden, jnp.concatenate(leaves)

  with jax.default_matmul_precision('highest'):
    want_hidden, want_gradients = run(exact_model)
  hidden, gradients = run(transformer.build_model(config))
  return dict(
    forward=relative_error(hidden, want_hidden),
    gradient=relative_error(gradients, want_gradients),
  )


# Correctness: train steps.


def check_stages(words: argparse.Namespace) -> None:
  """Compares one train step of each stage, tiny and in float32, with the same on the CPU."""
  cpu = mesh.make_layout(MeshOptions(), jax.devices('cpu')[:1])
  here = testing.make_layout()
  for name, take_step in STAGE_STEPS.items():
    want = None  # computed once for all precisions
    for precision in words.precision or ('highest', 'default'):
      with recorded(words, 'stages', stage=name, precision=precision) as results:
        if want is None:
          want = jax.device_get(take_step(cpu))
        with jax.default_matmul_precision(precision):
          got = jax.device_get(take_step(here))
        difference, place = largest_difference(got, want)
        results |= dict(difference=difference, where=place, right=difference < EXACT)


def largest_difference(got: Any, want: Any) -> tuple[float, str]:
  """Returns the largest |a − b| / (1 + |b|) of two trees, and its leaf; NaN is the largest."""
  largest = 0.0
  where = ''
  pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True)
  for (path, a), b in pairs:
    difference = float(np.max(np.abs(a - b) / (1 + np.abs(b))))
    if difference > largest or np.isnan(difference):
      largest = difference
      where = jax.tree_util.keystr(path)
    if np.isnan(difference):
      break
  return largest, where


def step_on_sequences(layout: Layout) -> Any:
  """Makes a step of pre-training and fine-tuning, on packed rows in two micro-batches."""
  segments = segments_of_every_kind(24).repeat(2, axis=0)
  tokens = np.random.default_rng(0).integers(2, 64, segments.shape).astype(np.int32)
  positions = np.tile(np.arange(24, dtype=np.int32), (len(segments), 1))
  begins = np.diff(segments, axis=1, prepend=0) != 0  # a first token is no target
  loss_mask = ((segments > 0) & ~begins).astype(np.float32)
  batch = make_sequences(tokens, positions, segments, loss_mask)
  return step_of_one_model(sft, sft.Options(microbatches=2), batch, layout)


def make_sequences(*fields: Any) -> Sequences:
  """Makes a batch of numpy arrays, which are annotated as what they become once placed."""
  return Sequences(*fields)


def step_of_reward(layout: Layout) -> Any:
  """Makes a step of the reward model."""
  return step_of_one_model(reward, reward.Options(), testing.make_rankings(ties=True), layout)


def step_of_preference(layout: Layout) -> Any:
  """Makes a step of DPO."""
  rankings = testing.make_rankings(ties=True)
  return step_of_one_model(preference, preference.Options(), rankings, layout)


def step_of_one_model(stage: ModuleType, options: Any, batch: Any, layout: Layout) -> Any:
  """Makes a step of a stage that trains one model: (parameters, metrics)."""
  definitions = testing.make_definitions(layout, learning_rate=3e-3)
  train_step = training.compile_train_step(stage.train_step, definitions, options)
  state, metrics = train_step(testing.make_state(definitions), batch)
  return state.params, metrics


def step_of_ppo(layout: Layout) -> Any:
  """Makes a step of PPO from made-up responses."""
  sampling = SamplingOptions(max_new_tokens=LENGTH)
  options = ppo.Options(minibatches=2, sampling=sampling)
  definitions = testing.make_ppo_definitions(layout)
  train_step = training.compile_train_step(ppo.train_step, definitions, options)
  reference = testing.make_params(definitions.model, layout, seed=5)
  state = testing.make_ppo_state(definitions, options)
  next_state, metrics = train_step(state, make_responses(32, 1), reference)
  return next_state.params, next_state.value_params, metrics


def step_of_policy_gradient(layout: Layout) -> Any:
  """Makes a step of GRPO from made-up responses."""
  options = policy_gradient.Options(
    batch_size=8,
    num_samples=4,
    advantage='standardised',
    reduce='sequence_mean',
    kl_place='loss',
    sampling=SamplingOptions(max_new_tokens=LENGTH),
  )
  definitions = testing.make_rollout_definitions(layout)
  train_step = training.compile_train_step(policy_gradient.train_step, definitions, options)
  reference = testing.make_params(definitions.model, layout, seed=5)
  state = testing.make_state(definitions)
  sampler_state = policy_gradient.SamplerState(**vars(state), sampler_trained={})
  next_state, metrics = train_step(sampler_state, make_responses(8, 4), reference)
  return next_state.params, metrics


def step_of_online_preference(layout: Layout) -> Any:
  """Makes a step of online DPO from made-up responses."""
  sampling = SamplingOptions(max_new_tokens=LENGTH)
  options = online_preference.Options(batch_size=8, num_samples=4, sampling=sampling)
  definitions = testing.make_rollout_definitions(layout)
  train_step = training.compile_train_step(online_preference.train_step, definitions, options)
  order_responses = functools.partial(
    online_preference.order_responses,
    definitions=definitions,
    options=options,
  )
  reference = testing.make_params(definitions.model, layout, seed=5)
  state = testing.make_state(definitions)
  prompts = testing.make_prompts(8)  # those of the responses: the same seed
  placed = layout.place((prompts, make_responses(8, 4)))
  rankings, rollout_metrics = jax.jit(order_responses)(state.params, reference, *placed)
  next_state, metrics = train_step(state, rankings)
  return next_state.params, metrics | rollout_metrics


def make_responses(prompts: int, num_samples: int) -> rollout.ScoredRollout:
  """Makes responses with scores, on the host: the step places them on its own device."""
  scored = testing.make_scored_rollout(prompts, num_samples, response_length=LENGTH)
  return jax.device_get(scored)


STAGE_STEPS = {
  'sft': step_on_sequences,
  'reward': step_of_reward,
  'preference': step_of_preference,
  'ppo': step_of_ppo,
  'policy_gradient': step_of_policy_gradient,
  'online_preference': step_of_online_preference,
}


# Correctness: the sampler.


def check_sampler(words: argparse.Namespace) -> None:
  """Compares the sampler's log-probabilities with those of the training forward."""
  config = dataclasses.replace(
    testing.MODEL_CONFIG,
    vocab_size=256,
    embed=64 if words.tiny else 256,
    layers=4,
    heads=8,
    kv_heads=4,
    head_dim=32,
    mlp=512,
  )
  for dtype, way, precision in (
    ('float32', 'auto', 'highest'),
    ('bfloat16', 'auto', 'highest'),
    ('bfloat16', 'plain', 'highest'),
    ('float32', 'auto', 'default'),
  ):
    values: dict[str, Any] = dict(dtype=dtype, attention=way)
    with recorded(words, 'sampler', **values, precision=precision) as results:
      with jax.default_matmul_precision(precision):
        results |= measure_sampler_gap(dataclasses.replace(config, **values))


def measure_sampler_gap(config: ModelConfig) -> dict[str, float]:
  """Measures the largest and the mean difference in nats over all tokens of responses."""
  R = 40
  layout = testing.make_layout()
  model = transformer.build_model(config, layout)
  params = testing.make_params(model, layout)
  prompts = layout.place(random_prompts(32, 24, config.vocab_size))
  generate = sampler.build_sampler(
    model,
    SamplingOptions(max_new_tokens=R),
    (testing.EOS_ID,),
    testing.PAD_ID,
    layout=layout,
  )
  samples = generate(params, prompts, jax.random.key(1))

  def forward(params: Params, sequences: Sequences) -> jax.Array:
    return rollout.forward_responses(model, params, sequences, R, 1.0).logprobs

  sequences = jax.jit(sampler.join_sequences)(prompts, samples)
  logprobs = jax.jit(forward)(params, sequences)
  gaps = np.abs(np.asarray(logprobs - samples.logprobs))[np.asarray(samples.mask)]
  return dict(largest=gaps.max(), mean=gaps.mean())


def random_prompts(B: int, P: int, vocab_size: int) -> Prompts:
  """Draws left-padded prompts of P / 2 to P tokens, as numpy arrays."""
  rng = np.random.default_rng(0)
  lengths = rng.integers(P // 2, P + 1, B)
  mask = np.arange(P) >= P - lengths[:, None]  # [B, P]
  tokens = np.where(mask, rng.integers(2, vocab_size, (B, P)), 0).astype(np.int32)
  fields: tuple[Any, ...] = (tokens, mask, np.arange(B, dtype=np.int32))
  return Prompts(*fields)


# Speed and memory.


def time_attention(words: argparse.Namespace) -> None:
  """Times attention, forward and backward, at the shapes of the train steps."""
  implementation: Any = 'cudnn' if jax.default_backend() == 'gpu' else 'xla'

  def causal_alone(query: jax.Array, key: jax.Array, value: jax.Array, mask: Any) -> jax.Array:
    del mask
    return jax.nn.dot_product_attention(
      query, key, value, is_causal=True, implementation=implementation
    )

  ways: dict[str, Attend] = {
    'plain': attention.attend,
    'library': library_attention(),
    'library, causal alone': causal_alone,
  }
  B = 2 if words.tiny else 8
  T = 32 if words.tiny else 2048
  for shape in ('tiny',) if words.tiny else ('360m', '1.7b'):
    H = SHAPES[shape]['heads']
    N = SHAPES[shape]['kv_heads']
    C = SHAPES[shape]['head_dim']
    inputs = [
      jax.random.normal(jax.random.key(number), (B, T, heads, C), jnp.bfloat16)
      for number, heads in enumerate((H, N, N))
    ]
    # The causal half; a backward pass is two and a half forward ones.
    flops = 3.5 * 4 * B * H * T * T * C / 2
    for name, attend in ways.items():
      with recorded(words, 'attention speed', shape=shape, way=name) as results:
        run = jax.jit(jax.grad(functools.partial(sum_of_squares, attend), (0, 1, 2)))
        seconds = median_seconds(functools.partial(run, *inputs), at_once=5)
        share = share_of_limit(words, 'bfloat16', flops / seconds)
        results |= dict(seconds=seconds, share=share)


def sum_of_squares(attend: Attend, *inputs: jax.Array) -> jax.Array:
  """Computes a number that depends on all of the output of causal attention."""
  segments = jnp.ones(inputs[0].shape[:2], jnp.int32)
  out = attend(*inputs, attention.causal_mask(segments, segments))
  return jnp.sum(out.astype(jnp.float32) ** 2)


def time_training(words: argparse.Namespace) -> None:
  """Times the train step of SFT, and measures its memory."""
  overrides = shape_overrides(words)
  overrides += [f'model.remat={words.remat}', f'model.attention={words.attention}']
  context = make_context('sft', words, overrides)
  options = context.read_options(sft.STAGE)
  trainable = training.open_trainable(context, options)
  definitions = trainable.definitions
  train_step = training.compile_train_step(sft.train_step, definitions, options)
  config = definitions.model.config
  B = options.batch_size
  T = options.max_length
  ones = np.ones((B, T), np.int32)
  tokens = np.random.default_rng(0).integers(2, config.vocab_size, (B, T)).astype(np.int32)
  positions = np.arange(T, dtype=np.int32) * ones
  loss_mask = ones.astype(np.float32)
  batch = context.layout.place(make_sequences(tokens, positions, ones, loss_mask))
  state = trainable.init()

  def train() -> dict[str, jax.Array]:
    nonlocal state  # each step donates the state before it
    state, metrics = train_step(state, batch)
    return metrics

  compiling = first_seconds(train)
  seconds = median_seconds(train, 3 if words.tiny else 8)
  count = transformer.parameter_count(definitions.model)
  # The causal half of 12 · L · H · C · T for each token.
  attention_flops = 6 * config.layers * config.heads * config.head_dim * T
  rate = B * T * (6 * count + attention_flops) / seconds
  record(
    words,
    'training',
    shape=words.shape,
    remat=words.remat,
    attention=words.attention,
    parameters=count,
    rows=B,
    length=T,
    seconds=seconds,
    compiling=compiling,
    tokens_per_second=B * T / seconds,
    flops_per_second=rate,
    share=share_of_limit(words, 'bfloat16', rate),
    peak_gib=peak_gib(),
    loss=float(train()['loss']),
  )


def time_decoding(words: argparse.Namespace) -> None:
  """Times decoding with unrolled layers, and with --scanned with scanned ones too."""
  context = make_context('sft', words, shape_overrides(words))
  opened = ModelStore(context).open('random')
  params = opened.read()
  for rows in words.rows:
    for scanned in (False, True) if words.scanned else (False,):
      with recorded(words, 'decoding', shape=words.shape, rows=rows, scanned=scanned) as results:
        results |= measure_decoding(words, context, opened.model, params, rows, scanned)


def measure_decoding(
  words: argparse.Namespace,
  context: Context,
  model: transformer.Model,
  params: Params,
  rows: int,
  scanned: bool,
) -> dict[str, Any]:
  """Measures a decoding step: all of a response less its first token, over the other tokens."""
  config = model.config
  P = 8 if words.tiny else 128
  R = P
  prompts = context.layout.place(random_prompts(rows, P, config.vocab_size))

  def time_rollout(length: int) -> tuple[float, float]:
    generate = sampler.build_sampler(
      model,
      SamplingOptions(max_new_tokens=length),
      (),  # no stop token
      0,
      unroll=False if scanned else None,
      layout=context.layout,
    )
    respond = functools.partial(generate, params, prompts, jax.random.key(1))
    compiling = first_seconds(respond)
    return compiling, median_seconds(respond, 3)

  _, prefill = time_rollout(1)
  compiling, total = time_rollout(R)
  seconds = (total - prefill) / (R - 1)
  width = jnp.dtype(config.dtype).itemsize
  places = rows * (P + R / 2)  # that are filled, on average
  cache_bytes = 2 * config.layers * config.kv_heads * config.head_dim * width * places
  rate = (transformer.parameter_count(model) * width + cache_bytes) / seconds
  return dict(
    prefill=prefill,
    step_seconds=seconds,
    compiling=compiling,
    new_tokens_per_second=rows / seconds,
    bytes_per_second=rate,
    share=share_of_limit(words, 'read', rate),
  )


def time_iteration(words: argparse.Namespace) -> None:
  """Times the phases of one step of PPO or GRPO, and measures its memory."""
  context = make_context(words.stage, words, [])
  stage: Any = ppo if words.stage == 'ppo' else policy_gradient
  options = context.read_options(stage.STAGE)
  parts = stage.define(context, options)
  state = parts.init()
  reference = parts.read_reference()
  score = scores.open_score(context, parts.store, 'random', options)
  vocab_size = parts.definitions.model.config.vocab_size
  prompts = context.layout.place(random_prompts(options.batch_size, options.max_length, vocab_size))

  def respond() -> Any:
    return parts.generate(state.params, prompts, jax.random.key(1))

  first_rollout = first_seconds(respond)
  samples = respond()
  N, R = samples.tokens.shape
  length = options.max_length + R
  values = dict(stage=words.stage, prompts=options.batch_size, responses=N, length=length)
  seconds = median_seconds(respond, 3)
  record(
    words,
    'iteration',
    **values,
    rollout=seconds,
    new_tokens_per_second=N * R / seconds,
    first_rollout=first_rollout,
  )
  scored_rows, _ = score(prompts, samples, ())
  seconds = median_seconds(lambda: score(prompts, samples, ())[0], 3)
  record(words, 'iteration', **values, scoring=seconds)

  scored = rollout.ScoredRollout(rollout.join_sequences(prompts, samples), samples, scored_rows)
  first_metrics: dict[str, Any] = {}

  def update() -> dict[str, jax.Array]:
    nonlocal state  # each update donates the state before it
    state, metrics = parts.update(state, scored, reference)
    if not first_metrics:  # those of the first update: later ones are of older responses
      first_metrics.update(metrics)
    return metrics

  seconds = median_seconds(update, 3)
  shown = ('policy/sampler_gap', 'policy/first_ratio', 'loss', 'kl')
  record(
    words,
    'iteration',
    **values,
    update=seconds,
    update_tokens_per_second=N * length / seconds,
    peak_gib=peak_gib(),
    **{name.replace('/', '_'): float(first_metrics[name]) for name in shown},
  )


# Plans, and what the shell script asks for.


def make_plans(words: argparse.Namespace) -> None:
  """Plans the steps that are timed for the card of --card, by the compiler or by shapes."""
  cards = [name for name in ('a100', 'h100', 'h200') if name in words.card.lower()]
  card = cards[0] if cards else 'h100'
  larger = [f'model.{name}={value}' for name, value in SHAPES['1.7b'].items()]
  plans: dict[str, tuple[str, list[str]]] = {
    'sft-360m': ('sft', []),
    'sft-1.7b': ('sft', larger),
    'ppo': ('ppo', []),
    'grpo': ('grpo', []),
  }
  if words.tiny:
    del plans['sft-1.7b']
  for name, (stage, overrides) in plans.items():
    path = words.out / f'plan-{name}.json'
    if path.is_file():
      continue
    command = [
      sys.executable,
      '-m',
      'rlhf_jax.plan',
      f'--config={HERE}:tiny' if words.tiny else f'--config={HERE}',
      f'--topology=gpu:1x{card}',
      f'--stage={stage}',
      f'--json={path}',
      *(f'--config.{override}' for override in overrides),
    ]
    if words.analytic:
      command.append('--analytic')
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    subprocess.run(command, check=False, env=environment)


def note_command(words: argparse.Namespace) -> None:
  """Records how a command of the shell script ended: --what=NAME --code=N --took=SECONDS."""
  log = words.out / f'{words.what}.log'
  text = log.read_text(encoding='utf-8', errors='replace') if log.is_file() else ''
  telling = re.findall(r'^(?:rlhf_jax: error|\S*Error|seconds).*$', text, re.MULTILINE)
  row = dict(
    step='command',
    what=words.what,
    code=words.code,
    seconds=words.took,
    tiny=words.tiny,
    said=telling[-1][:300] if telling else '',
  )
  append_row(words, row)


def print_table(words: argparse.Namespace) -> None:
  """Prints everything that was recorded, a line each, and the plans."""
  hidden = ('step', 'device', 'jax', 'tiny')
  rows = read_results(words)
  devices = sorted({f'{row["device"]}, jax {row["jax"]}' for row in rows if 'device' in row})
  print('\n' + '; '.join(devices))
  for row in rows:
    shown = [
      f'{name}={format_value(value)}'
      for name, value in row.items()
      if name not in hidden and value is not None
    ]
    print(f'{row["step"]:16}', *shown)
  for path in sorted(words.out.glob('plan-*.json')):
    plan = json.loads(path.read_text(encoding='utf-8'))
    how = 'compiled' if plan['compiled'] else 'by shapes'
    for stage in plan['plans'][0]['stages']:
      print(
        f'{"plan":16} {path.stem.removeprefix("plan-")} {how} '
        f'peak_gib={stage["peak"] / 2**30:.2f} resident_gib={stage["resident"] / 2**30:.2f} '
        f'seconds={stage["seconds"]:.3g}'
      )


def format_value(value: Any) -> str:
  """Returns a value as text, a number with few digits."""
  return f'{value:.4g}' if isinstance(value, float) else str(value)


STEPS = {
  'limits': check_limits,
  'attention': check_attention,
  'stages': check_stages,
  'sampler': check_sampler,
  'attention_speed': time_attention,
  'training': time_training,
  'decoding': time_decoding,
  'iteration': time_iteration,
  'plan': make_plans,
  'note': note_command,
  'table': print_table,
}


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the command."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  add = parser.add_argument
  add('step', choices=STEPS)
  add('--out', type=Path, required=True, help='folder of results.jsonl')
  add('--tiny', action='store_true', help='small enough for a CPU')
  add('--shape', default='360m', choices=SHAPES, help='of training and decoding')
  add('--remat', default='dots', help='of training')
  add('--attention', default='auto', help='of training')
  add('--precision', nargs='+', help='of stages: of products of float32')
  add('--rows', type=int, nargs='+', default=[64, 256], help='of decoding')
  add('--scanned', action='store_true', help='of decoding: scanned layers too')
  add('--stage', default='ppo', choices=('ppo', 'grpo'), help='of iteration')
  add('--card', default='', help='of plan: its name')
  add('--analytic', action='store_true', help='of plan: by shapes alone')
  add('--what', default='', help='of note: what ran')
  add('--code', type=int, default=0, help='of note: its exit code')
  add('--took', type=float, default=0.0, help='of note: its seconds')
  return parser


def main() -> int:
  """Runs a step; returns the exit code."""
  words = make_parser().parse_args()
  words.out.mkdir(parents=True, exist_ok=True)
  compilation.request_exact_products()
  try:
    STEPS[words.step](words)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())
