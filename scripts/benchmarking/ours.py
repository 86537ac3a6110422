"""Does a workload with this library, by the functions that its stages are made of.

  BENCHMARK_BEGAN=$(date +%s.%N) python scripts/benchmarking/ours.py WORKLOAD_JSON [TRACE_DIR]

The loop is runtime/loop.py with its logging, so that what passes between two steps is
what passes there in a run.
"""

import collections
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
from pathlib import Path
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts
sys.path.insert(1, str(Path(__file__).parents[2]))  # this library

import jax
import numpy as np

from benchmarking import worker
from benchmarking.worker import Turns
from benchmarking.workload import from_json, Workload
from rlhf_jax.commands import host_memory
from rlhf_jax.generation import sampler
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.models import transformer
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.models.transformer import Model
from rlhf_jax.runtime import compilation, hosts, loop, mesh, optimizers
from rlhf_jax.runtime import step as steps
from rlhf_jax.runtime.mesh import Layout, MeshOptions
from rlhf_jax.runtime.meter import PhaseClock
from rlhf_jax.runtime.optimizers import OptimizerOptions
from rlhf_jax.stages import policy_gradient, ppo, preference, reward, sft
from rlhf_jax.stages.shared import off_policy, packing, training
from rlhf_jax.stages.shared.rollout import RolloutDefinitions, RolloutParts
from rlhf_jax.types import Params, Prompts, Rankings, Sequences

FOREVER = 10**9  # steps: the benchmark ends the process

Step = Callable[[Any, Any], tuple[Any, dict[str, Any]]]


def main() -> None:
  host_memory.keep_freed_memory()  # as every command does
  work = from_json(sys.argv[1])
  trace = sys.argv[2] if len(sys.argv) > 2 else ''
  compilation.cache_compilations()
  compilation.request_exact_products()
  compilations = Compilations()
  turns = Turns(functools.partial(describe, compilations))
  clock = PhaseClock()
  what_to_train = PREPARE[work.stage](work, clock)
  timed = dataclasses.replace(
    what_to_train, step=TimedStep(what_to_train.step, clock, turns, trace)
  )
  options = loop.LoopOptions(
    steps=FOREVER, log_every=1, eval_every=0, save_every=FOREVER, tensorboard=False
  )
  with tempfile.TemporaryDirectory() as directory:
    loop.run(timed, options, directory, {})


# Measuring.


class Compilations:
  """Counts what XLA compiles, by the name of the program."""

  def __init__(self) -> None:
    self.counts: collections.Counter[str] = collections.Counter()
    jax.monitoring.register_event_duration_secs_listener(self._note)

  def _note(self, event: str, seconds: float, **values: Any) -> None:
    del seconds
    if event == '/jax/core/compile/backend_compile_duration':
      self.counts[str(values.get('fun_name'))] += 1


def describe(compilations: Compilations) -> dict[str, Any]:
  """Describes the process: device, versions, memory, compilations."""
  device = jax.devices()[0]
  memory = device.memory_stats() or {}
  return {
    'device': device.device_kind,
    'version': f'jax {jax.__version__}',
    'host_bytes': worker.peak_host_memory(),
    'device_bytes': memory.get('peak_bytes_in_use'),
    'compilations': sum(compilations.counts.values()),
  }


class TimedStep:
  """A step whose phases and pauses are told to the benchmark."""

  def __init__(self, step: Step, clock: PhaseClock, turns: Turns, trace: str):
    self._step = step
    self._clock = clock
    self._turns = turns
    self._trace = trace
    self._made = 0
    self._ended = time.perf_counter()
    self._waited = 0.0  # seconds of the last pause between turns

  def __call__(self, state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    """Makes a step, and waits for the next turn where it was the last of one."""
    with self._tracing():
      result = jax.block_until_ready(self._step(state, batch))
    ended = time.perf_counter()
    # From one step's results to the next one's, so that nothing between them is lost.
    seconds = ended - self._ended
    phases = self._clock.take()
    self._made += 1
    self._turns.done({'step': seconds, 'host': seconds - sum(phases.values()), **phases})
    self._ended = time.perf_counter()  # after the pause
    return result

  def _tracing(self) -> contextlib.AbstractContextManager[None]:
    """Traces the third step, where a trace is wanted."""
    if self._trace and self._made == 2:
      return jax.profiler.trace(self._trace)
    return contextlib.nullcontext()


class SameBatch(Iterator[Any]):
  """An endless iterator of one host batch."""

  def __init__(self, batch: Any):
    self._batch = batch

  def __next__(self) -> Any:
    return self._batch

  def get_state(self) -> dict[str, Any]:
    """Returns nothing: all places are the same."""
    return {}

  def set_state(self, state: dict[str, Any]) -> None:
    """Does nothing."""


# Models and batches.


def make_layout() -> Layout:
  """Makes a mesh of the first device alone."""
  return mesh.make_layout(MeshOptions(), jax.devices()[:1])


def make_model(work: Workload, layout: Layout, head: bool = False) -> Model:
  """Makes the definition of the workload's model."""
  shape = work.shape
  config = ModelConfig(
    vocab_size=shape.vocab_size,
    embed=shape.embed,
    layers=shape.layers,
    heads=shape.heads,
    kv_heads=shape.kv_heads,
    head_dim=shape.head_dim,
    mlp=shape.mlp,
    head=head,
    dtype=work.dtype,
    remat=work.remat,
    attention=work.attention,
  )
  return transformer.build_model(config, layout)


def make_params(model: Model, layout: Layout, seed: int = 0) -> Params:
  """Makes random parameters on the mesh, as a stage from `random` does."""
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return layout.create(model.init, layout.shardings(model.axes, shapes), jax.random.key(seed))


def make_optimizer() -> Any:
  """Makes AdamW, clipped, with a small constant learning rate."""
  options = OptimizerOptions(learning_rate=1e-5, schedule='constant')
  return optimizers.make_optimizer(options, FOREVER)


def random_tokens(work: Workload, rows: int, length: int) -> np.ndarray:
  """Draws tokens [rows, length] int32."""
  rng = np.random.default_rng(0)
  return rng.integers(2, work.shape.vocab_size, (rows, length)).astype(np.int32)


def make_sequences(work: Workload) -> Sequences:
  """Makes full rows, all of whose places are targets but the first."""
  tokens = random_tokens(work, work.rows, work.length)
  ones = np.ones_like(tokens)
  mask = ones.astype(np.float32)
  mask[:, 0] = 0
  positions = np.broadcast_to(np.arange(work.length, dtype=np.int32), tokens.shape)
  return Sequences(tokens=tokens, positions=positions, segment_ids=ones, loss_mask=mask)


def make_rankings(work: Workload) -> Rankings:
  """Makes full pairs, in each of which the first response is the better one."""
  shape = (work.batch, 2)
  tokens = random_tokens(work, work.rows, work.length).reshape(*shape, work.length)
  tokens[:, 1, : work.prompt_length] = tokens[:, 0, : work.prompt_length]
  positions = np.broadcast_to(np.arange(work.length, dtype=np.int32), tokens.shape)
  ones = np.ones(shape, np.int32)
  return Rankings(
    tokens=tokens,
    positions=positions,
    segment_ids=np.ones_like(tokens),
    group=ones,
    ranks=ones * np.array([1, 2], np.int32),
    index=ones * np.arange(work.batch, dtype=np.int32)[:, None],
    begins=ones * np.int32(work.prompt_length),
    confidence=ones.astype(np.float32),
    reference_logprobs=np.zeros(shape, np.float32),
  )


def make_prompts(work: Workload) -> Prompts:
  """Makes full prompts."""
  tokens = random_tokens(work, work.prompts, work.prompt_length)
  return Prompts(
    tokens=tokens,
    mask=np.ones(tokens.shape, bool),
    index=np.arange(work.prompts, dtype=np.int32),
  )


def make_sampling(work: Workload) -> SamplingOptions:
  """Makes the options of the sampling: the whole vocabulary, no early end."""
  return SamplingOptions(max_new_tokens=work.response_length, temperature=work.temperature)


# The stages: (workload, clock) → what the loop runs.


def prepare_sft(work: Workload, clock: PhaseClock) -> loop.Training:
  """Prepares next-token prediction on full rows; pretrain has the same step."""
  layout = make_layout()
  model = make_model(work, layout)
  return _prepare_supervised(work, clock, model, layout, sft, sft.Options(), make_sequences(work))


def prepare_reward(work: Workload, clock: PhaseClock) -> loop.Training:
  """Prepares a reward model that learns from pairs."""
  layout = make_layout()
  model = make_model(work, layout, head=True)
  options = reward.Options(packed_rows=_packed_pairs(work), responses_per_row=2)
  return _prepare_supervised(work, clock, model, layout, reward, options, make_rankings(work))


def _packed_pairs(work: Workload) -> int:
  """Returns `packed_rows` in which all pairs are computed at once, each with one prompt."""
  return max(work.batch, 2)


def _prepare_supervised(
  work: Workload,
  clock: PhaseClock,
  model: Model,
  layout: Layout,
  stage: Any,
  options: Any,
  batch: Any,
) -> loop.Training:
  definitions = training.Definitions(model, make_optimizer(), layout)
  step = training.compile_train_step(stage.train_step, definitions, options)

  def init() -> Any:
    return _create_state(definitions)

  return loop.Training(
    name=work.stage, init=init, batches=SameBatch(batch), step=clock.timed('update', step)
  )


def _create_state(definitions: Any) -> Any:
  params = make_params(definitions.model, definitions.layout)
  return steps.create_train_state(
    params, definitions.optimizer, jax.random.key(1), definitions.layout
  )


def prepare_dpo(work: Workload, clock: PhaseClock) -> loop.Training:
  """Prepares DPO whose reference reads every batch (`reference_logprobs='live'`)."""
  layout = make_layout()
  model = make_model(work, layout)
  definitions = training.Definitions(model, make_optimizer(), layout)
  reference_params = make_params(model, layout, seed=1)
  options = preference.Options(packed_rows=_packed_pairs(work), responses_per_row=2)
  logprobs = preference.build_logprobs(model, definitions.layout, options)
  reference = clock.timed('scoring', logprobs)
  compiled = training.compile_train_step(preference.train_step, definitions, options)
  update = clock.timed('update', compiled)

  def step(state: Any, batch: Rankings) -> tuple[Any, dict[str, Any]]:
    placed = layout.place(batch)
    logprobs = reference(reference_params, placed)
    return update(state, placed.replace(reference_logprobs=logprobs), None)

  return loop.Training(
    name='dpo',
    init=functools.partial(_create_state, definitions),
    batches=SameBatch(make_rankings(work)),
    step=step,
  )


def prepare_generate(work: Workload, clock: PhaseClock) -> loop.Training:
  """Prepares rollouts alone; the state never changes."""
  layout = make_layout()
  model = make_model(work, layout)
  definitions = training.Definitions(model, make_optimizer(), layout)
  generate = clock.timed(
    'rollout', sampler.build_sampler(model, make_sampling(work), (), 0, 1, layout=layout)
  )
  key = jax.random.key(2)

  def step(state: Any, batch: Prompts) -> tuple[Any, dict[str, Any]]:
    generate(state.params, layout.place(batch), key)
    return state, {}

  return loop.Training(
    name='generate',
    init=functools.partial(_create_state, definitions),
    batches=SameBatch(make_prompts(work)),
    step=step,
  )


def prepare_ppo(work: Workload, clock: PhaseClock) -> loop.Training:
  """Prepares PPO with four models: policy, value model, reference, reward model."""
  layout = make_layout()
  model, headed = make_model(work, layout), make_model(work, layout, head=True)
  options = ppo.Options(
    epochs=1,
    minibatches=1,
    batch_size=work.batch,
    max_length=work.prompt_length,
    missing_eos=False,
    sampling=make_sampling(work),
  )
  definitions = ppo.Definitions(
    model=model,
    value_model=headed,
    reference_model=model,
    optimizer=make_optimizer(),
    layout=layout,
  )
  reward_params = make_params(headed, layout, seed=4)
  score_samples = reward.build_score(headed, layout, options)

  def score(prompts: Any, samples: Any) -> tuple[Any, dict[str, Any]]:
    return score_samples(reward_params, prompts, samples), {}

  parts = _make_parts(work, clock, definitions, ppo.train_step, options, 1)
  step = functools.partial(
    ppo.iterate,
    parts=parts,
    score=clock.timed('scoring', score),
    reference_params=parts.read_reference(),
    layout=layout,
  )
  return loop.Training(
    name='ppo',
    init=functools.partial(_create_ppo_state, definitions, options),
    batches=SameBatch((make_prompts(work), None)),
    step=step,
  )


def _create_ppo_state(definitions: ppo.Definitions, options: ppo.Options) -> ppo.PPOState:
  layout = definitions.layout
  return ppo.create_state(
    make_params(definitions.model, layout),
    make_params(definitions.value_model, layout, seed=3),
    definitions,
    jax.random.key(1),
    options,
  )


def _make_parts(
  work: Workload,
  clock: PhaseClock,
  definitions: Any,
  train_step: Callable[..., Any],
  options: Any,
  num_samples: int,
) -> RolloutParts:
  layout = definitions.layout
  generate = sampler.build_sampler(
    definitions.model, options.sampling, (), 0, num_samples, layout=layout
  )
  update = training.compile_train_step(train_step, definitions, options)
  nothing: Any = None  # the models come from here, not from a store
  return RolloutParts(
    definitions=definitions,
    init=nothing,
    generate=clock.timed('rollout', generate),
    update=clock.timed('update', update),  # type: ignore[arg-type]
    read_reference=functools.partial(make_params, definitions.reference_model, layout, 5),
    store=nothing,
  )


def prepare_grpo(work: Workload, clock: PhaseClock) -> loop.Training:
  """Prepares GRPO on one group of responses, which a function on the host scores."""
  layout = make_layout()
  model = make_model(work, layout)
  options = policy_gradient.Options(
    batch_size=1,
    num_samples=work.batch,
    minibatches=1,
    # All responses at once, which share the prompt.
    packed_rows=-(-work.batch // packing.SHARED_RESPONSES),
    max_length=work.prompt_length,
    missing_eos=False,
    advantage='standardised',
    reduce='sequence_mean',
    kl_place='loss',
    kl_coefficient=0.04,
    sampling=make_sampling(work),
  )
  definitions = RolloutDefinitions(
    model=model, reference_model=model, optimizer=make_optimizer(), layout=layout
  )

  def score(prompts: Any, samples: Any) -> tuple[Any, dict[str, Any]]:
    del prompts
    tokens = hosts.to_host(samples.tokens)  # [K, R]
    return layout.place((tokens % 2).mean(axis=1, dtype=np.float32)), {}

  parts = _make_parts(work, clock, definitions, policy_gradient.train_step, options, work.batch)
  step = functools.partial(
    policy_gradient.iterate,
    parts=parts,
    score=clock.timed('scoring', score),
    reference_params=parts.read_reference(),
    layout=layout,
    options=options,
  )

  def init() -> off_policy.SamplerState:
    return off_policy.SamplerState(**vars(_create_state(definitions)), sampler_trained={})

  return loop.Training(name='grpo', init=init, batches=SameBatch(make_prompts(work)), step=step)


PREPARE: dict[str, Callable[[Workload, PhaseClock], loop.Training]] = {
  'pretrain': prepare_sft,
  'sft': prepare_sft,
  'reward': prepare_reward,
  'dpo': prepare_dpo,
  'ppo': prepare_ppo,
  'grpo': prepare_grpo,
  'generate': prepare_generate,
}


if __name__ == '__main__':
  main()
