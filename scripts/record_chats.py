"""Records what transformers makes of conversations with the templates of tests/interop.

python scripts/record_chats.py writes tests/interop/chats.json: for each template the texts of a
question with each of the responses, and of the question alone with the generation prompt.
"""

import argparse
import functools
import json
from pathlib import Path
import sys

PARSER = argparse.ArgumentParser(
  description=__doc__,
  formatter_class=argparse.RawDescriptionHelpFormatter,
)
if __name__ == '__main__':
  PARSER.parse_args()  # here, so that --help needs none of the packages below

import tokenizers
from tokenizers import models
import transformers

INTEROP = Path(__file__).resolve().parents[1] / 'tests' / 'interop'
sys.path.insert(0, str(INTEROP))

import chat_cases  # noqa: E402

DATE = '26 Jul 2024'  # what the templates get for today


def main() -> None:
  text = json.dumps(record(), indent=1, ensure_ascii=False)
  (INTEROP / 'chats.json').write_text(text + '\n', encoding='utf-8')


def record() -> dict[str, dict[str, str | list[str]]]:
  """Renders the conversations; {template: {'prompt': text, 'whole': a text a response}}."""
  recorded = {}
  for name, template in chat_cases.TEMPLATES.items():
    source = template.replace("strftime_now('%d %b %Y')", repr(DATE))
    tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizers.Tokenizer(models.WordLevel({'<s>': 0, '</s>': 1})),
      bos_token='<s>',
      eos_token='</s>',
      chat_template=source,
    )

    render = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    question = chat_cases.QUESTION
    recorded[name] = {
      'prompt': render(question, add_generation_prompt=True),
      'whole': [
        render([*question, {'role': 'assistant', 'content': response}])
        for response in chat_cases.RESPONSES
      ],
    }
  return recorded


if __name__ == '__main__':
  main()
