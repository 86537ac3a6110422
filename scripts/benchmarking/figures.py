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

  Policies compute logits where the loss reads them, reward and value models none. A prompt
  counts once for all its responses, and the last layer of a reward model where it is read. With
  one epoch and one minibatch no log-probabilities are needed of the policy before the
  update, as the ratio is 1. See planning/model_flops.py for what does not count.
  """
  config = make_config(work)
  rows = work.rows
  body = rows * model_flops.sequence_flops(config, work.length, 0)
  scored = body - rows * model_flops.unread_flops(config, work.length, 1)
  policy = rows * model_flops.sequence_flops(config, work.length, work.response_length)
  # Prompts need be read once only, however many responses each has.
  repeated = (rows - work.prompts) * model_flops.sequence_flops(config, work.prompt_length, 0)
  if work.stage in ('pretrain', 'sft'):
    full = rows * model_flops.sequence_flops(config, work.length, work.length)
    return {'update': TRAINING_PASSES * full}
  if work.stage == 'reward':
    unread = model_flops.unread_flops(config, work.prompt_length, 0)
    repeated -= (rows - work.prompts) * unread  # which `scored` leaves out already
    return {'update': TRAINING_PASSES * (scored - repeated)}
  if work.stage == 'dpo':
    policy -= repeated
    return {'scoring': policy, 'update': TRAINING_PASSES * policy}
  rollout = policy - repeated
  if work.stage == 'generate':
    return {'rollout': rollout}
  if work.stage == 'grpo':  # a function scores
    return {'rollout': rollout, 'update': (1 + TRAINING_PASSES) * rollout}
  reference = policy
  values = body  # for the advantages
  update = reference + values + TRAINING_PASSES * (policy + body)
  return {'rollout': rollout, 'scoring': scored, 'update': update}


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
