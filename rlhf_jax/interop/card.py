"""The model card, which is the README.md of an exported model.

It says what the model is, what it was trained on, its results and its config.
"""

from collections.abc import Mapping
import json
from typing import Any

from rlhf_jax.interop.families import FAMILIES
from rlhf_jax.models.model_config import ModelConfig


def write_card(
  config: ModelConfig,
  title: str,
  method: str,
  base: str,
  data: Mapping[str, str],
  results: Mapping[str, float],
  section: Mapping[str, Any],
) -> str:
  """Writes a model card as text.

  Args:
    config: the shape of the model.
    title: the name of the model.
    method: the training method.
    base: the model that training started from.
    data: purpose of the data → where they came from.
    results: name of a measure → its value in the last evaluation.
    section: the config of the training stage.

  Returns:
    The card, in Markdown with Hugging Face's YAML header.
  """
  lines = [
    *_header(config, method),
    f'# {title}',
    '',
    *_summary(config, method, base),
    *_how_to_open(config),
    *_data(data),
    *_results(results),
    *_config(section),
  ]
  return '\n'.join(lines)


def _header(config: ModelConfig, method: str) -> list[str]:
  """Returns the YAML block that Hugging Face's hub reads."""
  task = 'text-classification' if config.head else 'text-generation'
  return [
    '---',
    'library_name: transformers',
    f'pipeline_tag: {task}',
    f'tags: [rlhf_jax, {method}]',
    '---',
    '',
  ]


def _summary(config: ModelConfig, method: str, base: str) -> list[str]:
  """Returns a paragraph about what the model is and, for a reward model, how to score with it."""
  kind = 'reward' if config.head else 'language'
  lines = [
    f'A {kind} model trained with rlhf_jax by `{method}`, begun from `{base}`: '
    f'{config.layers} layers, width {config.embed}, {config.vocab_size} tokens, '
    f'up to {config.max_length} in a text. Weights are safetensors.',
    '',
  ]
  if config.head:
    lines += [
      'The score of a response is the logit at the token that ends its turn, plus `reward_bias` of '
      'config.json where that stands there. What a chat template writes behind that token, such as '
      'a line feed, is not part of the text: cut it off the ids of `apply_chat_template`.',
      '',
    ]
  return lines


def _how_to_open(config: ModelConfig) -> list[str]:
  """Returns how to open the model with transformers, if it has a class for the model."""
  family = FAMILIES[config.family]
  class_name = family.class_name(config.head)
  if config.head and not family.has_classifier:
    return [f'transformers has no `{class_name}`; rlhf_jax reads it.', '']
  auto = 'AutoModelForSequenceClassification' if config.head else 'AutoModelForCausalLM'
  return [f'`transformers.{auto}.from_pretrained(DIR)` opens it as a `{class_name}`.', '']


def _data(data: Mapping[str, str]) -> list[str]:
  """Returns the list of data on which the model was trained and evaluated."""
  items = [f'- {purpose}: {source}' for purpose, source in data.items()]
  return ['## Data', '', *items, '']


def _results(results: Mapping[str, float]) -> list[str]:
  """Returns the table of the last evaluation; no lines where there was none."""
  if not results:
    return []
  rows = [f'| {name} | {value:.6g} |' for name, value in results.items()]
  return ['## Results', '', '| held out | |', '| --- | --- |', *rows, '']


def _config(section: Mapping[str, Any]) -> list[str]:
  """Returns the config of the stage as JSON."""
  text = json.dumps(section, indent=2, sort_keys=True, default=list)
  return ['## Config', '', '```json', text, '```', '']
