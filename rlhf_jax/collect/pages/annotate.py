"""The pages on which people demonstrate, rank and edit."""

import time
from typing import Any

from sqlalchemy import Row
from starlette.responses import JSONResponse, Response

from rlhf_jax.collect import answers, assignment, database, judgements, rendering, tables
from rlhf_jax.collect import settings as settings_file
from rlhf_jax.collect.items import read_item
from rlhf_jax.collect.judgements import SentAnswer
from rlhf_jax.collect.pages import converse
from rlhf_jax.collect.refusals import Refused
from rlhf_jax.collect.site import Visit

_TITLES = {
  'rank': 'Rank the responses',
  'demonstrate': 'Write the best response',
  'edit': 'Improve the response',
  'converse': 'Talk with the model',
}


def show_home(visit: Visit) -> Response:
  """Shows a person's progress and the tasks that have items for this person."""
  if visit.person is None:
    return visit.show(
      'message.html',
      title=visit.site.settings.title,
      message='Open your invitation link to take part.',
    )
  site = visit.site
  with site.store.reading() as connection:
    progress = assignment.measure_progress(connection, visit.person.id, site.settings)
    waiting = assignment.count_waiting(connection, visit.person.id)
  return visit.show(
    'home.html',
    progress=progress,
    waiting={task: waiting[task] for task in site.tasks if waiting.get(task)},
    titles=_TITLES,
    code_address=_completion_address(visit),
    saved='saved' in visit.request.query_params,
  )


def show_guidelines(visit: Visit) -> Response:
  """Shows the guidelines."""
  return visit.show(
    'guidelines.html',
    text=visit.site.read_page(settings_file.GUIDELINES),
    version=visit.site.guidelines_version(),
  )


def give_next(visit: Visit) -> Response:
  """Redirects to the person's next item, or to the home page where there is none."""
  site = visit.site
  wanted = visit.request.query_params.get('task', '')
  tasks = [wanted] if wanted in site.tasks else list(site.tasks)
  with site.store.writing() as connection:
    lease = assignment.give_item(connection, visit.person.id, site.settings, tasks)
  saved = '?saved=1' if 'saved' in visit.request.query_params else ''
  if lease is None:
    return visit.redirect('/' + saved)
  return visit.redirect(f'/item/{lease.token}{saved}')


def show_item(visit: Visit) -> Response:
  """Shows an item with its form, which contains the draft where there is one."""
  return show_form(visit, '', 200)


def show_form(visit: Visit, problem: str, status: int) -> Response:
  """Shows an item with its form.

  Args:
    visit: a request of the item's address.
    problem: what is wrong with the answer that was sent; '' where none was sent.
    status: the HTTP status of the response.
  """
  site = visit.site
  with site.store.reading() as connection:
    lease = assignment.find_lease(connection, visit.path('token'), visit.person.id)
    item = read_item(connection, lease.item_id)
    draft = visit.form or assignment.read_draft(connection, lease.id)
    progress = assignment.measure_progress(connection, visit.person.id, site.settings)
    returned = judgements.last_reason(connection, lease.id)
  values: dict[str, Any] = {
    'lease': lease,
    'item': item,
    'context': item.record.get('context', ''),
    'draft': draft,
    'problem': problem,
    'returned': returned,
    'progress': progress,
    'saved': 'saved' in visit.request.query_params,
    'title': _TITLES[item.task],
    'guidelines': site.guidelines_version(),
    'unit': 'characters' if site.count_tokens is None else 'tokens',
    'flags': answers.RESPONSE_FLAGS,
    'strengths': answers.STRENGTHS,
  }
  if lease.state == 'answered':
    return _show_answered(visit, lease, item)
  if item.task == 'converse':
    return converse.show_conversation(visit, values, status)
  if item.task == 'rank':
    values['cards'] = answers.list_cards(item.responses, lease.shown)
    values['partial'] = len(lease.shown) >= site.settings.partial_from
    return visit.show('rank.html', status, **values)
  values['original'] = item.responses[0]['text'] if item.task == 'edit' else None
  return visit.show('write.html', status, **values)


def receive(visit: Visit) -> Response:
  """Receives an answer, a skip or a flag; shows an invalid answer again with the reason."""
  action = visit.field('action') or 'save'
  if action in ('skip', 'flag'):
    return _give_back(visit, action)
  if action != 'save':
    raise Refused(400, 'Unknown action.')
  try:
    training = _save(visit)
  except Refused as refused:
    if refused.status != answers.INVALID:
      raise
    _keep_draft(visit)
    return show_form(visit, refused.message, refused.status)
  if training:
    return visit.redirect(f'/item/{visit.path("token")}')  # this page now shows the explanation
  return visit.redirect('/next?saved=1')


def receive_draft(visit: Visit) -> Response:
  """Saves what a person has entered so far."""
  _keep_draft(visit)
  return Response(status_code=204)


def preview(visit: Visit) -> Response:
  """Renders a text as pages will show it, and counts its tokens (or its characters)."""
  text = answers.read_text(visit.form, 'text', visit.site.settings)
  count = visit.site.count_tokens
  return JSONResponse(
    {
      'html': str(rendering.render_markdown(text)),
      'count': len(text) if count is None else count(text),
    }
  )


def undo(visit: Visit) -> Response:
  """Undoes the person's last answer, and shows its item again."""
  site = visit.site
  with site.store.writing() as connection:
    lease = judgements.undo_last(connection, visit.person.id, site.settings)
  return visit.redirect(f'/item/{lease.token}')


def _save(visit: Visit) -> bool:
  """Saves an answer, and tells whether its item is one for training."""
  site = visit.site
  with site.store.writing() as connection:
    lease = assignment.find_lease(connection, visit.path('token'), visit.person.id)
    item = read_item(connection, lease.item_id)
    if item.task == 'converse':
      converse.save_turn(visit, connection, lease, item)
      return False
    if item.task == 'rank':
      answer = answers.parse_ranking(visit.form, lease.shown, site.settings)
    else:
      original = item.responses[0]['text'] if item.task == 'edit' else None
      answer = answers.parse_response(visit.form, site.settings, original)
    sent = SentAnswer(
      answer=answer,
      guidelines=read_guidelines(visit),
      pasted=answers.read_pastes(visit.form),
      shown=lease.shown,
    )
    judgements.save(connection, lease, sent, site.settings)
    if lease.state == 'open':  # False where the same form was sent before
      # so that the form can be shown as it was if the person undoes the answer
      assignment.save_draft(connection, lease, draft_fields(visit), site.settings)
  return item.training


def read_guidelines(visit: Visit) -> str:
  """Returns the version of the guidelines that was current when the page was made."""
  version = visit.field('guidelines')
  return version if version.isalnum() and len(version) <= 12 else ''


def draft_fields(visit: Visit) -> dict[str, list[str]]:
  """Returns the form fields that a draft keeps, to fill the form again later."""
  hidden = ('form_token', 'action', 'guidelines')
  return {name: values for name, values in visit.form.items() if name not in hidden}


def _keep_draft(visit: Visit) -> None:
  """Saves the fields of a form as a draft, unless the item is answered or skipped."""
  site = visit.site
  with site.store.writing() as connection:
    lease = assignment.find_lease(connection, visit.path('token'), visit.person.id)
    if lease.state == 'open':
      assignment.save_draft(connection, lease, draft_fields(visit), site.settings)


def _give_back(visit: Visit, action: str) -> Response:
  """Skips an item; with the action 'flag' it also records what is wrong with the item."""
  site = visit.site
  reason = answers.read_text(visit.form, 'flag_reason', site.settings).strip()
  if action == 'flag' and not reason:
    return show_form(visit, 'Say in a few words what is wrong with this item.', answers.INVALID)
  with site.store.writing() as connection:
    lease = assignment.find_lease(connection, visit.path('token'), visit.person.id)
    if action == 'flag' and lease.state == 'open':
      database.insert(
        connection,
        tables.flags,
        item_id=lease.item_id,
        person_id=visit.person.id,
        reason=reason,
        created=time.time(),
      )
    assignment.skip(connection, lease)
  return visit.redirect('/next')


def _show_answered(visit: Visit, lease: Row, item: Row) -> Response:
  """Shows an answer that was saved, and for a training item also the known answer."""
  with visit.site.store.reading() as connection:
    query = tables.judgements.select().where(
      tables.judgements.c.lease_id == lease.id, tables.judgements.c.stands
    )
    rows = connection.execute(query).all()
  return visit.show(
    'answered.html',
    item=item,
    context=item.record.get('context', ''),
    judgement=rows[-1] if rows else None,
    cards=answers.list_cards(item.responses, lease.shown) if item.task == 'rank' else [],
    shown=lease.shown,
    gold=item.gold if item.training else None,
  )


def _completion_address(visit: Visit) -> str:
  """Returns the address to which a person who is done returns; '' where there is none."""
  settings = visit.site.settings
  return settings.completion_url.replace('{code}', settings.completion_code)
