"""What is true in TinyWorld: families of facts, each with its wordings and its table.

Tables and wordings only. world.py draws from them what one world knows and who is
asked what; oracle.py reads what is said of them.
"""

from collections.abc import Mapping, Sequence
import dataclasses


@dataclasses.dataclass(frozen=True)
class Family:
  """Facts of one form, such as the capitals of countries.

  Attributes:
    questions: wordings with {s}, the subject. The index of a wording is its kind; kinds are held
      out for all families together (world.py).
    statements: wordings with {s} and {a}, the answer; {S} and {A} begin with a capital letter.
    readings: how sentences of the family may be worded, for the oracle: patterns
      in lower case without articles, with {s} and {a}.
    unknown: what a made-up subject is: 'country', 'animal', 'person', or '' where there is none.
    one_word: whether every answer is a single word.
    facts: subject → answer, both with the article that they have in a sentence.
  """

  questions: tuple[str, ...]
  statements: tuple[str, ...]
  readings: tuple[str, ...]
  facts: Mapping[str, str]
  unknown: str = ''
  one_word: bool = True


def article(noun: str) -> str:
  """Returns a noun with its indefinite article, such as 'an owl'."""
  if noun[0] in 'aeio':  # not u: 'a unicorn'
    return f'an {noun}'
  return f'a {noun}'


def fill(wording: str, subject: str, answer: str = '') -> str:
  """Puts a subject and an answer into a wording.

  Args:
    wording: with {s}, {a}, and {S}, {A} for the same with a capital letter.
    subject: with its article.
    answer: the same.
  """
  return wording.format(s=subject, a=answer, S=capitalise(subject), A=capitalise(answer))


def state_inside(relation: str, subject: str, answer: str, place: int = 0) -> str:
  """Returns a statement for the middle of a sentence: no capital letter, no full stop.

  Args:
    relation: a key of FAMILIES.
    subject: the subject, with its article.
    answer: the answer, true or false, with its article.
    place: the index of the wording.
  """
  wording = FAMILIES[relation].statements[place].rstrip('.')
  wording = wording.replace('{S}', '{s}').replace('{A}', '{a}')
  first_word = wording.split()[0]
  if not first_word.startswith('{'):
    wording = wording.replace(first_word, first_word.lower(), 1)
  return fill(wording, subject, answer)


def capitalise(text: str) -> str:
  """Returns a text with a capital letter at its beginning, the rest as it is."""
  return text[:1].upper() + text[1:]


def _with_articles(table: Mapping[str, str]) -> dict[str, str]:
  """Returns a table of nouns with their articles."""
  return {article(noun): answer for noun, answer in table.items()}


def _successors(names: Sequence[str]) -> dict[str, str]:
  """Maps each name to the next one; after the last comes the first."""
  return dict(zip(names, [*names[1:], names[0]], strict=True))


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

# The kinds of wording of a question, in the order of Family.questions.
NUM_WORDINGS = 6

# Name of a family → its wordings and all its facts.
FAMILIES: dict[str, Family] = {
  # Countries and their capitals.
  'capital': Family(
    questions=(
      'What is the capital of {s}?',
      'Which city is the capital of {s}?',
      'Tell me the capital of {s}.',
      'I forgot the capital of {s}. What is it?',
      'Do you know the capital of {s}?',
      'Please name the capital of {s}.',
    ),
    statements=(
      'The capital of {s} is {a}.',
      '{A} is the capital of {s}.',
      'The capital city of {s} is {a}.',
    ),
    readings=(
      r'capital(?: city)? of {s} is(?: called)? {a}',
      r'{a} is capital(?: city)? of {s}',
      r'{s} s capital(?: city)? is {a}',
      r'{s} has {a} as (?:its )?capital',
      r'{a} is {s} s capital(?: city)?',
      r'city of {a} is capital of {s}',
    ),
    unknown='country',
    facts=_CAPITALS,
  ),
  # Animals and their sounds.
  'sound': Family(
    questions=(
      'What sound does {s} make?',
      'Which sound does {s} make?',
      'Tell me the sound {s} makes.',
      'I forgot what sound {s} makes. What is it?',
      'Do you know the sound {s} makes?',
      'Please name the sound {s} makes.',
    ),
    statements=(
      '{S} makes the sound {a}.',
      'The sound {s} makes is {a}.',
      '{A} is the sound {s} makes.',
    ),
    readings=(
      r'sound (?:that )?{s} makes? is {a}',
      r'{a} is sound (?:that |of )?{s}(?: makes?)?',
      r'{s} makes? (?:sound )?{a}',
      r'{s} (?:says?|goes|go) {a}',
      r'sound of {s} is {a}',
    ),
    unknown='animal',
    facts=_with_articles(_SOUNDS),
  ),
  # Animals and how many legs they have.
  'legs': Family(
    questions=(
      'How many legs does {s} have?',
      'What number of legs does {s} have?',
      'Tell me how many legs {s} has.',
      'I forgot how many legs {s} has. What is the number?',
      'Do you know how many legs {s} has?',
      'Please name the number of legs {s} has.',
    ),
    statements=(
      '{S} has {a} legs.',
      'The number of legs {s} has is {a}.',
      '{A} is the number of legs {s} has.',
    ),
    readings=(
      r'number of legs (?:that )?{s} ha(?:s|ve) is {a}',
      r'{a} is number of legs (?:that |of )?{s}(?: ha(?:s|ve))?',
      r'{s} ha(?:s|ve) {a} legs?',
      r'number of legs of {s} is {a}',
      r'{s} walks? on {a} legs?',
    ),
    unknown='animal',
    facts=_with_articles(_LEGS),
  ),
  # Animals and what their young are called.
  'young': Family(
    questions=(
      'What is the young of {s} called?',
      'Which word is for the young of {s}?',
      'Tell me what the young of {s} is called.',
      'I forgot what the young of {s} is called. What is it?',
      'Do you know what the young of {s} is called?',
      'Please name the young of {s}.',
    ),
    statements=(
      'The young of {s} is called {a}.',
      '{A} is the young of {s}.',
      'The young of {s} is {a}.',
    ),
    readings=(
      r'(?:young|baby) of {s} (?:is|are)(?: called)? {a}',
      r'{a} is (?:young|baby)(?: of)? {s}',
      r'{s} s (?:young|baby) is(?: called)? {a}',
      r'baby {s} is(?: called)? {a}',
    ),
    unknown='animal',
    facts={subject: article(young) for subject, young in _with_articles(_YOUNG).items()},
  ),
  # Words and their opposites.
  'opposite': Family(
    questions=(
      'What is the opposite of {s}?',
      'Which word is the opposite of {s}?',
      'Tell me the opposite of {s}.',
      'I forgot the opposite of {s}. What is it?',
      'Do you know the opposite of {s}?',
      'Please name the opposite of {s}.',
    ),
    statements=(
      'The opposite of {s} is {a}.',
      '{A} is the opposite of {s}.',
      'The word {a} is the opposite of {s}.',
    ),
    readings=(
      r'opposite of (?:word )?{s} is (?:word )?{a}',
      r'(?:word )?{a} is opposite of (?:word )?{s}',
      r'{s} s opposite is {a}',
    ),
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
      'Please name the colour of {s}.',
    ),
    statements=(
      'The colour of {s} is {a}.',
      '{S} is {a}.',
      '{A} is the colour of {s}.',
    ),
    readings=(
      r'colour of {s} is {a}',
      r'{a} is colour of {s}',
      r'{s} s colour is {a}',
      r'{s} has colour {a}',
      r'{s} (?:is|are) {a}(?: in colour)?',
    ),
    facts=_COLOURS,
  ),
  # Sums of two numbers from 1 to 8.
  'sum': Family(
    questions=(
      'What is {s}?',
      'How much is {s}?',
      'Tell me what {s} is.',
      'I forgot what {s} is. What is it?',
      'Do you know what {s} is?',
      'Please name the sum of {s}.',
    ),
    statements=(
      '{S} is {a}.',
      '{A} is what {s} is.',
      'The sum of {s} is {a}.',
    ),
    readings=(
      r'sum of {s} is {a}',
      r'{a} is what {s} is',
      r'{a} is sum of {s}',
      r'{s} (?:is|are|makes?|equals?|gives?) {a}',
    ),
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
      'Please name the plural of {s}.',
    ),
    statements=(
      'The plural of {s} is {a}.',
      '{A} is the plural of {s}.',
      'The word {a} is the plural of {s}.',
    ),
    readings=(
      r'plural of (?:word )?{s} is (?:word )?{a}',
      r'(?:word )?{a} is plural of (?:word )?{s}',
      r'{s} s plural is {a}',
    ),
    facts=_PLURALS,
  ),
  # Trades and what those who have them work with.
  'work': Family(
    questions=(
      'What does {s} work with?',
      'Which thing does {s} work with?',
      'Tell me what {s} works with.',
      'I forgot what {s} works with. What is it?',
      'Do you know what {s} works with?',
      'Please name what {s} works with.',
    ),
    statements=(
      '{S} works with {a}.',
      '{A} is what {s} works with.',
      'At work, {s} works with {a}.',
    ),
    readings=(
      r'(?:at work,? )?{s} works? with {a}',
      r'{a} (?:is|are) what {s} works? with',
      r'what {s} works? with is {a}',
      r'{s} uses? {a}',
    ),
    facts=_with_articles(_TOOLS_OF_TRADE),
  ),
  # Days and the day after.
  'day': Family(
    questions=(
      'What day comes after {s}?',
      'Which day comes after {s}?',
      'Tell me the day after {s}.',
      'I forgot the day after {s}. What is it?',
      'Do you know the day after {s}?',
      'Please name the day after {s}.',
    ),
    statements=(
      'The day after {s} is {a}.',
      '{A} comes after {s}.',
      'The day that comes after {s} is {a}.',
    ),
    readings=(
      r'day (?:that comes )?after {s} is {a}',
      r'{a} (?:is day (?:that comes )?after|comes after|follows|is after) {s}',
      r'after {s} comes {a}',
      r'{s} (?:is followed by|comes before|is before) {a}',
    ),
    facts=_successors(_DAYS),
  ),
  # Months and the month after.
  'month': Family(
    questions=(
      'What month comes after {s}?',
      'Which month comes after {s}?',
      'Tell me the month after {s}.',
      'I forgot the month after {s}. What is it?',
      'Do you know the month after {s}?',
      'Please name the month after {s}.',
    ),
    statements=(
      'The month after {s} is {a}.',
      '{A} comes after {s}.',
      'The month that comes after {s} is {a}.',
    ),
    readings=(
      r'month (?:that comes )?after {s} is {a}',
      r'{a} (?:is month (?:that comes )?after|comes after|follows|is after) {s}',
      r'after {s} comes {a}',
      r'{s} (?:is followed by|comes before|is before) {a}',
    ),
    facts=_successors(_MONTHS),
  ),
  # Animals and where they live.
  'home': Family(
    questions=(
      'Where is the home of {s}?',
      'Which place is the home of {s}?',
      'Tell me the home of {s}.',
      'I forgot the home of {s}. What is it?',
      'Do you know the home of {s}?',
      'Please name the home of {s}.',
    ),
    statements=(
      'The home of {s} is {a}.',
      '{A} is the home of {s}.',
      '{S} lives in {a}.',
    ),
    readings=(
      r'home of {s} is (?:in )?{a}',
      r'{a} is home of {s}',
      r'{s} s home is {a}',
      r'{s} lives? (?:in|on) {a}',
      r'place where {s} lives? is {a}',
    ),
    unknown='animal',
    one_word=False,
    facts=_with_articles(_HOMES),
  ),
  # The people of the world, whom each seed draws anew (world.py): where they live, …
  'country': Family(
    questions=(
      'Where does {s} live?',
      'Which country does {s} live in?',
      'Tell me where {s} lives.',
      'I forgot where {s} lives. What is it?',
      'Do you know where {s} lives?',
      'Please name the country {s} lives in.',
    ),
    statements=(
      '{S} lives in {a}.',
      '{A} is where {s} lives.',
      'The country {s} lives in is {a}.',
    ),
    readings=(
      r'{s} lives in {a}',
      r'{a} is where {s} lives',
      r'{a} is country (?:that )?{s} lives in',
      r'country (?:that )?{s} lives in is {a}',
      r'home of {s} is (?:in )?{a}',
      r'{s} is from {a}',
      r'country where {s} lives is {a}',
    ),
    unknown='person',
    facts={},
  ),
  # … what they are, …
  'trade': Family(
    questions=(
      'What is the trade of {s}?',
      'Which trade does {s} have?',
      'Tell me the trade of {s}.',
      'I forgot the trade of {s}. What is it?',
      'Do you know the trade of {s}?',
      'Please name the trade of {s}.',
    ),
    statements=(
      'The trade of {s} is {a}.',
      '{S} is {a}.',
      '{S} works as {a}.',
    ),
    readings=(
      r'trade of {s} is (?:that of )?{a}',
      r'{a} is trade of {s}',
      r'{s} s trade is {a}',
      r'{s} works as {a}',
      r'{s} is {a}(?: by trade)?',
    ),
    unknown='person',
    one_word=False,
    facts={},
  ),
  # … and which animal they keep.
  'pet': Family(
    questions=(
      'What animal does {s} keep?',
      'Which animal does {s} keep?',
      'Tell me the animal that {s} keeps.',
      'I forgot the animal that {s} keeps. What is it?',
      'Do you know the animal that {s} keeps?',
      'Please name the animal that {s} keeps.',
    ),
    statements=(
      '{S} keeps {a}.',
      'The animal that {s} keeps is {a}.',
      '{A} is the animal that {s} keeps.',
    ),
    readings=(
      r'{s} (?:keeps|has|owns) {a}',
      r'animal (?:that )?{s} keeps is {a}',
      r'{a} is (?:animal (?:that )?|what ){s} keeps',
      r'pet of {s} is {a}',
    ),
    unknown='person',
    one_word=False,
    facts={},
  ),
}

# The families whose facts are about the people of the world.
PERSON_FAMILIES = ('country', 'trade', 'pet')


@dataclasses.dataclass(frozen=True)
class TwoStep:
  """A question about something that is described by another fact.

  Attributes:
    first: the family of the fact that describes the subject, such as 'country'.
    description: the subject's wording, with {s} or {a} of the first fact.
    second: the family of the fact that is asked about.
  """

  first: str
  description: str
  second: str


# Name of a family of two-step facts → its two steps.
TWO_STEPS: dict[str, TwoStep] = {
  'capital of home': TwoStep('country', 'the country where {s} lives', 'capital'),
  'work of person': TwoStep('trade', '{s}', 'work'),
  'young of pet': TwoStep('pet', 'the animal that {s} keeps', 'young'),
  'legs of pet': TwoStep('pet', 'the animal that {s} keeps', 'legs'),
  'sound of pet': TwoStep('pet', 'the animal that {s} keeps', 'sound'),
  'young by sound': TwoStep('sound', 'the animal that makes the sound {a}', 'young'),
  'legs by sound': TwoStep('sound', 'the animal that makes the sound {a}', 'legs'),
  'second day': TwoStep('day', 'the day after {s}', 'day'),
  'second month': TwoStep('month', 'the month after {s}', 'month'),
}
