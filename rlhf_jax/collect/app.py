"""The ASGI application: the addresses, the roles that may open them, and the checks before a page.

Pages are plain functions (Visit) → Response. They run in threads, because calls
of the database block. This module reads the request, checks it, and calls the
page.
"""

from collections.abc import Awaitable, Callable
import dataclasses
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from rlhf_jax.collect import people, security
from rlhf_jax.collect.pages import annotate, converse, join, lead, review
from rlhf_jax.collect.refusals import Refused
from rlhf_jax.collect.site import find_person, show_refusal, Site, Visit

_STATIC = Path(__file__).parent / 'static'
LOOPBACK = ('localhost', '127.0.0.1', '[::1]')


@dataclasses.dataclass(frozen=True)
class Page:
  """An address of the site, with the function that answers it.

  Attributes:
    method: GET or POST.
    path: the path, with parameters in braces.
    show: (visit) → response.
    role: the lowest role that may open the address; '' = anybody, also without
      signing in.
  """

  method: str
  path: str
  show: Callable[[Visit], Response]
  role: str = 'annotator'


PAGES = (
  Page('GET', '/join/{token}', join.show_consent, ''),
  Page('POST', '/join/{token}', join.accept, ''),
  Page('GET', '/', annotate.show_home, ''),
  Page('GET', '/guidelines', annotate.show_guidelines),
  Page('GET', '/next', annotate.give_next),
  Page('GET', '/item/{token}', annotate.show_item),
  Page('POST', '/item/{token}', annotate.receive),
  Page('POST', '/item/{token}/draft', annotate.receive_draft),
  Page('POST', '/preview', annotate.preview),
  Page('POST', '/undo', annotate.undo),
  Page('POST', '/item/{token}/say', converse.receive_message),
  Page('GET', '/item/{token}/turn', converse.tell_state),
  Page('GET', '/me', join.show_person),
  Page('POST', '/me/delete', join.delete_person),
  Page('POST', '/leave', join.sign_out),
  Page('GET', '/review', review.show_list, 'reviewer'),
  Page('GET', '/review/{judgement}', review.show_judgement, 'reviewer'),
  Page('POST', '/review/{judgement}', review.receive, 'reviewer'),
  Page('GET', '/lead', lead.show_overview, 'lead'),
  Page('GET', '/lead/plot/{name}', lead.draw_plot, 'lead'),
  Page('GET', '/lead/export/{name}', lead.export, 'lead'),
  Page('POST', '/lead/invite', lead.invite, 'lead'),
  Page('POST', '/lead/revoke', lead.revoke, 'lead'),
  Page('POST', '/lead/block', lead.block, 'lead'),
  Page('POST', '/lead/delete', lead.delete, 'lead'),
  Page('POST', '/lead/refit', lead.refit, 'lead'),
)


def build_app(site: Site, hosts: tuple[str, ...] = ()) -> Starlette:
  """Builds the application of a site.

  Args:
    site: the site, from `site.open_site`.
    hosts: host names under which people reach it, in addition to those of the
      local machine.

  Returns:
    An ASGI application.
  """
  routes: list[Route | Mount] = [
    Route(page.path, _endpoint(site, page), methods=[page.method]) for page in PAGES
  ]
  routes.append(Route('/health', _tell_health))
  routes.append(Mount('/static', _CachedFiles(directory=_STATIC)))
  allowed = [*LOOPBACK, *hosts]
  return Starlette(
    routes=routes,
    middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=allowed, www_redirect=False)],
    exception_handlers={
      404: _refusing(site, 404, 'There is no such page.'),
      405: _refusing(site, 405, 'This address does not accept this kind of request.'),
      500: _refusing(site, 500, 'Something went wrong here. What was saved before is safe.'),
    },
  )


class _CachedFiles(StaticFiles):
  """Static files of the package, with the headers of every response."""

  def file_response(self, *args, **kwargs) -> Response:
    """Returns the response for a file, which browsers may cache."""
    response = super().file_response(*args, **kwargs)
    security.add_headers(response, cached=True)
    return response


def _endpoint(site: Site, page: Page) -> Callable[[Request], Awaitable[Response]]:
  """Returns the function that Starlette calls for requests of a page."""

  async def answer(request: Request) -> Response:
    try:
      form: dict[str, list[str]] = {}
      if request.method == 'POST':
        security.check_same_site(request)
        form = await security.read_form(request, site.settings.largest_body)
      response = await run_in_threadpool(_call_page, site, page, request, form)
    except Refused as refused:
      response = show_refusal(site, request, refused)
      if refused.status == 413:
        response.headers['Connection'] = 'close'  # the rest of the body is not read
    security.add_headers(response)
    return response

  return answer


def _call_page(
  site: Site,
  page: Page,
  request: Request,
  form: dict[str, list[str]],
) -> Response:
  """Checks the person's rate, role and form token, and calls the page; runs in a thread."""
  person = find_person(site, request)
  visit = Visit(site, request, person, form)
  if person is None:
    client = request.client.host if request.client else ''
    site.address_limit.check(client)
    if page.role:
      raise Refused(403, 'Open your invitation link first: it signs you in.')
    return page.show(visit)
  site.people_limit.check(str(person.id))
  if request.method == 'POST' and page.role:
    token = visit.field('form_token') or request.headers.get('x-form-token', '')
    security.check_form_token(site.store, person.session, token)
  if page.role and not people.at_least(person.role, page.role):
    raise Refused(403, f'This page is for the role {page.role}.')
  return page.show(visit)


def _refusing(site: Site, status: int, message: str) -> Callable[[Request, Exception], Response]:
  """Returns the exception handler for an HTTP status, which shows a message."""

  def answer(request: Request, error: Exception) -> Response:
    del error  # it is in the server's log; people must not see internals of the program
    response = show_refusal(site, request, Refused(status, message))
    security.add_headers(response)
    return response

  return answer


async def _tell_health(request: Request) -> Response:
  """Answers 'ok', so that monitoring can tell that the server runs."""
  del request
  response = PlainTextResponse('ok')
  security.add_headers(response)
  return response
