"""README.md of an exported model: what it is, from what data, with which results and which config."""

import json

from rlhf_jax.interop.families import FAMILIES


def write_card(config, title: str, method: str, base: str, data: dict, results: dict, section: dict) -> str:
  """A model card.

  Args:
    config: the model's ModelConfig.
    title: its name.
    method: how it was trained.
    base: what it began with.
    data: purpose → where the data came from.
    results: name → number, of the last evaluation.
    section: the stage's config.
  """
  family = FAMILIES[config.family]
  kind, task = (family.scorer, 'text-classification') if config.head else (family.causal, 'text-generation')
  lines = ['---', 'library_name: transformers', f'pipeline_tag: {task}', f'tags: [rlhf_jax, {method}]', '---', '',
           f'# {title}', '',
           f'A {"reward" if config.head else "language"} model trained with rlhf_jax by `{method}`, begun from '
           f'`{base}`: {config.layers} layers, width {config.embed}, {config.vocab_size} tokens, up to '
           f'{config.max_length} in a text. Weights are safetensors.', '']
  if config.head:
    lines += ['The score of a text is the logit at its last token plus `reward_bias` of config.json.', '']
  if family.scorer_exists or not config.head:
    auto = 'AutoModelForSequenceClassification' if config.head else 'AutoModelForCausalLM'
    lines += [f'`transformers.{auto}.from_pretrained(DIR)` opens it as a `{kind}`.', '']
  else:
    lines += [f'transformers has no `{kind}`; rlhf_jax reads it.', '']
  lines += ['## Data', ''] + [f'- {purpose}: {source}' for purpose, source in data.items()] + ['']
  lines += ['## Results', '', '| held out | |', '| --- | --- |'] + [
      f'| {name} | {value:.6g} |' for name, value in results.items()] + [''] if results else []
  said = json.dumps(section, indent=2, sort_keys=True, default=list)
  return '\n'.join(lines + ['## Config', '', '```json', said, '```', ''])
