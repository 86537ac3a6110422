"""The pages on which a person talks with a model and ranks its replies.

In each turn the person writes a message, receives K replies and ranks them; the
best reply continues the conversation.
"""

import random
import time
from typing import Any

from sqlalchemy import Connection, Row
from starlette.responses import JSONResponse, Response

from rlhf_jax.collect import answers, assignment, conversation, judgements
from rlhf_jax.collect.items import read_item
from rlhf_jax.collect.judgements import SentAnswer
from rlhf_jax.collect.refusals import Refused
from rlhf_jax.collect.site import Visit


def show_conversation(visit: Visit, values: dict[str, Any], status: int) -> Response:
  """Shows a conversation so far, with the replies to rank or a box for the next message.

  Args:
    visit: a request of the item's address.
    values: the values for the template, see `annotate.show_form`.
    status: the HTTP status of the response.
  """
  lease = values['lease']
  with visit.site.store.reading() as connection:
    turn = conversation.last_turn(connection, lease.id)
    best = _best_of_turn(connection, turn)
  messages = values['item'].messages
  cards: list[dict[str, str]] = []
  if turn is not None:
    messages = turn.messages
    if turn.state == 'ready':
      cards = answers.list_cards(turn.responses, _order_of_turn(lease, turn))
    if turn.state == 'ranked':
      messages = conversation.next_messages(turn, best)
  return visit.show(
    'converse.html',
    status,
    **values,
    turn=turn,
    messages=messages,
    cards=cards,
    partial=False,
    turns=visit.site.settings.converse_turns,
  )


def receive_message(visit: Visit) -> Response:
  """Receives a person's message and starts the replies, for which the page then waits."""
  site = visit.site
  replier = site.replier
  if replier is None:
    raise Refused(409, 'There is no model to talk with here.')
  text = answers.read_text(visit.form, 'message', site.settings).strip()
  if not text:
    raise Refused(answers.INVALID, 'Write a message first.')
  replier.reserve()
  try:
    turn_id, messages = _add_message(visit, text)
  except BaseException:
    replier.release()
    raise
  replier.start(turn_id, messages, site.settings.converse_responses)
  return visit.redirect(f'/item/{visit.path("token")}')


def tell_state(visit: Visit) -> Response:
  """Returns the state of the last turn as JSON, by which the page knows that replies are there."""
  with visit.site.store.reading() as connection:
    lease = assignment.find_lease(connection, visit.path('token'), visit.person.id)
    turn = conversation.last_turn(connection, lease.id)
  return JSONResponse({'state': turn.state if turn is not None else 'none'})


def save_turn(visit: Visit, connection: Connection, lease: Row, item: Row) -> int:
  """Saves the ranking of a turn, and returns the id of the judgement."""
  settings = visit.site.settings
  turn = conversation.last_turn(connection, lease.id)
  number = visit.number('turn')
  if turn is None or turn.number != number or turn.state not in ('ready', 'ranked'):
    raise Refused(409, 'This turn is over, or its replies have not come yet.')
  shown = _order_of_turn(lease, turn)
  answer = answers.parse_ranking(visit.form, shown, settings)
  sent = SentAnswer(
    answer=answer,
    guidelines=visit.field('guidelines')[:12],
    pasted=answers.read_pastes(visit.form),
    shown=shown,
    number=turn.number,
    complete=turn.number >= settings.converse_turns,
  )
  judgement_id = judgements.save(connection, lease, sent, settings)
  conversation.set_turn_state(connection, turn.id, 'ranked')
  return judgement_id


def _add_message(visit: Visit, text: str) -> tuple[int, list[dict[str, str]]]:
  """Adds a turn with a person's message.

  Returns:
    (the id of the turn, the conversation up to the message).
  """
  with visit.site.store.writing() as connection:
    lease = assignment.find_lease(connection, visit.path('token'), visit.person.id)
    item = read_item(connection, lease.item_id)
    assignment.check_open(connection, lease, item)
    if item.task != 'converse' or lease.state != 'open':
      raise Refused(409, 'This conversation is over.')
    last = conversation.last_turn(connection, lease.id)
    number = 1
    messages = list(item.messages)
    if last is not None:
      if last.state in ('waiting', 'ready'):
        raise Refused(409, 'Rank the replies to your last message first.')
      if last.state == 'ranked':
        number = last.number + 1
        best = _best_of_turn(connection, last)
        messages = conversation.next_messages(last, best)
      else:  # the last turn got no replies; the new message replaces it
        number = last.number
        messages = list(last.messages[:-1])
        conversation.delete_turn(connection, last.id)
    messages = _as_assistant_spoke_last(messages)
    messages.append({'role': 'user', 'content': text})
    # an empty draft, because saving one extends the lease
    assignment.save_draft(connection, lease, {}, visit.site.settings)
    turn_id = conversation.add_turn(connection, lease.id, number, messages, time.time())
  return turn_id, messages


def _as_assistant_spoke_last(messages: list[dict[str, str]]) -> list[dict[str, str]]:
  """Removes a message of the user at the end, which the person's own message replaces."""
  if messages and messages[-1]['role'] == 'user':
    return messages[:-1]
  return messages


def _best_of_turn(connection: Connection, turn: Row | None) -> int:
  """Returns the number of the best reply of a ranked turn; 0 for a turn without a ranking."""
  if turn is None or turn.state != 'ranked':
    return 0
  judgement = judgements.find_standing(connection, turn.lease_id, turn.number)
  if judgement is None:
    return 0
  ranks = next(iter(judgement.answer['orders'].values()))
  return ranks.index(min(ranks))


def _order_of_turn(lease: Row, turn: Row) -> list[int]:
  """Returns the random order in which the replies of a turn are shown."""
  order = list(range(len(turn.responses)))
  # seeded by the secret token, so that nobody can guess the order, and by the
  # turn; it is the same when the page is loaded again
  random.Random(f'{lease.token} {turn.number}').shuffle(order)
  return order
