"""The policy: a decoder in Flax NNX, one block for training and for sampling.

A block is the same code wherever it runs; what differs is how its queries
meet keys and values, which the caller passes in as `attend`. Layers are
stacked and scanned, so that compile time does not grow with depth. Outside
this package parameters are a plain nested dict of arrays.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jax_rlvr import mesh as layouts
from jax_rlvr.policy import attention, splash
from jax_rlvr.policy.attention import Attend, Layout, capped
from jax_rlvr.policy.config import PolicyConfig, RopeScaling

if TYPE_CHECKING:
  from jaxtyping import Array, Float, Int

Params = dict[str, Any]

# What the backward pass keeps of a layer's forward pass.
Remat = Literal['none', 'dots', 'attention', 'full']

# Names of small weights that stay float32 whatever the compute type.
_EXACT = ('norm', 'bias')

_ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': functools.partial(jax.nn.gelu, approximate=True),
}


# (activations [..., D], weight, shape F…) → [..., F…].
Product = Callable[[jax.Array, jax.Array, tuple[int, ...]], jax.Array]


def product(
  x: jax.Array, weight: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
  """x [..., D] times weight [D…, F…], where F… is `shape`."""
  return jnp.tensordot(x, weight.reshape(x.shape[-1], *shape), 1)


class Block(nnx.Module):
  """One decoder layer."""

  def __init__(self, config: PolicyConfig, *, rngs: nnx.Rngs):
    c = config
    # Fan-in scaling; what writes to the residual stream is shrunk by the
    # number of writes, as in GPT-2, so that depth does not blow it up.
    writes = (2 * c.layers) ** -0.5

    def weight(shape, fan_in, scale=1.0):
      noise = jax.random.normal(rngs.params(), shape)
      return nnx.Param(noise * scale * fan_in**-0.5)

    def norm(size):
      return nnx.Param(_identity_norm(c, size))

    self.config = c
    attention = c.heads * c.head_size
    self.attention_norm = norm(c.width)
    self.query = weight((c.width, c.heads, c.head_size), c.width)
    self.key = weight((c.width, c.kv_heads, c.head_size), c.width)
    self.value = weight((c.width, c.kv_heads, c.head_size), c.width)
    self.output = weight((c.heads, c.head_size, c.width), attention, writes)
    self.feed_forward_norm = norm(c.width)
    self.gate = weight((c.width, c.feed_forward), c.width)
    self.up = weight((c.width, c.feed_forward), c.width)
    self.down = weight((c.feed_forward, c.width), c.feed_forward, writes)
    if c.qkv_bias:
      self.query_bias = nnx.Param(jnp.zeros((c.heads, c.head_size)))
      self.key_bias = nnx.Param(jnp.zeros((c.kv_heads, c.head_size)))
      self.value_bias = nnx.Param(jnp.zeros((c.kv_heads, c.head_size)))
    if c.qk_norm:
      self.query_norm = norm(c.head_size)
      self.key_norm = norm(c.head_size)
    if c.post_norms:
      self.attention_post_norm = norm(c.width)
      self.feed_forward_post_norm = norm(c.width)

  def __call__(
    self, x, rotate, attend: Attend, local, product: Product = product
  ):
    """x [..., D] → (x [..., D], whatever `attend` keeps)."""
    c = self.config
    norm = functools.partial(rms_norm, c)
    h = norm(x, self.attention_norm[...])
    query = product(h, self.query[...], (c.heads, c.head_size))
    key = product(h, self.key[...], (c.kv_heads, c.head_size))
    value = product(h, self.value[...], (c.kv_heads, c.head_size))
    if c.qkv_bias:
      query = _shifted(query, self.query_bias[...])
      key = _shifted(key, self.key_bias[...])
      value = _shifted(value, self.value_bias[...])
    if c.qk_norm:
      query = norm(query, self.query_norm[...])
      key = norm(key, self.key_norm[...])
    mixed, kept = attend(rotate(query, local), rotate(key, local), value, local)
    mixed = mixed.reshape(*mixed.shape[:-2], -1)
    h = product(mixed, self.output[...], (c.width,))
    x += norm(h, self.attention_post_norm[...]) if c.post_norms else h
    h = norm(x, self.feed_forward_norm[...])
    gate = product(h, self.gate[...], (c.feed_forward,))
    up = product(h, self.up[...], (c.feed_forward,))
    h = product(
      _ACTIVATIONS[c.activation](gate) * up, self.down[...], (c.width,)
    )
    x += norm(h, self.feed_forward_post_norm[...]) if c.post_norms else h
    return x, kept


class Decoder(nnx.Module):
  """Embedding, blocks stacked over L, final norm, head."""

  def __init__(self, config: PolicyConfig, *, rngs: nnx.Rngs):
    c = config
    embed = jax.random.normal(rngs.params(), (c.vocab_size, c.width))
    # A tied embedding is also the head, so it starts with the head's scale.
    self.embed = nnx.Param(embed * c.width**-0.5)

    @nnx.split_rngs(splits=c.layers)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stack(rngs):
      return Block(c, rngs=rngs)

    self.blocks = stack(rngs)
    self.norm = nnx.Param(_identity_norm(c, c.width))
    if not c.tied_embeddings:
      head = jax.random.normal(rngs.params(), (c.width, c.vocab_size))
      self.head = nnx.Param(head * c.width**-0.5)


def init(config: PolicyConfig, key: jax.Array) -> Params:
  """Random weights, float32."""
  model = Decoder(config, rngs=nnx.Rngs(params=key))
  return nnx.to_pure_dict(nnx.state(model))


def abstract_params(config: PolicyConfig) -> Params:
  """The tree of `init` with ShapeDtypeStructs for leaves."""
  return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def cast(params: Params, dtype: jax.typing.DTypeLike) -> Params:
  """Params to compute with: matrices cast, norms and biases as they are."""

  def one(path, x):
    kept = jax.tree_util.keystr(path[-1:], simple=True).endswith(_EXACT)
    return x if kept or x.dtype == dtype else x.astype(dtype)

  return jax.tree_util.tree_map_with_path(one, params)


@functools.cache
def _block_graph(config: PolicyConfig):
  """Graph definition of one block and the abstract state it merges with."""
  block = nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0)))
  return nnx.split(block)


def block_from(config: PolicyConfig, weights: Params) -> Block:
  """The block of one layer from its plain weights."""
  graph, state = _block_graph(config)
  state = nnx.clone(state)
  nnx.replace_by_pure_dict(state, weights)
  return nnx.merge(graph, state)


def _identity_norm(config: PolicyConfig, size: int):
  return jnp.zeros(size) if config.unit_offset else jnp.ones(size)


def _broadcast(weight, x):
  return jnp.expand_dims(weight, range(x.ndim - weight.ndim))


def _shifted(x, bias):
  """x + bias; a float32 bias has a float32 gradient."""
  return (x + _broadcast(bias, x)).astype(x.dtype)


def rms_norm(config: PolicyConfig, x, weight):
  """Root-mean-square norm over the last axis, in float32."""
  x32 = x.astype(jnp.float32)
  mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
  weight = _broadcast(weight.astype(jnp.float32), x) + config.unit_offset
  normed = x32 * jax.lax.rsqrt(mean_square + config.norm_eps)
  return (normed * weight).astype(x.dtype)


class _Angles(NamedTuple):
  """Sine and cosine of the rotations, [..., 1, H / 2]."""

  sin: jax.Array
  cos: jax.Array


def rotary(config: PolicyConfig, positions: jax.Array):
  """`rotate(x [..., n, H], local)` at `positions` [...] (halves convention).

  `local` says whether the layer has a window, and may be traced.
  """
  half = config.head_size // 2
  powers = -jnp.arange(half, dtype=jnp.float32) / half

  def angles(frequency):
    frequency = jnp.expand_dims(frequency, range(positions.ndim + 1))
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return _Angles(jnp.sin(angle), jnp.cos(angle))

  everywhere = angles(_scaled(config.rope_theta**powers, config.rope_scaling))
  near = everywhere
  if config.local_rope_theta is not None:
    near = angles(config.local_rope_theta**powers)

  def rotate(x, local):
    sin, cos = everywhere
    if near is not everywhere:
      sin, cos = jax.tree.map(
        lambda a, b: jnp.where(local, a, b), near, everywhere
      )
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(x.dtype)

  return rotate


def _scaled(frequency: jax.Array, scaling: RopeScaling | None) -> jax.Array:
  if scaling is None:
    return frequency
  slow = frequency / scaling.factor
  if scaling.kind == 'linear':
    return slow
  # Turns that the rotation makes within the original length.
  turns = frequency * scaling.original_max_tokens / (2 * math.pi)
  low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
  kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
  return kept * frequency + (1.0 - kept) * slow


@jax.custom_vjp
def _looked_up(table, ids):
  return table[ids]


def _looked_up_backward(saved, grad):
  """A frequent token's many small shares are summed in float32."""
  table, ids = saved
  total = jnp.zeros(table.shape, jnp.float32)
  return total.at[ids].add(grad.astype(jnp.float32)).astype(table.dtype), None


_looked_up.defvjp(
  lambda table, ids: (table[ids], (table, ids)), _looked_up_backward
)


def embed(config: PolicyConfig, params: Params, ids: jax.Array) -> jax.Array:
  """Token embeddings [..., D]."""
  # Else the partitioner would cut what it looks up as the table is cut.
  x = layouts.laid(_looked_up(params['embed'], ids), layouts.ROWS)
  if config.scale_embeddings:
    # Rounded as the models were trained: the factor has the weights' type.
    x *= jnp.asarray(config.width**0.5, x.dtype)
  return x


def scan_blocks(
  config: PolicyConfig, blocks, x, rotate, attend: Attend, remat: Remat = 'full'
):
  """Runs x through the stacked blocks → (x, kept stacked over L)."""
  kinds = set(config.is_local)

  def layer(x, weights_and_local):
    weights, local = weights_and_local
    # Known where all layers are of one kind.
    local = kinds == {True} if len(kinds) == 1 else local
    x, kept = block_from(config, weights)(x, rotate, attend, local)
    return layouts.laid(x, layouts.ROWS), kept

  if remat != 'none':
    policies = jax.checkpoint_policies
    # Inside a scan nothing is there to be merged with what is recomputed.
    layer = jax.checkpoint(
      layer,
      prevent_cse=False,
      policy={
        'full': policies.nothing_saveable,
        'dots': policies.dots_with_no_batch_dims_saveable,
        'attention': policies.save_only_these_names(splash.KEPT),
      }[remat],
    )
  return jax.lax.scan(layer, x, (blocks, jnp.array(config.is_local)))


def forward(
  config: PolicyConfig,
  params: Params,
  ids: Int[Array, 'B T'],
  layout: Layout | None = None,
  *,
  remat: Remat = 'full',
  backend: attention.Backend = attention.XLA,
) -> Float[Array, 'B T D']:
  """Hidden states after the final norm.

  Args:
    config: of the policy.
    params: of the policy.
    ids: tokens, padded at the end.
    layout: of the rows; one sequence a row if None.
    remat: what the backward pass keeps of each layer: all it needs ('none'),
      the outcomes of its projections ('dots'), its input and what the Splash
      kernel made ('attention'), or its input alone ('full').
    backend: of attention.
  """
  if layout is None:
    layout = attention.plain(*ids.shape)
  rotate = rotary(config, layout.positions)
  attend = backend.attend(config, layout)
  x = embed(config, params, ids)
  x, _ = scan_blocks(config, params['blocks'], x, rotate, attend, remat)
  return rms_norm(config, x, params['norm'])


def head(params: Params) -> Float[Array, 'D V']:
  """The output projection; the transposed embedding when tied."""
  return params['head'] if 'head' in params else params['embed'].T


def logits(
  config: PolicyConfig, params: Params, hidden: Float[Array, '*B D']
) -> Float[Array, '*B V']:
  """Float32 logits of hidden states."""
  scores = jnp.einsum(
    '...d,dv->...v', hidden, head(params), preferred_element_type=jnp.float32
  )
  return capped(scores, config.logit_softcap)
