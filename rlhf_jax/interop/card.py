"""The model card, README.md of an exported model: what it is, its data, results and config."""

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
    config: the model's shape.
    title: its name.
    method: how it was trained.
    base: the model that training began with.
    data: purpose → where the data came from.
    results: name → number, of the last evaluation.
    section: the stage's config.

  Returns:
    The card, in Markdown with Hugging Face's header.
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
  """The YAML block that Hugging Face's hub reads."""
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
  """What the model is, in one paragraph."""
  kind = 'reward' if config.head else 'language'
  lines = [
    f'A {kind} model trained with rlhf_jax by `{method}`, begun from `{base}`: '
    f'{config.layers} layers, width {config.embed}, {config.vocab_size} tokens, '
    f'up to {config.max_length} in a text. Weights are safetensors.',
    '',
  ]
  if config.head:
    lines += [
      'The score of a text is the logit at its last token, plus `reward_bias` of config.json where '
      'that stands there.',
      '',
    ]
  return lines


def _how_to_open(config: ModelConfig) -> list[str]:
  """The class of transformers that opens the model, where there is one."""
  family = FAMILIES[config.family]
  class_name = family.class_name(config.head)
  if config.head and not family.has_classifier:
    return [f'transformers has no `{class_name}`; rlhf_jax reads it.', '']
  auto = 'AutoModelForSequenceClassification' if config.head else 'AutoModelForCausalLM'
  return [f'`transformers.{auto}.from_pretrained(DIR)` opens it as a `{class_name}`.', '']


def _data(data: Mapping[str, str]) -> list[str]:
  """A list of what the model was trained and evaluated on."""
  items = [f'- {purpose}: {source}' for purpose, source in data.items()]
  return ['## Data', '', *items, '']


def _results(results: Mapping[str, float]) -> list[str]:
  """A table of the last evaluation, nothing where there was none."""
  if not results:
    return []
  rows = [f'| {name} | {value:.6g} |' for name, value in results.items()]
  return ['## Results', '', '| held out | |', '| --- | --- |', *rows, '']


def _config(section: Mapping[str, Any]) -> list[str]:
  """The stage's config as JSON."""
  text = json.dumps(section, indent=2, sort_keys=True, default=list)
  return ['## Config', '', '```json', text, '```', '']
