"""Does a workload with Tunix, on JAX; only a benchmark's worker imports this.

It has no trainer of reward models; here one is its PeftTrainer with a loss of pairs.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
import sys
import time
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tunix.generate import sampler as sampler_lib
from tunix.models.llama3 import model as llama
from tunix.rl import common, rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.ppo import ppo_learner
from tunix.rl.rollout import base_rollout
from tunix.sft import peft_trainer
from tunix.sft.dpo import dpo_trainer

from benchmarking import worker
from benchmarking.worker import Turns
from benchmarking.workload import from_json, Workload

FOREVER = 10**6  # steps: the benchmark ends the process
WORD = 't{}'  # token n as text


def main() -> None:
  work = from_json(sys.argv[1])
  turns = Turns(describe)
  with make_mesh():
    START[work.stage](work, turns)


def describe() -> dict[str, Any]:
  """Describes the process: device, versions, memory."""
  device = jax.devices()[0]
  memory = device.memory_stats() or {}
  return {
    'device': device.device_kind,
    'version': f'tunix 0.1.7, jax {jax.__version__}',
    'host_bytes': worker.peak_host_memory(),
    'device_bytes': memory.get('peak_bytes_in_use'),
  }


class TimedBatches(Iterator[Any]):
  """An endless iterator of one batch, which times what is done between its calls.

  Tunix dispatches steps ahead; so a turn is timed as a whole, until all its arrays are
  there, and its steps share the time.
  """

  def __init__(self, batch: Any, turns: Turns):
    self._batch = batch
    self._turns = turns
    self._made = -1  # steps of this turn; the first call comes before any
    self._began = time.perf_counter()

  def __next__(self) -> Any:
    self._made += 1
    if self._made and self._made == self._turns.left:
      for array in jax.live_arrays():
        array.block_until_ready()
      mean = (time.perf_counter() - self._began) / self._made
      for _ in range(self._made):
        self._turns.done({'step': mean})
      self._made = 0
      self._began = time.perf_counter()
    return self._batch


class WordTokenizer:
  """Tokens as words; none ends a text."""

  def __init__(self, work: Workload):
    self._size = work.shape.vocab_size

  def encode(self, text: str, **_: Any) -> list[int]:
    """Returns the tokens of words."""
    return [int(word[1:]) for word in text.split()]

  def decode(self, tokens: Any, **_: Any) -> str:
    """Returns tokens as words."""
    return ' '.join(WORD.format(int(n)) for n in tokens)

  def bos_id(self) -> int:
    """Returns the first token of prompts."""
    return 2

  def eos_id(self) -> int:
    """Returns an id that no model draws, so that no response ends early."""
    return self._size

  def pad_id(self) -> int:
    """Returns the token of padding."""
    return 0


# Models and batches.


class Scorer(llama.Llama3):
  """A model whose logits are scalars, and which takes the segments that PPO passes."""

  def __call__(self, *args: Any, segment_ids: Any = None, **kwargs: Any) -> Any:
    """Computes scores; there is one segment, and the mask says all."""
    del segment_ids
    return super().__call__(*args, **kwargs)


def make_mesh() -> jax.sharding.Mesh:
  """Makes a mesh of the first device, with the axes that Tunix shards by."""
  return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('fsdp', 'tp'))


def make_model(work: Workload, head: bool = False, seed: int = 0) -> Any:
  """Makes a model with random parameters; with a scalar head in the place of logits."""
  shape = work.shape
  config = llama.ModelConfig(
    num_layers=shape.layers,
    vocab_size=shape.vocab_size,
    embed_dim=shape.embed,
    hidden_dim=shape.mlp,
    num_heads=shape.heads,
    head_dim=shape.head_dim,
    num_kv_heads=shape.kv_heads,
    rope_theta=10_000,
    norm_eps=1e-5,
    weight_tying=not head,
  )
  kind = Scorer if head else llama.Llama3
  model = kind(config, rngs=nnx.Rngs(seed))
  if head:
    model.lm_head = nnx.Linear(shape.embed, 1, use_bias=False, rngs=nnx.Rngs(seed))
  dtype = jnp.dtype(work.dtype)
  nnx.update(model, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model)))
  return model


def make_optimizer() -> optax.GradientTransformation:
  """Makes AdamW, clipped."""
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))


def draw(work: Workload, rows: int, length: int) -> np.ndarray:
  """Draws tokens [rows, length] int32."""
  rng = np.random.default_rng(rows * length)
  return rng.integers(3, work.shape.vocab_size, (rows, length)).astype(np.int32)


def draw_texts(work: Workload, rows: int) -> list[str]:
  """Draws prompts as texts; Tunix puts the first token before them."""
  tokens = draw(work, rows, work.prompt_length - 1)
  return [' '.join(WORD.format(n) for n in row) for row in tokens]


def add_places(inputs: Any) -> dict[str, Any]:
  """Adds positions and the causal mask to full rows, as a trainer's model wants them."""
  tokens, mask = inputs.input_tokens, inputs.input_mask
  return {
    'input_tokens': tokens,
    'input_mask': mask,
    'positions': common.build_positions_from_mask(mask),
    'attention_mask': common.make_causal_attn_mask(mask),
  }


# The stages: each trains until the benchmark ends the process.


def start_sft(work: Workload, turns: Turns) -> None:
  """Trains by next-token prediction on full rows."""
  tokens = draw(work, work.rows, work.length)
  trainer = _make_trainer(make_model(work))
  trainer.with_gen_model_input_fn(add_places)
  trainer.train(TimedBatches(_full_rows(tokens), turns))


def start_reward(work: Workload, turns: Turns) -> None:
  """Trains a scalar head on pairs; the first half of the rows are the better responses."""

  def loss(model: Any, input_tokens: Any, input_mask: Any, positions: Any, attention_mask: Any):
    del input_mask
    scores, _ = model(input_tokens, positions, None, attention_mask)
    better, worse = jnp.split(scores[:, -1, 0], 2)
    return -jax.nn.log_sigmoid(better - worse).mean()

  tokens = draw(work, work.rows, work.length)
  trainer = _make_trainer(make_model(work, head=True))
  trainer.with_loss_fn(loss).with_gen_model_input_fn(add_places)
  trainer.train(TimedBatches(_full_rows(tokens), turns))


def _make_trainer(model: Any) -> peft_trainer.PeftTrainer:
  config = peft_trainer.TrainingConfig(eval_every_n_steps=FOREVER, max_steps=FOREVER)
  return peft_trainer.PeftTrainer(model, make_optimizer(), config)


def _full_rows(tokens: np.ndarray) -> peft_trainer.TrainingInput:
  return peft_trainer.TrainingInput(input_tokens=tokens, input_mask=np.ones_like(tokens, bool))


def start_dpo(work: Workload, turns: Turns) -> None:
  """Trains by DPO; the reference reads every batch."""
  config = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=FOREVER, max_steps=FOREVER)
  trainer = dpo_trainer.DPOTrainer(
    make_model(work), make_model(work, seed=1), make_optimizer(), config
  )
  prompts = draw(work, work.batch, work.prompt_length)
  chosen = draw(work, work.batch, work.response_length)
  rejected = chosen[::-1].copy()
  batch = dpo_trainer.TrainingInput(
    prompt_ids=prompts,
    prompt_mask=np.ones_like(prompts),
    chosen_ids=chosen,
    chosen_mask=np.ones_like(chosen),
    rejected_ids=rejected,
    rejected_mask=np.ones_like(rejected),
  )
  trainer.train(TimedBatches(batch, turns))


def _make_cluster(work: Workload, **models: Any) -> rl_cluster.RLCluster:
  mesh = make_mesh()
  training = rl_cluster.RLTrainingConfig(
    actor_optimizer=make_optimizer(),
    critic_optimizer=make_optimizer(),
    eval_every_n_steps=FOREVER,
    max_steps=FOREVER,
  )
  rollout = base_rollout.RolloutConfig(
    max_tokens_to_generate=work.response_length,
    temperature=work.temperature,
    top_p=1.0,
    max_prompt_length=work.prompt_length,
    kv_cache_size=work.length,
    eos_tokens=[work.shape.vocab_size],
  )
  config = rl_cluster.ClusterConfig(
    role_to_mesh={role: mesh for role in rl_cluster.Role},
    training_config=training,
    rollout_config=rollout,
  )
  return rl_cluster.RLCluster(
    actor=make_model(work),
    reference=make_model(work, seed=1),
    tokenizer=WordTokenizer(work),
    cluster_config=config,
    **models,
  )


def start_ppo(work: Workload, turns: Turns) -> None:
  """Trains by PPO: one epoch, one minibatch, four models."""
  cluster = _make_cluster(
    work, critic=make_model(work, head=True, seed=2), reward=make_model(work, head=True, seed=3)
  )
  learner = ppo_learner.PPOLearner(cluster, ppo_learner.PPOConfig(num_iterations=1, beta=0.05))
  learner.train(TimedBatches({'prompts': np.array(draw_texts(work, work.batch))}, turns))


def start_grpo(work: Workload, turns: Turns) -> None:
  """Trains by GRPO on one group of responses a step."""

  def score(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    del prompts
    return [len(text) % 7 for text in completions]

  config = grpo_learner.GRPOConfig(num_generations=work.batch, num_iterations=1, beta=0.04)
  learner = grpo_learner.GRPOLearner(_make_cluster(work), config, reward_fns=score)
  learner.train(TimedBatches({'prompts': np.array(draw_texts(work, 1))}, turns))


def start_generate(work: Workload, turns: Turns) -> None:
  """Responds to prompts by the sampler of its rollouts."""
  shape = work.shape
  cache = sampler_lib.CacheConfig(
    cache_size=work.length,
    num_layers=shape.layers,
    num_kv_heads=shape.kv_heads,
    head_dim=shape.head_dim,
  )
  sampler = sampler_lib.Sampler(make_model(work), WordTokenizer(work), cache)
  prompts = draw_texts(work, work.batch)

  def step() -> dict[str, float]:
    began = time.perf_counter()
    output = sampler(
      prompts,
      max_generation_steps=work.response_length,
      max_prompt_length=work.prompt_length,
      temperature=work.temperature,
      top_p=1.0 if work.temperature else None,
      eos_tokens=[shape.vocab_size],
      seed=0,
    )
    jax.block_until_ready(output.tokens)
    return {'step': time.perf_counter() - began}

  worker.run(step, turns)


START: dict[str, Callable[[Workload, Turns], None]] = {
  'pretrain': start_sft,
  'sft': start_sft,
  'reward': start_reward,
  'dpo': start_dpo,
  'ppo': start_ppo,
  'grpo': start_grpo,
  'generate': start_generate,
}


if __name__ == '__main__':
  main()
