"""A reward model whose trunk stays as it is: only the head is fitted, to features read once.

Every text is read a single time, and what the model sees at its end is kept.
Fitting a head to that takes seconds, so it is done again and again: k-fold
cross-validation says how often the head agrees with people on conversations that
it was not fitted to, for each source of data, beside the length of a response and
a bag of bigrams on the same folds (evaluation/pair_models.py). It is for data of
people, and for models that are too large to train at hand.

  r(x, y) = w·h_last + b,   h_last of the frozen model

The loss is that of `reward`: logistic in the difference of scores, pairs of one
ranking weighted together as one. Source of the method: linear probes, Alain and
Bengio 2016, arXiv:1610.01644.

In the stage's folder, `SPLIT-features.npz` holds the features, so that no text is
read twice when a run goes on or is changed, and `folds.json` the accuracies.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import files
from rlhf_jax.data import conversations, encode, records, sources
from rlhf_jax.data.records import Ranking
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import pair_models
from rlhf_jax.evaluation.pair_models import Pairs
from rlhf_jax.models import heads
from rlhf_jax.models.transformer import Model
from rlhf_jax.options import Count, Range
from rlhf_jax.planning import work
from rlhf_jax.planning.programs import abstract_sequences, Program, StagePlan
from rlhf_jax.runtime import hosts, loop
from rlhf_jax.runtime.loop import LoopOptions
from rlhf_jax.stages.shared import training
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.kind import DataUse, StageKind
from rlhf_jax.stages.shared.model_store import ModelStore
from rlhf_jax.text_table import format_rows
from rlhf_jax.types import Params, Sequences, TrainState

FEATURES = 'features.npz'  # of each split: what the frozen model sees of every text
FOLDS_JSON = 'folds.json'  # how often each model agrees with people

_SAVE_EVERY = 20  # batches; so much is read again after an interruption
_WIDTH = 32  # texts are padded to a multiple of it, and read from the shortest on
_SMALLEST_SCALE = 1e-6  # of a feature, in which nothing differs


@dataclasses.dataclass(frozen=True)
class Options:
  """The section of a reward model with a frozen trunk."""

  init: str = 'sft'  # the frozen model; a new scalar head is added
  likelihood: bool = False  # the head also sees how likely the response is to the model itself
  batch_size: Count = 16  # texts read at once, over all devices
  max_length: Count = 256  # tokens of a prompt with one response
  # What becomes of a ranking with a longer response: drop (they are counted),
  # truncate_left (the prompt loses its beginning) or error.
  overlong: str = 'drop'
  # parts of the training rankings, each measured by a head fitted to the others
  folds: Annotated[int, Range(least=3)] = 5
  measured_pairs: Count = 100  # a source with fewer pairs has no row of its own in folds.json
  data: DataOptions = DataOptions()


class Texts(NamedTuple):
  """The texts of rankings, each once, and the pairs of them that people ordered."""

  ids: list[np.ndarray]  # N of int32, a prompt with its response
  begins: list[int]  # N, where the response begins
  responses: list[str]  # N
  pairs: Pairs

  @property
  def lengths(self) -> np.ndarray:
    """The tokens of each response, [N, 1] float64."""
    sizes = [len(ids) - begin for ids, begin in zip(self.ids, self.begins, strict=True)]
    return np.array(sizes, np.float64)[:, None]


class Head(NamedTuple):
  """A fitted head, float64."""

  weights: np.ndarray  # [F], of the features
  bias: float


# The pure function that reads.


def read_features(model: Model, params: Params, sequences: Sequences) -> jax.Array:
  """Reads what the head sees of texts.

  Args:
    model: a definition with a scalar head.
    params: its parameters.
    sequences: prompts with responses, the targets; [B, T].

  Returns:
    [B, D] float32, the hidden state of the last token; with a head that sees likelihoods
    [B, D + NUM_LIKELIHOODS].
  """
  segment_ids = sequences.segment_ids
  hidden, _ = model.apply(params, sequences.tokens, sequences.positions, segment_ids)
  places = jnp.arange(segment_ids.shape[1])
  last = jnp.max(jnp.where(segment_ids > 0, places, 0), axis=1)  # [B]
  features = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0].astype(jnp.float32)
  if not model.config.likelihood_head:
    return features
  logprobs, _ = heads.token_logprobs(model, params, hidden[:, :-1], sequences.tokens[:, 1:])
  likelihoods = heads.likelihood_features(logprobs, sequences.loss_mask[:, 1:] > 0)
  return jnp.concatenate([features, likelihoods], axis=-1)


# The stage.


def run(context: Context) -> None:
  """Runs the stage; leaves features, folds.json, a checkpoint and a Hugging Face directory."""
  options = context.read_options(STAGE)
  training.train_and_export(context, build(context, options), LOOP)


def build(context: Context, options: Options) -> loop.Training:
  """Builds a training whose only step changes nothing, and after which the head is in place."""
  training.check_batch(context, options.batch_size, 1)
  opened = ModelStore(context).open(
    options.init, head=True, trained=True, likelihood=options.likelihood
  )
  training.write_model_json(context, opened.model)
  train = read_texts(context, options, 'train')
  held_out = read_texts(context, options, 'validation')
  params = opened.read()
  features = {}
  for split, texts in (('train', train), ('validation', held_out)):
    features[split] = _read_or_compute(context, options, opened.model, params, texts, split)
  report = measure_folds(features['train'], train, options)
  training.write_on_first_process(
    context.directory / FOLDS_JSON, json.dumps(report, indent=2) + '\n'
  )
  hosts.say(format_folds(report))
  head = fit_head(features['train'], train.pairs, options.folds)

  def evaluate(state: TrainState) -> tuple[dict[str, float], list]:
    del state  # the features do not depend on it
    return measure_head(head, features['validation'], held_out), []

  def finish(state: TrainState) -> TrainState:
    score = place_head(head, state.trained['score'])
    return state.replace(trained={**state.trained, 'score': score})

  return loop.Training(
    name=context.name,
    init=lambda: training.create_state(context, params, optax.identity()),
    batches=_NoBatches(),
    step=_count_a_step,
    evaluate=evaluate,
    finish=finish,
  )


# The only step; the head is fitted as a whole.
LOOP = LoopOptions(steps=1, log_every=1, eval_every=0, save_every=1)


class _NoBatches:
  """Batches of nothing: all texts are read before the only step."""

  def __next__(self) -> None:
    return None

  def get_state(self) -> dict:
    """Returns the position, of which there is one."""
    return {}

  def set_state(self, state: dict) -> None:
    """Moves nowhere."""


def _count_a_step(state: TrainState, batch: None) -> tuple[TrainState, dict[str, Any]]:
  """Makes a step that only counts."""
  return state.replace(step=state.step + 1), {}


# Texts and features.


def read_texts(context: Context, options: Options, split: str) -> Texts:
  """Reads the rankings of a split, each different text once.

  Raises:
    UserError: people ordered no pair.
  """
  rows = sources.load_records(options.data, 'ranking', split)
  examples = encode.rankings(
    rows, context.tokenizer, options.max_length, options.overlong, hosts.spread
  )
  places: dict[bytes, int] = {}  # the bytes of a text's ids → its place
  texts = Texts([], [], [], _no_pairs())
  found: list[tuple[Any, ...]] = []
  for example in examples:
    row = rows[int(example['index'][0])]
    numbers = []
    for number, response in enumerate(row.responses):
      ids = example['tokens'][number, : example['lengths'][number]]
      key = ids.tobytes()
      if key not in places:
        places[key] = len(places)
        texts.ids.append(ids)
        texts.begins.append(int(example['begins'][number]))
        texts.responses.append(records.response_text(response))
      numbers.append(places[key])
    found += _ordered_pairs(row, numbers)
  if not found:
    raise UserError(f'{context.where}.data: people ordered no pair of the {split} split')
  columns = [np.array(column) for column in zip(*found, strict=True)]
  return texts._replace(pairs=Pairs(*columns))


def _no_pairs() -> Pairs:
  return Pairs(*(np.zeros(0) for _ in dataclasses.fields(Pairs)))


def _ordered_pairs(row: Ranking, numbers: Sequence[int]) -> list[tuple[Any, ...]]:
  """Returns the fields of a `Pairs` for each pair of a ranking that is not tied."""
  better_and_worse = []
  for i, better in enumerate(numbers):
    for j, worse in enumerate(numbers):
      if row.ranks[i] < row.ranks[j] and better != worse:
        better_and_worse.append((better, worse))
  weight = 1 / max(1, len(better_and_worse))
  opener = conversations.message_text(row.messages[0])
  rest = (weight, float(row.confidence), opener, row.source)
  return [(better, worse, *rest) for better, worse in better_and_worse]


def _read_or_compute(
  context: Context, options: Options, model: Model, params: Params, texts: Texts, split: str
) -> np.ndarray:
  """Returns the features of texts, [N, F] float64; computes those that the folder lacks."""
  path = context.directory / f'{split}-{FEATURES}'
  # The folder of the run is not the same for all processes.
  init = options.init.replace(str(context.workdir), '{workdir}')
  digest = hashlib.sha256(f'{init} {options.likelihood}'.encode())
  for ids in texts.ids:
    digest.update(ids.tobytes())
  name = digest.hexdigest()  # of these texts and this model
  known = np.zeros((0, 0), np.float32)
  if path.is_file():
    with np.load(path) as stored:
      if str(stored['name']) == name:
        known = stored['features']

  def save(features: np.ndarray) -> None:
    if hosts.is_first_process():
      with files.replacing(path) as partial, open(partial, 'wb') as file:
        np.savez(file, name=np.array(name), features=features)

  # From the shortest to the longest, so that little is padding.
  order = np.argsort([len(ids) for ids in texts.ids], kind='stable')
  in_order = compute_features(context, model, params, texts, order, options.batch_size, known, save)
  features = np.zeros(in_order.shape)
  features[order] = in_order
  return features


def compute_features(
  context: Context,
  model: Model,
  params: Params,
  texts: Texts,
  order: np.ndarray,
  batch_size: int,
  known: np.ndarray,
  save: Callable[[np.ndarray], None],
) -> np.ndarray:
  """Reads texts with the frozen model.

  Args:
    context: the context of the stage.
    model: the definition of the frozen model.
    params: its parameters.
    texts: N of them.
    order: [N] int, the order in which they are read.
    batch_size: texts that are read at once.
    known: [M, F] float32, the features of the first M of them.
    save: keeps the features so far; called now and then, and at the end.

  Returns:
    [N, F] float32, in the order of reading.
  """
  read = jax.jit(functools.partial(read_features, model))
  parts = [known] if len(known) else []
  begins = range(len(known), len(order), batch_size)
  for turn, begin in enumerate(begins, start=1):
    chosen = order[begin : begin + batch_size]
    # Filled up with the last text, so that all batches are of one size.
    filled = np.pad(chosen, (0, batch_size - len(chosen)), mode='edge')
    sequences = _pad(texts, filled, context.tokenizer.pad_id)
    values = hosts.to_host(read(params, context.layout.place(sequences)))
    parts.append(values[: len(chosen)])
    if turn % _SAVE_EVERY == 0 or turn == len(begins):
      save(np.concatenate(parts))
      hosts.say(f'{context.name}: {begin + len(chosen):,} of {len(order):,} texts are read')
  return np.concatenate(parts)


def _pad(texts: Texts, numbers: np.ndarray, pad_id: int) -> Sequences:
  """Pads some texts on the right to a multiple of _WIDTH; the responses are the targets."""
  longest = max(len(texts.ids[number]) for number in numbers)
  width = -(-longest // _WIDTH) * _WIDTH
  shape = (len(numbers), width)
  tokens, segment_ids = np.full(shape, pad_id, np.int32), np.zeros(shape, np.int32)
  loss_mask = np.zeros(shape, np.float32)
  for row, number in enumerate(numbers):
    ids = texts.ids[number]
    tokens[row, : len(ids)] = ids
    segment_ids[row, : len(ids)] = 1
    loss_mask[row, texts.begins[number] : len(ids)] = 1
  positions: Any = np.tile(np.arange(width, dtype=np.int32), (len(numbers), 1))
  values: Any = (tokens, segment_ids, loss_mask)
  return Sequences(
    tokens=values[0], positions=positions, segment_ids=values[1], loss_mask=values[2]
  )


# The head, and how good it is.


def fit_head(features: np.ndarray, pairs: Pairs, num_folds: int) -> Head:
  """Fits the head to all pairs; the ridge is chosen by one fold of them.

  Args:
    features: [N, F] float64.
    pairs: all pairs of the training split.
    num_folds: one part in so many chooses the ridge.

  Returns:
    The head; the texts that are compared score 0 on average.
  """
  scales = _scales(features)
  scaled = features / scales
  folds = pair_models.assign_folds(pairs.clusters, num_folds)
  ridge = pair_models.choose_ridge(scaled, pairs, folds == 0, pair_models.RIDGES)
  weights = pair_models.fit(scaled, pairs, ridge) / scales
  return Head(weights, -float((features @ weights).mean()))


def place_head(head: Head, score: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns the leaves of a fitted head, with the shardings of the model's own."""
  width = score['kernel'].shape[0]  # D
  values = {'kernel': head.weights[:width], 'bias': np.asarray(head.bias)}
  if 'likelihood' in score:
    values['likelihood'] = head.weights[width:] / width  # see heads.likelihood_scores
  return {
    name: jax.device_put(values[name].astype(np.float32).reshape(leaf.shape), leaf.sharding)
    for name, leaf in score.items()
  }


def _scales(features: np.ndarray) -> np.ndarray:
  """Returns the standard deviation of each feature, [F]."""
  return np.maximum(features.std(axis=0), _SMALLEST_SCALE)


def measure_folds(features: np.ndarray, texts: Texts, options: Options) -> dict[str, Any]:
  """Measures the head by k-fold cross-validation, beside length and bigrams on the same folds.

  Args:
    features: [N, F] float64, of the training texts.
    texts: these texts and their pairs.
    options: of which `folds` and `measured_pairs` are read.

  Returns:
    Source → pairs, clusters, and the accuracies and gains of compare_models. The models are
    `length` and `bigrams`; `head`, fitted to this source alone, as they are; and `joint`, one head
    fitted to all sources.
  """
  pairs = texts.pairs
  folds = pair_models.assign_folds(pairs.clusters, options.folds)
  scaled = features / _scales(features)
  joint = pair_models.cross_validate(scaled, pairs, folds)
  report = {}
  for source in sorted(set(pairs.sources)):
    is_own = pairs.sources == source
    own = pairs.select(is_own)
    if len(own.better) < options.measured_pairs:
      continue
    own_folds = pair_models.assign_folds(own.clusters, options.folds)
    used, own = own.renumber()
    responses = [texts.responses[number] for number in used]
    bigrams = pair_models.rotate(pair_models.bags_of_bigrams(responses))
    lengths = texts.lengths[used] / 100  # of order 1, so that the tiny ridge has no influence
    right = {
      'length': pair_models.cross_validate(lengths, own, own_folds, ridges=(1e-6,)),
      'bigrams': pair_models.cross_validate(bigrams, own, own_folds),
      'joint': joint[is_own],
      'head': pair_models.cross_validate(scaled[used], own, own_folds),
    }
    report[str(source)] = {
      'pairs': len(own.better),
      'clusters': len(set(own.clusters)),
      **pair_models.compare_models(right, own, 'head'),
    }
  return report


def format_folds(report: Mapping[str, Any]) -> str:
  """Formats the accuracies of folds.json as an aligned table."""
  names = ('length', 'bigrams', 'head', 'joint')
  rows: list[tuple[str, ...]] = [('source', 'pairs', *names)]
  for source, values in report.items():
    cells = [f'{values["accuracy"][name]:.1%}' for name in names]
    rows.append((source, str(values['pairs']), *cells))
  return format_rows(rows)


def measure_head(head: Head, features: np.ndarray, texts: Texts) -> dict[str, float]:
  """Measures the head on held-out rankings, as the stage `reward` does."""
  pairs = texts.pairs
  right = pair_models.correctness(features, pairs, head.weights)
  longer = pair_models.correctness(texts.lengths, pairs, np.ones(1))
  values = {
    'accuracy': right.mean(),
    'length_accuracy': longer.mean(),
    'pairs': len(right),
  }
  for source in sorted(set(pairs.sources)):
    is_own = pairs.sources == source
    values[f'accuracy/{source}'] = right[is_own].mean()
    values[f'length_accuracy/{source}'] = longer[is_own].mean()
    values[f'pairs/{source}'] = is_own.sum()
  return {name: float(value) for name, value in values.items()}


# The plan.


def plan(context: Context) -> StagePlan:
  """Plans the program that reads; `context` has an abstract layout."""
  options = context.read_options(STAGE)
  training.check_batch(context, options.batch_size, 1)
  opened = ModelStore(context).open(options.init, head=True, likelihood=options.likelihood)
  training.write_model_json(context, opened.model)  # for the plans of later stages
  params = opened.read()
  sequences = abstract_sequences(context.layout, options.batch_size, options.max_length)
  read = jax.jit(functools.partial(read_features, opened.model))
  estimate = work.forward(
    opened.model.config,
    context.layout,
    options.batch_size,
    options.max_length,
    options.max_length if options.likelihood else 0,
  )
  program = Program('read', functools.partial(read.lower, params, sequences), estimate)
  return StagePlan({'params': params}, [program], ['fitting the head, on the host, is left out'])


def list_data(options: Options, tokenizer: Any) -> list[DataUse]:
  """Lists the data that the stage reads, with the encoding of its records."""

  def encode_rankings(rows: Sequence[Ranking], overlong: str) -> list[dict]:
    return encode.rankings(rows, tokenizer, options.max_length, overlong)

  return [DataUse('data', options.data, 'ranking', encode_rankings, options.overlong)]


TINY: dict[str, Any] = {
  'batch_size': 8,
  'max_length': 128,
  'data': {'count': 60},
}
STAGE = StageKind(options=Options, run=run, plan=plan, tiny=TINY, data=list_data)
