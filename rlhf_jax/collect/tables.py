"""The tables of the database.

Rows of judgements and revisions are added and never overwritten: a judgement
that was undone, returned or amended keeps its row, and a revision records what
happened to it. Only the deletion of a person's data removes rows. Times are
seconds since 1970.
"""

import sqlalchemy
from sqlalchemy import Boolean, Column, Float, ForeignKey, Index, Integer, JSON, Table, Text

METADATA = sqlalchemy.MetaData()
SCHEMA = '1'  # stored in `facts`; a database with another schema is refused

# Facts about the whole database: its schema, and the secret that signs links.
facts = Table(
  'facts',
  METADATA,
  Column('name', Text, primary_key=True),
  Column('value', Text, nullable=False),
)

# All versions of the guidelines, so that each judgement can name the version it followed.
guidelines = Table(
  'guidelines',
  METADATA,
  Column('version', Text, primary_key=True),
  Column('text', Text, nullable=False),
  Column('created', Float, nullable=False),
)

items = Table(
  'items',
  METADATA,
  Column('id', Integer, primary_key=True),
  Column('key', Text, nullable=False, unique=True),  # adding the same key again changes nothing
  Column('batch', Text, nullable=False),  # such as 'people/train'
  Column('task', Text, nullable=False),  # rank, demonstrate, edit, converse
  Column('record', JSON, nullable=False),  # id, source, license, domain, context, meta
  Column('messages', JSON, nullable=False),
  Column('responses', JSON, nullable=False),  # K objects {text, model}
  Column('gold', JSON),  # the known answer, {axis: ranks}; null where there is none
  Column('explanation', Text, nullable=False),  # shown after a training item
  Column('training', Boolean, nullable=False),
  Column('priority', Float, nullable=False),  # items of the highest priority come first
  Column('wanted', Integer, nullable=False),  # number of judgements that the item needs
  Column('answers', Integer, nullable=False),  # number of people whose answer is complete
  Column('closed', Boolean, nullable=False),  # True: nobody gets the item any more
  Column('created', Float, nullable=False),
  Column('waiting', Boolean, nullable=False),  # not closed, and answers < wanted
  # in the order in which items are given, so that the next item is the first row of the index
  Index(
    'items_in_order',
    'waiting',
    'training',
    sqlalchemy.text('priority DESC'),
    sqlalchemy.text('answers DESC'),
    'id',
  ),
)

invitations = Table(
  'invitations',
  METADATA,
  Column('id', Integer, primary_key=True),
  Column('role', Text, nullable=False),
  Column('label', Text, nullable=False),
  Column('expires', Float, nullable=False),
  Column('places', Integer, nullable=False),  # people that it admits; 1 = a personal link
  Column('revoked', Boolean, nullable=False),
  Column('created', Float, nullable=False),
)

people = Table(
  'people',
  METADATA,
  Column('id', Integer, primary_key=True),
  Column('pseudonym', Text, nullable=False, unique=True),  # random; the only name in exports
  Column('role', Text, nullable=False),  # annotator, reviewer, lead
  Column('invitation_id', ForeignKey('invitations.id')),
  Column('external', Text, nullable=False),  # a crowd platform's id of the person; '' = none
  Column('parameters', JSON, nullable=False),  # the parameters in the platform's URL
  Column('session', Text, nullable=False),  # a new one signs the person out everywhere
  Column('consented', Float, nullable=False),
  Column('blocked', Boolean, nullable=False),
  Column('created', Float, nullable=False),
)

leases = Table(
  'leases',
  METADATA,
  Column('id', Integer, primary_key=True),
  Column('token', Text, nullable=False, unique=True),  # in the address of the item's page
  Column('item_id', ForeignKey('items.id'), nullable=False),
  Column('person_id', ForeignKey('people.id'), nullable=False),
  Column('shown', JSON, nullable=False),  # numbers of the responses, in the order on the page
  Column('state', Text, nullable=False),  # open, answered, skipped
  Column('started', Float, nullable=False),
  Column('expires', Float, nullable=False),
  Index('leases_of_item', 'item_id', 'state'),
  Index('leases_of_person', 'person_id', 'state'),
)

drafts = Table(
  'drafts',
  METADATA,
  Column('lease_id', ForeignKey('leases.id'), primary_key=True),
  Column('fields', JSON, nullable=False),  # fields of the form: name → values
  Column('saved', Float, nullable=False),
)

judgements = Table(
  'judgements',
  METADATA,
  Column('id', Integer, primary_key=True),
  Column('item_id', ForeignKey('items.id'), nullable=False),
  Column('person_id', ForeignKey('people.id'), nullable=False),  # whose judgement it is
  Column('author_id', ForeignKey('people.id'), nullable=False),  # the reviewer if it was amended
  Column('lease_id', ForeignKey('leases.id'), nullable=False),
  Column('number', Integer, nullable=False),  # turn of a conversation; 0 for other tasks
  Column('task', Text, nullable=False),
  Column('answer', JSON, nullable=False),  # see answers.py
  Column('shown', JSON, nullable=False),
  Column('guidelines', Text, nullable=False),  # version of the guidelines that the page showed
  Column('seconds', Float, nullable=False),  # between the page's delivery and the answer
  Column('pasted', JSON, nullable=False),  # number and length of pastes, for the reviewer
  Column('amends', ForeignKey('judgements.id')),  # the judgement that this one replaces
  Column('stands', Boolean, nullable=False),  # False once it was undone, returned or amended
  Column('created', Float, nullable=False),
  Index('judgements_of_item', 'item_id', 'stands'),
  Index('judgements_of_person', 'person_id', 'stands'),
)

revisions = Table(
  'revisions',
  METADATA,
  Column('id', Integer, primary_key=True),
  Column('judgement_id', ForeignKey('judgements.id'), nullable=False),
  Column('action', Text, nullable=False),  # undone, returned, amended, accepted
  Column('person_id', ForeignKey('people.id'), nullable=False),
  Column('reason', Text, nullable=False),
  Column('created', Float, nullable=False),
  Index('revisions_of_judgement', 'judgement_id'),
)

# Problems with items that people reported, such as a prompt that cannot be answered.
flags = Table(
  'flags',
  METADATA,
  Column('id', Integer, primary_key=True),
  Column('item_id', ForeignKey('items.id'), nullable=False),
  Column('person_id', ForeignKey('people.id'), nullable=False),
  Column('reason', Text, nullable=False),
  Column('created', Float, nullable=False),
)

# The turns of conversations: a person's message and the replies to it.
turns = Table(
  'turns',
  METADATA,
  Column('id', Integer, primary_key=True),
  Column('lease_id', ForeignKey('leases.id'), nullable=False),
  Column('number', Integer, nullable=False),
  Column('messages', JSON, nullable=False),  # up to the person's message of this turn
  Column('responses', JSON, nullable=False),  # K objects {text, model}; [] while waiting
  Column('state', Text, nullable=False),  # waiting, ready, failed, ranked
  Column('error', Text, nullable=False),
  Column('created', Float, nullable=False),
  sqlalchemy.UniqueConstraint('lease_id', 'number'),
)
