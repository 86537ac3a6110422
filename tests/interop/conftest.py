"""Lets the tests of this folder import interop_cases, and opens SmolLM2 once for all of them."""

from pathlib import Path
import sys

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.interop import pretrained

sys.path.insert(0, str(Path(__file__).parent))  # pytest's import mode adds nothing by itself


@pytest.fixture(scope='session')
def smollm2():
  """The model; reading its vocabulary takes seconds."""
  try:
    return pretrained.open_pretrained('smollm2')
  except UserError as error:
    pytest.skip(str(error))
