"""Rewards for instructions that a program can check: IFEval (Zhou et al. 2023, arXiv:2311.07911, table 1).

A record's meta has `instruction_id_list` and, for each of these, the `kwargs` of its check. The rules are the strict
ones of the reference implementation (google-research, instruction_following_eval); docs/rewards.md says where they
differ. Left out: the loose rules (which try a response without its first or last line), and instructions that
IFEval's prompts do not use.
"""

import json
import re

from rlhf_jax.errors import UserError

_OPTIONS = 'My answer is yes.', 'My answer is no.', 'My answer is maybe.'
_CLOSING = '"\'”’)]*_'
_ABBREVIATIONS = {'mr.', 'mrs.', 'ms.', 'dr.', 'prof.', 'st.', 'jr.', 'sr.', 'vs.', 'etc.', 'inc.', 'ltd.'}


def follows(prompts, responses, records) -> list[float]:
  """The share of its record's instructions that a response follows, 0..1; an empty response follows none.

  Raises:
    UserError: names the record whose meta lacks something, and the instruction.
  """
  return [sum(outcomes) / len(outcomes) for outcomes in map(_outcomes, responses, records)]


def follows_all(prompts, responses, records) -> list[float]:
  """1.0 where a response follows all its record's instructions, else 0.0; raises as `follows`."""
  return [float(all(outcomes)) for outcomes in map(_outcomes, responses, records)]


def _outcomes(response, record):
  """Whether each instruction is followed."""
  ids, options = record.meta.get('instruction_id_list'), record.meta.get('kwargs')
  if not (isinstance(ids, list) and isinstance(options, list) and len(ids) == len(options) > 0):
    raise UserError(f'record {record.id}: meta needs "instruction_id_list" and as many "kwargs"')
  outcomes = []
  for name, given in zip(ids, options):
    where = f'record {record.id}: instruction {name!r}'
    if name not in CHECKS:
      raise UserError(f'{where}: no such check; there are {", ".join(CHECKS)}')
    try:
      followed = CHECKS[name](response, {key: value for key, value in (given or {}).items() if value is not None})
    except KeyError as error:
      raise UserError(f'{where}: kwargs lack {error}') from None
    except (AttributeError, TypeError) as error:
      raise UserError(f'{where}: kwargs {given!r:.60}: {error}') from None
    outcomes.append(bool(response.strip()) and bool(followed))
  return outcomes


def _related(count, relation, threshold):
  if relation == 'at least':
    return count >= threshold
  if relation == 'less than':
    return count < threshold
  raise TypeError(f'expected the relation "at least" or "less than", got {relation!r}')


def _occurrences(word, text):
  """How often a word occurs, inside other words too, whatever the case."""
  return len(re.findall(re.escape(word), text, flags=re.IGNORECASE))


def _has_word(word, text):
  return re.search(rf'\b{re.escape(word)}\b', text, flags=re.IGNORECASE)


def _count_sentences(text):
  """Ends of sentences, and one more for words behind the last."""
  count, unfinished = 0, False
  for line in text.splitlines():
    words = line.split()
    for place, word in enumerate(words):
      unfinished = unfinished or any(map(str.isalnum, word))
      bare, following = word.rstrip(_CLOSING), words[place + 1:place + 2]
      ends = bare.endswith(('.', '!', '?', '…')) and not (following and _goes_on(bare, place, following[0]))
      if unfinished and ends:
        count, unfinished = count + 1, False
  return count + unfinished


def _goes_on(word, place, following):
  """Whether the full stop of a word ends no sentence: "Dr.", "e.g.", "J.", a list's "1.", "wait... what"."""
  if word.endswith(('..', '…')):
    return following[0].islower()
  return (word.lower() in _ABBREVIATIONS or re.fullmatch(r'\W*(?:[A-Za-z]\.)+', word) is not None
          or place == 0 and word[:-1].isdigit())


def _language(text, language):
  """Whether a text is in a language (ISO 639-1); one that cannot be told is in none."""
  try:
    import langdetect
  except ImportError:
    raise UserError('programs.instructions: langdetect is not installed, run: pip install rlhf_jax[ifeval]') from None
  langdetect.DetectorFactory.seed = 0  # it draws at random
  try:
    return langdetect.detect(text.lower() if text.isupper() else text).split('-')[0] == language
  except langdetect.LangDetectException:
    return False


def _count_highlights(text):
  return sum(bool((double or single).strip()) for double, single in
             re.findall(r'\*\*([^\n*]*)\*\*|\*([^\n*]*)\*', text))


def _between(text, divider):
  """The parts of a text between dividers, which may also stand before the first and behind the last."""
  parts = [part.strip() for part in text.split(divider)]
  return parts[not parts[0]:len(parts) - (not parts[-1])]


def _is_json(text):
  text = re.sub(r'\A```(?:json)?|```\Z', '', text.strip(), flags=re.IGNORECASE)
  try:
    json.loads(text)
  except (ValueError, RecursionError):
    return False
  return True


def _is_postscript(text, marker):
  return re.search(re.escape(marker).replace(r'\.', r'\.\s?'), text, flags=re.IGNORECASE)


def _first_word(text, count, place, word):
  """Whether there are `count` paragraphs (parted by empty lines) and that at `place`, from 1, begins with a word."""
  paragraphs = [part.strip() for part in text.split('\n\n') if part.strip()]
  if len(paragraphs) != count or not 1 <= place <= count:
    return False
  return re.split(r'[.,?!\'"]', paragraphs[place - 1].split()[0].lstrip('\'"'))[0].lower() == word.lower()


def _two_responses(text):
  parts = _between(text, '******')
  return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _paragraphs(text, count):
  parts = _between(text, '***')
  return len(parts) == count and all(parts)


def _capital_words(text):
  return sum(map(str.isupper, re.findall(r"\w+(?:[-'’.]\w+)*", text)))


# what an instruction is called → whether a response follows it, given its kwargs
CHECKS = {
    'change_case:capital_word_frequency': lambda text, given: _related(
        _capital_words(text), given['capital_relation'], given['capital_frequency']),
    'change_case:english_capital': lambda text, given: text.isupper() and _language(text, 'en'),
    'change_case:english_lowercase': lambda text, given: text.islower() and _language(text, 'en'),
    'combination:repeat_prompt': lambda text, given: text.strip().lower().startswith(
        given['prompt_to_repeat'].strip().lower()),
    'combination:two_responses': lambda text, given: _two_responses(text),
    'detectable_content:number_placeholders': lambda text, given: (
        len(re.findall(r'\[[^\]\n]*\]', text)) >= given['num_placeholders']),
    'detectable_content:postscript': lambda text, given: _is_postscript(text, given['postscript_marker']),
    'detectable_format:constrained_response': lambda text, given: any(option in text for option in _OPTIONS),
    'detectable_format:json_format': lambda text, given: _is_json(text),
    'detectable_format:multiple_sections': lambda text, given: (
        len(re.findall(re.escape(given['section_spliter']) + r'\s?\d+', text)) >= given['num_sections']),
    'detectable_format:number_bullet_lists': lambda text, given: (
        len(re.findall(r'^[ \t]*(?:\*[^*\n]|-)', text, flags=re.MULTILINE)) == given['num_bullets']),
    'detectable_format:number_highlighted_sections': lambda text, given: (
        _count_highlights(text) >= given['num_highlights']),
    'detectable_format:title': lambda text, given: any(
        title.strip('<> ') for title in re.findall(r'<<[^\n]+>>', text)),
    'keywords:existence': lambda text, given: all(_occurrences(word, text) for word in given['keywords']),
    'keywords:forbidden_words': lambda text, given: not any(
        _has_word(word, text) for word in given['forbidden_words']),
    'keywords:frequency': lambda text, given: _related(
        _occurrences(given['keyword'], text), given['relation'], given['frequency']),
    'keywords:letter_frequency': lambda text, given: _related(
        text.lower().count(given['letter'].lower()), given['let_relation'], given['let_frequency']),
    'language:response_language': lambda text, given: _language(text, given['language']),
    'length_constraints:nth_paragraph_first_word': lambda text, given: _first_word(
        text, given['num_paragraphs'], given['nth_paragraph'], given['first_word']),
    'length_constraints:number_paragraphs': lambda text, given: _paragraphs(text, given['num_paragraphs']),
    'length_constraints:number_sentences': lambda text, given: _related(
        _count_sentences(text), given['relation'], given['num_sentences']),
    'length_constraints:number_words': lambda text, given: _related(
        len(re.findall(r'\w+', text)), given['relation'], given['num_words']),
    'punctuation:no_comma': lambda text, given: ',' not in text,
    'startend:end_checker': lambda text, given: text.strip().strip('"').lower().endswith(
        given['end_phrase'].strip().lower()),
    'startend:quotation': lambda text, given: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"',
}
