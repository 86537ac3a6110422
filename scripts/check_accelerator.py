"""Checks the project on an accelerator: its limits, and correctness, speed and memory.

  bash scripts/check_accelerator.sh OUT [--tiny]      # all checks, with time limits, and a table
  python scripts/check_accelerator.py STEP --out=OUT  # one of the checks in STEPS below

Each result is a line of JSON in OUT/results.jsonl. This file is also an experiment, so that exactly
the train steps that are timed here can be planned:

  python -m rlhf_jax.plan --config=scripts/check_accelerator.py --topology=gpu:1xh100 --stage=sft

It runs on any machine; --tiny makes everything small enough for a CPU.

Shape letters: B rows, T length of a row, H query heads, N key-value heads, C head_dim, P length of
a prompt, R length of a response.
"""

import argparse
import collections
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import fcntl
import functools
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import tempfile
import time
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from rlhf_jax import options as options_lib
from rlhf_jax import testing
from rlhf_jax.errors import UserError
from rlhf_jax.experiment import config as configs
from rlhf_jax.experiment import pipeline, planner
from rlhf_jax.generation import sampler
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.models import attention, decode_attention, transformer
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.runtime import compilation, mesh
from rlhf_jax.runtime.mesh import Layout, MeshOptions
from rlhf_jax.stages import online_preference, policy_gradient, ppo, preference, reward, sft
from rlhf_jax.stages.shared import off_policy, rollout, scores, training
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.model_store import ModelStore
from rlhf_jax.types import Params, Prompts, Samples, Sequences

HERE = Path(__file__).resolve()
SHAPES = {  # those of SmolLM2
  '360m': dict(embed=960, layers=32, heads=15, kv_heads=5, head_dim=64, mlp=2560),
  '1.7b': dict(embed=2048, layers=24, heads=32, kv_heads=32, head_dim=64, mlp=8192),
  'tiny': dict(embed=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=128),
}
TOLERANCE = 1e-4  # of a float32 train step on two kinds of devices, see largest_difference
LENGTH = 7  # R in the train steps that are compared

Attend = Callable[..., jax.Array]  # (query, key, value, mask) → [B, T, H, C]


# The experiment that is timed and planned.


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment that is timed and planned; `tiny` makes the model and lengths small."""
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


def shape_overrides(args: argparse.Namespace) -> list[str]:
  """Returns the overrides that give the experiment the model shape of --shape."""
  if args.tiny:
    return []
  return [f'model.{name}={value}' for name, value in SHAPES[args.shape].items()]


def make_context(stage: str, args: argparse.Namespace, overrides: list[str]) -> Context:
  """Makes the context of a stage of the experiment above, on the first device."""
  path = f'{HERE}:tiny' if args.tiny else str(HERE)
  workdir = args.out / 'work'
  config = pipeline.load_config(path, overrides)
  config = configs.resolve(config, workdir=workdir, data='')
  options = options_lib.from_section(MeshOptions, config.mesh)
  layout = mesh.make_layout(options, jax.devices()[:1])
  return Context(config, stage, workdir, layout, planner.open_tokenizer(config))


# Results.


def record(args: argparse.Namespace, step: str, **values: Any) -> None:
  """Prints a result and appends it to OUT/results.jsonl."""
  device = jax.devices()[0].device_kind
  row = dict(step=step, device=device, jax=jax.__version__, tiny=args.tiny, **values)
  append_row(args, row)


def append_row(args: argparse.Namespace, row: dict[str, Any]) -> None:
  """Prints a row and appends it to OUT/results.jsonl at once, as the process may be killed."""
  text = json.dumps(row, default=float) + '\n'
  with open(args.out / 'results.jsonl', 'a', encoding='utf-8') as file:
    file.write(text)
  print(text, end='', flush=True)


@contextlib.contextmanager
def recorded(args: argparse.Namespace, step: str, **values: Any) -> Iterator[dict[str, Any]]:
  """Records the results of the block; an exception is recorded as `error` and not raised.

  Args:
    args: the parsed arguments.
    step: the name of the check.
    **values: what distinguishes this result from others of the check.

  Yields:
    A dict to which the block adds its results.
  """
  results: dict[str, Any] = {}
  try:
    yield results
  except Exception as error:  # for example, an unsupported kernel or too little memory
    message = f'{type(error).__name__}: {error}'
    results = dict(error=message.splitlines()[0][:300])
  record(args, step, **values, **results)


def read_results(args: argparse.Namespace) -> list[dict[str, Any]]:
  """Reads the results that were recorded so far."""
  path = args.out / 'results.jsonl'
  if not path.is_file():
    return []
  return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def share_of_limit(args: argparse.Namespace, limit: str, value: float) -> float | None:
  """Returns a rate as a share of a measured limit; None if the check `limits` was not run."""
  measured = [
    row['value'] for row in read_results(args) if row['step'] == 'limits' and row['what'] == limit
  ]
  return value / measured[-1] if measured else None


@contextlib.contextmanager
def alone(args: argparse.Namespace) -> Iterator[None]:
  """Pauses the other commands of the shell script while the block runs.

  So programs can be compiled in parallel, and each is still timed alone on the machine.
  OUT/groups has a file for each command, named by its process group.
  """
  with open(args.out / 'lock', 'w', encoding='utf-8') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    signal_others(args, signal.SIGSTOP)
    time.sleep(0.2)  # kernels that others have started come to their end
    try:
      yield
    finally:
      signal_others(args, signal.SIGCONT)


def signal_others(args: argparse.Namespace, number: signal.Signals) -> None:
  """Sends a signal to the process groups of all commands but this one."""
  for path in (args.out / 'groups').glob('*'):
    group = int(path.name)
    if group != os.getpgrp():
      with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def median_seconds(
  args: argparse.Namespace,
  function: Callable[[], Any],
  repeats: int = 5,
  at_once: int = 1,
) -> float:
  """Measures the median time of a call, after one call that compiles and one that warms up.

  Args:
    args: the parsed arguments.
    function: what is timed.
    repeats: the number of measurements.
    at_once: calls of one measurement, dispatched without waiting between them.

  Returns:
    The seconds of one call.
  """
  jax.block_until_ready(function())
  times = []
  with alone(args):
    jax.block_until_ready(function())
    for _ in range(repeats):
      began = time.perf_counter()
      last = [function() for _ in range(at_once)][-1]
      jax.block_until_ready(last)
      times.append((time.perf_counter() - began) / at_once)
  return float(np.median(times))


def record_kernels(args: argparse.Namespace, what: str, function: Callable[[], Any]) -> None:
  """Records which kernels a call spends its time in: the first 40, with the times each ran."""
  with tempfile.TemporaryDirectory() as folder:
    with alone(args), jax.profiler.trace(folder):
      jax.block_until_ready(function())
    (path,) = Path(folder).rglob('*.xplane.pb')
    profile = jax.profiler.ProfileData.from_file(str(path))
  seconds: dict[str, float] = collections.defaultdict(float)
  counts: dict[str, int] = collections.defaultdict(int)
  streams = [
    line
    for plane in profile.planes
    if plane.name.startswith('/device:GPU')
    for line in plane.lines
    if line.name.startswith('Stream')
  ]
  for line in streams:
    for event in line.events:
      seconds[event.name] += event.duration_ns * 1e-9
      counts[event.name] += 1
  slowest = sorted(seconds, key=seconds.__getitem__, reverse=True)[:40]
  append_row(
    args,
    dict(
      step='kernels',
      what=what,
      busy=sum(seconds.values()),
      kernels=sum(counts.values()),
      slowest=[[name[:90], round(seconds[name] * 1e3, 3), counts[name]] for name in slowest],
    ),
  )


def first_seconds(function: Callable[[], Any]) -> float:
  """Times the first call of a function, which compiles it."""
  began = time.perf_counter()
  jax.block_until_ready(function())
  return time.perf_counter() - began


def peak_gib() -> float | None:
  """Returns this process's peak of device memory in GiB; None if the device does not report it."""
  stats = jax.devices()[0].memory_stats() or {}
  peak = stats.get('peak_bytes_in_use')
  return None if peak is None else peak / 2**30


# Limits.


def check_limits(args: argparse.Namespace) -> None:
  """Measures the FLOP/s of matrix products and the bandwidth of the memory, on random data."""
  size = 256 if args.tiny else 8192
  count = 2**16 if args.tiny else 2**29
  for name, dtype, precision in (
    ('bfloat16', jnp.bfloat16, None),
    ('float32', jnp.float32, 'highest'),
    ('float32, default precision', jnp.float32, 'default'),
  ):
    left, right = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    multiply = jax.jit(functools.partial(jnp.matmul, precision=precision))
    seconds = median_seconds(args, functools.partial(multiply, left, right), at_once=10)
    record(args, 'limits', what=name, value=2 * size**3 / seconds, unit='FLOP/s')
  x = jax.random.normal(jax.random.key(0), (count,))
  # A maximum reads every element and writes only one.
  seconds = median_seconds(args, functools.partial(jax.jit(jnp.max), x), at_once=10)
  record(args, 'limits', what='read', value=x.nbytes / seconds, unit='B/s')
  increment = jax.jit(lambda x: x + 1)
  seconds = median_seconds(args, functools.partial(increment, x), at_once=10)
  record(args, 'limits', what='copy', value=2 * x.nbytes / seconds, unit='B/s')


# Correctness: attention.


def check_attention(args: argparse.Namespace) -> None:
  """Compares library attention and plain attention in bfloat16 with plain attention in float32."""
  T = 64 if args.tiny else 512
  for name, length, H, N, C, window in (
    ('causal, segments', T, 8, 8, 64, 0),
    ('grouped heads', T, 15, 5, 64, 0),
    ('window', T, 8, 4, 64, T // 4),
    ('heads of 128', T, 4, 2, 128, 0),
    ('short rows', 58, 4, 1, 32, 0),
    ('odd rows', 57, 4, 2, 32, 0),
    ('heads of 24', T, 4, 2, 24, 0),
  ):
    with recorded(args, 'attention', case=name, T=length) as results:
      results |= compare_attention(length, H, N, C, window)
  for name, H, N, C in (('grouped heads', 15, 5, 64), ('heads of 128', 8, 8, 128)):
    with recorded(args, 'attention', case=f'decoding: {name}') as results:
      results |= compare_decoding(H, N, C, interpret=jax.default_backend() != 'gpu')
  for name, changes, length in (
    ('cap, auto', dict(attention_cap=30.0), 64),
    ('cap, cudnn', dict(attention_cap=30.0, attention='cudnn'), 64),
    ('odd rows, auto', dict(), 57),
    ('windows, auto', dict(windows=(16, 0)), 64),
    ('float16, auto', dict(dtype='float16'), 64),
  ):
    with recorded(args, 'attention', case=f'model: {name}') as results:
      values: dict[str, Any] = {'dtype': 'bfloat16', **changes}
      config = dataclasses.replace(testing.MODEL_CONFIG, **values)
      platform = jax.default_backend()
      chosen = attention.choose_implementation(config, length, False, platform)
      results['implementation'] = chosen
      results |= compare_models(config, segments_of_every_kind(length))
  with recorded(args, 'attention', case='model: one text in each row') as results:
    config = dataclasses.replace(testing.MODEL_CONFIG, dtype='bfloat16')
    segments = segments_of_every_kind(64)[[0, 1]]  # the full row, and padding on the right
    results |= compare_models(config, segments)


def compare_decoding(H: int, N: int, C: int, interpret: bool) -> dict[str, float]:
  """Measures the relative errors of the decoding kernel, and of plain attention in bfloat16.

  Args:
    H: query heads.
    N: key-value heads.
    C: head_dim.
    interpret: whether to interpret the kernel.
  """
  B, S = 8, 300
  keys = jax.random.split(jax.random.key(0), 3)
  query = jax.random.normal(keys[0], (B, 1, H, C), jnp.bfloat16)
  key, value = (jax.random.normal(k, (B, N, S, C), jnp.bfloat16) for k in keys[1:])
  begins = jnp.arange(B)[:, None] * 30
  places = jnp.arange(S)
  mask = (places >= begins) & (places < begins + 80) & (places % 7 > 0)
  filled = decode_attention.filled_range(mask)
  kernel = functools.partial(decode_attention.attend_one, interpret=interpret)
  exact = attention.attend_to_cache(
    *(x.astype(jnp.float32) for x in (query, key, value)), mask[:, None]
  )
  results = dict(
    forward=kernel(query, key, value, mask, filled),
    plain_forward=attention.attend_to_cache(query, key, value, mask[:, None]),
  )
  return {
    name: float(jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact))
    for name, out in results.items()
  }


def library_attention() -> Attend:
  """Returns the attention of a library: cuDNN's on a GPU, XLA's elsewhere."""
  implementation: Any = 'cudnn' if jax.default_backend() == 'gpu' else 'xla'

  def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    mask = attention.mask_for_library(mask)
    return attention.attend_with_library(query, key, value, mask, None, None, implementation)

  return attend


def segments_of_every_kind(T: int) -> np.ndarray:
  """Makes segment ids [4, T]: a full row, right padding, left padding, and packed with padding."""
  segments = np.ones((4, T), np.int32)
  segments[1, 3 * T // 4 :] = 0
  segments[2, : T // 5] = 0
  segments[3, T // 3 :] = 2
  segments[3, 9 * T // 10 :] = 0
  return segments


def compare_attention(T: int, H: int, N: int, C: int, window: int) -> dict[str, float]:
  """Measures the relative errors of output and gradients, outside padding.

  Args:
    T: length of a row.
    H: query heads.
    N: key-value heads.
    C: head_dim.
    window: of sliding-window attention; 0 = none.

  Returns:
    '{library or plain}_{forward or gradient}' → relative error, in the Euclidean norm.
  """
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


def compare_models(config: ModelConfig, segments: np.ndarray) -> dict[str, float]:
  """Measures the relative errors of a model's hidden states and gradients against float32."""
  tokens = np.random.default_rng(1).integers(2, config.vocab_size, segments.shape)
  positions = np.tile(np.arange(segments.shape[1], dtype=np.int32), (len(segments), 1))
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


def check_stages(args: argparse.Namespace) -> None:
  """Compares one tiny float32 train step of each stage with the same step on the CPU."""
  cpu = mesh.make_layout(MeshOptions(), jax.devices('cpu')[:1])
  here = testing.make_layout()
  for name, take_step in STAGE_STEPS.items():
    want = None  # computed once for all precisions
    for precision in args.precision or ('highest', 'default'):
      with recorded(args, 'stages', stage=name, precision=precision) as results:
        if want is None:
          want = jax.device_get(take_step(cpu))
        with jax.default_matmul_precision(precision):
          got = jax.device_get(take_step(here))
        difference, place = largest_difference(got, want)
        results |= dict(difference=difference, where=place, right=difference < TOLERANCE)


def largest_difference(got: Any, want: Any) -> tuple[float, str]:
  """Returns the largest |a − b| / (1 + |b|) of two trees, and its leaf; NaN counts as largest."""
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
  """Runs a step of pre-training or SFT, on packed rows in two microbatches."""
  segments = segments_of_every_kind(24).repeat(2, axis=0)
  tokens = np.random.default_rng(0).integers(2, 64, segments.shape).astype(np.int32)
  positions = np.tile(np.arange(24, dtype=np.int32), (len(segments), 1))
  begins = np.diff(segments, axis=1, prepend=0) != 0  # the first token of a segment is no target
  loss_mask = ((segments > 0) & ~begins).astype(np.float32)
  batch = make_sequences(tokens, positions, segments, loss_mask)
  return step_of_one_model(sft, sft.Options(microbatches=2), batch, layout)


def make_sequences(*fields: Any) -> Sequences:
  """Makes a batch from numpy arrays; Any, as the fields are annotated as jax.Array."""
  return Sequences(*fields)


def step_of_reward(layout: Layout, packed_rows: int = 0) -> Any:
  """Runs a step of the reward model."""
  options = reward.Options(packed_rows=packed_rows)
  return step_of_one_model(reward, options, testing.make_rankings(ties=True), layout)


def step_of_preference(layout: Layout, packed_rows: int = 0) -> Any:
  """Runs a step of DPO."""
  rankings = testing.make_rankings(ties=True)
  options = preference.Options(packed_rows=packed_rows)
  return step_of_one_model(preference, options, rankings, layout)


def step_of_one_model(stage: ModuleType, options: Any, batch: Any, layout: Layout) -> Any:
  """Runs a step of a stage that trains one model; returns (parameters, metrics)."""
  definitions = testing.make_definitions(layout, learning_rate=3e-3)
  train_step = training.compile_train_step(stage.train_step, definitions, options)
  state, metrics = train_step(testing.make_state(definitions), batch)
  return state.params, metrics


def step_of_ppo(layout: Layout, packed_rows: int = 0) -> Any:
  """Runs a step of PPO on random responses."""
  sampling = SamplingOptions(max_new_tokens=LENGTH)
  options = ppo.Options(minibatches=2, sampling=sampling, packed_rows=packed_rows)
  definitions = testing.make_ppo_definitions(layout)
  train_step = training.compile_train_step(ppo.train_step, definitions, options)
  reference = testing.make_params(definitions.model, layout, seed=5)
  state = testing.make_ppo_state(definitions, options)
  next_state, metrics = train_step(state, make_responses(32, 1), reference)
  return next_state.params, next_state.value_params, metrics


def step_of_policy_gradient(layout: Layout, packed_rows: int = 0) -> Any:
  """Runs a step of GRPO on random responses."""
  options = policy_gradient.Options(
    batch_size=8,
    num_samples=4,
    advantage='standardised',
    reduce='sequence_mean',
    kl_place='loss',
    sampling=SamplingOptions(max_new_tokens=LENGTH),
    packed_rows=packed_rows,
  )
  definitions = testing.make_rollout_definitions(layout)
  train_step = training.compile_train_step(policy_gradient.train_step, definitions, options)
  reference = testing.make_params(definitions.model, layout, seed=5)
  state = testing.make_state(definitions)
  sampler_state = off_policy.SamplerState(**vars(state), sampler_trained={})
  next_state, metrics = train_step(sampler_state, make_responses(8, 4), reference)
  return next_state.params, metrics


def step_of_online_preference(layout: Layout) -> Any:
  """Runs a step of online DPO on random responses."""
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
  prompts = testing.make_prompts(8)  # the prompts of make_responses, as the seed is the same
  placed = layout.place((prompts, make_responses(8, 4)))
  rankings, rollout_metrics = jax.jit(order_responses)(state.params, reference, *placed)
  next_state, metrics = train_step(state, rankings)
  return next_state.params, metrics | rollout_metrics


def make_responses(prompts: int, num_samples: int) -> rollout.ScoredRollout:
  """Makes random responses with scores, as numpy arrays, so that a step can use any device."""
  scored = testing.make_scored_rollout(prompts, num_samples, response_length=LENGTH)
  return jax.device_get(scored)


STAGE_STEPS = {
  'sft': step_on_sequences,
  'reward': step_of_reward,
  'reward, packed': functools.partial(step_of_reward, packed_rows=4),
  'preference': step_of_preference,
  'preference, packed': functools.partial(step_of_preference, packed_rows=4),
  'ppo': step_of_ppo,
  'ppo, packed': functools.partial(step_of_ppo, packed_rows=4),
  'policy_gradient': step_of_policy_gradient,
  'policy_gradient, packed': functools.partial(step_of_policy_gradient, packed_rows=4),
  'online_preference': step_of_online_preference,
}


# Correctness: the sampler.


def check_sampler(args: argparse.Namespace) -> None:
  """Compares the sampler's log-probabilities with those of the training forward pass."""
  config = dataclasses.replace(
    testing.MODEL_CONFIG,
    vocab_size=256,
    embed=64 if args.tiny else 256,
    layers=4,
    heads=8,
    kv_heads=4,
    head_dim=32,
    mlp=512,
  )
  for dtype, implementation, precision in (
    ('float32', 'auto', 'highest'),
    ('bfloat16', 'auto', 'highest'),
    ('bfloat16', 'plain', 'highest'),
    ('float32', 'auto', 'default'),
  ):
    values: dict[str, Any] = dict(dtype=dtype, attention=implementation)
    with recorded(args, 'sampler', **values, precision=precision) as results:
      with jax.default_matmul_precision(precision):
        results |= measure_sampler_gap(dataclasses.replace(config, **values))


def measure_sampler_gap(config: ModelConfig) -> dict[str, float]:
  """Measures the largest and the mean difference, in nats, over all response tokens.

  `sampler_rounding` and `forward_rounding` are the mean differences of both from an exact
  float32 forward pass.
  """
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

  def forward(model: transformer.Model, params: Params, sequences: Sequences) -> jax.Array:
    return rollout.forward_responses(model, params, sequences, R, 1.0).logprobs

  def differences(a: jax.Array, b: jax.Array) -> np.ndarray:
    return np.abs(np.asarray(a - b))[np.asarray(samples.mask)]

  sequences = jax.jit(sampler.join_sequences)(prompts, samples)
  logprobs = jax.jit(functools.partial(forward, model))(params, sequences)
  exact_config = dataclasses.replace(config, dtype='float32', attention='plain')
  exact_model = transformer.build_model(exact_config, layout)
  with jax.default_matmul_precision('highest'):
    exact = jax.jit(functools.partial(forward, exact_model))(params, sequences)
  gaps = differences(logprobs, samples.logprobs)
  return dict(
    largest=gaps.max(),
    mean=gaps.mean(),
    sampler_rounding=differences(samples.logprobs, exact).mean(),
    forward_rounding=differences(logprobs, exact).mean(),
  )


def random_prompts(B: int, P: int, vocab_size: int) -> Prompts:
  """Makes random left-padded prompts of P / 2 to P tokens, as numpy arrays."""
  rng = np.random.default_rng(0)
  lengths = rng.integers(P // 2, P + 1, B)
  mask = np.arange(P) >= P - lengths[:, None]  # [B, P]
  tokens = np.where(mask, rng.integers(2, vocab_size, (B, P)), 0).astype(np.int32)
  fields: tuple[Any, ...] = (tokens, mask, np.arange(B, dtype=np.int32))
  return Prompts(*fields)


# Speed and memory.


def time_attention(args: argparse.Namespace) -> None:
  """Times attention, forward and backward, at the shapes of the timed train steps."""
  implementation: Any = 'cudnn' if jax.default_backend() == 'gpu' else 'xla'

  def causal_only(query: jax.Array, key: jax.Array, value: jax.Array, mask: Any) -> jax.Array:
    del mask  # is_causal=True may use a faster kernel than an explicit mask
    return jax.nn.dot_product_attention(
      query, key, value, is_causal=True, implementation=implementation
    )

  implementations: dict[str, Attend] = {
    'plain': attention.attend,
    'library': library_attention(),
    'library, only causal': causal_only,
  }
  B = 2 if args.tiny else 8
  T = 32 if args.tiny else 2048
  for shape in ('tiny',) if args.tiny else ('360m', '1.7b'):
    H = SHAPES[shape]['heads']
    N = SHAPES[shape]['kv_heads']
    C = SHAPES[shape]['head_dim']
    inputs = [
      jax.random.normal(jax.random.key(number), (B, T, heads, C), jnp.bfloat16)
      for number, heads in enumerate((H, N, N))
    ]
    # Half of all pairs, as attention is causal; a backward pass is two and a half forward passes.
    flops = 3.5 * 4 * B * H * T * T * C / 2
    for name, attend in implementations.items():
      with recorded(args, 'attention speed', shape=shape, implementation=name) as results:
        run = jax.jit(jax.grad(functools.partial(sum_of_squares, attend), (0, 1, 2)))
        seconds = median_seconds(args, functools.partial(run, *inputs), at_once=5)
        share = share_of_limit(args, 'bfloat16', flops / seconds)
        results |= dict(seconds=seconds, share=share)


def sum_of_squares(attend: Attend, *inputs: jax.Array) -> jax.Array:
  """Computes the sum of squares of the output of causal attention, as a loss to differentiate."""
  segments = jnp.ones(inputs[0].shape[:2], jnp.int32)
  out = attend(*inputs, attention.causal_mask(segments, segments))
  return jnp.sum(out.astype(jnp.float32) ** 2)


def time_training(args: argparse.Namespace) -> None:
  """Times the train step of SFT, and measures its memory."""
  overrides = shape_overrides(args)
  overrides += [f'model.remat={args.remat}', f'model.attention={args.attention}']
  context = make_context('sft', args, overrides)
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
  seconds = median_seconds(args, train, 3 if args.tiny else 8)
  count = transformer.parameter_count(definitions.model)
  # For each token 12 · layers · heads · head_dim · length, halved by the causal mask.
  attention_flops = 6 * config.layers * config.heads * config.head_dim * T
  rate = B * T * (6 * count + attention_flops) / seconds
  record(
    args,
    'training',
    shape=args.shape,
    remat=args.remat,
    attention=args.attention,
    parameters=count,
    rows=B,
    length=T,
    seconds=seconds,
    compiling=compiling,
    tokens_per_second=B * T / seconds,
    flops_per_second=rate,
    share=share_of_limit(args, 'bfloat16', rate),
    peak_gib=peak_gib(),
    loss=float(train()['loss']),
  )
  record_kernels(args, f'training {args.shape} {args.remat} {args.attention}', train)


def time_decoding(args: argparse.Namespace) -> None:
  """Times decoding with unrolled layers; --scanned also times it with scanned layers."""
  context = make_context('sft', args, shape_overrides(args))
  opened = ModelStore(context).open('random')
  params = opened.read()
  for rows in args.rows:
    for scanned in (False, True) if args.scanned else (False,):
      with recorded(args, 'decoding', shape=args.shape, rows=rows, scanned=scanned) as results:
        results |= measure_decoding(args, context, opened.model, params, rows, scanned)


def measure_decoding(
  args: argparse.Namespace,
  context: Context,
  model: transformer.Model,
  params: Params,
  rows: int,
  scanned: bool,
) -> dict[str, Any]:
  """Measures the time of a decoding step.

  That is the time of R tokens less the time of one token (mainly the prefill), divided by
  R − 1.
  """
  config = model.config
  P = 8 if args.tiny else 128
  R = P
  prompts = context.layout.place(random_prompts(rows, P, config.vocab_size))

  def time_rollout(length: int) -> tuple[float, float, Callable[[], Any]]:
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
    return compiling, median_seconds(args, respond, 3), respond

  _, prefill, _ = time_rollout(1)
  compiling, total, respond = time_rollout(R)
  seconds = (total - prefill) / (R - 1)
  width = jnp.dtype(config.dtype).itemsize
  # of the cache that are filled, on average; not the padding of prompts
  positions = float(prompts.mask.sum()) + rows * R / 2
  cache_bytes = 2 * config.layers * config.kv_heads * config.head_dim * width * positions
  rate = (transformer.parameter_count(model) * width + cache_bytes) / seconds
  record_kernels(args, f'decoding {args.shape} {rows}', respond)
  return dict(
    prefill=prefill,
    step_seconds=seconds,
    compiling=compiling,
    new_tokens_per_second=rows / seconds,
    bytes_per_second=rate,
    share=share_of_limit(args, 'read', rate),
  )


def time_iteration(args: argparse.Namespace) -> None:
  """Times the phases of one step of PPO or GRPO, and measures its memory."""
  context = make_context(args.stage, args, [])
  stage: Any = ppo if args.stage == 'ppo' else policy_gradient
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
  values = dict(stage=args.stage, prompts=options.batch_size, responses=N, length=length)
  seconds = median_seconds(args, respond, 3)
  record(
    args,
    'iteration',
    **values,
    rollout=seconds,
    new_tokens_per_second=N * R / seconds,
    first_rollout=first_rollout,
  )
  scored_rows, _ = score(prompts, samples, ())
  seconds = median_seconds(args, lambda: score(prompts, samples, ())[0], 3)
  record(args, 'iteration', **values, scoring=seconds)

  scored = rollout.ScoredRollout(rollout.join_sequences(prompts, samples), samples, scored_rows)
  first_metrics: dict[str, Any] = {}

  def update() -> dict[str, jax.Array]:
    nonlocal state  # each update donates the state before it
    state, metrics = parts.update(state, scored, reference)
    if not first_metrics:  # only of the first update: for later ones the responses are stale
      first_metrics.update(metrics)
    return metrics

  seconds = median_seconds(args, update, 3)
  shown = ('policy/sampler_gap', 'policy/first_ratio', 'loss', 'kl')
  record(
    args,
    'iteration',
    **values,
    update=seconds,
    update_tokens_per_second=N * length / seconds,
    peak_gib=peak_gib(),
    **{name.replace('/', '_'): float(first_metrics[name]) for name in shown},
  )


def time_packing(args: argparse.Namespace) -> None:
  """Times updates from responses of geometric lengths, padded and packed.

  Their mean is a quarter of the maximum. GRPO has eight responses to each prompt, which packed rows
  hold once. `ideal` is the time of the padded rows times the share of their places that hold
  tokens; with prompts that are held once, an update can take less.
  """
  rows = 32 if args.tiny else 256
  padded = {}
  for stage, packed_rows in (('ppo', 0), ('ppo', 8), ('ppo', 16), ('grpo', 0), ('grpo', 8)):
    # Both compute at most 16 rows at a time.
    microbatches = 1 if packed_rows else rows // 2 // 16
    prompts = rows if stage == 'ppo' else rows // 8
    values = dict(stage=stage, packed_rows=packed_rows, responses=rows)
    with recorded(args, 'packing', **values) as results:
      overrides = [
        f'{stage}.batch_size={prompts}',
        f'{stage}.minibatches=2',
        f'{stage}.packed_rows={packed_rows}',
        f'{stage}.microbatches={microbatches}',
      ]
      context = make_context(stage, args, overrides)
      results |= measure_update(args, context, ppo if stage == 'ppo' else policy_gradient)
      padded.setdefault(stage, results['seconds'])
      results['ideal'] = padded[stage] * results['share_of_tokens']


def measure_update(args: argparse.Namespace, context: Context, stage: Any) -> dict[str, float]:
  """Measures the update of PPO or GRPO from responses of geometric lengths."""
  options = context.read_options(stage.STAGE)
  parts = stage.define(context, options)
  state = parts.init()
  reference = parts.read_reference()
  vocab_size = parts.definitions.model.config.vocab_size
  rows = options.batch_size * options.num_samples
  prompts = random_prompts(options.batch_size, options.max_length, vocab_size)
  samples = geometric_responses(rows, options.sampling.max_new_tokens, vocab_size)
  scores_of_rows = np.random.default_rng(2).normal(size=rows).astype(np.float32)
  inputs = context.layout.place((prompts, samples, scores_of_rows))
  scored = testing.score_samples(*inputs)
  metrics: dict[str, jax.Array] = {}

  def update() -> dict[str, jax.Array]:
    nonlocal state, metrics  # each update donates the state before it
    state, metrics = parts.update(state, scored, reference)
    return metrics

  compiling = first_seconds(update)
  seconds = median_seconds(args, update, 3)
  share = float(jnp.mean(scored.sequences.segment_ids > 0))
  return dict(
    seconds=seconds,
    compiling=compiling,
    share_of_tokens=share,
    padding=float(metrics.get('packed/padding_share', 1 - share)),
    shared=float(metrics.get('packed/shared_share', 0.0)),
    peak_gib=peak_gib() or 0.0,
  )


def geometric_responses(B: int, R: int, vocab_size: int) -> Samples:
  """Makes random responses of geometric lengths, R / 4 on average, at most R, as numpy arrays."""
  rng = np.random.default_rng(1)
  mask = np.arange(R) < rng.geometric(4 / R, B)[:, None]
  tokens = np.where(mask, rng.integers(2, vocab_size, (B, R)), 0).astype(np.int32)
  logprobs = np.where(mask, -float(np.log(vocab_size)), 0.0).astype(np.float32)
  fields: tuple[Any, ...] = (tokens, mask, logprobs, np.ones(B, bool))
  return Samples(*fields)


# Plans, and the steps that the shell script calls.


def make_plans(args: argparse.Namespace) -> None:
  """Plans the timed train steps for the GPU of --card; with --analytic from shapes alone."""
  cards = [name for name in ('a100', 'h100', 'h200') if name in args.card.lower()]
  card = cards[0] if cards else 'h100'
  larger = [f'model.{name}={value}' for name, value in SHAPES['1.7b'].items()]
  plans: dict[str, tuple[str, list[str]]] = {
    'sft-360m': ('sft', []),
    'sft-1.7b': ('sft', larger),
    'ppo': ('ppo', []),
    'grpo': ('grpo', []),
  }
  if args.tiny:
    del plans['sft-1.7b']
  for name, (stage, overrides) in plans.items():
    path = args.out / f'plan-{name}.json'
    if path.is_file():
      continue
    command = [
      sys.executable,
      '-m',
      'rlhf_jax.plan',
      f'--config={HERE}:tiny' if args.tiny else f'--config={HERE}',
      f'--topology=gpu:1x{card}',
      f'--stage={stage}',
      f'--json={path}',
      *(f'--config.{override}' for override in overrides),
    ]
    if args.analytic:
      command.append('--analytic')
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    subprocess.run(command, check=False, env=environment)


def print_table(args: argparse.Namespace) -> None:
  """Prints all results, one a line, and the plans."""
  hidden = ('step', 'device', 'jax', 'tiny')
  rows = [row for row in read_results(args) if row['step'] != 'kernels']
  devices = sorted({f'{row["device"]}, jax {row["jax"]}' for row in rows if 'device' in row})
  print('\n' + '; '.join(devices))
  for row in rows:
    shown = [
      f'{name}={format_value(value)}'
      for name, value in row.items()
      if name not in hidden and value is not None
    ]
    print(f'{row["step"]:16}', *shown)
  for path in sorted(args.out.glob('plan-*.json')):
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
  'packing': time_packing,
  'plan': make_plans,
  'table': print_table,
}


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the command."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  add = parser.add_argument
  add('step', choices=STEPS)
  add('--out', type=Path, required=True, help='folder of results.jsonl')
  add('--tiny', action='store_true', help='small enough for a CPU')
  add('--shape', default='360m', choices=SHAPES, help='training, decoding: shape of the model')
  add('--remat', default='dots', help='training: config.model.remat')
  add('--attention', default='auto', help='training: config.model.attention')
  add('--precision', nargs='+', help='stages: precisions of float32 matrix products')
  add('--rows', type=int, nargs='+', default=[256, 64], help='decoding: numbers of rows')
  add('--scanned', action='store_true', help='decoding: also time scanned layers')
  add('--stage', default='ppo', choices=('ppo', 'grpo'), help='iteration: the stage')
  add('--card', default='', help='plan: the name of the GPU')
  add('--analytic', action='store_true', help='plan: estimate from shapes alone')
  return parser


def main() -> int:
  """Runs a check; returns the exit code."""
  args = make_parser().parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  compilation.request_exact_products()
  try:
    STEPS[args.step](args)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())
