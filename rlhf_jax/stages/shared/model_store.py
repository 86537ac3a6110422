"""Opens the models of a stage: shapes, parameters, adapters and shared bases.

`ModelStore.open` gives a definition at once and reads parameters when they are
asked for, so that a plan can define every step without reading anything.
"""

from collections.abc import Callable
import dataclasses
import functools
import logging
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.feedback.language_judge import LanguageModel
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.models import lora, quantised, transformer
from rlhf_jax.models.lora import LoraOptions
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.models.transformer import Model
from rlhf_jax.runtime import hosts
from rlhf_jax.runtime.mesh import Layout
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.model_sources import find_model, ModelSource
from rlhf_jax.types import merge_params, Params

RANDOM = 'random'  # the name of a freshly initialised model with the shape of config.model


@dataclasses.dataclass(frozen=True)
class OpenModel:
  """A model as a stage uses it.

  Attributes:
    model: its definition.
    read: () → its sharded parameters, float32 but for a frozen base that is kept in
      fewer bits; abstract arrays where the layout is abstract.
    tokenizer: the tokenizer whose token ids the model reads.
  """

  model: Model
  read: Callable[[], Params]
  tokenizer: Tokenizer


def no_reward_model(context: Context, name: str) -> UserError:
  """Returns the error for a model without a scalar head where a reward is named."""
  return UserError(
    f'{context.where}.reward: {name!r} has no scalar head: expected a reward model, such as the '
    "stage 'reward' makes, or a directory for sequence classification"
  )


class ModelStore:
  """Opens the models of one stage.

  Models that stand on the same frozen base share its arrays, so that adapters of
  several models need their base once. The bases that were read are kept as long as
  the store.
  """

  def __init__(self, context: Context, adapters: LoraOptions | None = None):
    """Makes a store.

    Args:
      context: the context of the stage.
      adapters: the section's `lora`; None for a stage that trains nothing.
    """
    self.context = context
    self._adapters = None  # all parameters are trained
    if adapters is not None and adapters.rank:
      self._adapters = adapters
    self._bases: dict[tuple[str, str], Params] = {}  # (name, how it is kept) → parameters

  def open(
    self, name: str, head: bool = False, trained: bool = False, likelihood: bool = False
  ) -> OpenModel:
    """Opens a model by its name.

    Args:
      name: 'random' (freshly initialised, with the shape of config.model), an earlier
        stage, or any name that model_sources.find_model takes.
      head: give the model a scalar head. Where the source has none and the stage
        trains the model, a freshly initialised one, which is said.
      trained: the stage trains this model. With adapters in the section it goes
        on with those that the source has, or begins with new ones; without, the
        source's adapters are merged into its matrices first.
      likelihood: the scalar head sees how likely the response is.

    Raises:
      UserError: nothing has this name, it is a reward model where a language model is
        needed, the model knows fewer tokens than the tokenizer has, or its adapters are not
        those of the section.
    """
    source = self._find(name, trained)
    if source is not None and name not in self.context.config.stages:
      self._check_ids(name, source)
    if source is not None and source.config.head and not head:
      raise UserError(
        f'{self.context.where}: {name!r} is a reward model, which predicts no tokens; expected a '
        'language model'
      )
    return self._open(name, source, head, trained, likelihood)

  def open_reward(self, name: str) -> OpenModel:
    """Opens a reward model, which keeps its own tokenizer where ids mean something else to it.

    Raises:
      UserError: as `open`; or the model has no scalar head, and so was never trained to score.
    """
    source = self._find(name, trained=False)
    if source is None:
      logging.warning('%s: %r is no reward: its scores mean nothing', self.context.where, name)
    elif not source.config.head:
      raise no_reward_model(self.context, name)
    likelihood = source is not None and source.config.likelihood_head  # as it was trained
    own = None
    if source is not None and name not in self.context.config.stages:
      own = source.tokenizer()
    if own is None or self._find_difference(own) is None:
      return self._open(name, source, head=True, likelihood=likelihood)
    return self._with_tokenizer(own)._open(name, source, head=True, likelihood=likelihood)

  def _open(
    self,
    name: str,
    source: ModelSource | None,
    head: bool = False,
    trained: bool = False,
    likelihood: bool = False,
  ) -> OpenModel:
    """Opens a model that has been found."""
    model = self._define(name, source, head, trained, likelihood)
    return OpenModel(
      model=model,
      read=functools.partial(self._read, source, model, trained),
      tokenizer=self.context.tokenizer,
    )

  def open_reader(self, name: str) -> OpenModel:
    """Opens a model that reads text as a judge or scorer does.

    A stage of this run reads with the run's tokenizer, any other model with its own.

    Raises:
      UserError: nothing has this name, or the model has no tokenizer.
    """
    if name in (RANDOM, *self.context.config.stages):
      return self.open(name)
    source = find_model(name)
    tokenizer = source.tokenizer()
    if tokenizer is None:
      raise UserError(
        f'{self.context.where}: {name!r} reads texts, but no tokenizer lies beside it'
      )
    return self._with_tokenizer(tokenizer)._open(name, source)

  def open_language_model(self, name: str) -> LanguageModel:
    """Opens a model that reads text, with its parameters, for judges and scorers."""
    reader = self.open_reader(name)
    return LanguageModel(reader.model, reader.read(), reader.tokenizer, self.context.layout)

  def _with_tokenizer(self, tokenizer: Tokenizer) -> 'ModelStore':
    """Returns a store of models that read with another tokenizer than the run's."""
    own_context = dataclasses.replace(self.context, tokenizer=tokenizer)
    store = ModelStore(own_context, self._adapters)
    store._bases = self._bases  # so that a reader on the same base needs no second copy
    return store

  # First part: which model it is, and its shape.

  def _check_ids(self, name: str, source: ModelSource) -> None:
    """Refuses a model to which the run's ids mean something else."""
    own = source.tokenizer()
    number = None if own is None else self._find_difference(own)
    if own is None or number is None:
      return
    ours = self.context.tokenizer.tokens[number]
    raise UserError(
      f'{self.context.where}: {name!r} has another tokenizer than the run: id {number} is '
      f'{own.tokens[number]!r} to it and {ours!r} in {self.context.config.tokenizer.init!r} '
      '(config.tokenizer.init); expected models whose ids mean the same'
    )

  def _find_difference(self, own: Tokenizer) -> int | None:
    """Finds an id that means another token to a model than in this run; None where all agree."""
    if not isinstance(self.context.tokenizer, Tokenizer):  # a plan's, of which only sizes count
      return None
    return self.context.tokenizer.find_difference(own)

  def _find(self, name: str, trained: bool) -> ModelSource | None:
    """Finds the source of a model; None for a freshly initialised one."""
    if name != RANDOM:
      return find_model(name, self.context.workdir, self.context.config.stages)
    if trained and self._adapters is not None:
      raise UserError(
        f'{self.context.where}.lora: adapters need a trained model to stand on, but init is random'
      )
    return None

  def _define(
    self,
    name: str,
    source: ModelSource | None,
    head: bool,
    trained: bool,
    likelihood: bool = False,
  ) -> Model:
    """Defines the model as this stage uses it."""
    context = self.context
    common = context.config.model  # how every model computes, whatever its shape
    vocab_size = context.tokenizer.vocab_size
    config = source.config if source else random_model_config(context.config, vocab_size)
    if config.vocab_size < vocab_size:
      raise UserError(
        f'{context.where}: {name!r} knows {config.vocab_size} tokens, but the tokenizer of the '
        f'run has {vocab_size}'
      )
    if trained:
      config = with_adapters(config, self._adapters, f'{context.where}.lora: {name!r}')
    elif self._adapters is not None:
      # Another model on the same base: it is kept in as many bits as the trained one.
      config = dataclasses.replace(config, base=self._adapters.base)
    empty_ids: tuple[tuple[int, int], ...] = ()
    if isinstance(context.tokenizer, Tokenizer):
      empty_ids = context.tokenizer.empty_ids(config.vocab_size)
    config = dataclasses.replace(
      config,
      head=head,
      likelihood_head=likelihood,
      empty_ids=empty_ids,
      dtype=common.dtype,
      remat=common.remat,
      attention=common.attention,
      # what a scalar head says is not sampled, and need not be exact
      numerics='fast' if head else common.numerics,
    )
    if config.base in quantised.QUANTISED_KINDS and context.layout.rollout_tensor:
      raise UserError(
        f'config.mesh.rollout_tensor: expected 0 where lora.base is {config.base}, as quantised '
        'matrices cannot be laid otherwise for decoding'
      )
    return transformer.build_model(config, context.layout)

  # Second part: its parameters.

  def _read(self, source: ModelSource | None, model: Model, trained: bool) -> Params:
    """Reads the parameters of a model.

    Leaves that the source lacks are freshly initialised, but only for a model that the stage
    trains: what nothing trains must have been trained before.
    """
    layout = self.context.layout
    shardings = model_shardings(model, layout)
    if layout.abstract and self._adapters is None:
      # A plan needs shapes only, whichever leaves would be read.
      return layout.create(model.init, shardings, jax.random.key(0))
    params: Params = {}
    if source is not None:
      # Only a base that nothing trains is shared: a step donates what it trains.
      shares_base = self._adapters is not None or (source.base is not None and not trained)
      bases = self._bases if shares_base else {}
      params = read_parameters(source, layout, model.config.base, bases)
    if trained and source is not None:
      params = self._prepare_for_training(params, source, model)
    if source is not None and not trained:
      return complete_parameters(params, model.init, shardings, layout, where=source.name)
    if source is not None and model.config.head and 'score' not in params:
      hosts.say(
        f'{self.context.name}: {source.name} has no scalar head: training begins with a new one'
      )
    new_leaves_key = self.context.key('new parameters')
    return complete_parameters(params, model.init, shardings, layout, new_leaves_key)

  # Third part: its adapters.

  def _prepare_for_training(self, params: Params, source: ModelSource, model: Model) -> Params:
    """Merges adapters that are not trained on, and gives a trained head memory of its own."""
    if source.config.lora_rank and not model.config.lora_rank:
      merge = functools.partial(lora.merge_adapters, source.config)
      params = jax.jit(merge)(params)
    if self._adapters is not None and 'score' in params:
      # Another model on the same base may use this head, and a step donates what it
      # trains.
      params = {
        **params,
        'score': copy_tree(self.context.layout, params['score']),
      }
    return params


def random_model_config(config: Any, vocab_size: int) -> ModelConfig:
  """Returns the shape of a model that is freshly initialised, as config.model says."""
  return ModelConfig(vocab_size=vocab_size, **config.model.to_dict())


def with_adapters(config: ModelConfig, adapters: LoraOptions | None, where: str) -> ModelConfig:
  """Returns the shape of a model that is trained with adapters, or without where there are none.

  Args:
    config: the shape of the source.
    adapters: the section's adapters; None or rank 0 to train all parameters.
    where: what an error message begins with.

  Raises:
    UserError: the source has other adapters, or the targets are no matrices of the
      model.
  """
  if adapters is None or not adapters.rank:
    return dataclasses.replace(config, lora_rank=0, lora_targets=(), base='float32')
  unknown = [name for name in adapters.targets if name not in config.matrices]
  if unknown:
    raise UserError(
      f'{where}: targets: expected some of {", ".join(config.matrices)}, got {", ".join(unknown)}'
    )
  chosen = adapters.targets or config.matrices
  wanted: dict[str, Any] = {
    'lora_rank': adapters.rank,
    'lora_alpha': float(adapters.alpha),
    'lora_targets': tuple(name for name in config.matrices if name in chosen),
  }
  present = {name: getattr(config, name) for name in wanted}
  if config.lora_rank and present != wanted:
    raise UserError(
      f'{where} has adapters of {present}, expected {wanted}; ask for the same, or begin with '
      'its export, in which they are merged into the matrices'
    )
  return dataclasses.replace(config, **wanted, base=adapters.base)


# Reading and completing parameters.


def read_parameters(
  source: ModelSource,
  layout: Layout,
  base_dtype: str,
  bases: dict[tuple[str, str], Params],
) -> Params:
  """Reads the parameters of a source, its adapters beside their base.

  Args:
    source: the stored model.
    layout: how the parameters are sharded.
    base_dtype: how a frozen base is kept, see models/quantised.py.
    bases: frozen bases that were read before, by name and base_dtype; a new one is
      added.
  """
  base = source.base if source.base is not None else source
  key = (base.name, base_dtype)
  if key not in bases:
    bases[key] = quantised.convert(_load(base, layout), base_dtype, layout.create)
  if source.base is None:
    return dict(bases[key])  # a copy: callers add leaves
  return merge_params(_load(source, layout), bases[key])  # where both have a leaf, the adapters'


def _load(source: ModelSource, layout: Layout) -> Params:
  """Loads the stored parameters; returns abstract arrays on an abstract layout."""
  model = transformer.build_model(source.config)
  shardings = model_shardings(model, layout)
  if not layout.abstract:
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return dict(source.load(shapes, shardings))
  params = layout.create(model.init, shardings, jax.random.key(0))
  if source.base is not None:
    adapters, _ = lora.split_trainable(params)
    return adapters
  return params


def complete_parameters(
  params: Params,
  init: Callable[[jax.Array], Params],
  shardings: Any,
  layout: Layout,
  key: jax.Array | None = None,
  where: str = 'the model',
) -> Params:
  """Completes a tree of parameters with freshly initialised leaves.

  Args:
    params: what was read; leaves that the model does not have are left out.
    init: the model's.
    shardings: the shardings of all leaves of the model.
    layout: how new leaves are made.
    key: the key of new leaves; None if no leaf may be missing.
    where: what an error message calls the model.

  Raises:
    UserError: a leaf is missing and there is no key.
  """
  leaves = traverse_util.flatten_dict(params)
  places = traverse_util.flatten_dict(shardings)
  missing = [path for path in places if path not in leaves]
  if missing and key is None:
    names = ', '.join('.'.join(path) for path in missing[:3])
    raise UserError(f'{where} lacks {names}, which must have been trained')
  if missing:
    # Only the missing leaves are outputs, so XLA does not compute the others.

    def make(key: jax.Array) -> list[jax.Array]:
      every = traverse_util.flatten_dict(init(key))
      return [every[path] for path in missing]

    new = layout.create(make, [places[path] for path in missing], key)
    leaves |= dict(zip(missing, new, strict=True))
  # In the order of the model's leaves, without those that it does not have.
  return traverse_util.unflatten_dict({path: leaves[path] for path in places})


def model_shardings(model: Model, layout: Layout) -> Any:
  """Returns the shardings of a model's parameters, as a tree."""
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return layout.shardings(model.axes, shapes)


def copy_tree(layout: Layout, tree: Any) -> Any:
  """Copies a tree of arrays into memory of its own, with the same shardings."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, tree)
  return layout.create(_copy, shardings, tree)


def _copy(tree: Any) -> Any:
  return jax.tree.map(jnp.copy, tree)
