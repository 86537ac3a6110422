"""The web server, which runs the application of a workdir in uvicorn."""

from collections.abc import Callable
import logging
from pathlib import Path
import socket

import uvicorn

from rlhf_jax.collect import app, conversation, database, people
from rlhf_jax.collect.conversation import Replier, Replies
from rlhf_jax.collect.site import open_site
from rlhf_jax.errors import UserError


def serve(
  workdir: Path,
  host: str = '127.0.0.1',
  port: int = 8321,
  url: str = '',
  public_url: str = '',
  replies: Replies | None = None,
  count_tokens: Callable[[str], int] | None = None,
) -> None:
  """Serves the site of a workdir until the process is interrupted.

  Args:
    workdir: the folder of the collection.
    host: the address to listen at; loopback by default.
    port: the port to listen at; 0 for any free one.
    url: the URL of the database; '' for SQLite in the workdir.
    public_url: the address at which people reach the site, such as
      'https://labels.example.org'; '' for http at `host` and `port`.
    replies: gets the models' replies in conversations; None for no
      conversations.
    count_tokens: text → number of tokens; None to count characters.

  Raises:
    UserError: the server cannot listen at the address, or the settings or the
      database cannot be used.
  """
  store = database.open_database(workdir, url)
  replier = None if replies is None else Replier(store, replies)
  secure = public_url.startswith('https://')
  site = open_site(workdir, store, secure, replier, count_tokens)
  listener = _listen(host, port)
  base = public_url.rstrip('/') or f'http://{host}:{listener.getsockname()[1]}'
  with store.writing() as connection:
    invitation = people.lead_invitation(connection)
  # The only link that is printed: whoever has it can sign in as the lead.
  print(f'lead: {base}/join/{people.make_token(store, invitation)}', flush=True)
  if replier is not None:
    conversation.resume_waiting(store, replier, site.settings.converse_responses)
  hosts = (base.split('://')[1].split(':')[0].split('/')[0], host)
  config = uvicorn.Config(
    app.build_app(site, hosts),
    log_level='warning',
    access_log=False,  # the log would contain the links of invitations
    server_header=False,
    proxy_headers=False,
  )
  try:
    uvicorn.Server(config).run(sockets=[listener])
  finally:
    if replier is not None:
      replier.close()
    store.close()
    logging.info('the server has ended')


def _listen(host: str, port: int) -> socket.socket:
  """Returns a socket bound to an address; raises UserError where the address cannot be used."""
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  listener = socket.socket(family, socket.SOCK_STREAM)
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listener.bind((host, port))
  except OSError as error:
    listener.close()
    raise UserError(f'--port: cannot listen at {host}:{port}: {error.strerror}') from None
  return listener
