"""The pages for joining and leaving: invitation, consent, and the person's own data."""

from starlette.responses import Response

from rlhf_jax.collect import assignment, people, security
from rlhf_jax.collect import settings as settings_file
from rlhf_jax.collect.refusals import Refused
from rlhf_jax.collect.site import Visit


def show_consent(visit: Visit) -> Response:
  """Shows what a person agrees to before anything is stored."""
  site = visit.site
  with site.store.reading() as connection:
    invitation = people.open_invitation(site.store, connection, visit.path('token'))
  return visit.show(
    'join.html',
    role=invitation.role,
    consent=site.read_page(settings_file.CONSENT),
    # the form sends a platform's parameters back, because nothing is stored
    # before the consent
    parameters=dict(visit.request.query_params),
  )


def accept(visit: Visit) -> Response:
  """Admits a person who has consented, and signs the person in."""
  site = visit.site
  if visit.field('consent') != 'yes':
    raise Refused(422, 'Without your consent nothing can be stored, so you cannot take part.')
  parameters = {}
  for name, values in visit.form.items():
    if name.startswith('parameter.'):
      parameters[name.removeprefix('parameter.')] = values[0]
  with site.store.writing() as connection:
    invitation = people.open_invitation(site.store, connection, visit.path('token'))
    person = people.accept(connection, invitation, parameters)
  response = visit.redirect('/')
  security.start_session(site.store, response, person.id, person.session, site.secure)
  return response


def show_person(visit: Visit) -> Response:
  """Shows people the data that is stored about them."""
  site = visit.site
  with site.store.reading() as connection:
    progress = assignment.measure_progress(connection, visit.person.id, site.settings)
  return visit.show('me.html', progress=progress)


def delete_person(visit: Visit) -> Response:
  """Deletes the data of the person who asks for it."""
  if visit.field('sure') != 'yes':
    raise Refused(422, 'Nothing was deleted. Tick the box to confirm.')
  with visit.site.store.writing() as connection:
    deleted = people.delete_data(connection, visit.person.id)
  visit.person = None  # nobody is signed in any more
  response = visit.show(
    'message.html',
    title='Deleted',
    message=f'Your data is deleted: {deleted} judgements, and all that was known about you.',
  )
  response.delete_cookie(security.COOKIE)
  return response


def sign_out(visit: Visit) -> Response:
  """Signs the person out in this browser."""
  visit.person = None
  response = visit.show(
    'message.html',
    title='Signed out',
    message='Your invitation link signs you in again.',
  )
  response.delete_cookie(security.COOKIE)
  return response
