"""Makes tiny models, states, batches and meshes, for tests of train steps.

  from rlhf_jax import testing
  from rlhf_jax.stages import sft

  definitions = testing.make_definitions(learning_rate=1e-2)
  state = testing.make_state(definitions)
  batch = testing.make_sequences()
  state, metrics = sft.train_step(state, batch, definitions, sft.Options())

For a given seed, everything is the same on every mesh and in every process. The
model has two layers of width 32 and a vocabulary of 64 tokens: token 0 is
padding, token 1 ends a response. Train steps are pure and un-jitted;
`compile_train_step` in stages/shared/training.py compiles them.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax

from rlhf_jax.data import sources
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.data.tinyworld import vocabulary
from rlhf_jax.generation import sampler
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.models import transformer
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.models.transformer import Model
from rlhf_jax.runtime import mesh, optimizers
from rlhf_jax.runtime import step as steps
from rlhf_jax.runtime.mesh import Layout, MeshOptions
from rlhf_jax.runtime.optimizers import OptimizerOptions
from rlhf_jax.stages import ppo
from rlhf_jax.stages.shared.rollout import (
  RolloutDefinitions,
  ScoredRollout,
)
from rlhf_jax.stages.shared.training import Definitions
from rlhf_jax.types import (
  Params,
  Prompts,
  Rankings,
  Samples,
  Sequences,
  TrainState,
)

PAD_ID = 0
EOS_ID = 1
FIRST_ID = 2  # the smallest id of an ordinary token
MODEL_CONFIG = ModelConfig(
  vocab_size=64,
  embed=32,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  mlp=48,
  head=True,
)


# Meshes and models.


def make_layout(description: str = 'one device') -> Layout:
  """Makes a mesh from a description in words.

  Args:
    description: 'one device' (the first one), or mesh axes with their sizes, such as
      'data 2, fsdp 2, tensor 2', whose product must be the number of devices. For
      8 CPU devices, set XLA_FLAGS=--xla_force_host_platform_device_count=8.
  """
  if description == 'one device':
    return mesh.make_layout(MeshOptions(), jax.devices()[:1])
  sizes: dict[str, Any] = {}  # mesh axis → devices
  for part in description.split(','):
    axis, size = part.split()  # 'data 2'
    sizes[axis] = int(size)
  sizes.setdefault('data', 1)  # MeshOptions' default would take all remaining devices
  return mesh.make_layout(MeshOptions(**sizes))


def make_model(layout: Layout | None = None, **changes: Any) -> Model:
  """Makes the definition of the tiny model, which has a scalar head.

  Args:
    layout: the mesh; the first device if None.
    **changes: fields of ModelConfig.
  """
  config = dataclasses.replace(MODEL_CONFIG, **changes)
  return transformer.build_model(config, layout or make_layout())


def make_params(model: Model, layout: Layout | None = None, seed: int = 0) -> Params:
  """Makes the parameters of a model: for a given seed the same numbers on every mesh.

  They are those of a freshly initialised model, doubled: the original ones are so
  small that the logits hardly depend on the input, which would hide errors.

  Args:
    model: the definition.
    layout: the mesh on which they are sharded; the first device if None.
    seed: the seed of the numbers.

  Returns:
    A nested dict of float32 arrays.
  """
  layout = layout or make_layout()
  values = _host_params(model.config, seed)
  return jax.device_put(values, layout.shardings(model.axes, values))


@functools.cache  # on the host, so that the same numbers can be put onto every mesh
def _host_params(config: ModelConfig, seed: int) -> Params:
  model = transformer.build_model(config)

  def init(key: jax.Array) -> Params:
    return jax.tree.map(_double, model.init(key))

  return jax.device_get(jax.jit(init)(jax.random.key(seed)))


def _double(x: jax.Array) -> jax.Array:
  return 2 * x


def make_optimizer(
  learning_rate: float = 1e-2, updates: int = 100, **changes: Any
) -> optax.GradientTransformation:
  """Makes AdamW, or the optimizer that is named, with a constant learning rate.

  Its eps is 1e-5. With a smaller eps, Adam would scale a gradient that is zero except for
  rounding errors up to a full update, which would differ from mesh to mesh.

  Args:
    learning_rate: the learning rate.
    updates: the number of updates, which only schedules other than 'constant' use.
    **changes: fields of OptimizerOptions.
  """
  values = {
    'learning_rate': learning_rate,
    'schedule': 'constant',
    'eps': 1e-5,
    **changes,
  }
  return optimizers.make_optimizer(OptimizerOptions(**values), updates)


@functools.cache
def make_tokenizer(vocab_size: int = 384, documents: int = 200) -> Tokenizer:
  """Makes a tokenizer with a chat template, trained on documents of TinyWorld."""
  records = sources.load_records(DataOptions(), 'document', 'train')[:documents]
  texts = (record.text for record in records)
  core = vocabulary.train_tokenizer(texts, vocab_size)
  return Tokenizer(core, vocabulary.CHAT_TEMPLATE, eos='<eos>', pad='<pad>')


# Definitions and states.


def make_definitions(
  layout: Layout | None = None,
  learning_rate: float = 1e-2,
  **changes: Any,
) -> Definitions:
  """Makes the definitions of a step that trains one model: SFT, reward, preference optimisation.

  Args:
    layout: the mesh; the first device if None.
    learning_rate: of AdamW, constant.
    **changes: fields of ModelConfig.
  """
  layout = layout or make_layout()
  return Definitions(make_model(layout, **changes), make_optimizer(learning_rate), layout)


def make_rollout_definitions(
  layout: Layout | None = None, learning_rate: float = 3e-3
) -> RolloutDefinitions:
  """Makes the definitions of a policy-gradient step; policy and reference have the same one."""
  layout = layout or make_layout()
  model = make_model(layout)
  return RolloutDefinitions(
    model=model,
    reference_model=model,
    optimizer=make_optimizer(learning_rate),
    layout=layout,
  )


def make_ppo_definitions(
  layout: Layout | None = None, learning_rate: float = 3e-3
) -> ppo.Definitions:
  """Makes the definitions of a PPO step; the value model shares no parameters with the policy."""
  layout = layout or make_layout()
  model = make_model(layout)
  return ppo.Definitions(
    model=model,
    reference_model=model,
    optimizer=make_optimizer(learning_rate),
    layout=layout,
    value_model=model,
  )


def make_state(definitions: Any, seed: int = 0) -> TrainState:
  """Makes the state before the first step.

  Args:
    definitions: their model, optimizer and layout are used.
    seed: the seed of the parameters.
  """
  params = make_params(definitions.model, definitions.layout, seed)
  return steps.create_train_state(
    params, definitions.optimizer, jax.random.key(1), definitions.layout
  )


def make_ppo_state(
  definitions: ppo.Definitions,
  options: ppo.Options | None = None,
  seed: int = 0,
  value_seed: int = 2,
) -> ppo.PPOState:
  """Makes the state of PPO before the first step.

  Args:
    definitions: their models, optimizer and layout are used.
    options: their `kl_coefficient` is the initial one; the defaults if None.
    seed: the seed of the policy's parameters.
    value_seed: the seed of the value model's parameters.
  """
  layout = definitions.layout
  return ppo.create_state(
    make_params(definitions.model, layout, seed),
    make_params(definitions.value_model, layout, value_seed),
    definitions,
    jax.random.key(1),
    options or ppo.Options(),
  )


# Batches. Their arrays are numpy arrays; `Layout.place`, or the call of a train
# step, puts them onto the devices.


def make_sequences(rows: int = 8, length: int = 12, seed: int = 0) -> Sequences:
  """Makes right-padded rows, each of a prompt and a response; the response's tokens are targets.

  Args:
    rows: B.
    length: T.
    seed: the seed of lengths and tokens.

  Returns:
    Sequences whose arrays are [B, T].
  """
  rng = np.random.default_rng(seed)
  lengths = rng.integers(4, length + 1, rows)
  begins = rng.integers(1, lengths - 1)  # [B], of the responses; neither part is empty
  positions = np.arange(length)  # [T]
  inside = positions < lengths[:, None]  # [B, T]
  tokens = rng.integers(FIRST_ID, MODEL_CONFIG.vocab_size, (rows, length))
  return Sequences(
    tokens=_array(np.where(inside, tokens, PAD_ID), np.int32),
    positions=_array(np.where(inside, positions, 0), np.int32),
    segment_ids=_array(inside, np.int32),
    loss_mask=_array(inside & (positions >= begins[:, None]), np.float32),
  )


def make_rankings(
  rows: int = 8,
  places: int = 4,
  length: int = 12,
  seed: int = 0,
  ties: bool = False,
) -> Rankings:
  """Makes rows with one ranking each, of two or more responses; the other slots are empty.

  Args:
    rows: B.
    places: K, the slots of a row; at least 2.
    length: T.
    seed: the seed of everything.
    ties: whether the first two responses of rankings of three or more are tied.

  Returns:
    Rankings whose arrays are [B, K, T] and [B, K].
  """
  rng = np.random.default_rng(seed)
  shape = (rows, places)
  lengths = rng.integers(4, length + 1, shape)
  begins = rng.integers(1, lengths - 1)
  group = np.zeros(shape, np.int32)
  ranks = np.ones(shape, np.int32)
  for row in range(rows):
    count = int(rng.integers(2, places + 1))  # responses in this row
    group[row, :count] = 1
    ranks[row, :count] = rng.permutation(count) + 1
    if ties and count > 2:
      ranks[row, :2] = ranks[row, :2].min()
  present = group[:, :, None] > 0  # [B, K, 1]
  positions = np.arange(length)
  inside = (positions < lengths[:, :, None]) & present  # [B, K, T]
  tokens = rng.integers(FIRST_ID, MODEL_CONFIG.vocab_size, (*shape, length))
  index = np.where(group > 0, np.arange(rows)[:, None], -1)  # [B, K]
  return Rankings(
    tokens=_array(np.where(inside, tokens, PAD_ID), np.int32),
    positions=_array(np.where(inside, positions, 0), np.int32),
    segment_ids=_array(inside, np.int32),
    group=_array(group, np.int32),
    ranks=_array(ranks, np.int32),
    index=_array(index, np.int32),
    begins=_array(np.where(group > 0, begins, 0), np.int32),
    confidence=_array(np.ones(shape), np.float32),
    reference_logprobs=_array(np.where(group > 0, rng.normal(-20, 2, shape), 0), np.float32),
  )


def make_prompts(rows: int = 8, length: int = 6, seed: int = 0) -> Prompts:
  """Makes left-padded prompts of one to `length` tokens.

  Args:
    rows: B.
    length: P.
    seed: the seed of lengths and tokens.

  Returns:
    Prompts whose tokens and mask are [B, P].
  """
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, length + 1, rows)
  mask = np.arange(length) >= length - lengths[:, None]  # [B, P]
  tokens = rng.integers(FIRST_ID, MODEL_CONFIG.vocab_size, (rows, length))
  return Prompts(
    tokens=_array(np.where(mask, tokens, PAD_ID), np.int32),
    mask=_array(mask, np.bool_),
    index=_array(np.arange(rows), np.int32),
  )


def make_samples(rows: int = 8, length: int = 7, seed: int = 0) -> Samples:
  """Makes responses of one to `length` tokens, some of which did not end with a stop token.

  Args:
    rows: N, the number of responses.
    length: R.
    seed: the seed of everything.

  Returns:
    Samples whose arrays are [N, R] and [N].
  """
  rng = np.random.default_rng(seed)
  mask = np.arange(length) < rng.integers(1, length + 1, rows)[:, None]  # [N, R]
  tokens = rng.integers(FIRST_ID, MODEL_CONFIG.vocab_size, (rows, length))
  return Samples(
    tokens=_array(np.where(mask, tokens, PAD_ID), np.int32),
    mask=_array(mask, np.bool_),
    logprobs=_array(np.where(mask, -4.0, 0.0), np.float32),
    ended=_array(rng.random(rows) < 0.7, np.bool_),
  )


def make_scored_rollout(
  prompts: int = 8,
  num_samples: int = 1,
  prompt_length: int = 6,
  response_length: int = 7,
  seed: int = 0,
) -> ScoredRollout:
  """Makes responses with normally distributed scores.

  Args:
    prompts: B.
    num_samples: K responses to each prompt.
    prompt_length: P.
    response_length: R; the options of the step need max_new_tokens=R in `sampling`.
    seed: the seed of everything.

  Returns:
    B * K responses, on the default device.
  """
  rows = prompts * num_samples
  prompt_batch = make_prompts(prompts, prompt_length, seed)
  samples = make_samples(rows, response_length, seed + 1)
  scores = np.random.default_rng(seed + 2).normal(size=rows).astype(np.float32)
  return score_samples(prompt_batch, samples, scores)


def score_samples(
  prompts: Prompts,
  samples: Samples,
  scores: Any,
  pretraining: Sequences | None = None,
) -> ScoredRollout:
  """Joins prompts, responses and scores into the batch of a train step.

  Args:
    prompts: tokens and mask [B, P].
    samples: tokens and mask [B * K, R].
    scores: [B * K] float32.
    pretraining: documents for PPO-ptx, [B * K, T]; None = no PPO-ptx.
  """
  return ScoredRollout(sampler.join_sequences(prompts, samples), samples, scores, pretraining)


def _array(values: np.ndarray, dtype: Any) -> Any:
  """Converts a numpy array to the dtype of a batch's field.

  The return type is Any, as the fields are annotated as jax.Array, which they
  become when they are put onto the devices.
  """
  return values.astype(dtype)


# Assertions.


def assert_trees_close(got: Any, want: Any, message: str = '', tolerance: float = 1e-5) -> None:
  """Asserts that two trees of arrays are equal within a tolerance, relative plus absolute."""
  got, want = jax.device_get((got, want))
  got_structure: Any = jax.tree.structure(got)
  assert got_structure == jax.tree.structure(want), message
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(got),
    jax.tree.leaves(want),
    strict=True,
  )
  for (path, a), b in pairs:
    np.testing.assert_allclose(
      a,
      b,
      rtol=tolerance,
      atol=tolerance,
      err_msg=message + jax.tree_util.keystr(path),
    )
