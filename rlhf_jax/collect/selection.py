"""Selection: which items are asked next, and which need no more people.

After each refit of a reward model the pairs come first on which it is least sure: where
the probability of a pair is near ½, or where the members of an ensemble differ. An item
whose ranking is sure enough, by the model of people, is closed.
"""

from collections.abc import Callable, Sequence
import dataclasses

import numpy as np
import sqlalchemy
from sqlalchemy import Connection

from rlhf_jax.collect import items, judgements, quality, tables
from rlhf_jax.collect.settings import Settings
from rlhf_jax.data.records import Message

# (conversations, their responses) → scores of each response; one for a reward model
Score = Callable[[Sequence[Sequence[Message]], Sequence[Sequence[str]]], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Refitted:
  """What a refit has changed.

  Attributes:
    report: quality of the first axis; None without rankings.
    closed: items that need no more people.
  """

  report: quality.Report | None
  closed: int


def refit(connection: Connection, settings: Settings) -> Refitted:
  """Fits the model of people, and closes the items whose ranking is sure enough.

  Args:
    connection: of a transaction that writes.
    settings: `stop_confidence`, and the axes: the first one decides.
  """
  orders = read_orders(connection, settings.axes[0])
  if not orders:
    return Refitted(None, 0)
  report = quality.measure(orders)
  closed = 0
  if settings.stop_confidence:
    sure = [item for item, value in report.confidence.items() if value >= settings.stop_confidence]
    # turns of conversations have numbers below 0, and no item
    closed = sum(items.close(connection, item) for item in sure)
  return Refitted(report, closed)


def read_orders(connection: Connection, axis: str) -> list[quality.Order]:
  """Reads the orders of an axis from all judgements that stand, those of the training aside."""
  rows = [row for row in judgements.list_judgements(connection) if not row.training]
  return quality.orders_from_rows(rows, judgements.read_turns(connection), axis)


def prioritise(connection: Connection, scores: Sequence[Score]) -> int:
  """Sets the priorities of all items that wait to how unsure the reward models are.

  Args:
    connection: of a transaction that writes.
    scores: one for each reward model; two or more are an ensemble.

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
    value = measure_doubt(np.stack([member[number] for member in members]))
    update = sqlalchemy.update(table).where(table.c.id == item.id)
    connection.execute(update.values(priority=value))
  return len(waiting)


def measure_doubt(scores: np.ndarray) -> float:
  """Measures how unsure reward models are of an order.

  The mean entropy of the pairs under the mean probability of the ensemble: it is high
  where a pair is near ½, and where the members differ.

  Args:
    scores: [M, K] float, of M reward models.

  Returns:
    Nats, between 0 and log 2.

  >>> round(measure_doubt(np.zeros((1, 2))), 3)
  0.693
  """
  rows, columns = np.triu_indices(scores.shape[1], 1)
  above = scores[:, rows] - scores[:, columns]  # [M, pairs]
  probability = np.mean(1 / (1 + np.exp(-np.clip(above, -30, 30))), axis=0)
  inside = np.clip(probability, 1e-12, 1 - 1e-12)
  entropy = -inside * np.log(inside) - (1 - inside) * np.log(1 - inside)
  return float(entropy.mean())
