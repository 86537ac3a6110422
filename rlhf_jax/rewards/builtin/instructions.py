"""Rewards for instructions that a function can check: IFEval.

Zhou et al. 2023, arXiv:2311.07911, table 1. A record's meta has
`instruction_id_list` and, for each of these, the `kwargs` of its check. The rules
are the strict ones of the reference implementation (google-research,
instruction_following_eval); docs/rewards.md says where they differ. Left out: the
loose rules (which try a response without its first or last line), and instructions
that IFEval's prompts do not use.
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
_CLOSING = '"\'”’)]*_'  # may stand behind the end of a sentence
_ABBREVIATIONS = frozenset('mr. mrs. ms. dr. prof. st. jr. sr. vs. etc. inc. ltd.'.split())
_INITIALS = re.compile(r'\W*(?:[A-Za-z]\.)+')  # "e.g.", "J.", "U.S."

Kwargs = Mapping[str, Any]  # of an instruction, without those that are None
# check(text, kwargs) → whether the text follows the instruction.
Check = Callable[[str, Kwargs], bool]


def follows(
  prompts: Sequence[list[dict]],
  responses: Sequence[str],
  records: Sequence[Prompt],
) -> list[float]:
  """Computes the share of its record's instructions that each response follows.

  Args:
    prompts: not used.
    responses: N texts.
    records: N prompts, whose meta has `instruction_id_list` and `kwargs`.

  Returns:
    N shares in 0..1; an empty response follows no instruction.

  Raises:
    UserError: a record's meta lacks something; the message names the record and
      the instruction.
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

  Arguments and errors are those of `follows`.
  """
  values = []
  for response, record in zip(responses, records, strict=True):
    values.append(float(all(_check_instructions(response, record))))
  return values


def _check_instructions(response: str, record: Prompt) -> list[bool]:
  """Tells for each instruction of a record whether the response follows it."""
  names = record.meta.get('instruction_id_list')
  all_kwargs = record.meta.get('kwargs')
  message = f'record {record.id}: meta needs "instruction_id_list" and as many "kwargs"'
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
    # The data set names the kwargs of all checks and sets those of others to None.
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
  # Blanks are allowed behind the dots of a marker: "P. S."
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
  # A star that is doubled is bold text, not a bullet.
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
  # '<< >>' is no title.
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
  """Checks the number of paragraphs, separated by empty lines, and one's first word."""
  count = kwargs['num_paragraphs']
  place = kwargs['nth_paragraph']  # from 1
  word = kwargs['first_word']
  paragraphs = [part.strip() for part in text.split('\n\n') if part.strip()]
  if len(paragraphs) != count or not 1 <= place <= count:
    return False
  beginning = paragraphs[place - 1].split()[0].lstrip('\'"')
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


# --- what several checks use ---


def _compare(count: int, relation: str, threshold: int) -> bool:
  """Tells whether a count is in a relation to a threshold."""
  if relation == 'at least':
    return count >= threshold
  if relation == 'less than':
    return count < threshold
  raise TypeError(f'expected the relation "at least" or "less than", got {relation!r}')


def _count_occurrences(word: str, text: str) -> int:
  """Counts a word, inside other words too, whatever the case."""
  return len(re.findall(re.escape(word), text, flags=re.IGNORECASE))


def _has_word(word: str, text: str) -> bool:
  """Tells whether a text has a whole word, whatever the case."""
  pattern = rf'\b{re.escape(word)}\b'
  return re.search(pattern, text, flags=re.IGNORECASE) is not None


def _split_by_divider(text: str, divider: str) -> list[str]:
  """Splits a text; dividers may also stand before the first part and after the last."""
  parts = [part.strip() for part in text.split(divider)]
  begin = 0 if parts[0] else 1
  end = len(parts) if parts[-1] else len(parts) - 1
  return parts[begin:end]


def _is_in_language(text: str, language: str) -> bool:
  """Tells whether a text is in a language (ISO 639-1); False where none is detected."""
  try:
    import langdetect
  except ImportError:
    raise UserError(
      'rewards.builtin.instructions: langdetect is not installed, run: pip install rlhf_jax[ifeval]'
    ) from None
  langdetect.DetectorFactory.seed = 0  # it draws at random
  if text.isupper():  # its profiles are of texts in lower case
    text = text.lower()
  try:
    detected = langdetect.detect(text)
  except langdetect.LangDetectException:
    return False
  return detected.split('-')[0] == language  # 'zh-cn' is 'zh'


def _count_sentences(text: str) -> int:
  """Counts the ends of sentences, and one more for words behind the last."""
  count = 0
  has_words = False  # since the last end
  for line in text.splitlines():
    words = line.split()
    for place, word in enumerate(words):
      if any(letter.isalnum() for letter in word):
        has_words = True
      following = words[place + 1] if place + 1 < len(words) else None
      if has_words and _ends_sentence(word, place, following):
        count += 1
        has_words = False
  return count + has_words


def _ends_sentence(word: str, place: int, following: str | None) -> bool:
  """Tells whether a sentence ends with a word.

  Args:
    word: with the signs behind it.
    place: of the word in its line.
    following: the next word of the line; None at its end.
  """
  word = word.rstrip(_CLOSING)
  if not word.endswith(('.', '!', '?', '…')):
    return False
  return following is None or not _goes_on(word, place, following)


def _goes_on(word: str, place: int, following: str) -> bool:
  """Tells whether a word's stop ends no sentence: "Dr.", "J.", "1.", "wait... what"."""
  if word.endswith(('..', '…')):
    return following[0].islower()
  is_abbreviation = word.lower() in _ABBREVIATIONS
  is_list_number = place == 0 and word[:-1].isdigit()
  return is_abbreviation or is_list_number or _INITIALS.fullmatch(word) is not None
