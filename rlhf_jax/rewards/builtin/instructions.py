"""Rewards for following instructions that a program can verify: IFEval.

Zhou et al. 2023, arXiv:2311.07911, table 1. A record's meta has
`instruction_id_list` and, for each of these instructions, the `kwargs` of its
check. The rules are the strict ones of the reference implementation
(google-research, instruction_following_eval); docs/rewards.md says where they
differ. Left out: the loose rules, which also try a response without its first or
last line, and instructions that IFEval's prompts do not use.
"""

from collections.abc import Callable, Mapping, Sequence
import json
import re
from typing import Any

from rlhf_jax.data.records import Prompt
from rlhf_jax.errors import UserError

_CONSTRAINED_RESPONSES = (
  'My answer is yes.',
  'My answer is no.',
  'My answer is maybe.',
)
_CLOSING = '"\'”’)]*_'  # characters that may follow the end of a sentence
_ABBREVIATIONS = frozenset('mr. mrs. ms. dr. prof. st. jr. sr. vs. etc. inc. ltd.'.split())
_INITIALS = re.compile(r'\W*(?:[A-Za-z]\.)+')  # "e.g.", "J.", "U.S."

Kwargs = Mapping[str, Any]  # of an instruction's check, without those that are None
# check(text, kwargs) → whether the text follows the instruction.
Check = Callable[[str, Kwargs], bool]


def follows(
  prompts: Sequence[list[dict]],
  responses: Sequence[str],
  records: Sequence[Prompt],
) -> list[float]:
  """Computes, for each response, the share of its record's instructions that it follows.

  Args:
    prompts: not used.
    responses: N texts.
    records: N prompts, whose meta has `instruction_id_list` and `kwargs`.

  Returns:
    N shares from 0 to 1; an empty response follows no instruction.

  Raises:
    UserError: a record's meta is incomplete or invalid, or names an unknown instruction;
      the message names the record and the instruction.
  """
  values = []
  for response, record in zip(responses, records, strict=True):
    outcomes = _check_instructions(response, record)
    values.append(sum(outcomes) / len(outcomes))
  return values


def follows_all(
  prompts: Sequence[list[dict]],
  responses: Sequence[str],
  records: Sequence[Prompt],
) -> list[float]:
  """Gives 1.0 where a response follows all its record's instructions, else 0.0.

  Takes the same arguments as `follows` and raises the same errors.
  """
  values = []
  for response, record in zip(responses, records, strict=True):
    values.append(float(all(_check_instructions(response, record))))
  return values


def _check_instructions(response: str, record: Prompt) -> list[bool]:
  """Returns, for each instruction of a record, whether the response follows it."""
  names = record.meta.get('instruction_id_list')
  all_kwargs = record.meta.get('kwargs')
  message = f'record {record.id}: meta needs "instruction_id_list" and a list of as many "kwargs"'
  if not isinstance(names, list) or not isinstance(all_kwargs, list):
    raise UserError(message)
  if not names or len(names) != len(all_kwargs):
    raise UserError(message)
  is_empty = not response.strip()
  outcomes = []
  for name, kwargs in zip(names, all_kwargs, strict=True):
    where = f'record {record.id}: instruction {name!r}'
    followed = _run_check(name, response, kwargs, where)
    outcomes.append(followed and not is_empty)
  return outcomes


def _run_check(
  name: str,
  response: str,
  kwargs: Mapping[str, Any] | None,
  where: str,
) -> bool:
  """Runs the check of an instruction; `where` names it in messages."""
  if name not in CHECKS:
    raise UserError(f'{where}: no such check; there are {", ".join(CHECKS)}')
  try:
    # The data set lists the kwargs of all checks; those of other checks are None.
    arguments = {key: value for key, value in (kwargs or {}).items() if value is not None}
    return bool(CHECKS[name](response, arguments))
  except KeyError as error:
    raise UserError(f'{where}: kwargs lack {error}') from None
  except (AttributeError, TypeError) as error:
    raise UserError(f'{where}: kwargs {kwargs!r:.60}: {error}') from None


# --- checks, in the order of their names ---


def _capital_word_frequency(text: str, kwargs: Kwargs) -> bool:
  words = re.findall(r"\w+(?:[-'’.]\w+)*", text)
  count = sum(word.isupper() for word in words)
  return _compare(count, kwargs['capital_relation'], kwargs['capital_frequency'])


def _english_capital(text: str, kwargs: Kwargs) -> bool:
  return text.isupper() and _is_in_language(text, 'en')


def _english_lowercase(text: str, kwargs: Kwargs) -> bool:
  return text.islower() and _is_in_language(text, 'en')


def _repeat_prompt(text: str, kwargs: Kwargs) -> bool:
  prompt = kwargs['prompt_to_repeat'].strip().lower()
  return text.strip().lower().startswith(prompt)


def _two_responses(text: str, kwargs: Kwargs) -> bool:
  parts = _split_by_divider(text, '******')
  return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _number_placeholders(text: str, kwargs: Kwargs) -> bool:
  placeholders = re.findall(r'\[[^\]\n]*\]', text)
  return len(placeholders) >= kwargs['num_placeholders']


def _postscript(text: str, kwargs: Kwargs) -> bool:
  # A space is allowed after each dot of a marker: "P. S."
  marker = re.escape(kwargs['postscript_marker']).replace(r'\.', r'\.\s?')
  return re.search(marker, text, flags=re.IGNORECASE) is not None


def _constrained_response(text: str, kwargs: Kwargs) -> bool:
  return any(response in text for response in _CONSTRAINED_RESPONSES)


def _json_format(text: str, kwargs: Kwargs) -> bool:
  fences = r'\A```(?:json)?|```\Z'
  text = re.sub(fences, '', text.strip(), flags=re.IGNORECASE)
  try:
    json.loads(text)
  except (ValueError, RecursionError):
    return False
  return True


def _multiple_sections(text: str, kwargs: Kwargs) -> bool:
  heading = re.escape(kwargs['section_spliter']) + r'\s?\d+'
  return len(re.findall(heading, text)) >= kwargs['num_sections']


def _number_bullet_lists(text: str, kwargs: Kwargs) -> bool:
  # A double star is bold text, not a bullet.
  bullets = re.findall(r'^[ \t]*(?:\*[^*\n]|-)', text, flags=re.MULTILINE)
  return len(bullets) == kwargs['num_bullets']


def _number_highlighted_sections(text: str, kwargs: Kwargs) -> bool:
  highlights = re.findall(r'\*\*([^\n*]*)\*\*|\*([^\n*]*)\*', text)
  count = 0
  for double, single in highlights:
    if (double or single).strip():
      count += 1
  return count >= kwargs['num_highlights']


def _title(text: str, kwargs: Kwargs) -> bool:
  # An empty '<< >>' is not a title.
  titles = re.findall(r'<<[^\n]+>>', text)
  return any(title.strip('<> ') for title in titles)


def _keyword_existence(text: str, kwargs: Kwargs) -> bool:
  return all(_count_occurrences(word, text) for word in kwargs['keywords'])


def _forbidden_words(text: str, kwargs: Kwargs) -> bool:
  return not any(_has_word(word, text) for word in kwargs['forbidden_words'])


def _keyword_frequency(text: str, kwargs: Kwargs) -> bool:
  count = _count_occurrences(kwargs['keyword'], text)
  return _compare(count, kwargs['relation'], kwargs['frequency'])


def _letter_frequency(text: str, kwargs: Kwargs) -> bool:
  count = text.lower().count(kwargs['letter'].lower())
  return _compare(count, kwargs['let_relation'], kwargs['let_frequency'])


def _response_language(text: str, kwargs: Kwargs) -> bool:
  return _is_in_language(text, kwargs['language'])


def _nth_paragraph_first_word(text: str, kwargs: Kwargs) -> bool:
  """Checks the number of paragraphs, separated by empty lines, and one paragraph's first word."""
  count = kwargs['num_paragraphs']
  number = kwargs['nth_paragraph']  # from 1
  word = kwargs['first_word']
  paragraphs = [part.strip() for part in text.split('\n\n') if part.strip()]
  if len(paragraphs) != count or not 1 <= number <= count:
    return False
  beginning = paragraphs[number - 1].split()[0].lstrip('\'"')
  first_word = re.split(r'[.,?!\'"]', beginning)[0]
  return first_word.lower() == word.lower()


def _number_paragraphs(text: str, kwargs: Kwargs) -> bool:
  parts = _split_by_divider(text, '***')
  return len(parts) == kwargs['num_paragraphs'] and all(parts)


def _number_sentences(text: str, kwargs: Kwargs) -> bool:
  return _compare(_count_sentences(text), kwargs['relation'], kwargs['num_sentences'])


def _number_words(text: str, kwargs: Kwargs) -> bool:
  count = len(re.findall(r'\w+', text))
  return _compare(count, kwargs['relation'], kwargs['num_words'])


def _no_comma(text: str, kwargs: Kwargs) -> bool:
  return ',' not in text


def _end_checker(text: str, kwargs: Kwargs) -> bool:
  end = kwargs['end_phrase'].strip().lower()
  return text.strip().strip('"').lower().endswith(end)


def _quotation(text: str, kwargs: Kwargs) -> bool:
  text = text.strip()
  return len(text) > 1 and text[0] == text[-1] == '"'


CHECKS: dict[str, Check] = {  # the name of an instruction → its check
  'change_case:capital_word_frequency': _capital_word_frequency,
  'change_case:english_capital': _english_capital,
  'change_case:english_lowercase': _english_lowercase,
  'combination:repeat_prompt': _repeat_prompt,
  'combination:two_responses': _two_responses,
  'detectable_content:number_placeholders': _number_placeholders,
  'detectable_content:postscript': _postscript,
  'detectable_format:constrained_response': _constrained_response,
  'detectable_format:json_format': _json_format,
  'detectable_format:multiple_sections': _multiple_sections,
  'detectable_format:number_bullet_lists': _number_bullet_lists,
  'detectable_format:number_highlighted_sections': _number_highlighted_sections,
  'detectable_format:title': _title,
  'keywords:existence': _keyword_existence,
  'keywords:forbidden_words': _forbidden_words,
  'keywords:frequency': _keyword_frequency,
  'keywords:letter_frequency': _letter_frequency,
  'language:response_language': _response_language,
  'length_constraints:nth_paragraph_first_word': _nth_paragraph_first_word,
  'length_constraints:number_paragraphs': _number_paragraphs,
  'length_constraints:number_sentences': _number_sentences,
  'length_constraints:number_words': _number_words,
  'punctuation:no_comma': _no_comma,
  'startend:end_checker': _end_checker,
  'startend:quotation': _quotation,
}


# --- helpers of the checks ---


def _compare(count: int, relation: str, threshold: int) -> bool:
  """Tells whether a count is 'at least' or 'less than' a threshold."""
  if relation == 'at least':
    return count >= threshold
  if relation == 'less than':
    return count < threshold
  raise TypeError(f'expected the relation "at least" or "less than", got {relation!r}')


def _count_occurrences(word: str, text: str) -> int:
  """Counts how often a word occurs, also inside other words, ignoring case."""
  return len(re.findall(re.escape(word), text, flags=re.IGNORECASE))


def _has_word(word: str, text: str) -> bool:
  """Tells whether a text contains a whole word, ignoring case."""
  pattern = rf'\b{re.escape(word)}\b'
  return re.search(pattern, text, flags=re.IGNORECASE) is not None


def _split_by_divider(text: str, divider: str) -> list[str]:
  """Splits a text; a divider before the first part or after the last one adds no empty part."""
  parts = [part.strip() for part in text.split(divider)]
  begin = 0 if parts[0] else 1
  end = len(parts) if parts[-1] else len(parts) - 1
  return parts[begin:end]


def _is_in_language(text: str, language: str) -> bool:
  """Tells whether a text is in a language (an ISO 639-1 code); False where none is detected.

  Raises:
    UserError: langdetect is not installed.
  """
  try:
    import langdetect
  except ImportError:
    raise UserError(
      'rewards.builtin.instructions: langdetect is not installed, run: pip install rlhf_jax[ifeval]'
    ) from None
  langdetect.DetectorFactory.seed = 0  # its algorithm is random
  if text.isupper():  # its language profiles were made from lower-case text
    text = text.lower()
  try:
    detected = langdetect.detect(text)
  except langdetect.LangDetectException:
    return False
  return detected.split('-')[0] == language  # 'zh-cn' is 'zh'


def _count_sentences(text: str) -> int:
  """Counts sentences: their ends, plus one if words follow the last end."""
  count = 0
  has_words = False  # whether there were words since the last end
  for line in text.splitlines():
    words = line.split()
    for index, word in enumerate(words):
      if any(letter.isalnum() for letter in word):
        has_words = True
      following = words[index + 1] if index + 1 < len(words) else None
      if has_words and _ends_sentence(word, index, following):
        count += 1
        has_words = False
  return count + has_words


def _ends_sentence(word: str, index: int, following: str | None) -> bool:
  """Tells whether a word is the last one of a sentence.

  Args:
    word: the word with the punctuation after it.
    index: its index in the line.
    following: the next word of the line; None if it is the last one.
  """
  word = word.rstrip(_CLOSING)
  if not word.endswith(('.', '!', '?', '…')):
    return False
  return following is None or not _sentence_continues(word, index, following)


def _sentence_continues(word: str, index: int, following: str) -> bool:
  """Tells whether a full stop does not end its sentence: "Dr.", "J.", "1.", "wait... what"."""
  if word.endswith(('..', '…')):
    return following[0].islower()
  is_abbreviation = word.lower() in _ABBREVIATIONS
  is_list_number = index == 0 and word[:-1].isdigit()
  return is_abbreviation or is_list_number or _INITIALS.fullmatch(word) is not None
