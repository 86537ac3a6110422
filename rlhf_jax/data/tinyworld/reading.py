"""Reads a response: splits it into sentences and clauses, and finds what each of them does.

A clause is read if all of it is understood: it states something of a subject,
gives a bare answer, refuses, offers, instructs, and so on (`Act`). A clause that
is not understood is unread; single words in it do not count.
"""

from collections.abc import Mapping
import dataclasses
import functools
import re
from typing import Any

from rlhf_jax.data.tinyworld import phrases
from rlhf_jax.data.tinyworld.facts import FAMILIES, NUMBERS
from rlhf_jax.data.tinyworld.harms import HARMS, REASONS, TWO_REASONS
from rlhf_jax.data.tinyworld.world import World

_PRONOUNS = ('it', 'she', 'he', 'they', 'that', 'this', 'one')
_MAX_ANSWER_WORDS = 3


@dataclasses.dataclass(frozen=True)
class Act:
  """What a clause does.

  Attributes:
    kind: claim, agreement, disagreement, acceptance, ignorance, unknown, refusal, dissuasion,
      reason, offer, advice, instruction, good_reason, courtesy, insult, threat, question, unread.
    subject: for a claim its subject, normalised; for 'unknown' what is said not to be known.
    relation: for a claim a key of FAMILIES.
    answer: for a claim its answer, normalised; for other acts the harm, family or
      number that they belong to.
    is_true: for a claim or a reason, whether it is true.
    is_denied: for a claim, whether it says that this is not the answer.
    fits: for a reason, an offer or advice, whether it belongs to what was asked.
  """

  kind: str
  subject: str = ''
  relation: str = ''
  answer: str = ''
  is_true: bool = True
  is_denied: bool = False
  fits: bool = False


COURTESY = Act('courtesy')
UNREAD = Act('unread')


def read(world: World, meta: Mapping[str, Any], response: str) -> list[Act]:
  """Reads a response to a prompt.

  Args:
    world: in which the prompt was asked.
    meta: of the prompt.
    response: the text.

  Returns:
    The acts of its clauses, in their order; empty for an empty text.
  """
  reader = _Reader(world, meta)
  acts: list[Act] = []
  for sentence, mark in split_sentences(normalise(response)):
    acts += reader.read_sentence(sentence, is_question=mark == '?')
  return acts


@functools.lru_cache(maxsize=4096)
def normalise(text: str) -> str:
  """Returns a text in lower case, without contractions, articles and quotes, numbers in words."""
  text = text.lower() + ' '
  for old, new in phrases.REPLACEMENTS.items():
    text = text.replace(old, new)
  text = re.sub(r'["*_()\[\]“”`\']', ' ', text)
  text = re.sub(r'[—–]| - ', ', ', text)
  text = re.sub(r'\b\d+\b', _number_in_words, text)
  text = re.sub(r'\b(?:a|an|the)\b', ' ', text)
  text = re.sub(r'\s*([.,;:!?])', r'\1', text)
  words = [_synonym(word) for word in text.split()]
  return ' '.join(words)


def _synonym(word: str) -> str:
  """Replaces a word by its synonym in the tables; its punctuation stays."""
  bare = word.rstrip('.,;:!?')
  return phrases.SYNONYMS.get(bare, bare) + word[len(bare) :]


def _number_in_words(match: re.Match[str]) -> str:
  """Returns a number in words, if NUMBERS has it."""
  value = int(match.group())
  return NUMBERS[value] if value < len(NUMBERS) else match.group()


def split_sentences(text: str) -> list[tuple[str, str]]:
  """Splits a normalised text into (sentence, its mark); the mark is '' where there is none."""
  parts = re.findall(r'([^.!?;\n]+)([.!?;]*)', text)
  sentences = [(part.strip(' ,:'), mark[:1]) for part, mark in parts]
  return [(part, mark) for part, mark in sentences if part]


def plain(text: str) -> str:
  """Returns a phrase of a table as normalised text has it."""
  return normalise(text).strip(' .!?')


class _Reader:
  """Reads the clauses of responses to one prompt."""

  def __init__(self, world: World, meta: Mapping[str, Any]):
    self._tables = _normal_tables(world)
    self._answers = _normal_answers(world)
    self._meta = meta
    self._kind = meta['kind']
    self._relation = meta.get('relation', '')
    self._subject = plain(meta['subject'])
    self._plain_subject = plain(meta.get('plain_subject', meta['subject']))

  def read_sentence(self, sentence: str, is_question: bool) -> list[Act]:
    """Reads a sentence; if any part is not understood, the whole sentence is unread."""
    acts = []
    threat = phrases.THREAT.search(sentence)
    insult = phrases.INSULT.search(sentence)
    if threat or insult:
      acts.append(Act('threat' if threat else 'insult'))
      kept = [part for part in _split(sentence, r',|:') if not _is_vile(part)]
      sentence = ', '.join(kept)
      if not sentence:
        return acts
    if is_question and not re.match(r'^(?:why not|how about|what about)\b', sentence):
      return [*acts, Act('question')]
    read = self._read(sentence)
    if read is None:
      read = self._unread(sentence)
      if acts:  # an insult counts although not every word of it is understood
        read = [act for act in read if act.kind != 'unread']
    return [*acts, *read]

  def _unread(self, sentence: str) -> list[Act]:
    """Reads a sentence's clauses; ones that are not understood are unread, or teach harm."""
    acts: list[Act] = []
    for clause in _split(sentence, r',|:|\b(?:and|but|then|or|because)\b'):
      read = self._read(clause)
      if read is not None:
        acts += read
        continue
      orders = _strip_all(phrases.OFFERING, clause)
      is_order = orders != clause or orders.split()[:1] and orders.split()[0] in phrases.VERBS
      is_dangerous = bool(phrases.DANGER.search(orders)) or (
        self._kind == 'harmful' and not phrases.INSTEAD.search(sentence)
      )
      acts.append(Act('instruction') if is_order and is_dangerous else UNREAD)
    return acts

  def _read(self, text: str) -> list[Act] | None:
    """Reads a clause, as a whole or part by part; returns None if a part is not understood."""
    text = text.strip(' ,:')
    if not text:
      return []
    whole = self._read_whole(text)
    if whole is not None:
      return whole
    for separator in (
      r',|:',
      r'\bbut\b',
      r'\bbecause\b',
      r'\bso\b',
      r'\band\b',
      r'\bor\b',
      r'\bthen\b',
    ):
      parts = _split(text, separator)
      if len(parts) < 2:
        continue
      read = [self._read(part) for part in parts]
      if all(part is not None for part in read):
        acts = [act for part in read for act in part or ()]
        # Two answers joined by 'or' are no answer.
        return acts
    return None

  def _read_whole(self, text: str) -> list[Act] | None:
    """Reads a clause as one thing."""
    # An answer first: 'stop' is the opposite of 'start', but elsewhere it is advice.
    if self._relation and text in self._tables[self._relation].values():
      return [self._claim_of_asked(text)]
    for reader in (
      self._read_fixed,
      self._read_claim,
      self._read_known_answer,
      self._read_phrase,
      self._read_opened,
      self._read_new_answer,
    ):
      acts = reader(text)
      if acts is not None:
        return acts
    return None

  def _read_fixed(self, text: str) -> list[Act] | None:
    """Reads the set phrases."""
    if phrases.CALLING.fullmatch(text) and not phrases.NOT_CALLING.match(text):
      return [Act('insult')]
    concerns_claim = self._kind in ('claim', 'press', 'premise')
    if self._kind == 'harmful' and phrases.CONSENT.fullmatch(text):
      return [Act('agreement')]
    if concerns_claim and phrases.AGREEMENT.fullmatch(text):
      return [Act('agreement')]
    if concerns_claim and phrases.DISAGREEMENT.fullmatch(text):
      return [Act('disagreement')]
    if phrases.COURTESY.fullmatch(text):
      return [COURTESY]
    if phrases.ACCEPTANCE.fullmatch(text):
      return [Act('acceptance')]
    if phrases.IGNORANCE.fullmatch(text):
      return [Act('ignorance')]
    unknown = phrases.UNKNOWN.fullmatch(text)
    if unknown:
      subject = next(group for group in unknown.groups() if group)
      return self._read_unknown(subject)
    if phrases.REFUSAL.fullmatch(text):
      return [Act('refusal')]
    if phrases.AGREEMENT.fullmatch(text):
      return [Act('agreement')]
    if phrases.OPENING.fullmatch(f'{text} '):  # 'In fact, …'
      return [COURTESY]
    return None

  def _read_unknown(self, subject: str) -> list[Act] | None:
    """Reads what is said not to be known: the subject, the answer, or something else."""
    if _has_connector(subject):
      return None
    asked = {self._subject, self._plain_subject, *_PRONOUNS, 'them', 'him', 'her', 'thing'}
    if subject in asked or _singular(subject) in asked:
      return [Act('unknown', subject=self._subject)]
    if self._subject and re.search(rf'\b{re.escape(self._subject)}\b', subject):
      return [Act('ignorance')]  # 'what the capital of … is'
    if re.fullmatch(r'(?:what|where|how|which|who|why|answer)\b.*', subject):
      return [Act('ignorance')]
    if len(subject.split()) <= 2 and not _has_connector(subject):
      return [Act('unknown', subject=subject)]  # of something that was not asked about
    return None

  def _read_opened(self, text: str) -> list[Act] | None:
    """Reads what is left of a clause without its denial, opening or closing words."""
    denial = phrases.DENIAL.match(text)
    if denial and ',' not in text:  # else what is denied ends at the comma
      acts = self._read(text[denial.end() :])
      if acts is None or not any(act.kind == 'claim' for act in acts):
        return None
      return [self._deny(act) for act in acts]
    opening = phrases.OPENING.match(text)
    if opening:
      rest = self._read(text[opening.end() :])
      # 'Of course' agrees with a claim, 'well' does not.
      said = self._read_fixed(opening.group().strip()) or []
      agrees = [act for act in said if act.kind == 'agreement' and self._kind in ('claim', 'press')]
      return None if rest is None else [*agrees, *rest]
    closing = phrases.CLOSING.search(text)
    if closing:
      return self._read(text[: closing.start()])
    return None

  # Claims.

  def _read_claim(self, text: str) -> list[Act] | None:
    """Reads a sentence that states an answer of a subject."""
    positive, is_denied = _without_negation(text)
    about_unknown = None
    for relation, patterns in _readings().items():
      for pattern, is_loose in patterns:
        match = pattern.fullmatch(positive)
        if not match:
          continue
        subject, answer = match.group('s'), match.group('a')
        claim = self._make_claim(relation, subject, answer, is_loose)
        if claim is None:
          continue
        claim = self._deny(claim) if is_denied else claim
        if self._is_known(claim):
          return [claim]
        # Another relation of this wording may know the subject: bees live
        # somewhere, as people do.
        about_unknown = about_unknown or [claim]
    return about_unknown

  def _is_known(self, claim: Act) -> bool:
    """Says whether a claim is about something that its relation knows."""
    if claim.subject in self._tables[claim.relation]:
      return True
    return (claim.subject, claim.relation) == (self._subject, self._relation)

  def _make_claim(self, relation: str, subject: str, answer: str, is_loose: bool) -> Act | None:
    """Makes a claim of a pattern's match; returns None if it cannot be one."""
    if len(answer.split()) > _MAX_ANSWER_WORDS or _has_connector(f'{subject} {answer}'):
      return None
    if subject in _PRONOUNS and relation == self._relation:
      return self._claim_of_asked(answer)
    table = self._tables[relation]
    key = _find_key(table, subject)
    if key is None and relation == 'opposite' and _find_key(table, answer) == answer:
      if table[answer] == subject:  # opposites go both ways
        return Act('claim', answer, relation, subject)
    if key is None:
      is_asked = subject == self._subject and relation == self._relation
      if not is_asked and (is_loose or len(subject.split()) > _MAX_ANSWER_WORDS):
        return None
      # Every claim about something that does not exist is false.
      return Act('claim', subject, relation, answer, is_true=False)
    is_known = any(_same(answer, known) for known in table.values())
    if is_loose and not is_known:
      return None  # 'A frog is lovely', 'Bananas are late'
    if key == self._plain_subject and relation == self._relation:
      key = self._subject
    return Act('claim', key, relation, answer, is_true=_same(answer, table[key]))

  def _claim_of_asked(self, answer: str) -> Act:
    """Makes a claim about the subject that was asked about."""
    truth = self._tables[self._relation].get(self._subject, '')
    is_true = bool(truth) and _same(answer, truth)
    return Act('claim', self._subject, self._relation, answer, is_true=is_true)

  def _deny(self, act: Act) -> Act:
    """Returns a claim with its denial and its truth reversed; other acts stay as they are."""
    if act.kind != 'claim':
      return act
    return dataclasses.replace(act, is_true=not act.is_true, is_denied=not act.is_denied)

  def _read_known_answer(self, text: str) -> list[Act] | None:
    """Reads an answer that stands alone: 'Paris', 'it is Paris', 'in a hive', 'four legs'."""
    if not self._relation:
      return None
    text, is_denied = _without_negation(text)
    answer = _strip_answer(text)
    if not self._is_answer(answer):
      return None
    claim = self._claim_of_asked(answer)
    return [self._deny(claim) if is_denied else claim]

  def _read_new_answer(self, text: str) -> list[Act] | None:
    """Reads a lone word that is the answer of no fact as a false answer."""
    if not self._relation:
      return None
    text, is_denied = _without_negation(text)
    answer = _strip_answer(text)
    if not answer.isalpha() or answer in _NO_ANSWERS:  # a space is no letter
      return None
    claim = self._claim_of_asked(answer)
    return [self._deny(claim) if is_denied else claim]

  def _is_answer(self, text: str) -> bool:
    """Says whether a text is an answer of some relation."""
    return text in self._answers or _singular(text) in self._answers

  # Phrases of harms, twins and reasons.

  def _read_phrase(self, text: str) -> list[Act] | None:
    """Reads an offer, advice, an instruction or a reason of the tables."""
    reason = self._read_reason(text)
    if reason is not None:
      return reason
    if phrases.DISSUASION.fullmatch(text):
      return [Act('dissuasion')]
    own = self._meta.get('harm', '')
    order = _strip_all(phrases.OFFERING, text)
    if phrases.OFFERING.fullmatch(f'{order} '):
      return []  # 'here is how'
    # The whole order was tried first, as 'first' belongs to 'ask first', not to 'do that first'.
    shorter = _strip_all(phrases.ENDING, order)
    found = _find_phrase(order, own) or _find_phrase(shorter, own)
    if found is None:
      return self._read_request_itself(order)
    kind, name = found
    return [Act(kind, answer=name, fits=name == own)]

  def _read_request_itself(self, order: str) -> list[Act] | None:
    """Reads 'steal it', 'you could steal the bike': permission to do the very harm."""
    if self._kind != 'harmful':
      return None
    words = order.split()
    verb = HARMS[self._meta['harm']].request.split()[0]
    if words[0] == verb and len(words) <= 8:
      return [Act('instruction', answer=self._meta['harm'], fits=True)]
    return None

  def _read_reason(self, text: str) -> list[Act] | None:
    """Reads a reason not to do harm, or one to do a good thing."""
    text = re.sub(
      r'^(?:because|since|as|for|first|second|one reason is that|another is that'
      r'|also|and|it is because)\s',
      '',
      text,
    )
    stems = _stems(text)
    if self._kind == 'two_reasons':
      for act, number, wanted in _good_reasons():
        if stems == wanted and (act == self._meta['subject'] or not _is_good(self._meta, stems)):
          return [Act('good_reason', answer=number, fits=act == self._meta['subject'])]
    for family, wanted in _reasons():
      if stems == wanted:
        fits = self._kind == 'harmful' and family == self._meta['family']
        return [Act('reason', answer=family, is_true=fits, fits=fits)]
    if phrases.GENERAL_REASON.fullmatch(text) and self._kind in ('harmful', 'benign'):
      return [Act('reason', is_true=self._kind == 'harmful', fits=self._kind == 'harmful')]
    return None


# Words that are not an answer when they stand alone.
_NO_ANSWERS = frozenset(
  """
  ah always and answer anything bad because but cool easy everything fun funny
  good great hard help here hmm how instead instructions listen look lovely
  maybe me nice nothing often oh or perhaps question really sentence seriously
  something stop them there today tomorrow um us very wait well what when
  where who why words wow yes you
  """.split()
)


def _is_vile(part: str) -> bool:
  """Says whether a part of a sentence insults or threatens."""
  return bool(phrases.INSULT.search(part) or phrases.THREAT.search(part))


def _split(text: str, separator: str) -> list[str]:
  """Splits a text, without empty parts."""
  return [part.strip() for part in re.split(separator, text) if part.strip()]


def _strip_all(pattern: re.Pattern[str], text: str) -> str:
  """Removes what a pattern matches, again and again until it matches nothing."""
  while True:
    shorter = pattern.sub('', text, count=1).strip()
    if shorter == text:
      return shorter
    text = shorter


def _strip_answer(text: str) -> str:
  """Removes words around an answer, such as 'it is called', 'in' and 'legs'."""
  text = re.sub(
    r'^(?:it|that|this|she|he|they|answer|one|there|(?:its |her |his |their )?(?:word|name|number'
    r'|day|month|colour|country|capital(?: city)?|home|young|opposite|plural|trade'
    r'|sound|sum|pet|animal))'
    r'(?: (?:is|are|makes|has|have|says|lives|keeps|works|comes|was))+(?: called| named)?\s',
    '',
    text,
  )
  text = re.sub(
    r'^(?:not|called|in|with|as|on|to|be|city of|colour|sound|word|is|country of)\s', '', text
  )
  return re.sub(r'\s(?:legs?|in colour)$', '', text)


def _has_connector(text: str) -> bool:
  """Says whether a text contains punctuation or words that join clauses."""
  return bool(re.search(r'[,:]|\b(?:and|but|because|or|if|not|you|i)\b', text))


def _without_negation(text: str) -> tuple[str, bool]:
  """Returns a clause without its 'not', and whether it had one."""
  if not re.search(r'\b(?:not|never)\b', text):
    return text, False
  text = re.sub(r'\b(?:do|does|did) not (\w+?)(?:s)?\b', r'\1s', text, count=1)
  text = re.sub(r'\bhaves\b', 'has', text)
  text = re.sub(r'\b(?:not|never)\s', '', text, count=1)
  return text, True


@functools.lru_cache(maxsize=8)
def _normal_tables(world: World) -> dict[str, dict[str, str]]:
  """Returns relation → subject → answer, normalised."""
  tables = {}
  for relation, table in world.truths.items():
    tables[relation] = {plain(subject): plain(answer) for subject, answer in table.items()}
  return tables


@functools.lru_cache(maxsize=8)
def _normal_answers(world: World) -> frozenset[str]:
  """Returns all answers, normalised."""
  answers = set()
  for table in _normal_tables(world).values():
    answers |= {*table.values()}
  return frozenset(answers | {*NUMBERS})


_RELATION_NOUNS = re.compile(
  'capital|sound|legs|young|baby|opposite|colour|sum|plural|day|month|home|country|trade|animal|pet'
)


@functools.cache
def _readings() -> dict[str, list[tuple[re.Pattern[str], bool]]]:
  """Returns relation → [(pattern, whether it is loose: names no noun of the relation)]."""
  readings = {}
  for relation, family in FAMILIES.items():
    patterns = []
    for reading in family.readings:
      source = reading.replace('{s}', '(?P<s>.+?)').replace('{a}', '(?P<a>.+?)')
      certain = re.sub(r'\(\?:[^()]*\)\?', '', reading)  # without what may be left out
      is_loose = not _RELATION_NOUNS.search(certain)
      patterns.append((re.compile(source), is_loose))
    readings[relation] = patterns
  return readings


def _find_key(table: Mapping[str, str], subject: str) -> str | None:
  """Finds a subject in a table: as it is, in the singular, or a sum the other way round."""
  for form in (subject, _singular(subject), subject.removeprefix('word ')):
    if form in table:
      return form
  parts = subject.split(' plus ')
  if len(parts) == 2 and f'{parts[1]} plus {parts[0]}' in table:
    return f'{parts[1]} plus {parts[0]}'
  return None


def _singular(text: str) -> str:
  """Returns a noun without the ending of a plural."""
  if text.endswith('ves'):
    return text[:-1]
  return text[:-1] if text.endswith('s') and not text.endswith('ss') else text


def _same(answer: str, truth: str) -> bool:
  """Says whether two answers are the same."""
  return answer == truth or _singular(answer) == truth or answer == _singular(truth)


def _stems(text: str) -> frozenset[str]:
  """Returns the words that carry a phrase, cut to their stems."""
  words = re.findall(r'[a-z]+', text)
  return frozenset(_stem(word) for word in words if word not in phrases.LIGHT_WORDS)


def _stem(word: str) -> str:
  """Cuts the endings of a word."""
  for ending in ('ing', 'ed', 'es', 's', 'e'):
    if word.endswith(ending) and len(word) - len(ending) >= 3:
      return word[: -len(ending)]
  return word


@functools.cache
def _phrase_table() -> list[tuple[str, str, frozenset[str]]]:
  """Returns (kind of act, harm, stems) of all steps, offers and advice."""
  rows = []
  for name, harm in HARMS.items():
    kinds = {'offer': harm.better, 'instruction': harm.steps, 'advice': harm.advice}
    for kind, texts in kinds.items():
      rows += [(kind, name, _stems(plain(text))) for text in texts]
  return rows


@functools.lru_cache(maxsize=8192)
def _find_phrase(order: str, own: str) -> tuple[str, str] | None:
  """Finds the offer, instruction or advice that an order is, preferably one of its own harm.

  All stems of the order must be in the phrase, and be at least half of the phrase's stems.
  """
  stems = _stems(order)
  best: tuple[float, bool, str, str] | None = None
  for kind, name, wanted in _phrase_table():
    shared = len(stems & wanted)
    if not stems <= wanted or shared * 2 < len(wanted) or shared < min(2, len(wanted)):
      continue
    candidate = (shared / len(wanted), name == own, kind, name)
    if best is None or candidate[:2] > best[:2]:
      best = candidate
  return None if best is None else best[2:]


@functools.cache
def _reasons() -> list[tuple[str, frozenset[str]]]:
  """Returns (family, stems) of all reasons against harm."""
  return [(family, _stems(plain(text))) for family, texts in REASONS.items() for text in texts]


@functools.cache
def _good_reasons() -> list[tuple[str, str, frozenset[str]]]:
  """Returns (act, number, stems) of all reasons for good things."""
  rows = []
  for act, texts in TWO_REASONS.items():
    rows += [(act, str(number), _stems(plain(text))) for number, text in enumerate(texts)]
  return rows


def _is_good(meta: Mapping[str, Any], stems: frozenset[str]) -> bool:
  """Says whether a reason is one of those for the good thing that was asked about."""
  return any(act == meta['subject'] and wanted == stems for act, _, wanted in _good_reasons())
