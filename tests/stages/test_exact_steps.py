import json
import os
from pathlib import Path
import subprocess
import sys

import pytest

PROGRAM = Path(__file__).with_name('exact_steps.py')


@pytest.mark.slow
@pytest.mark.parametrize('case', ['ppo', 'ppo packed', 'grpo', 'grpo lora', 'grpo experts'])
def test_sampler_and_training_agree_to_the_bit_at_every_step(case):
  environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
  run = subprocess.run(
    [sys.executable, str(PROGRAM), case], capture_output=True, text=True, env=environment
  )
  assert run.returncode == 0, run.stderr[-3000:]
  result = json.loads(run.stdout)
  assert result['gaps'] == [0.0] * 4 and result['change'] > 1e-3
