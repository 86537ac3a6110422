"""The server: uvicorn around the application of a workdir."""

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
  """Serves a workdir until it is interrupted.

  Args:
    workdir: of the collection.
    host: address to listen at; loopback unless the lead says otherwise.
    port: 0 = any that is free.
    url: of the database; '' = SQLite in the workdir.
    public_url: how people reach it, such as 'https://labels.example.org'; '' = as it
      listens.
    replies: who answers in conversations.
    count_tokens: text → tokens.

  Raises:
    UserError: the address is taken or cannot be used.
  """
  store = database.open_database(workdir, url)
  replier = None if replies is None else Replier(store, replies)
  secure = public_url.startswith('https://')
  site = open_site(workdir, store, secure, replier, count_tokens)
  listener = _listen(host, port)
  base = public_url.rstrip('/') or f'http://{host}:{listener.getsockname()[1]}'
  with store.writing() as connection:
    invitation = people.lead_invitation(connection)
  # the only link that is printed: who reads it leads the collection
  print(f'lead: {base}/join/{people.make_token(store, invitation)}', flush=True)
  if replier is not None:
    conversation.resume_waiting(store, replier, site.settings.converse_responses)
  hosts = (base.split('://')[1].split(':')[0].split('/')[0], host)
  config = uvicorn.Config(
    app.build_app(site, hosts),
    log_level='warning',
    access_log=False,  # addresses of invitations would stand in it
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
  """Returns a socket that listens; raises UserError where it cannot."""
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  listener = socket.socket(family, socket.SOCK_STREAM)
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listener.bind((host, port))
  except OSError as error:
    listener.close()
    raise UserError(f'--port: cannot listen at {host}:{port}: {error.strerror}') from None
  return listener
