"""The lead's pages: progress, quality, invitations, exports."""

import json
import time
from typing import Any

import sqlalchemy
from starlette.responses import Response

from rlhf_jax.collect import export as exports
from rlhf_jax.collect import items, people, plots, quality, selection, tables
from rlhf_jax.collect.refusals import Refused
from rlhf_jax.collect.site import Visit

_HALF_WIDTH = 0.03  # target for the agreement's interval; the page says how many labels it needs


def show_overview(visit: Visit) -> Response:
  """Shows the progress of the collection and the quality of its judgements."""
  return _show(visit, '')


def refit(visit: Visit) -> Response:
  """Fits the model of people again, and closes items whose ranking is certain enough."""
  with visit.site.store.writing() as connection:
    result = selection.refit(connection, visit.site.settings)
  return _show(visit, f'The quality was computed again; {result.closed} items were closed.')


def invite(visit: Visit) -> Response:
  """Makes an invitation, and shows the overview, which lists its link."""
  site = visit.site
  places = visit.number('places')
  days = visit.number('days')
  if not 1 <= places <= 10_000 or not 1 <= days <= 365:
    raise Refused(422, 'Expected 1 to 10,000 places and 1 to 365 days.')
  role = visit.field('role')
  if role not in people.ROLES:
    raise Refused(422, 'Unknown role.')
  label = visit.field('label')[:200]
  with site.store.writing() as connection:
    number = people.invite(connection, role, places, float(days), label)
  return _show(visit, f'Invitation {number} was made; its link is in the list.')


def revoke(visit: Visit) -> Response:
  """Withdraws an invitation."""
  with visit.site.store.writing() as connection:
    people.revoke(connection, visit.number('invitation'))
  return _show(visit, 'The invitation is withdrawn.')


def block(visit: Visit) -> Response:
  """Ends a person's access."""
  number = _other_person(visit)
  with visit.site.store.writing() as connection:
    people.block(connection, number)
  return _show(visit, 'The access is closed. The judgements are kept.')


def delete(visit: Visit) -> Response:
  """Deletes a person's data, at the person's request."""
  number = _other_person(visit)
  with visit.site.store.writing() as connection:
    deleted = people.delete_data(connection, number)
  return _show(visit, f'Deleted: {deleted} judgements.')


def export(visit: Visit) -> Response:
  """Sends an export as JSON Lines."""
  kind = visit.path('name').removesuffix('.jsonl')
  if kind not in exports.KINDS:
    raise Refused(404, 'There is no such export.')
  combination = visit.request.query_params.get('combination', 'all')
  if combination not in exports.COMBINATIONS:
    raise Refused(422, 'There is no such combination.')
  with visit.site.store.reading() as connection:
    rows = exports.export_kind(connection, kind, combination=combination)
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  headers = {'Content-Disposition': f'attachment; filename="{kind}.jsonl"'}
  return Response(text, media_type='application/x-ndjson', headers=headers)


def draw_plot(visit: Visit) -> Response:
  """Draws one of the overview's plots as SVG."""
  name = visit.path('name').removesuffix('.svg')
  if name not in ('progress', 'times', 'reliability', 'confidence'):
    raise Refused(404, 'There is no such plot.')
  table = tables.judgements
  query = sqlalchemy.select(table.c.created, table.c.seconds).where(table.c.stands)
  if name in ('progress', 'times'):
    with visit.site.store.reading() as connection:
      rows = connection.execute(query.order_by(table.c.created)).all()
    if name == 'progress':
      picture = plots.draw_progress([row.created for row in rows])
    else:
      picture = plots.draw_times([row.seconds for row in rows])
  else:
    report = _read_report(visit)
    if report is None:
      raise Refused(404, 'There are no rankings yet.')
    if name == 'reliability':
      picture = plots.draw_reliability(report.people)
    else:
      picture = plots.draw_confidence(list(report.confidence.values()))
  return Response(picture, media_type='image/svg+xml')


def _show(visit: Visit, notice: str) -> Response:
  """Renders the overview with a notice about the last action; '' for none."""
  site = visit.site
  with site.store.reading() as connection:
    counts = items.count_items(connection)
    everybody = people.list_people(connection)
    invitations = people.list_invitations(connection)
  report = _read_report(visit)
  more_labels = 0
  if report is not None:
    labels = sum(each.judgements for each in report.people)
    more_labels = quality.labels_for(report.agreement, _HALF_WIDTH, labels)
  base = str(visit.request.base_url).rstrip('/')
  return visit.show(
    'lead.html',
    notice=notice,
    counts=counts,
    report=report,
    more_labels=more_labels,
    half_width=_HALF_WIDTH,
    numbers={each.pseudonym: each for each in everybody},
    invitations=[
      {
        'row': invitation,
        'link': f'{base}/join/{people.make_token(site.store, invitation.id)}',
        'days': max(0, round((invitation.expires - time.time()) / people.DAY)),
      }
      for invitation in invitations
    ],
    roles=people.ROLES,
    combinations=exports.COMBINATIONS,
  )


def _read_report(visit: Visit) -> quality.Report | None:
  """Returns the quality of the judgements; None where there are no rankings.

  It is computed again only if judgements have changed since the last time.
  """
  site = visit.site
  with site.store.reading() as connection:
    state = _state_of_judgements(connection)
    cached = site.reports.get('report')
    if cached is not None and cached[0] == state:
      return cached[1]
    orders = selection.read_orders(connection, site.settings.axes[0])
  report = quality.measure(orders) if orders else None
  site.reports['report'] = (state, report)
  return report


def _state_of_judgements(connection: sqlalchemy.Connection) -> tuple[Any, ...]:
  """Returns values that change whenever a judgement is added, deleted or taken back."""
  table = tables.judgements
  query = sqlalchemy.select(
    sqlalchemy.func.max(table.c.id),
    sqlalchemy.func.sum(sqlalchemy.case((table.c.stands, 1), else_=0)),
  )
  return tuple(connection.execute(query).one())


def _other_person(visit: Visit) -> int:
  """Reads the id of a person from the form.

  Raises:
    Refused: the id is that of the lead who asks, or there is no such person.
  """
  number = visit.number('person')
  if number == visit.person.id:
    raise Refused(422, 'Your own access and data are under My data.')
  with visit.site.store.reading() as connection:
    known = {person.id for person in people.list_people(connection)}
  if number not in known:
    raise Refused(404, 'There is no such person.')
  return number
