"""The shape of a model: sizes, and the features in which families of decoders differ.

All of them are data; the defaults are Llama's. Per-layer patterns repeat:
`windows=(4096, 0)` is a local layer, a global one, a local one …
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.models import rope

DTYPES = ('float32', 'bfloat16', 'float16')
REMAT = {
  'none': None,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}
ATTENTION = ('auto', 'plain', 'cudnn', 'splash')
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'silu': jax.nn.silu,
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_tanh': jax.nn.gelu,
}
NORMS = ('rms', 'rms_offset', 'layer')
QK_NORMS = ('', 'head', 'all')

# The matrices of a layer: attention's, then the MLP's.
TARGETS = ('query', 'key', 'value', 'output', 'gate', 'up', 'down')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape of a model; its fields are what a saved model's config.json holds."""

  vocab_size: int  # V
  embed: int  # D, the width
  layers: int  # L
  heads: int  # H
  kv_heads: int  # N; H is a multiple of it
  head_dim: int  # C
  mlp: int  # F, the inner width; of one expert where there are some
  norm_eps: float = 1e-5  # added to the variance
  rope_theta: float = 10000.0  # base of the wavelengths
  tied: bool = True  # the output matrix is the embedding
  # tokens of a text; a matter of record, except with learned positions and longrope
  max_length: int = 2048
  head: bool = False  # has a scalar head
  # what it computes in; parameters, norms, softmax and losses are float32
  dtype: str = 'float32'
  # what the backward pass recomputes: none, dots (all but matrix products), full
  remat: str = 'none'
  attention: str = 'auto'  # plain, cudnn, splash, or auto (see attention.py)
  family: str = 'llama'  # whose files an export writes: a key of families.FAMILIES
  # rms; rms_offset: scales are 1 + the parameter; layer: mean and variance, with a bias
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
  attention_scalar: float = 0.0  # the softmax is of q·k / √attention_scalar; 0 = head_dim
  attention_cap: float = 0.0  # soft cap of attention's logits; 0 = none
  logit_cap: float = 0.0  # soft cap of the next token's logits; 0 = none
  # how many places back a layer sees, itself included, a pattern over layers; 0 = all,
  # () = all in all layers
  windows: tuple[int, ...] = ()
  learned_positions: bool = False  # an embedding of max_length positions, no rotary ones
  rope_local_theta: float = 0.0  # rope_theta of layers with a window; 0 = the same
  rope_layers: tuple[int, ...] = ()  # 1 = rotary, 0 = none, a pattern; () = all rotary
  rope_fraction: float = 1.0  # the part of a head that turns
  # as in Hugging Face's config.json: rope_type (see rope.SCALINGS) and its numbers
  rope_scaling: dict = dataclasses.field(default_factory=dict, hash=False)
  experts: int = 0  # E, mixture of experts in every layer; 0 = none
  experts_per_token: int = 0  # k
  renormalise: bool = True  # the weights of a token's experts sum to 1
  lora_rank: int = 0  # r, low-rank adapters (see lora.py); 0 = none
  lora_alpha: float = 16.0  # adapters count alpha / rank times
  lora_targets: tuple[str, ...] = ()  # the matrices that have adapters
  base: str = 'float32'  # how parameters are kept that adapters freeze (see quantised.py)

  def __post_init__(self):
    for name in ('windows', 'rope_layers', 'lora_targets'):  # JSON knows lists only
      object.__setattr__(self, name, tuple(getattr(self, name)))

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
  """Returns the precision of a product whose factors are narrow and whose result is float32.

  The backward pass of such a product multiplies with the slopes of its result, which
  are float32 whatever the factors are. Exact products of float32 are several times as
  slow on a GPU as rounded ones, so a bfloat16 model, whose factors are rounded anyway,
  does not ask for them: at 360M those of the logits alone took a quarter of a step.

  Args:
    dtype: of the factors.

  Returns:
    None, which is JAX's default (exact, see compilation.request_exact_products), for
    float32; the device's own default for other dtypes.
  """
  if dtype == jnp.float32:
    return None
  return jax.lax.Precision.DEFAULT


def check_model_config(config: ModelConfig) -> None:
  """Raises UserError where no model has this shape."""
  _check_sizes(config)
  _check_choice(config, 'dtype', DTYPES)
  _check_choice(config, 'remat', REMAT)
  _check_choice(config, 'attention', ATTENTION)
  _check_choice(config, 'norm', NORMS)
  _check_choice(config, 'qk_norm', QK_NORMS)
  _check_choice(config, 'activation', ACTIVATIONS)
  _check_experts(config)
  _check_adapters(config)
  _check_rope_scaling(config.rope_scaling)


def _repeat(pattern: Sequence[int], count: int) -> list[int]:
  """Repeats a pattern over so many layers."""
  return [pattern[i % len(pattern)] for i in range(count)]


def _check_sizes(config: ModelConfig) -> None:
  """Raises UserError for sizes below 1, or heads that do not divide."""
  names = ('vocab_size', 'embed', 'layers', 'heads', 'kv_heads', 'head_dim', 'mlp')
  sizes = {name: getattr(config, name) for name in names}
  if min(sizes.values()) >= 1:
    if config.heads % config.kv_heads == 0 and config.head_dim % 2 == 0:
      return
  got = ', '.join(f'{name} {size}' for name, size in sizes.items())
  raise UserError(
    f'model: expected sizes from 1, heads a multiple of kv_heads and an even head_dim; got {got}'
  )


def _check_choice(config: ModelConfig, name: str, choices: Iterable[str]) -> None:
  """Raises UserError where a field is not one of its choices."""
  value = getattr(config, name)
  choices = tuple(choices)
  if value not in choices:
    expected = ', '.join(map(repr, choices))
    raise UserError(f'model.{name}: expected one of {expected}, got {value!r}')


def _check_experts(config: ModelConfig) -> None:
  """Raises UserError for a mixture of experts that block.py cannot compute."""
  if not config.experts:
    return
  count_fits = 0 < config.experts_per_token <= config.experts
  if not count_fits or not config.gated or config.mlp_bias:
    raise UserError(
      f'model.experts: expected 1 to {config.experts} experts_per_token, gated, '
      f'without biases; got {config.experts_per_token}'
    )


def _check_adapters(config: ModelConfig) -> None:
  """Raises UserError for adapters on what the model does not have."""
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
  """Raises UserError for a scaling that rope.py does not know, or without its numbers."""
  if not scaling:
    return
  kind = scaling.get('rope_type', '')
  required = rope.SCALINGS.get(kind, ())
  missing = [key for key in required if scaling.get(key) is None]
  if kind not in rope.SCALINGS or missing:
    without = f' without {", ".join(missing)}' if missing else ''
    raise UserError(
      f'model.rope_scaling: expected rope_type {", ".join(rope.SCALINGS)} and its '
      f'numbers; got {scaling.get("rope_type")!r}{without}'
    )
