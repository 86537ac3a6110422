"""The pages on which a reviewer reads judgements and accepts, returns or amends them."""

from typing import Any

import sqlalchemy
from sqlalchemy import Connection, Row
from starlette.responses import Response

from rlhf_jax.collect import answers, judgements, people, tables
from rlhf_jax.collect.items import read_item
from rlhf_jax.collect.refusals import Refused
from rlhf_jax.collect.site import Visit

_NEWEST = 200  # largest number of judgements in the list, which shows the newest


def show_list(visit: Visit) -> Response:
  """Shows the newest judgements and the items that people reported."""
  with visit.site.store.reading() as connection:
    rows = judgements.list_judgements(connection, standing=False, limit=_NEWEST)
    states = {each.judgement_id: each.action for each in judgements.list_revisions(connection)}
    flags = connection.execute(sqlalchemy.select(tables.flags)).all()
  return visit.show('review_list.html', rows=rows[::-1], states=states, flags=flags)


def show_judgement(visit: Visit) -> Response:
  """Shows a judgement as its person saw it, with a form to amend it."""
  return _show(visit, '', 200)


def receive(visit: Visit) -> Response:
  """Accepts a judgement, sends it back to its person, or replaces it by an amended one."""
  action = visit.field('action')
  reason = answers.read_text(visit.form, 'why', visit.site.settings).strip()
  if action not in ('accept', 'return', 'amend'):
    raise Refused(400, 'Unknown action.')
  if action != 'accept' and not reason:
    return _show(visit, 'Please give a reason for sending it back or amending it.', answers.INVALID)
  number = visit.number('judgement')
  try:
    with visit.site.store.writing() as connection:
      judgement = judgements.read_judgement(connection, number)
      if action == 'accept':
        judgements.accept(connection, judgement, visit.person.id)
      elif action == 'return':
        judgements.return_to_person(
          connection,
          judgement,
          visit.person.id,
          reason,
          visit.site.settings,
        )
      else:
        answer = _read_amended(visit, connection, judgement)
        number = judgements.amend(connection, judgement, answer, visit.person.id, reason)
  except Refused as refused:
    if refused.status != answers.INVALID:
      raise
    return _show(visit, refused.message, refused.status)
  return visit.redirect(f'/review/{number}')


def _read_amended(visit: Visit, connection: Connection, judgement: Row) -> dict[str, Any]:
  """Reads the reviewer's answer from the form."""
  if 'orders' in judgement.answer:
    return answers.parse_ranking(visit.form, judgement.shown, visit.site.settings)
  item = read_item(connection, judgement.item_id)
  original = item.responses[0]['text'] if judgement.task == 'edit' else None
  return answers.parse_response(visit.form, visit.site.settings, original)


def _show(visit: Visit, problem: str, status: int) -> Response:
  """Renders the page of a judgement; `problem` says what is wrong with the reviewer's form."""
  site = visit.site
  with site.store.reading() as connection:
    judgement = judgements.read_judgement(connection, visit.number('judgement'))
    item = read_item(connection, judgement.item_id)
    person = people.read_person(connection, judgement.person_id)
    messages, responses = _what_was_shown(connection, judgement, item)
    history = [
      revision
      for revision in judgements.list_revisions(connection)
      if revision.judgement_id in (judgement.id, judgement.amends)
    ]
  cards = []
  if 'orders' in judgement.answer:
    cards = answers.list_cards(responses, judgement.shown)
  return visit.show(
    'review_item.html',
    status,
    judgement=judgement,
    pseudonym=person.pseudonym,
    messages=messages,
    context=item.record.get('context', ''),
    cards=cards,
    draft=_fields_of(judgement),
    flags=answers.RESPONSE_FLAGS,
    partial=len(cards) >= site.settings.partial_from,
    original=item.responses[0]['text'] if judgement.task == 'edit' else None,
    history=history,
    problem=problem,
  )


def _what_was_shown(connection: Connection, judgement: Row, item: Row) -> tuple[list, list]:
  """Returns the (messages, responses) that the person judged."""
  if judgement.task != 'converse':
    return item.messages, item.responses
  turn = judgements.read_turns(connection)[judgement.lease_id, judgement.number]
  return turn.messages, turn.responses


def _fields_of(judgement: Row) -> dict[str, list[str]]:
  """Returns the form fields from which `answers.parse_ranking` reads these ranks and flags."""
  fields: dict[str, list[str]] = {}
  for axis, ranks in judgement.answer.get('orders', {}).items():
    for place, number in enumerate(judgement.shown):
      rank = ranks[number]
      # responses without a rank got the last rank in 'top', and rank 2 in 'best_worst'
      left_out = judgement.answer['mode'] == 'top' and rank == max(ranks)
      if judgement.answer['mode'] == 'best_worst':
        left_out = rank == 2
      text = '' if left_out else str(rank)
      fields[answers.field_name(axis, answers.LETTERS[place])] = [text]
  for number, flags in judgement.answer.get('flags', {}).items():
    letter = answers.LETTERS[judgement.shown.index(int(number))]
    fields[f'flag.{letter}'] = flags
  return fields
