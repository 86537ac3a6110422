"""Chat templates of the kinds that the families have, and tokenizers of three kinds."""

import functools

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

CHATML = (
  '{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}'
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
).replace('\n', "{{ '\n' }}")

# Written for these tests, each with what is peculiar to a family or to a report of a fault.
TEMPLATES = {
  'chatml': CHATML,
  'default_system': (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system{{ '\n' }}You help.<|im_end|>"
    "{{ '\n' }}{% endif %}" + CHATML
  ),
  # Blanks around the words and before the end mark.
  'llama2': (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content"
    " + ' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    '{% else %}{{ raise_exception("Only user and assistant") }}{% endif %}{% endfor %}'
  ),
  # The outer blanks of messages are taken away; a date.
  'llama3': (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>{{ '\n\nToday: '"
    " + strftime_now('%d %b %Y') }}<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m.role }}"
    "<|end_header_id|>{{ '\n\n' }}{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}"
    '{% endif %}'
  ),
  # The prompt ends with a blank that belongs to the first word of the response.
  'mistral': (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content"
    " + ' [/INST] ' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
  ),
  # A thinking block in the last turn, none in earlier ones; tools.
  'qwen3': (
    "{% if tools %}<|im_start|>system{{ '\n' }}{% for t in tools %}{{ t | tojson }}{{ '\n' }}"
    "{% endfor %}<|im_end|>{{ '\n' }}{% endif %}"
    '{% set ns = namespace(last=0) %}{% for m in messages %}'
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}"
    "{% set text = m.content or '' %}{% set why = '' %}"
    "{% if m.role == 'assistant' and '</think>' in text %}"
    "{% set why = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>{{ '\n' + why + '\n' }}</think>"
    "{{ '\n\n' }}{% endif %}{{ text }}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
  ),
  # The generation prompt opens an empty thinking block, whatever the response will be.
  'no_thinking': (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>{{ '\n' }}"
    '{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant'
    "{{ '\n<think>\n\n</think>\n\n' }}{% endif %}"
  ),
  # Another name of the assistant, a trimmed content.
  'gemma': (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else"
    " m.role }}{{ '\n' + m.content | trim }}<end_of_turn>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model{{ '\n' }}{% endif %}"
  ),
  # The last turn alone is closed by the end of sequence.
  'olmo2': (
    "{% for m in messages %}<|{{ m.role }}|>{{ '\n' + m.content }}"
    "{% if m.role == 'assistant' and loop.last %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}"
  ),
  # A second mark at the end of the conversation, and the assistant's words between tags.
  'phi3': (
    "{% for m in messages %}<|{{ m.role }}|>{{ '\n' }}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% else %}{{ eos_token }}{% endif %}"
  ),
  # Nothing marks the end of a turn.
  'unmarked': (
    "{% for m in messages %}{{ m.role | capitalize + ': ' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
  ),
  # The end of a turn is text, as in a ChatML template on a vocabulary without its marks.
  'text_mark': (
    "{% for m in messages %}{{ '### ' + m.role + '\n' + m.content + '\n### end\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
  ),
}

MARKS = (
  *('<s>', '</s>', '<|im_start|>', '<|im_end|>', '[INST]', '[/INST]', '<|eot_id|>', '<|end|>'),
  *('<|start_header_id|>', '<|end_header_id|>', '<start_of_turn>', '<end_of_turn>'),
  *('<|system|>', '<|user|>', '<|assistant|>'),
)

QUESTION = [{'role': 'user', 'content': 'How much is it?'}]
FIRST = ('Yes', ' Yes', '\nYes', '$46', '<b>', '    return', 'é', '</s>Yes')
LAST = ('.', ' ', '\n', '<', '💡', '<|im_end|>')
RESPONSES = (
  *(f'{first} it is{last}' for first in FIRST for last in LAST),
  '<think>\nTwo and two.\n</think>\n\nIt is 4.',
  'Yes',
  '',
)

_TEXTS = ['How much is it? Yes it is. Two and two make four.\n\nuser assistant system: end'] * 20


def build_unigram():
  """As SentencePiece's Unigram: '▁' for blanks and before a text; '</s>' is a piece of it."""
  core = tokenizers.Tokenizer(models.Unigram())
  core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first')
  core.decoder = decoders.Metaspace(prepend_scheme='first')
  letters = [chr(code) for code in range(33, 127)]
  trainer = trainers.UnigramTrainer(
    vocab_size=220,
    initial_alphabet=[*letters, '\n', '▁', 'é', '💡'],
    unk_token='<unk>',
    special_tokens=['<unk>', '</s>', '<s>'],
    show_progress=False,
  )
  core.train_from_iterator(_TEXTS, trainer)
  return core


def build_byte_fallback():
  """As Llama 2: '▁' before every text, also behind a mark; unknown characters as bytes."""
  pieces = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256))]
  pieces += [chr(code) for code in range(33, 127)] + ['▁', '▁▁', '▁Y', 'es', '▁Yes']
  merges = [('▁', '▁'), ('▁', 'Y'), ('e', 's'), ('▁Y', 'es')]
  vocabulary = {piece: number for number, piece in enumerate(pieces)}
  core = tokenizers.Tokenizer(
    models.BPE(vocabulary, merges, unk_token='<unk>', fuse_unk=True, byte_fallback=True)
  )
  core.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
  core.decoder = decoders.Sequence(
    [
      decoders.Replace('▁', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  return core


@functools.cache
def with_marks(build):
  """A core that has the marks of all templates."""
  core = build()
  core.add_special_tokens(
    [tokenizers.AddedToken(mark, special=True, normalized=False) for mark in MARKS]
  )
  return core
