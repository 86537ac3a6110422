"""Selection of the items that people judge next, and of those that need no more judgements.

`prioritise` puts those items first whose order reward models are least sure of:
the probability of a pair is near ½, or the members of an ensemble disagree.
`refit` closes items whose ranking is certain enough according to the
Plackett–Luce model of people.
"""

from collections.abc import Callable, Sequence
import dataclasses

import numpy as np
import sqlalchemy
from sqlalchemy import Connection

from rlhf_jax.collect import items, judgements, quality, tables
from rlhf_jax.collect.settings import Settings
from rlhf_jax.data.records import Message

# a reward model: (N conversations, the responses to each) → N arrays of scores
Score = Callable[[Sequence[Sequence[Message]], Sequence[Sequence[str]]], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Refitted:
  """The result of `refit`.

  Attributes:
    report: the quality of the judgements on the first axis; None where there
      are no rankings.
    closed: the number of items that were closed by this refit.
  """

  report: quality.Report | None
  closed: int


def refit(connection: Connection, settings: Settings) -> Refitted:
  """Fits the model of people again, and closes the items whose ranking is certain enough.

  Args:
    connection: a connection of a writing transaction.
    settings: the settings, of which `stop_confidence` and the first of `axes`
      are used.
  """
  orders = read_orders(connection, settings.axes[0])
  if not orders:
    return Refitted(None, 0)
  report = quality.measure(orders)
  closed = 0
  if settings.stop_confidence:
    sure = [item for item, value in report.confidence.items() if value >= settings.stop_confidence]
    # turns of conversations have numbers below 0; no item has such a number, so none is closed
    closed = sum(items.close(connection, item) for item in sure)
  return Refitted(report, closed)


def read_orders(connection: Connection, axis: str) -> list[quality.Order]:
  """Reads the orders on an axis from all judgements that stand, except training items."""
  rows = [row for row in judgements.list_judgements(connection) if not row.training]
  return quality.orders_from_rows(rows, judgements.read_turns(connection), axis)


def prioritise(connection: Connection, scores: Sequence[Score]) -> int:
  """Sets the priority of each ranking item that waits for judgements.

  The priority is the uncertainty of the reward models about the item, see
  `measure_doubt`.

  Args:
    connection: a connection of a writing transaction.
    scores: one scoring function for each reward model; two or more form an
      ensemble.

  Returns:
    The number of items whose priority was set.
  """
  table = tables.items
  query = sqlalchemy.select(table).where(
    table.c.task == 'rank',
    table.c.waiting,
    ~table.c.training,
    table.c.gold.is_(sqlalchemy.null()),
  )
  waiting = connection.execute(query).all()
  if not waiting:
    return 0
  conversations = [item.messages for item in waiting]
  texts = [[response['text'] for response in item.responses] for item in waiting]
  members = [score(conversations, texts) for score in scores]
  for number, item in enumerate(waiting):
    member_scores = np.stack([member[number] for member in members])
    value = measure_doubt(member_scores, texts[number])
    update = sqlalchemy.update(table).where(table.c.id == item.id)
    connection.execute(update.values(priority=value))
  return len(waiting)


def measure_doubt(scores: np.ndarray, texts: Sequence[str]) -> float:
  """Measures how uncertain reward models are about the order of K responses.

  The measure is the entropy of each pair's probability, which is averaged over
  the ensemble first; then the mean over the pairs. It is high where a
  probability is near ½ and where the members of the ensemble disagree. A pair
  of equal texts has no order to ask for and counts 0.

  Args:
    scores: [M, K] float, the scores of M reward models.
    texts: K responses.

  Returns:
    The mean entropy in nats, between 0 and log 2.

  >>> round(measure_doubt(np.zeros((1, 2)), ['a', 'b']), 3)
  0.693
  """
  rows, columns = np.triu_indices(scores.shape[1], 1)
  above = scores[:, rows] - scores[:, columns]  # [M, pairs]
  probability = np.mean(1 / (1 + np.exp(-np.clip(above, -30, 30))), axis=0)
  inside = np.clip(probability, 1e-12, 1 - 1e-12)
  entropy = -inside * np.log(inside) - (1 - inside) * np.log(1 - inside)
  stripped = np.array([text.strip() for text in texts])
  differ = stripped[rows] != stripped[columns]
  return float((entropy * differ).mean())
