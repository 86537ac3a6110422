"""Does a workload with TRL, on PyTorch; only a benchmark's worker imports this.

PPO is in TRL's experimental part up to release 1.14 and in none after it.
"""

from collections.abc import Callable
import os
from pathlib import Path
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts

import datasets
import tokenizers
import torch
import transformers
import trl

from benchmarking import worker
from benchmarking.worker import Turns
from benchmarking.workload import from_json, Workload

FOREVER = 10**6  # steps: the benchmark ends the process
EXAMPLES = 256  # of the data set, which is repeated
WORD = 't{}'  # token n as text; words are split at blanks, so n words are n tokens


def main() -> None:
  work = from_json(sys.argv[1])
  datasets.disable_progress_bars()
  transformers.logging.set_verbosity_error()
  torch.manual_seed(0)
  turns = Turns(describe)
  with tempfile.TemporaryDirectory() as directory:
    START[work.stage](work, turns, directory)


def describe() -> dict[str, Any]:
  """Describes the process: device, versions, memory."""
  on_gpu = torch.cuda.is_available()
  return {
    'device': torch.cuda.get_device_name() if on_gpu else f'cpu, {torch.get_num_threads()} threads',
    'version': f'trl {trl.__version__}, torch {torch.__version__}',
    'host_bytes': worker.peak_host_memory(),
    'device_bytes': torch.cuda.max_memory_allocated() if on_gpu else None,
  }


class TimeSteps(transformers.TrainerCallback):
  """Tells the benchmark of every step, from one's end to the next one's."""

  def __init__(self, turns: Turns):
    self._turns = turns
    self._ended = time.perf_counter()

  def on_step_end(self, *_: Any, **__: Any) -> None:
    """Records the step that ends, and waits for the next turn."""
    if torch.cuda.is_available():
      torch.cuda.synchronize()
    self._turns.done({'step': time.perf_counter() - self._ended})
    self._ended = time.perf_counter()


# Models, tokens and settings.


def make_config(work: Workload, **changes: Any) -> transformers.LlamaConfig:
  """Makes the workload's shape."""
  shape = work.shape
  return transformers.LlamaConfig(
    vocab_size=shape.vocab_size,
    hidden_size=shape.embed,
    num_hidden_layers=shape.layers,
    num_attention_heads=shape.heads,
    num_key_value_heads=shape.kv_heads,
    intermediate_size=shape.mlp,
    tie_word_embeddings=True,
    max_position_embeddings=max(2048, work.length),
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
    attn_implementation='sdpa',
    **changes,
  )


def make_model(work: Workload) -> Any:
  """Makes a language model with random parameters."""
  model = transformers.LlamaForCausalLM(make_config(work))
  return model.to(getattr(torch, work.dtype))


def make_scorer(work: Workload) -> Any:
  """Makes a model with a scalar head."""
  model = transformers.LlamaForSequenceClassification(make_config(work, num_labels=1))
  return model.to(getattr(torch, work.dtype))


def make_tokenizer(work: Workload) -> Any:
  """Makes a tokenizer of which each word is a token."""
  words = {WORD.format(n): n for n in range(work.shape.vocab_size)}
  core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=WORD.format(2)))
  core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=core,
    pad_token=WORD.format(0),
    eos_token=WORD.format(1),
    padding_side='left',
  )


def draw(work: Workload, length: int) -> list[list[int]]:
  """Draws tokens of so many examples."""
  tokens = torch.randint(2, work.shape.vocab_size, (EXAMPLES, length))
  return tokens.tolist()


def draw_texts(work: Workload, length: int) -> list[str]:
  """Draws texts of so many tokens each."""
  return [' '.join(WORD.format(n) for n in row) for row in draw(work, length)]


def common_settings(work: Workload, directory: str) -> dict[str, Any]:
  """Returns the settings of all trainers: AdamW, no checkpoints, no evaluation."""
  return dict(
    output_dir=directory,
    per_device_train_batch_size=work.batch,
    gradient_accumulation_steps=1,
    gradient_checkpointing=False,
    learning_rate=1e-5,
    lr_scheduler_type='constant',
    bf16=work.dtype == 'bfloat16',
    use_cpu=not torch.cuda.is_available(),
    logging_steps=10,
    save_strategy='no',
    report_to=[],
    disable_tqdm=True,
  )


# The stages: each trains until the benchmark ends the process.


def start_sft(work: Workload, turns: Turns, directory: str) -> None:
  """Trains by next-token prediction on full rows."""
  data = datasets.Dataset.from_dict({'input_ids': draw(work, work.length)})
  args = trl.SFTConfig(
    **common_settings(work, directory), max_steps=FOREVER, max_length=work.length
  )
  _train(trl.SFTTrainer, make_model(work), args, data, work, turns)


def start_reward(work: Workload, turns: Turns, directory: str) -> None:
  """Trains a reward model on pairs."""
  prompts = draw(work, work.prompt_length)
  columns = {}
  for name in ('chosen_ids', 'rejected_ids'):
    responses = draw(work, work.response_length)
    columns[name] = [a + b for a, b in zip(prompts, responses)]
  args = trl.RewardConfig(
    **common_settings(work, directory), max_steps=FOREVER, max_length=work.length
  )
  data = datasets.Dataset.from_dict(columns)
  _train(trl.RewardTrainer, make_scorer(work), args, data, work, turns)


def start_dpo(work: Workload, turns: Turns, directory: str) -> None:
  """Trains by DPO; the reference reads every batch."""
  columns = {
    'prompt': draw_texts(work, work.prompt_length),
    # TRL adds the end token, and a blank before the response is no token.
    'chosen': [f' {text}' for text in draw_texts(work, work.response_length - 1)],
    'rejected': [f' {text}' for text in draw_texts(work, work.response_length - 1)],
  }
  args = trl.DPOConfig(
    **common_settings(work, directory), max_steps=FOREVER, max_length=work.length
  )
  data = datasets.Dataset.from_dict(columns)
  _train(trl.DPOTrainer, make_model(work), args, data, work, turns, ref_model=make_model(work))


def start_grpo(work: Workload, turns: Turns, directory: str) -> None:
  """Trains by GRPO on one group of responses a step."""
  data = datasets.Dataset.from_dict({'prompt': draw_texts(work, work.prompt_length)})
  args = trl.GRPOConfig(
    **common_settings(work, directory),
    max_steps=FOREVER,
    num_generations=work.batch,
    max_completion_length=work.response_length,
    temperature=work.temperature,
    beta=0.04,
    generation_kwargs={'min_new_tokens': work.response_length},
  )

  def score(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(n % 2 for n in row) / len(row) for row in completion_ids]

  # By a path: TRL reads the reference again from where the policy came from.
  path = f'{directory}/model'
  make_model(work).save_pretrained(path)
  model = transformers.LlamaForCausalLM.from_pretrained(path)
  _train(trl.GRPOTrainer, model, args, data, work, turns, reward_funcs=score)


def _train(
  trainer: Callable[..., Any],
  model: Any,
  args: Any,
  data: Any,
  work: Workload,
  turns: Turns,
  **others: Any,
) -> None:
  trainer(
    model=model,
    args=args,
    train_dataset=data,
    processing_class=make_tokenizer(work),
    callbacks=[TimeSteps(turns)],
    **others,
  ).train()


def start_ppo(work: Workload, turns: Turns, directory: str) -> None:
  """Trains by PPO: one epoch, one minibatch, four models."""
  os.environ['TRL_EXPERIMENTAL_SILENCE'] = '1'
  try:
    from trl.experimental.ppo import PPOConfig, PPOTrainer
  except ImportError:
    sys.exit(f'benchmark: trl {trl.__version__} has no PPO; releases up to 1.14 have')
  data = datasets.Dataset.from_dict({'input_ids': draw(work, work.prompt_length)})
  args = PPOConfig(
    **common_settings(work, directory),
    num_ppo_epochs=1,
    num_mini_batches=1,
    total_episodes=FOREVER,
    num_sample_generations=0,
    local_rollout_forward_batch_size=work.batch,
    response_length=work.response_length,
    temperature=work.temperature,
  )
  PPOTrainer(
    args=args,
    processing_class=make_tokenizer(work),
    model=make_model(work),
    ref_model=make_model(work),
    reward_model=make_scorer(work),
    value_model=make_scorer(work),
    train_dataset=data,
    eval_dataset=data.select(range(work.batch)),
    callbacks=[TimeSteps(turns)],
  ).train()


def start_generate(work: Workload, turns: Turns, directory: str) -> None:
  """Responds to prompts by transformers' `generate`, which TRL calls."""
  del directory
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  model = make_model(work).to(device).eval()
  prompts = torch.tensor(draw(work, work.prompt_length)[: work.batch], device=device)

  def step() -> dict[str, float]:
    began = time.perf_counter()
    with torch.inference_mode():
      sampling = dict(temperature=work.temperature, top_k=0) if work.temperature else {}
      model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        min_new_tokens=work.response_length,
        max_new_tokens=work.response_length,
        do_sample=bool(work.temperature),
        **sampling,
      )
    return {'step': time.perf_counter() - began}

  worker.run(step, turns)


START: dict[str, Callable[[Workload, Turns, str], None]] = {
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
