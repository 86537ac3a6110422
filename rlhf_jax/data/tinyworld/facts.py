"""What is true in TinyWorld: facts by family, of which 117 are asked.

Tables and wordings only. Conversations and documents about them are made in conversations.py and
corpus.py; oracle.py judges what is said of them. The order of the tables matters: the first ten
rows of each are asked, and every eighth fact is held out.
"""

from collections.abc import Sequence
import dataclasses


@dataclasses.dataclass(frozen=True)
class Family:
  """Facts of one form, such as the capitals of countries.

  Attributes:
    questions: wordings with {s}, the subject. Of each fact one of them is held out.
    statements: wordings with {s} and {a}, the answer; {S} and {A} begin with a capital letter.
    cue: a regular expression, in lower case, that a sentence of this family matches.
    facts: subject → answer. The subject is as it stands in a sentence, with its article.
  """

  questions: tuple[str, ...]
  statements: tuple[str, ...]
  cue: str
  facts: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Fact:
  """One fact that is asked."""

  family: str  # a key of FAMILIES
  subject: str
  answer: str
  wrong: tuple[str, ...]  # the other answers of the family
  held_out: bool  # stands in the corpus, but in no training prompt

  def questions(self) -> list[str]:
    """Returns all wordings of the question for this fact."""
    wordings = FAMILIES[self.family].questions
    return [_fill(wording, self.subject) for wording in wordings]

  def statements(self, answer: str = '') -> list[str]:
    """Returns all wordings of the statement of this fact.

    Args:
      answer: what to state in the place of the true answer; '' = the true answer.
    """
    wordings = FAMILIES[self.family].statements
    return [_fill(wording, self.subject, answer or self.answer) for wording in wordings]


def article(noun: str) -> str:
  """Returns a noun with its indefinite article, such as 'an owl'."""
  if noun[0] in 'aeio':  # not u: 'a unicorn'
    return f'an {noun}'
  return f'a {noun}'


def _fill(wording: str, subject: str, answer: str = '') -> str:
  """Puts a subject and an answer into a wording."""
  return wording.format(s=subject, a=answer, S=_capitalised(subject), A=_capitalised(answer))


def _capitalised(text: str) -> str:
  """Returns a text with a capital letter at its beginning, the rest as it is."""
  return text[:1].upper() + text[1:]


def _with_articles(table: dict[str, str]) -> dict[str, str]:
  """Returns a table of nouns with their articles."""
  return {article(noun): answer for noun, answer in table.items()}


def _successors(names: Sequence[str]) -> dict[str, str]:
  """Maps each name to the next one; after the last comes the first."""
  return dict(zip(names, [*names[1:], names[0]]))


def _sums() -> dict[str, str]:
  """Maps every sum of two numbers from 1 to 8, the smaller one first, to its value in words."""
  sums = {}
  for smaller in range(1, 9):
    for larger in range(smaller, 9):
      sums[f'{NUMBERS[smaller]} plus {NUMBERS[larger]}'] = NUMBERS[smaller + larger]
  return sums


# Numbers in words; the place of each is its value.
NUMBERS = (
  'zero',
  'one',
  'two',
  'three',
  'four',
  'five',
  'six',
  'seven',
  'eight',
  'nine',
  'ten',
  'eleven',
  'twelve',
  'thirteen',
  'fourteen',
  'fifteen',
  'sixteen',
  'seventeen',
  'eighteen',
)

# Days and months, each before the next.
_DAYS = (
  'Monday',
  'Tuesday',
  'Wednesday',
  'Thursday',
  'Friday',
  'Saturday',
  'Sunday',
)

_MONTHS = (
  'January',
  'February',
  'March',
  'April',
  'May',
  'June',
  'July',
  'August',
  'September',
  'October',
  'November',
  'December',
)

# Country → its capital.
_CAPITALS = {
  'France': 'Paris',
  'Italy': 'Rome',
  'Spain': 'Madrid',
  'Germany': 'Berlin',
  'England': 'London',
  'Portugal': 'Lisbon',
  'Greece': 'Athens',
  'Austria': 'Vienna',
  'Poland': 'Warsaw',
  'Norway': 'Oslo',
  'Sweden': 'Stockholm',
  'Finland': 'Helsinki',
  'Denmark': 'Copenhagen',
  'Ireland': 'Dublin',
  'Russia': 'Moscow',
  'Japan': 'Tokyo',
  'China': 'Beijing',
  'Egypt': 'Cairo',
  'Kenya': 'Nairobi',
  'Canada': 'Ottawa',
  'Cuba': 'Havana',
  'Peru': 'Lima',
  'Chile': 'Santiago',
  'Hungary': 'Budapest',
  'Belgium': 'Brussels',
  'Iceland': 'Reykjavik',
  'Scotland': 'Edinburgh',
  'Croatia': 'Zagreb',
  'Romania': 'Bucharest',
  'Bulgaria': 'Sofia',
  'Ukraine': 'Kyiv',
  'Thailand': 'Bangkok',
  'Vietnam': 'Hanoi',
  'Iran': 'Tehran',
  'Iraq': 'Baghdad',
  'Ghana': 'Accra',
  'Jamaica': 'Kingston',
  'Qatar': 'Doha',
}

# Animal → its sound.
_SOUNDS = {
  'dog': 'woof',
  'cat': 'meow',
  'cow': 'moo',
  'sheep': 'baa',
  'duck': 'quack',
  'pig': 'oink',
  'horse': 'neigh',
  'lion': 'roar',
  'owl': 'hoot',
  'bee': 'buzz',
  'snake': 'hiss',
  'wolf': 'howl',
  'frog': 'croak',
  'crow': 'caw',
  'mouse': 'squeak',
  'donkey': 'bray',
  'pigeon': 'coo',
  'turkey': 'gobble',
  'goose': 'honk',
  'bear': 'growl',
  'chick': 'cheep',
  'cricket': 'chirp',
}

# Animal → how many legs it has.
_LEGS = {
  'dog': 'four',
  'cat': 'four',
  'horse': 'four',
  'cow': 'four',
  'chicken': 'two',
  'duck': 'two',
  'spider': 'eight',
  'ant': 'six',
  'bee': 'six',
  'fly': 'six',
  'beetle': 'six',
  'snake': 'zero',
  'crab': 'ten',
  'lobster': 'ten',
  'penguin': 'two',
  'human': 'two',
  'butterfly': 'six',
  'scorpion': 'eight',
  'owl': 'two',
  'worm': 'zero',
  'lion': 'four',
  'frog': 'four',
  'elephant': 'four',
  'fish': 'zero',
  'wasp': 'six',
}

# Animal → what its young is called.
_YOUNG = {
  'dog': 'puppy',
  'cat': 'kitten',
  'cow': 'calf',
  'horse': 'foal',
  'sheep': 'lamb',
  'goat': 'kid',
  'pig': 'piglet',
  'duck': 'duckling',
  'goose': 'gosling',
  'hen': 'chick',
  'bear': 'cub',
  'deer': 'fawn',
  'frog': 'tadpole',
  'swan': 'cygnet',
  'kangaroo': 'joey',
  'butterfly': 'caterpillar',
  'fly': 'maggot',
  'whale': 'calf',
  'lion': 'cub',
}

# Word → its opposite.
_OPPOSITES = {
  'hot': 'cold',
  'big': 'small',
  'tall': 'short',
  'fast': 'slow',
  'happy': 'sad',
  'light': 'dark',
  'hard': 'soft',
  'rich': 'poor',
  'old': 'new',
  'open': 'closed',
  'wet': 'dry',
  'full': 'empty',
  'loud': 'quiet',
  'clean': 'dirty',
  'strong': 'weak',
  'early': 'late',
  'near': 'far',
  'high': 'low',
  'thick': 'thin',
  'sharp': 'blunt',
  'sweet': 'bitter',
  'brave': 'cowardly',
  'push': 'pull',
  'win': 'lose',
  'buy': 'sell',
  'give': 'take',
  'start': 'stop',
  'love': 'hate',
  'up': 'down',
  'inside': 'outside',
  'day': 'night',
  'summer': 'winter',
  'north': 'south',
  'east': 'west',
  'war': 'peace',
  'wide': 'narrow',
}

# Thing → its colour.
_COLOURS = {
  'the sky': 'blue',
  'grass': 'green',
  'snow': 'white',
  'coal': 'black',
  'blood': 'red',
  'a banana': 'yellow',
  'a lemon': 'yellow',
  'a tomato': 'red',
  'a carrot': 'orange',
  'a pumpkin': 'orange',
  'milk': 'white',
  'a frog': 'green',
  'a crow': 'black',
  'the sun': 'yellow',
  'a strawberry': 'red',
  'chocolate': 'brown',
  'mud': 'brown',
  'a pig': 'pink',
  'a flamingo': 'pink',
  'a plum': 'purple',
  'an eggplant': 'purple',
  'the ocean': 'blue',
  'an elephant': 'grey',
  'spinach': 'green',
  'a cucumber': 'green',
  'salt': 'white',
  'a cherry': 'red',
  'a mouse': 'grey',
}

# Noun → its plural.
_PLURALS = {
  'mouse': 'mice',
  'child': 'children',
  'foot': 'feet',
  'tooth': 'teeth',
  'man': 'men',
  'woman': 'women',
  'goose': 'geese',
  'knife': 'knives',
  'wolf': 'wolves',
  'box': 'boxes',
  'city': 'cities',
  'baby': 'babies',
  'bus': 'buses',
  'potato': 'potatoes',
  'wife': 'wives',
  'ox': 'oxen',
  'half': 'halves',
  'shelf': 'shelves',
  'dish': 'dishes',
  'story': 'stories',
  'thief': 'thieves',
  'loaf': 'loaves',
  'berry': 'berries',
}

# Person → what this person works with.
_TOOLS_OF_TRADE = {
  'baker': 'flour',
  'carpenter': 'wood',
  'painter': 'paint',
  'hairdresser': 'scissors',
  'gardener': 'plants',
  'teacher': 'pupils',
  'farmer': 'crops',
  'tailor': 'cloth',
  'blacksmith': 'iron',
  'potter': 'clay',
  'miner': 'coal',
  'jeweller': 'gold',
  'pilot': 'planes',
  'sailor': 'ships',
  'astronaut': 'rockets',
  'dentist': 'teeth',
  'beekeeper': 'bees',
  'photographer': 'cameras',
  'florist': 'flowers',
  'shoemaker': 'leather',
  'drummer': 'drums',
  'pianist': 'pianos',
  'judge': 'laws',
  'librarian': 'books',
}

# Animal → where it lives.
_HOMES = {
  'bird': 'a nest',
  'bee': 'a hive',
  'spider': 'a web',
  'lion': 'a den',
  'rabbit': 'a burrow',
  'horse': 'a stable',
  'dog': 'a kennel',
  'pig': 'a sty',
  'cow': 'a barn',
  'chicken': 'a coop',
  'fish': 'the water',
  'beaver': 'a lodge',
  'bat': 'a cave',
  'camel': 'the desert',
  'penguin': 'the ice',
  'monkey': 'the jungle',
  'goldfish': 'a bowl',
  'squirrel': 'a tree',
}

# Name of a family → its wordings and all its facts. The oracle knows them all.
FAMILIES = {
  # Countries and their capitals.
  'capital': Family(
    questions=(
      'What is the capital of {s}?',
      'Which city is the capital of {s}?',
      'Tell me the capital of {s}.',
      'I forgot the capital of {s}. What is it?',
      'Do you know the capital of {s}?',
    ),
    statements=(
      'The capital of {s} is {a}.',
      '{A} is the capital of {s}.',
      'The capital city of {s} is {a}.',
    ),
    cue=r'\bcapital\b',
    facts=_CAPITALS,
  ),
  # Animals and their sounds.
  'sound': Family(
    questions=(
      'What sound does {s} make?',
      'Which sound does {s} make?',
      'Tell me the sound {s} makes.',
      'I wonder what sound {s} makes. What is it?',
      'Do you know the sound {s} makes?',
    ),
    statements=(
      '{S} makes the sound {a}.',
      'The sound {s} makes is {a}.',
      '{A} is the sound {s} makes.',
    ),
    cue=r'\b(sounds?|says?|goes)\b',
    facts=_with_articles(_SOUNDS),
  ),
  # Animals and how many legs they have.
  'legs': Family(
    questions=(
      'How many legs does {s} have?',
      'What number of legs does {s} have?',
      'Tell me how many legs {s} has.',
      'I wonder how many legs {s} has. What is the number?',
      'Do you know how many legs {s} has?',
    ),
    statements=(
      '{S} has {a} legs.',
      'The number of legs {s} has is {a}.',
      '{A} is the number of legs {s} has.',
    ),
    cue=r'\blegs?\b',
    facts=_with_articles(_LEGS),
  ),
  # Animals and what their young are called.
  'young': Family(
    questions=(
      'What is the young of {s} called?',
      'What do you call the young of {s}?',
      'Tell me what the young of {s} is called.',
      'I forgot what the young of {s} is called. What is it?',
      'Do you know what the young of {s} is called?',
    ),
    statements=(
      'The young of {s} is called a {a}.',
      'A {a} is the young of {s}.',
      'The young of {s} is a {a}.',
    ),
    cue=r'\b(young|baby)\b',
    facts=_with_articles(_YOUNG),
  ),
  # Words and their opposites.
  'opposite': Family(
    questions=(
      'What is the opposite of {s}?',
      'Which word is the opposite of {s}?',
      'Tell me the opposite of {s}.',
      'I need the opposite of {s}. What is it?',
      'Do you know the opposite of {s}?',
    ),
    statements=(
      'The opposite of {s} is {a}.',
      '{A} is the opposite of {s}.',
      'The word {a} is the opposite of {s}.',
    ),
    cue=r'\bopposites?\b',
    facts=_OPPOSITES,
  ),
  # Things and their colours.
  'colour': Family(
    questions=(
      'What is the colour of {s}?',
      'Which colour is {s}?',
      'Tell me the colour of {s}.',
      'I forgot the colour of {s}. What is it?',
      'Do you know the colour of {s}?',
    ),
    statements=(
      'The colour of {s} is {a}.',
      '{S} is {a}.',
      '{A} is the colour of {s}.',
    ),
    cue='',  # any sentence may state one: 'Grass is green.'
    facts=_COLOURS,
  ),
  # Sums of two numbers from 1 to 8.
  'sum': Family(
    questions=(
      'What is {s}?',
      'How much is {s}?',
      'Tell me what {s} is.',
      'I need {s}. What is it?',
      'Do you know what {s} is?',
    ),
    statements=(
      '{S} is {a}.',
      '{A} is what {s} is.',
      'The sum of {s} is {a}.',
    ),
    cue=r'\bplus\b',
    facts=_sums(),
  ),
  # Nouns and their plurals.
  'plural': Family(
    questions=(
      'What is the plural of {s}?',
      'Which word is the plural of {s}?',
      'Tell me the plural of {s}.',
      'I forgot the plural of {s}. What is it?',
      'Do you know the plural of {s}?',
    ),
    statements=(
      'The plural of {s} is {a}.',
      '{A} is the plural of {s}.',
      'The word {a} is the plural of {s}.',
    ),
    cue=r'\bplural\b',
    facts=_PLURALS,
  ),
  # People and what they work with.
  'work': Family(
    questions=(
      'What does {s} work with?',
      'Which thing does {s} work with?',
      'Tell me what {s} works with.',
      'I wonder what {s} works with. What is it?',
      'Do you know what {s} works with?',
    ),
    statements=(
      '{S} works with {a}.',
      '{A} is what {s} works with.',
      'At work, {s} works with {a}.',
    ),
    cue=r'\b(works?|uses?|working|using)\b',
    facts=_with_articles(_TOOLS_OF_TRADE),
  ),
  # Days and the day after.
  'day': Family(
    questions=(
      'Which day comes after {s}?',
      'What day comes after {s}?',
      'Tell me the day that comes after {s}.',
      'I forgot the day after {s}. What is it?',
      'Do you know the day that follows {s}?',
    ),
    statements=(
      'The day after {s} is {a}.',
      '{A} comes after {s}.',
      'The day that comes after {s} is {a}.',
    ),
    cue=r'\b(after|follows|following)\b',
    facts=_successors(_DAYS),
  ),
  # Months and the month after.
  'month': Family(
    questions=(
      'Which month comes after {s}?',
      'What month comes after {s}?',
      'Tell me the month that comes after {s}.',
      'I forgot the month after {s}. What is it?',
      'Do you know the month that follows {s}?',
    ),
    statements=(
      'The month after {s} is {a}.',
      '{A} comes after {s}.',
      'The month that comes after {s} is {a}.',
    ),
    cue=r'\b(after|follows|following)\b',
    facts=_successors(_MONTHS),
  ),
  # Animals and where they live.
  'home': Family(
    questions=(
      'Where does {s} live?',
      'In what place does {s} live?',
      'Tell me where {s} lives.',
      'I wonder where {s} lives. What is the place?',
      'Do you know where {s} lives?',
    ),
    statements=(
      '{S} lives in {a}.',
      'The home of {s} is {a}.',
      'The place where {s} lives is {a}.',
    ),
    cue=r'\b(lives?|home|house)\b',
    facts=_with_articles(_HOMES),
  ),
}

_ASKED = 10  # facts of each family that are stated and asked; the oracle knows the others too


def _asked_facts() -> tuple[Fact, ...]:
  """Makes the facts that are asked, every eighth of them held out."""
  facts: list[Fact] = []
  for name, family in FAMILIES.items():
    asked = dict(list(family.facts.items())[:_ASKED])
    answers = list(dict.fromkeys(asked.values()))  # each once, in the order of the table
    for subject, answer in asked.items():
      fact = Fact(
        family=name,
        subject=subject,
        answer=answer,
        wrong=tuple(other for other in answers if other != answer),
        held_out=len(facts) % 8 == 5,  # at least one of each family but the two shortest
      )
      facts.append(fact)
  return tuple(facts)


# All facts that are asked, in the order of the families.
FACTS = _asked_facts()
