"""The work that is measured: a stage, a model's shape, and the sizes of a batch.

Plain data, without JAX: the workers of other libraries read it too.
"""

import dataclasses
import json
from typing import Any

# The stages; each is one program or a few, see `Workload.phases`.
STAGES = ('pretrain', 'sft', 'reward', 'dpo', 'ppo', 'grpo', 'generate')
TRAINING = ('pretrain', 'sft', 'reward', 'dpo')  # learn from a data set


@dataclasses.dataclass(frozen=True)
class Shape:
  """A Llama's shape; the output matrix is the embedding."""

  vocab_size: int
  embed: int
  layers: int
  heads: int
  kv_heads: int
  mlp: int

  @property
  def head_dim(self) -> int:
    """The width of a head."""
    return self.embed // self.heads


SHAPES = {
  'tiny': Shape(4096, 256, 6, 4, 4, 704),
  'small': Shape(49152, 576, 30, 9, 3, 1536),  # SmolLM2-135M
  'medium': Shape(49152, 960, 32, 15, 5, 2560),  # SmolLM2-360M
  'large': Shape(49152, 2048, 24, 32, 32, 8192),  # SmolLM2-1.7B
}


@dataclasses.dataclass(frozen=True)
class Workload:
  """One measurement.

  Attributes:
    stage: a name of STAGES.
    model: a name of SHAPES.
    batch: rows; pairs for reward and dpo, prompts for ppo, the responses to one prompt
      for grpo.
    prompt_length: tokens of a prompt, P.
    response_length: tokens of a response, R; no response ends before.
    dtype: of the computation.
    temperature: of the sampling; 0 = greedy.
    attention: as in ModelConfig; other libraries ignore it.
    remat: as in ModelConfig; other libraries ignore it.
    layers: of the model; 0 = those of its shape.
  """

  stage: str
  model: str = 'tiny'
  batch: int = 8
  prompt_length: int = 64
  response_length: int = 64
  dtype: str = 'float32'
  temperature: float = 1.0
  attention: str = 'auto'
  remat: str = 'none'
  layers: int = 0

  @property
  def shape(self) -> Shape:
    """The model's shape."""
    shape = SHAPES[self.model]
    return dataclasses.replace(shape, layers=self.layers or shape.layers)

  @property
  def length(self) -> int:
    """Tokens of a row, prompt and response."""
    return self.prompt_length + self.response_length

  @property
  def rows(self) -> int:
    """Rows of prompt and response that a step reads or writes."""
    return self.batch * (2 if self.stage in ('reward', 'dpo') else 1)

  @property
  def prompts(self) -> int:
    """Different prompts of a rollout: grpo's responses all answer one."""
    return 1 if self.stage == 'grpo' else self.batch

  @property
  def tokens(self) -> int:
    """The tokens of a step by which its speed is told, see `counted`."""
    if self.stage in TRAINING:
      return self.rows * self.length
    return self.rows * self.response_length

  @property
  def counted(self) -> str:
    """What `tokens` counts, in words."""
    if self.stage in TRAINING:
      return f'{self.rows} rows of {self.length} places'
    return f'{self.rows} x {self.response_length} new tokens'

  def to_json(self) -> str:
    """Returns the fields as a JSON object."""
    return json.dumps(dataclasses.asdict(self))


def from_json(text: str) -> Workload:
  """Returns the workload that `to_json` wrote."""
  values: dict[str, Any] = json.loads(text)
  return Workload(**values)
