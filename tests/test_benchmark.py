"""scripts/benchmark.py: its figures by hand, and one run of it."""

import importlib
import json
from pathlib import Path
import subprocess
import sys

import pytest

SCRIPTS = Path(__file__).parents[1] / 'scripts'
sys.path.insert(0, str(SCRIPTS))

figures = importlib.import_module('benchmarking.figures')
workload = importlib.import_module('benchmarking.workload')
Workload = workload.Workload

# of the shape `tiny`: matrices of 6 layers (attention 4 · 256², MLP 3 · 256 · 704), and the head
BODY = 6 * (4 * 256**2 + 3 * 256 * 704)
HEAD = 256 * 4096


def count(length, head):
  attention = 4 * 256 * 6 * length * (length + 1) / 2
  return 2 * (length * BODY + head * HEAD) + attention


def unread(tokens):
  """Query, output and MLP of one layer, and its attention, of the first tokens of a text."""
  return 2 * tokens * (2 * 256**2 + 3 * 256 * 704) + 4 * 256 * tokens * (tokens + 1) / 2


def reading(read, head=0):
  """A pass over 64 + 64 tokens, of which the last layer is read at the end only."""
  return count(128, head) - unread(128 - read)


PROMPT = count(64, 0) - unread(64)  # of which the last layer gives keys and values


@pytest.mark.parametrize(
  'stage, flops, tokens',
  [
    ('sft', 3 * 8 * count(128, 128), 8 * 128),
    # both responses of a pair read one prompt, and the last layer counts at their ends
    ('reward', 3 * (16 * reading(1) - 8 * PROMPT), 16 * 128),
    ('dpo', 4 * (16 * reading(64, 64) - 8 * PROMPT), 16 * 128),
    ('generate', 8 * reading(64, 64), 8 * 64),
    # rollout, reference and update of the policy; reward; update of the value model
    ('ppo', 8 * (5 * reading(64, 64) + reading(1) + 3 * reading(64)), 8 * 64),
    # all responses answer one prompt, which is read once
    ('grpo', 5 * (8 * reading(64, 64) - 7 * PROMPT), 8 * 64),
  ],
)
def test_flops_and_tokens_of_a_step(stage, flops, tokens):
  work = Workload(stage)
  assert sum(figures.phase_flops(work).values()) == pytest.approx(flops)
  assert work.tokens == tokens and workload.from_json(work.to_json()) == work


def test_figures_of_timed_steps():
  work = Workload('generate')
  times = [{'step': 2.0, 'rollout': 1.9, 'host': 0.1}] * 3 + [{'step': 9, 'rollout': 8, 'host': 1}]
  limits = {'flops_per_second': 1e12, 'bytes_per_second': 1e9}
  line = figures.summarise(work, 'rlhf_jax', {'device': 'cpu'}, times, limits)
  assert line['tokens_per_second'] == 256 and line['device'] == 'cpu'
  assert line['step_seconds'] == {'median': 2.0, 'min': 2.0}
  assert line['of'] == 'matrix-vector product, 1.0 GB/s'
  # 64 steps, each with all matrices and the filled part of the cache
  read = 64 * 4 * (BODY + HEAD + 8 * 2 * 6 * 256 * (64 + 31.5))
  assert line['share'] == pytest.approx(read / 2e9, abs=1e-4)
  assert line['phases']['rollout']['share_of_step'] == 0.95
  assert line['host'] == {'seconds': 0.1, 'share': 0.05}


def test_a_run():
  words = '--stage=generate --batch=1 --prompt-len=4 --response-len=4 --steps=2 --turns=1'.split()
  command = [sys.executable, str(SCRIPTS / 'benchmark.py'), *words, '--warm-only']
  done = subprocess.run(command, capture_output=True, text=True, timeout=240)
  assert done.returncode == 0, done.stderr[-2000:]
  line = json.loads(done.stdout)
  assert line['library'] == 'rlhf_jax' and line['steps'] == 2 and line['tokens_per_second'] > 0
  assert line['compilations']['later'] == 0 and line['host_bytes'] > 1e8
  assert set(line['phases']) == {'rollout'} and 'share' not in line  # limits were not measured
