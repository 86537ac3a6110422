"""Models' files: Hugging Face directories, tokenizers and templates, GGUF, PEFT."""

from collections.abc import Iterator
import functools
import importlib.util
import json
from pathlib import Path
import shutil
import sys
from typing import Any

from breaking.cases import (
  Case,
  changed_values,
  find_value,
  flips,
  is_other_type,
  odd_files,
  truncations,
)

TESTS = Path(__file__).resolve().parents[2] / 'tests/interop'
LLAMA = TESTS / 'fixtures/tiny_llama'
# Keys of config.json from which the shape comes: another type is never right.
SHAPE = (
  'hidden_size',
  'intermediate_size',
  'num_attention_heads',
  'num_hidden_layers',
  'num_key_value_heads',
  'max_position_embeddings',
  'rms_norm_eps',
  'vocab_size',
  'model_type',
  'hidden_act',
  'rope_parameters',
  'head_dim',
)


_REPLACE = {'type': 'Replace', 'pattern': {'String': 'e'}, 'content': 'e' * 10}
_MANY = [_REPLACE] * 12
# Tokenizers that make gigabytes of a word.
GROWING = {
  'a normalizer that grows': {'normalizer': {'type': 'Sequence', 'normalizers': _MANY}},
  'a decoder that grows': {'decoder': {'type': 'Sequence', 'decoders': _MANY}},
  'a normalizer between characters': {
    'normalizer': {'type': 'Replace', 'pattern': {'Regex': ''}, 'content': 'e' * 10**6}
  },
}


@functools.cache
def tokenizer() -> Any:
  """Returns a tiny tokenizer with a chat template."""
  from rlhf_jax import testing

  return testing.make_tokenizer()


def hugging_face_cases() -> Iterator[Case]:
  """Yields directories of which one file is damaged."""
  for directory in (LLAMA, TESTS / 'data/qwen2', TESTS / 'data/gpt2'):
    names = [path.name for path in directory.iterdir() if path.suffix in ('.json', '.safetensors')]
    few = 1 if directory == LLAMA else 4
    for name in sorted(names):
      if name == 'generation_config.json':
        continue  # read with the tokenizer only
      data = (directory / name).read_bytes()
      yield _directory(directory, name, 'gone', None, True)
      for what, odd in odd_files():
        yield _directory(directory, name, what, odd, True)
      for what, part in truncations(data, 24 // few):
        yield _directory(directory, name, what, part, True)
      header = int.from_bytes(data[:8], 'little') + 8 if name.endswith('.safetensors') else 0
      for what, part in flips(data, 24 // few, until=header):
        yield _directory(directory, name, what, part, False)
      if name == 'config.json' or name.endswith('index.json'):
        yield from _changed_json(directory, name, json.loads(data))


def _changed_json(directory: Path, name: str, values: dict) -> Iterator[Case]:
  for key, wrong, changed in changed_values(values):
    if key.startswith(('transformers_version', 'weight_map.')) and wrong not in ([], -1):
      continue
    refuse = key in SHAPE and is_other_type(find_value(values, key), wrong)
    data = json.dumps(changed).encode()
    yield _directory(directory, name, f'{key} is {wrong!r}', data, refuse)


def _directory(directory: Path, name: str, what: str, data: bytes | None, refuse: bool) -> Case:
  def run(folder: Path) -> None:
    from rlhf_jax.interop import pretrained

    _copy_with(directory, folder / 'model', name, data)
    config = pretrained.read_config(folder / 'model')
    pretrained.load_parameters(folder / 'model', config)

  title = f'{directory.name}/{name}: {what}'
  return Case('Hugging Face', title, run, 'model', refuse)


def _copy_with(directory: Path, target: Path, name: str, data: bytes | None) -> None:
  """Copies a directory with one file changed, or left out."""
  shutil.copytree(directory, target)
  if data is None:
    (target / name).unlink(missing_ok=True)
  else:
    (target / name).write_bytes(data)


LOOP = (
  '{% for a in range(99999) %}{% for b in range(99999) %}{% set x = b %}{% endfor %}{% endfor %}'
)
DOUBLE = (
  "{% set n = namespace(s='x' * 99) %}"
  '{% for i in range(60) %}{% set n.s = n.s OP n.s %}{% endfor %}'
)
TEMPLATES = (
  '',
  '{{',
  '{% for %}',
  '{% endfor %}',
  '{{ messages[99].content }}',
  '{{ nothing.at.all }}',
  "{{ raise_exception('no\nway\x1b[31m') }}",
  '{{ 1 / 0 }}',
  "{{ ''.__class__.__mro__ }}",
  '{{ messages.__class__.__base__.__subclasses__() }}',
  "{% include '/etc/passwd' %}",
  "{% import 'os' as os %}{{ os.system('true') }}",
  '{{ messages }}',
  '{{ messages | tojson }}',
  'no messages at all',
  '{{ messages[0].content }}{{ messages[0].content }}',
  '{% for m in messages %}{{ m.role }}{% endfor %}',
  '{% for m in messages %}{{ m.content[:3] }}{% endfor %}',
  '{% for m in messages %}{{ m.content | upper }}{% endfor %}',
  '{{ messages | map("nothing") | list }}',
  '{{ messages | nofilter }}',
  '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}',
  '{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}',
  "{{ 'x' * 10 ** 10 }}",
  "{{ 'x' * 999999999 }}",
  "{{ '%999999999d' % 1 }}",
  "{{ 'x'.ljust(9999999999) }}",
  "{{ 'x'.center(3000000000) }}",
  '{{ 10 ** 10 ** 10 }}',
  '{{ [0] * 10 ** 9 }}',
  '{{ range(10 ** 9) | list }}',
  "{{ 'x' | center(3000000000) }}",
  "{{ ('x' * 9999999).replace('x', 'y' * 9999) }}",
  '{{ lipsum(n=10000) }}',
  LOOP,
  DOUBLE.replace('OP', '~'),
  DOUBLE.replace('OP', '+'),
  '{% for i in range(99999) %}{% for m in messages %}{{ m.content * 9999 }}{% endfor %}'
  '{% endfor %}',
)


def tokenizer_cases() -> Iterator[Case]:
  """Yields tokenizers of which one file is damaged, and templates."""
  for name in ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja'):
    is_json = name.endswith('.json')
    for what, odd in odd_files():
      yield _tokenizer(name, what, odd, is_json)
    for number in range(24):
      yield _tokenizer(name, f'cut to {number} of 24 parts', number, name == 'tokenizer.json')
    for number in range(40):
      yield _tokenizer(name, f'flip {number}', -1 - number, False)
  for key in ('model', 'added_tokens', 'pre_tokenizer', 'decoder', 'version', 'normalizer'):
    for wrong in (5, 'x', [5], {'type': 'Nothing'}, True):
      yield _tokenizer('tokenizer.json', f'{key} is {wrong!r}', {key: wrong}, key == 'model')
  keys = ('eos_token', 'bos_token', 'pad_token', 'chat_template', 'add_prefix_space')
  for key in (*keys, 'added_tokens_decoder', 'tokenizer_class', 'model_max_length'):
    for wrong in (
      5,
      -1,
      'nothing',
      [5],
      ['a'],
      {'x': 1},
      {'content': 5},
      [{'name': 'default'}],
      True,
    ):
      refuse = key in ('eos_token', 'pad_token') and not isinstance(wrong, str)
      yield _tokenizer('tokenizer_config.json', f'{key} is {wrong!r}', {key: wrong}, refuse)
  for name, change in GROWING.items():
    yield _tokenizer('tokenizer.json', name, change, True)
  for number, template in enumerate(TEMPLATES):
    yield _tokenizer(
      'chat_template.jinja',
      f'template {number}: {template[:40]!r}',
      template.encode(),
      number in (*range(1, 9), 10, 11, *range(20, len(TEMPLATES))) and number != 33,
    )


def _tokenizer(name: str, what: str, change: Any, refuse: bool) -> Case:
  """A tokenizer's directory; `change` is bytes, values of keys, or the number of a cut or flip."""

  def run(folder: Path) -> None:
    from rlhf_jax.interop.tokenizer import Tokenizer

    tokenizer().save(folder)
    path = folder / name
    data = path.read_bytes() if path.is_file() else b'{{ messages[0].content }}'
    if isinstance(change, dict):
      path.write_text(json.dumps({**json.loads(data), **change}))
    elif isinstance(change, bytes):
      path.write_bytes(change)
    elif change >= 0:
      path.write_bytes(data[: len(data) * change // 24])
    else:
      [(_, flipped)] = flips(data, 1, seed=change)
      path.write_bytes(flipped)
    loaded = Tokenizer.load(folder)
    loaded.text('some text')
    messages = [{'role': 'user', 'content': 'Why?'}]
    loaded.prompt(messages)
    loaded.exchange(messages, 'So.')

  place = 'template' if name.endswith('.jinja') else ''
  return Case('tokenizer and template', f'{name}: {what}', run, place, refuse, 60.0)


def gguf_cases() -> Iterator[Case]:
  """Yields GGUF files that are cut or changed; none without the package that reads them."""
  if importlib.util.find_spec('gguf') is None:  # each would be refused, whatever is in it
    print('GGUF: not tried: pip install gguf', file=sys.stderr)
    return
  for name in ('llama3', 'qwen2', 'gpt2'):
    data = (TESTS / f'gguf/{name}.gguf').read_bytes()
    for what, part in truncations(data, 30):
      yield _gguf(name, what, part, True)
    for what, part in flips(data, 60, until=6000):
      yield _gguf(name, what, part, False)
    for what, part in flips(data, 20, until=64):
      yield _gguf(name, what, part, False)
  for what, odd in odd_files():
    yield _gguf('odd', what, odd, True)


def _gguf(name: str, what: str, data: bytes, refuse: bool) -> Case:
  def run(folder: Path) -> None:
    from rlhf_jax.interop import gguf_io

    (folder / 'model.gguf').write_bytes(data)
    _, _, load = gguf_io.open_gguf(folder / 'model.gguf')
    load(None)

  return Case('GGUF', f'{name}: {what}', run, 'model.gguf', refuse)


def adapter_cases() -> Iterator[Case]:
  """Yields PEFT adapters that are damaged."""
  directory = TESTS / 'adapters/llama'
  values = json.loads((directory / 'adapter_config.json').read_text())
  for key, wrong, changed in changed_values(values):
    if key in ('peft_version', 'megatron_core', 'inference_mode', 'revision', 'task_type'):
      continue
    refuse = key in ('r', 'lora_alpha', 'target_modules', 'peft_type')
    refuse = refuse and is_other_type(values[key], wrong) and not isinstance(wrong, str)
    data = json.dumps(changed).encode()
    yield _adapters('adapter_config.json', f'{key} is {wrong!r}', data, refuse)
  for name in ('adapter_config.json', 'adapter_model.safetensors'):
    data = (directory / name).read_bytes()
    for what, odd in odd_files():
      yield _adapters(name, what, odd, True)
    for what, part in truncations(data, 24):
      yield _adapters(name, what, part, True)
    for what, part in flips(data, 24, until=1500):
      yield _adapters(name, what, part, False)


def _adapters(name: str, what: str, data: bytes, refuse: bool) -> Case:
  def run(folder: Path) -> None:
    import jax

    from rlhf_jax import testing
    from rlhf_jax.models import transformer
    from rlhf_jax.stages.shared import model_sources, model_store

    _copy_with(TESTS / 'data/llama', folder / 'data/llama', 'none', None)
    _copy_with(TESTS / 'adapters/llama', folder / 'adapters/llama', name, data)
    source = model_sources.find_model(str(folder / 'adapters/llama'))
    layout = testing.make_layout()
    model = transformer.build_model(source.config)
    del jax
    params = model_store.read_parameters(source, layout, 'float32', {})
    shardings = model_store.model_shardings(model, layout)
    model_store.complete_parameters(params, model.init, shardings, layout)

  return Case('PEFT', f'{name}: {what}', run, 'adapter', refuse)
