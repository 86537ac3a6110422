"""Makes the figures of a measurement from what the workers told."""

from collections.abc import Mapping, Sequence
import dataclasses
import statistics
from typing import Any

from benchmarking.workload import Workload
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.planning import model_flops

TRAINING_PASSES = 3  # forward, slopes of states, slopes of parameters


def phase_flops(work: Workload) -> dict[str, float]:
  """Counts the FLOPs that each phase of a step needs, by the workload's sizes alone.

  The last layer is computed only where states are read: of a response where policies predict it
  and value models value it, of a text at its end where it is scored. Policies compute logits where
  the loss reads them, reward and value models none. A prompt counts once for all its responses.
  With one epoch and one minibatch neither policy nor value model is needed before the update, whose
  own forward pass gives the same. See planning/model_flops.py for what does not count.
  """
  config = make_config(work)
  rows, length, response = work.rows, work.length, work.response_length
  policy = rows * model_flops.needed_flops(config, length, response, response)
  value = rows * model_flops.needed_flops(config, length, response, 0)
  scored = rows * model_flops.needed_flops(config, length, 1, 0)
  # Prompts need be read once only, however many responses each has.
  repeated = (rows - work.prompts) * model_flops.needed_flops(config, work.prompt_length, 0, 0)
  if work.stage in ('pretrain', 'sft'):
    full = rows * model_flops.sequence_flops(config, length, length)
    return {'update': TRAINING_PASSES * full}
  if work.stage == 'reward':
    return {'update': TRAINING_PASSES * (scored - repeated)}
  once = policy - repeated
  if work.stage == 'dpo':
    return {'scoring': once, 'update': TRAINING_PASSES * once}
  if work.stage == 'generate':
    return {'rollout': once}
  if work.stage == 'grpo':  # a function scores; the update includes the reference
    return {'rollout': once, 'update': (1 + TRAINING_PASSES) * once}
  update = policy + TRAINING_PASSES * (policy + value)
  return {'rollout': once, 'scoring': scored, 'update': update}


def rollout_bytes(work: Workload) -> float:
  """Counts the bytes that the decoding of a step must read; 0 where nothing is decoded."""
  if work.stage not in ('ppo', 'grpo', 'generate'):
    return 0.0
  itemsize = 4 if work.dtype == 'float32' else 2
  return model_flops.decoding_bytes(
    make_config(work), work.rows, work.prompt_length, work.response_length, itemsize
  )


def make_config(work: Workload) -> ModelConfig:
  """Makes the shape of the workload's model."""
  return ModelConfig(**dataclasses.asdict(work.shape), head_dim=work.shape.head_dim)


def summarise(
  work: Workload,
  library: str,
  described: Mapping[str, Any],
  times: Sequence[Mapping[str, float]],
  limits: Mapping[str, float] | None,
) -> dict[str, Any]:
  """Makes the line of one library: speeds, shares, memory and compilations.

  Args:
    work: what was done.
    library: who did it.
    described: what its worker told of itself.
    times: phase → seconds of every step after the first; `step` is the whole.
    limits: of the machine, see roofline.py; None = not measured.
  """
  seconds = [step['step'] for step in times]
  median = statistics.median(seconds)
  needed = phase_flops(work)
  line: dict[str, Any] = {
    'library': library,
    **dataclasses.asdict(work),
    'tokens_per_second': round(work.tokens / median, 1),
    'tokens': f'{work.tokens} a step: {work.counted}',
    'step_seconds': {'median': round(median, 5), 'min': round(min(seconds), 5)},
    'steps': len(times),
    'flops': sum(needed.values()),
  }
  if limits:
    line['share'] = share_of_limit(work, median, limits)
    line['of'] = name_limit(work, limits)
  line['phases'] = describe_phases(work, times, limits)
  if all('host' in step for step in times):
    host = statistics.median(step['host'] for step in times)
    line['host'] = {'seconds': round(host, 5), 'share': round(host / median, 4)}
  # The benchmark's rows are full, so that every library computes the same places.
  line['padding_share'] = 0.0
  return {**line, **described}


def share_of_limit(work: Workload, seconds: float, limits: Mapping[str, float]) -> float:
  """Returns the share of what the machine could do in a step's time."""
  if work.stage == 'generate':
    return round(rollout_bytes(work) / seconds / limits['bytes_per_second'], 4)
  return round(sum(phase_flops(work).values()) / seconds / limits['flops_per_second'], 4)


def name_limit(work: Workload, limits: Mapping[str, float]) -> str:
  """Names the denominator of `share_of_limit`."""
  if work.stage == 'generate':
    return f'matrix-vector product, {limits["bytes_per_second"] / 1e9:.1f} GB/s'
  return f'matrix product, {limits["flops_per_second"] / 1e9:.0f} GFLOP/s'


def describe_phases(
  work: Workload,
  times: Sequence[Mapping[str, float]],
  limits: Mapping[str, float] | None,
) -> dict[str, dict[str, float]]:
  """Returns the median seconds and the shares of every phase that was timed."""
  needed = phase_flops(work)
  phases = {}
  total = statistics.median(step['step'] for step in times)
  for name in ('rollout', 'scoring', 'update'):
    if not all(name in step for step in times):
      continue
    seconds = statistics.median(step[name] for step in times)
    phase = {'seconds': round(seconds, 5), 'share_of_step': round(seconds / total, 4)}
    if limits and name in needed:
      phase['mfu'] = round(needed[name] / seconds / limits['flops_per_second'], 4)
    if limits and name == 'rollout':
      phase['bandwidth_share'] = round(
        rollout_bytes(work) / seconds / limits['bytes_per_second'], 4
      )
    phases[name] = phase
  return phases
