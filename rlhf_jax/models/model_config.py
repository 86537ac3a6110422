"""The configuration of a model: its sizes, and the features by which families differ.

Every feature is a field of ModelConfig, so that one network serves all families
of decoders; the defaults are Llama's. Per-layer patterns repeat: with
`windows=(4096, 0)`, layers with a sliding window of 4096 tokens alternate with
layers of full attention.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.types import MATRIX_AXES

DTYPES = ('float32', 'bfloat16', 'float16')
CUDNN_ATTENTION = 'dot_product_attention_fwd_wrapper'  # JAX's name of its primitive


def _saves_products(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
  """Tells whether remat=dots saves the result of an operation for the backward pass.

  It saves products with weights, and the result of cuDNN's attention: computing
  that again costs a fifth of attention's time, and it is as small as a product's.

  Args:
    primitive: the operation, a JAX primitive.
    *arguments: the shapes and dtypes of its arguments.
    **parameters: its parameters.
  """
  if primitive.name == CUDNN_ATTENTION:
    return True
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return policy(primitive, *arguments, **parameters)


# What the backward pass recomputes, as a policy of jax.checkpoint.
REMAT = {
  'none': None,
  'dots': _saves_products,
  'full': jax.checkpoint_policies.nothing_saveable,
}
ATTENTION = ('auto', 'plain', 'cudnn', 'splash')
NUMERICS = ('fast', 'exact')
TEXT_STEP = 8  # columns; the most queries in a tile of exact attention
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'silu': jax.nn.silu,
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_tanh': jax.nn.gelu,
}
NORMS = ('rms', 'rms_offset', 'layer')
QK_NORMS = ('', 'head', 'all')
# rope_type → the other keys that `rope_scaling` must have, named as by Hugging Face.
ROPE_SCALINGS = {
  'linear': ('factor',),
  'llama3': (
    'factor',
    'low_freq_factor',
    'high_freq_factor',
    'original_max_position_embeddings',
  ),
  'longrope': (
    'short_factor',
    'long_factor',
    'original_max_position_embeddings',
  ),
}
OPTIONAL_ROPE_NUMBERS = {  # and what it may have besides
  'longrope': ('attention_factor', 'factor'),
}

# The matrices of a layer that can have adapters: attention's four, then the MLP's three.
TARGETS = tuple(MATRIX_AXES)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The configuration of a model, as the config.json of a saved model holds it."""

  vocab_size: int  # V
  embed: int  # D, the width
  layers: int  # L
  heads: int  # H
  kv_heads: int  # N, a divisor of H
  head_dim: int  # C
  mlp: int  # F, the inner width of the MLP, or of each expert
  norm_eps: float = 1e-5  # added to the variance
  rope_theta: float = 10000.0  # base of the wavelengths
  tied: bool = True  # the unembedding is the transposed embedding
  # the longest text, in tokens; used by learned positions and longrope only
  max_length: int = 2048
  head: bool = False  # whether it has a scalar head, for rewards or values
  # whether that head also sees how likely the response is to the model itself
  likelihood_head: bool = False
  # of activations and matrix products; parameters, norms, softmax and losses are float32
  dtype: str = 'float32'
  # what the backward pass recomputes: none (nothing), dots (everything but matrix
  # products) or full (everything)
  remat: str = 'none'
  attention: str = 'auto'  # plain, cudnn, splash, or auto (see attention.py)
  numerics: str = 'fast'  # fast; exact = a text's bits depend on nothing beside it (exact.py)
  family: str = 'llama'  # the file format of an export: a key of families.FAMILIES
  # rms (RMSNorm), rms_offset (RMSNorm whose scale is 1 + the parameter) or layer
  # (LayerNorm with a bias)
  norm: str = 'rms'
  pre_norm: bool = True  # norms before attention and MLP, inside the residual branch
  post_norm: bool = False  # norms after attention and MLP, inside the residual branch
  # RMSNorm of queries and keys: over each 'head', over 'all' heads at once, or none ('')
  qk_norm: str = ''
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  activation: str = 'silu'  # silu, gelu, gelu_tanh
  gated: bool = True  # the MLP is down(activation(gate x) · up x), else down(activation(up x))
  embed_scale: bool = False  # embeddings are multiplied by √D
  attention_scalar: float = 0.0  # attention logits are q·k / √attention_scalar; 0 = head_dim
  attention_cap: float = 0.0  # soft cap of attention logits; 0 = none
  logit_cap: float = 0.0  # soft cap of next-token logits; 0 = none
  # sliding windows in tokens, the query's own included: a pattern over the layers;
  # 0 = full attention, () = full attention in every layer
  windows: tuple[int, ...] = ()
  learned_positions: bool = False  # max_length position embeddings in place of rotary ones
  rope_local_theta: float = 0.0  # rope_theta of layers with a window; 0 = the same
  # a pattern over the layers: 1 = rotary, 0 = no positions; () = rotary in every layer
  rope_layers: tuple[int, ...] = ()
  rope_fraction: float = 1.0  # the fraction of a head's dimensions that are rotated
  # as in Hugging Face's config.json: rope_type (see ROPE_SCALINGS) and its parameters
  rope_scaling: dict = dataclasses.field(default_factory=dict, hash=False)
  experts: int = 0  # E, the experts of every layer; 0 = a plain MLP
  experts_per_token: int = 0  # k, the experts that compute each token
  renormalise: bool = True  # the weights of a token's experts are scaled to sum to 1
  # ranges [first, end) of token ids that stand for no token; their probability is 0
  empty_ids: tuple[tuple[int, int], ...] = ()
  lora_rank: int = 0  # r, the rank of adapters (see lora.py); 0 = no adapters
  lora_alpha: float = 16.0  # adapters are scaled by alpha / rank
  lora_targets: tuple[str, ...] = ()  # the matrices that have adapters
  base: str = 'float32'  # storage format of what adapters freeze (see quantised.py)

  def __post_init__(self):
    for name in ('windows', 'rope_layers', 'lora_targets'):  # JSON has lists, no tuples
      object.__setattr__(self, name, tuple(getattr(self, name)))
    object.__setattr__(self, 'empty_ids', tuple(map(tuple, self.empty_ids)))

  @property
  def is_exact(self) -> bool:
    """Returns whether a text's bits depend on nothing beside it."""
    return self.numerics == 'exact'

  @property
  def text_step(self) -> int:
    """Returns at multiples of how many columns the texts of a packed row must begin."""
    return TEXT_STEP if self.is_exact else 1

  @property
  def matrices(self) -> tuple[str, ...]:
    """Returns the matrices of a layer that may have adapters; those of experts may not."""
    attention, mlp = TARGETS[:4], TARGETS[4:]
    if self.experts:
      return attention
    return attention + (mlp if self.gated else mlp[1:])

  @property
  def layer_windows(self) -> list[int]:
    """Returns the window of every layer."""
    return _repeat(self.windows or (0,), self.layers)

  @property
  def rotary_layers(self) -> list[int]:
    """Returns 1 for every layer with rotary positions, else 0."""
    return _repeat(self.rope_layers or (1,), self.layers)


def product_precision(dtype: Any) -> jax.lax.Precision | None:
  """Returns the precision of a matrix product of this dtype whose result is float32.

  The backward pass of such a product multiplies with the gradient of its result,
  which is float32 whatever the operands are. Exact float32 products are several
  times as slow on a GPU as rounded ones. A bfloat16 model, whose operands are
  rounded anyway, can do without them: in a model of 360M parameters those of the
  logits alone took a quarter of a step.

  Args:
    dtype: the dtype of the operands.

  Returns:
    For float32 None, which is JAX's default (exact, see
    compilation.request_exact_products); for other dtypes the device's own default.
  """
  if dtype == jnp.float32:
    return None
  return jax.lax.Precision.DEFAULT


def check_model_config(config: ModelConfig) -> None:
  """Checks that a model with this configuration can be built.

  Args:
    config: the configuration.

  Raises:
    UserError: sizes do not fit each other, or a choice is unknown.
  """
  _check_sizes(config)
  _check_choice(config, 'dtype', DTYPES)
  _check_choice(config, 'remat', REMAT)
  _check_choice(config, 'attention', ATTENTION)
  _check_choice(config, 'numerics', NUMERICS)
  _check_choice(config, 'norm', NORMS)
  _check_choice(config, 'qk_norm', QK_NORMS)
  _check_choice(config, 'activation', ACTIVATIONS)
  _check_exact(config)
  _check_experts(config)
  _check_adapters(config)
  _check_rope_scaling(config.rope_scaling)


def _repeat(pattern: Sequence[int], count: int) -> list[int]:
  """Repeats a pattern until it has `count` entries."""
  return [pattern[i % len(pattern)] for i in range(count)]


def _check_sizes(config: ModelConfig) -> None:
  """Raises UserError if a size is below 1, or if the sizes of heads do not fit."""
  names = ('vocab_size', 'embed', 'layers', 'heads', 'kv_heads', 'head_dim', 'mlp')
  sizes = {name: getattr(config, name) for name in names}
  if min(sizes.values()) >= 1:
    if config.heads % config.kv_heads == 0 and config.head_dim % 2 == 0:
      return
  got = ', '.join(f'{name} {size}' for name, size in sizes.items())
  raise UserError(
    'model: expected sizes of at least 1, heads a multiple of kv_heads and an even head_dim; '
    f'got {got}'
  )


def _check_choice(config: ModelConfig, name: str, choices: Iterable[str]) -> None:
  """Raises UserError if a field is not one of its choices."""
  value = getattr(config, name)
  choices = tuple(choices)
  if value not in choices:
    expected = ', '.join(map(repr, choices))
    raise UserError(f'model.{name}: expected one of {expected}, got {value!r}')


def _check_exact(config: ModelConfig) -> None:
  """Raises UserError for exact numerics of a model that cannot have them."""
  if config.is_exact and (config.dtype != 'float32' or config.attention not in ('auto', 'plain')):
    raise UserError(
      'model.numerics: exact needs model.dtype float32 and model.attention auto or plain; got '
      f'{config.dtype} and {config.attention}'
    )
  if config.is_exact and config.rope_scaling.get('rope_type') == 'longrope':
    raise UserError(
      'model.numerics: expected fast for a model with longrope, whose sampler learns only at the '
      'end whether a text is long; got exact'
    )


def _check_experts(config: ModelConfig) -> None:
  """Raises UserError for a mixture of experts that block.py cannot compute."""
  if not config.experts:
    return
  count_fits = 0 < config.experts_per_token <= config.experts
  if not count_fits or not config.gated or config.mlp_bias:
    raise UserError(
      f'model.experts: expected experts_per_token from 1 to {config.experts}, gated true and '
      f'mlp_bias false; got experts_per_token {config.experts_per_token}, gated '
      f'{config.gated}, mlp_bias {config.mlp_bias}'
    )


def _check_adapters(config: ModelConfig) -> None:
  """Raises UserError for adapters of matrices that the model does not have."""
  if not config.lora_rank:
    return
  targets = config.lora_targets
  known = config.matrices
  if config.lora_rank < 0 or not targets or not set(targets) <= set(known):
    raise UserError(
      f'lora: expected a rank from 1 and targets of {", ".join(known)}; got '
      f'{config.lora_rank} and {", ".join(targets) or "none"}'
    )


def _check_rope_scaling(scaling: dict[str, Any]) -> None:
  """Raises UserError for an unknown scaling, or that lacks a parameter."""
  if not scaling:
    return
  kind = scaling.get('rope_type', '')
  required = ROPE_SCALINGS.get(kind, ())
  missing = [key for key in required if scaling.get(key) is None]
  if kind not in ROPE_SCALINGS or missing:
    without = f' without {", ".join(missing)}' if missing else ''
    raise UserError(
      f'model.rope_scaling: expected a rope_type of {", ".join(ROPE_SCALINGS)} with its '
      f'parameters; got {scaling.get("rope_type")!r}{without}'
    )
