"""The shape of a model: sizes, and the features in which families of decoders differ, all of them data.

The defaults are Llama's. Per-layer patterns repeat: `windows=(4096, 0)` is a local layer, a global one, a local one …
"""

import dataclasses

import jax

from rlhf_jax.errors import UserError
from rlhf_jax.models import rope

DTYPES = ('float32', 'bfloat16', 'float16')
REMAT = {
  'none': None,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}
ATTENTION = ('auto', 'plain', 'cudnn', 'splash')
ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': jax.nn.gelu,
}
NORMS = ('rms', 'rms_offset', 'layer')
QK_NORMS = ('', 'head', 'all')
TARGETS = ('query', 'key', 'value', 'output', 'gate', 'up', 'down')  # the matrices of a layer


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape of a model.

  Attributes:
    vocab_size, embed, layers, heads, kv_heads, head_dim: sizes.
    mlp: inner width, of one expert where there are some.
    max_length: tokens of a text; a matter of record, except with learned positions and `longrope`.
    tied: the output matrix is the embedding.
    head: a scalar head.
    family: whose files an export writes: a key of families.FAMILIES.
    norm: rms; rms_offset: rms whose scales are 1 + the parameter; layer: mean and variance, with a bias.
    pre_norm, post_norm: norms before and after attention and MLP, both inside the residual branch.
    qk_norm: RMSNorm of queries and keys: over each 'head', over 'all' heads at once, or none ('').
    qkv_bias, output_bias, mlp_bias: biases of these matrices.
    activation: silu, gelu, gelu_tanh.
    gated: the MLP is down(activation(gate x) · up x), else down(activation(up x)).
    embed_scale: embeddings are multiplied by √embed.
    attention_scalar: the softmax is of q·k / √attention_scalar; 0 = head_dim.
    attention_cap, logit_cap: soft caps of attention's and the next token's logits; 0 = none.
    windows: how many places back a layer sees, itself included, a pattern over layers; 0 = all, () = all in all layers.
    learned_positions: an embedding of each of max_length positions in place of rotary ones.
    rope_theta: base of the wavelengths.
    rope_local_theta: the same for layers with a window; 0 = rope_theta.
    rope_layers: 1 = rotary positions, 0 = none, a pattern over layers; () = all have them.
    rope_fraction: the part of a head that turns.
    rope_scaling: as in Hugging Face's config.json: `rope_type` (see rope.SCALINGS) and its numbers; {} = none.
    experts, experts_per_token: mixture of experts in every layer; 0 = none.
    renormalise: the weights of a token's experts sum to 1.
    lora_rank, lora_alpha, lora_targets: low-rank adapters on these matrices (see lora.py); rank 0 = none.
    base: how the parameters are kept that adapters leave as they are (see quantised.py).
    dtype: what it computes in; parameters, norms, softmax and losses are float32.
    remat: what the backward pass recomputes: none, dots (all but matrix products), full.
    attention: who computes it: plain, cudnn, splash, or auto (see attention.py).
  """

  vocab_size: int
  embed: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp: int
  norm_eps: float = 1e-5
  rope_theta: float = 10000.0
  tied: bool = True
  max_length: int = 2048
  head: bool = False
  dtype: str = 'float32'
  remat: str = 'none'
  attention: str = 'auto'
  family: str = 'llama'
  norm: str = 'rms'
  pre_norm: bool = True
  post_norm: bool = False
  qk_norm: str = ''
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  activation: str = 'silu'
  gated: bool = True
  embed_scale: bool = False
  attention_scalar: float = 0.0
  attention_cap: float = 0.0
  logit_cap: float = 0.0
  windows: tuple[int, ...] = ()
  learned_positions: bool = False
  rope_local_theta: float = 0.0
  rope_layers: tuple[int, ...] = ()
  rope_fraction: float = 1.0
  rope_scaling: dict = dataclasses.field(default_factory=dict, hash=False)
  experts: int = 0
  experts_per_token: int = 0
  renormalise: bool = True
  lora_rank: int = 0
  lora_alpha: float = 16.0
  lora_targets: tuple[str, ...] = ()
  base: str = 'float32'

  def __post_init__(self):
    for name in ('windows', 'rope_layers', 'lora_targets'):  # JSON knows lists only
      object.__setattr__(self, name, tuple(getattr(self, name)))

  @property
  def matrices(self) -> tuple[str, ...]:
    """The matrices of a layer that may have adapters; those of experts may not."""
    return TARGETS[:4] + (() if self.experts else TARGETS[4:] if self.gated else TARGETS[5:])

  @property
  def layer_windows(self) -> list[int]:
    """The window of every layer."""
    return _repeated(self.windows or (0,), self.layers)

  @property
  def rotary_layers(self) -> list[int]:
    """1 for every layer with rotary positions, else 0."""
    return _repeated(self.rope_layers or (1,), self.layers)


def _repeated(pattern, count):
  return [pattern[i % len(pattern)] for i in range(count)]


def check_model_config(config: ModelConfig) -> None:
  """Raises UserError where no model has this shape."""
  names = ('vocab_size', 'embed', 'layers', 'heads', 'kv_heads', 'head_dim', 'mlp')
  sizes = {name: getattr(config, name) for name in names}
  if min(sizes.values()) < 1 or config.heads % config.kv_heads or config.head_dim % 2:
    raise UserError(
      'model: expected sizes from 1, heads a multiple of kv_heads and an even head_dim; got '
      + ', '.join(f'{name} {size}' for name, size in sizes.items())
    )
  for name, known in (
    ('dtype', DTYPES),
    ('remat', tuple(REMAT)),
    ('attention', ATTENTION),
    ('norm', NORMS),
    ('qk_norm', QK_NORMS),
    ('activation', tuple(ACTIVATIONS)),
  ):
    if getattr(config, name) not in known:
      raise UserError(
        f'model.{name}: expected one of {", ".join(map(repr, known))}, got {getattr(config, name)!r}'
      )
  if config.experts and not (
    0 < config.experts_per_token <= config.experts and config.gated and not config.mlp_bias
  ):
    raise UserError(
      f'model.experts: expected 1 to {config.experts} experts_per_token, gated, without biases; got '
      f'{config.experts_per_token}'
    )
  if config.lora_rank:
    can = config.matrices
    if config.lora_rank < 0 or not config.lora_targets or not set(config.lora_targets) <= set(can):
      raise UserError(
        f'lora: expected a rank from 1 and targets of {", ".join(can)}; got {config.lora_rank} and '
        f'{", ".join(config.lora_targets) or "none"}'
      )
  kind = config.rope_scaling.get('rope_type')
  missing = [key for key in rope.SCALINGS.get(kind, ()) if config.rope_scaling.get(key) is None]
  if config.rope_scaling and (kind not in rope.SCALINGS or missing):
    raise UserError(
      f'model.rope_scaling: expected rope_type {", ".join(rope.SCALINGS)} and its numbers; got {kind!r}'
      + f' without {", ".join(missing)}' * bool(missing)
    )
