"""Export of judgements as records, in the schema that the data sources of training read.

People appear in exports under their pseudonyms only. Training items are
exported only in the kind `raw`; gold questions are exported like any other
item.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection

from rlhf_jax.collect import judgements, quality
from rlhf_jax.errors import UserError

# How the rankings that several people gave of an item become records.
#   all: one record for each ranking, unchanged.
#   majority: one record for each item, combined by Copeland's rule.
#   reliability: one record for each item, combined by the Plackett–Luce model of people
#     (person_model.py), with the confidence that the model computes.
COMBINATIONS = ('all', 'majority', 'reliability')
KINDS = ('rankings', 'demonstrations', 'prompts', 'raw')

# Fields of a ranking that a combined one does not have.
_OF_ONE_PERSON = (
  'annotator',
  'shown',
  'mode',
  'all_bad',
  'strength',
  'flags',
  'reason',
  'guidelines',
)

Fields = dict[str, Any]  # a line of a JSON Lines file


def export_kind(
  connection: Connection,
  kind: str,
  batch: str = '',
  combination: str = 'all',
) -> list[Fields]:
  """Exports one kind of records.

  Args:
    connection: the connection to read from.
    kind: one of KINDS. prompts: the messages that people wrote in conversations
      (red-team prompts where the settings ask for them). raw: every judgement,
      including those that were taken back, with its time, the order on the page
      and its revisions.
    batch: the batch whose items are exported; '' for all batches.
    combination: how rankings of the same item are combined; one of
      COMBINATIONS. The other kinds ignore it.

  Raises:
    UserError: the kind or the combination is unknown.
  """
  if kind not in KINDS:
    raise UserError(f'--kind: expected one of {", ".join(KINDS)}, got {kind!r}')
  if combination not in COMBINATIONS:
    names = ', '.join(COMBINATIONS)
    raise UserError(f'--combination: expected one of {names}, got {combination!r}')
  if kind == 'rankings':
    return export_rankings(connection, batch, combination)
  if kind == 'demonstrations':
    return export_demonstrations(connection, batch)
  if kind == 'prompts':
    return export_prompts(connection, batch)
  return export_raw(connection, batch)


def export_rankings(
  connection: Connection,
  batch: str = '',
  combination: str = 'all',
) -> list[Fields]:
  """Exports the rankings of responses from the tasks `rank`, `converse` and `edit`.

  An edit becomes a ranking in which the edited response is better than the
  original.
  """
  rows = _exported_rows(connection, batch)
  turns = judgements.read_turns(connection)
  axes = []
  for row in rows:
    for axis in row.answer.get('orders', {}):
      if axis not in axes:
        axes.append(axis)
  exported = []
  for axis in axes:
    lines = [_ranking_line(row, turns, axis) for row in rows if _has_order(row, axis)]
    if combination == 'all':
      exported += lines
    else:
      orders = quality.orders_from_rows(rows, turns, axis)
      exported += _combine(lines, orders, combination)
  exported += [_edit_line(row) for row in rows if row.task == 'edit']
  return exported


def export_demonstrations(connection: Connection, batch: str = '') -> list[Fields]:
  """Exports the responses that people wrote in the tasks `demonstrate` and `edit`."""
  exported = []
  for row in _exported_rows(connection, batch):
    if row.task in ('demonstrate', 'edit'):
      line = _line_head(row, row.record.get('id', row.key))
      line['response'] = row.answer['response']
      exported.append(line)
  return exported


def export_prompts(connection: Connection, batch: str = '') -> list[Fields]:
  """Exports each message that a person wrote to a model, with the conversation before it."""
  turns = judgements.read_turns(connection)
  exported = []
  for row in _exported_rows(connection, batch):
    if row.task != 'converse':
      continue
    turn = turns[row.lease_id, row.number]
    line = _line_head(row, f'{row.record.get("id", row.key)}/{row.number}')
    line['messages'] = turn.messages
    line['meta'] = {'all_bad': row.answer['all_bad']}
    exported.append(line)
  return exported


def export_raw(connection: Connection, batch: str = '') -> list[Fields]:
  """Exports every judgement as the person gave it, with its later revisions."""
  turns = judgements.read_turns(connection)
  history: dict[int, list[Fields]] = defaultdict(list)
  for revision in judgements.list_revisions(connection):
    history[revision.judgement_id].append({'action': revision.action, 'reason': revision.reason})
  exported = []
  for row in judgements.list_judgements(connection, standing=False, batch=batch):
    line = _line_head(row, row.record.get('id', row.key))
    if row.task == 'converse':
      turn = turns[row.lease_id, row.number]
      line['messages'] = turn.messages
      line['responses'] = [response['text'] for response in turn.responses]
    else:
      line['responses'] = [response['text'] for response in row.responses]
    line |= {
      'judgement': row.id,
      'task': row.task,
      'answer': row.answer,
      'shown': row.shown,
      'seconds': round(row.seconds, 1),
      'stands': row.stands,
      'amends': row.amends,
      'pasted': row.pasted,
      'training': row.training,
      'revisions': history[row.id],
    }
    exported.append(line)
  return exported


def _exported_rows(connection: Connection, batch: str) -> list[Any]:
  """Returns the judgements that stand (were not taken back), except those of training items."""
  rows = judgements.list_judgements(connection, batch=batch)
  return [row for row in rows if not row.training]


def _line_head(row: Any, identifier: str) -> Fields:
  """Returns the fields that every exported line has."""
  return {
    'id': f'{identifier}/{row.pseudonym}',
    'source': row.pseudonym,
    'license': row.record.get('license', ''),
    'domain': row.record.get('domain', ''),
    'messages': row.messages,
    'annotator': row.pseudonym,
    'guidelines': row.guidelines,
    'item': row.key,
  }


def _has_order(row: Any, axis: str) -> bool:
  """Says whether a judgement orders the responses on an axis, such as 'overall'."""
  return axis in row.answer.get('orders', {})


def _ranking_line(row: Any, turns: Mapping[tuple[int, int], Any], axis: str) -> Fields:
  """Returns one person's ranking as a record of the kind `ranking`."""
  identifier = row.record.get('id', row.key)
  responses = row.responses
  messages = row.messages
  if row.task == 'converse':
    turn = turns[row.lease_id, row.number]
    responses = turn.responses
    messages = turn.messages
    identifier = f'{identifier}/{row.lease_id}/{row.number}'
  if axis != 'overall':
    identifier = f'{identifier}/{axis}'
  line = _line_head(row, identifier)
  line['messages'] = messages
  line['domain'] = line['domain'] or ('' if axis == 'overall' else axis)
  line |= {
    'context': row.record.get('context', ''),
    'responses': [response['text'] for response in responses],
    'ranks': row.answer['orders'][axis],
    'models': [response['model'] for response in responses],
    'shown': row.shown,  # the numbers of the responses, in the order on the page
    'axis': axis,
    'confidence': 1.0,
  }
  for name in ('mode', 'all_bad', 'strength', 'flags', 'reason'):
    line[name] = row.answer[name]
  return line


def _edit_line(row: Any) -> Fields:
  """Returns an edit as a ranking of two responses, the edited one better than the original."""
  line = _line_head(row, f'{row.record.get("id", row.key)}/edit')
  line |= {
    'context': row.record.get('context', ''),
    'responses': [row.responses[0]['text'], row.answer['response']],
    'ranks': [2, 1],
    'confidence': 1.0,
  }
  return line


def _combine(
  lines: Sequence[Fields],
  orders: Sequence[quality.Order],
  combination: str,
) -> list[Fields]:
  """Combines the rankings of each item into one record.

  Args:
    lines: the records of the single rankings.
    orders: the same rankings as orders, in the same sequence.
    combination: 'majority' or 'reliability', see COMBINATIONS.
  """
  by_item: dict[int, list[int]] = defaultdict(list)
  for number, order in enumerate(orders):
    by_item[order.item].append(number)
  fitted = None
  if combination == 'reliability' and orders:
    fitted, _ = quality.fit_people(orders)
  combined = []
  for item, numbers in by_item.items():
    if fitted is not None:
      ranks = quality.order_of_means(fitted.means[item])
      confidence = quality.mean_confidence(fitted.above[item])
    else:
      ranks, confidence = quality.majority_order([orders[number].ranks for number in numbers])
    line = dict(lines[numbers[0]])
    for name in _OF_ONE_PERSON:
      del line[name]
    line |= {
      'id': line['id'].rsplit('/', 1)[0],
      'source': 'people',
      'ranks': ranks,
      'confidence': confidence,
      'people': len(numbers),
    }
    combined.append(line)
  return combined
