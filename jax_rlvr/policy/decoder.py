"""The policy: a decoder in Flax NNX, one block for training and for sampling.

A block is the same code wherever it runs; what differs is how its queries
meet keys and values, which the caller passes in as `attend`. Layers are
stacked and scanned, so that compile time does not grow with depth. Outside
this package parameters are a plain nested dict of arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_rlvr.policy.config import PolicyConfig

if TYPE_CHECKING:
  from jaxtyping import Array, Bool, Float, Int

Params = dict[str, Any]
Attend = Callable[..., tuple[jax.Array, Any]]


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

    attention = c.heads * c.head_size
    self.attention_norm = nnx.Param(jnp.ones(c.width))
    self.query = weight((c.width, c.heads, c.head_size), c.width)
    self.key = weight((c.width, c.kv_heads, c.head_size), c.width)
    self.value = weight((c.width, c.kv_heads, c.head_size), c.width)
    self.output = weight((c.heads, c.head_size, c.width), attention, writes)
    self.feed_forward_norm = nnx.Param(jnp.ones(c.width))
    self.gate = weight((c.width, c.feed_forward), c.width)
    self.up = weight((c.width, c.feed_forward), c.width)
    self.down = weight((c.feed_forward, c.width), c.feed_forward, writes)
    self.norm_eps = c.norm_eps

  def __call__(self, x, rotate, attend: Attend):
    """x [..., D] → (x [..., D], whatever `attend` keeps)."""
    h = rms_norm(x, self.attention_norm[...], self.norm_eps)
    query = rotate(jnp.einsum('...d,dnh->...nh', h, self.query[...]))
    key = rotate(jnp.einsum('...d,dkh->...kh', h, self.key[...]))
    value = jnp.einsum('...d,dkh->...kh', h, self.value[...])
    mixed, kept = attend(query, key, value)
    x += jnp.einsum('...nh,nhd->...d', mixed, self.output[...])
    h = rms_norm(x, self.feed_forward_norm[...], self.norm_eps)
    x += (jax.nn.silu(h @ self.gate[...]) * (h @ self.up[...])) @ self.down[...]
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
    self.norm = nnx.Param(jnp.ones(c.width))
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


def rms_norm(x, weight, eps):
  """Root-mean-square norm over the last axis, in float32."""
  x32 = x.astype(jnp.float32)
  mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
  weight = jnp.expand_dims(weight, range(x.ndim - 1))
  return (x32 * jax.lax.rsqrt(mean_square + eps) * weight).astype(x.dtype)


def rotary(config: PolicyConfig, positions: jax.Array):
  """Rotation of heads [..., n, H] at `positions` [...] (halves convention)."""
  half = config.head_size // 2
  frequency = config.rope_theta ** (-jnp.arange(half) / half)
  frequency = jnp.expand_dims(frequency, range(positions.ndim + 1))
  angle = positions[..., None, None].astype(jnp.float32) * frequency
  sin, cos = jnp.sin(angle), jnp.cos(angle)

  def rotate(x):
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(x.dtype)

  return rotate


def attention(visible: Bool[Array, 'B T T'] | None, keep: bool = False):
  """Attention of rows [B, T] to what each query sees; to its past if None.

  A row that ends in padding needs no mask: only padding sees the padding.
  With `keep`, keys and values are kept for a cache.
  """

  def attend(query, key, value):
    if visible is None:
      mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    else:
      mixed = jax.nn.dot_product_attention(
        query, key, value, mask=visible[:, None]
      )
    return mixed, (key, value) if keep else None

  return attend


def scan_blocks(config, blocks, x, rotate, attend, remat=True):
  """Runs x through the stacked blocks → (x, kept stacked over L)."""

  def layer(x, weights):
    return block_from(config, weights)(x, rotate, attend)

  return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, blocks)


def forward(
  config: PolicyConfig,
  params: Params,
  ids: Int[Array, 'B T'],
  positions: Int[Array, 'B T'] | None = None,
  visible: Bool[Array, 'B T T'] | None = None,
  *,
  remat: bool = True,
) -> Float[Array, 'B T D']:
  """Hidden states after the final norm.

  Args:
    config: of the policy.
    params: of the policy.
    ids: tokens, padded at the end.
    positions: of each token in its sequence; 0 … T − 1 if None.
    visible: [b, i, j] True where token i sees token j; its past if None.
    remat: recompute each layer in the backward pass instead of keeping it.
  """
  if positions is None:
    positions = jnp.arange(ids.shape[1])[None]
  x = params['embed'][ids]
  rotate = rotary(config, positions)
  x, _ = scan_blocks(
    config, params['blocks'], x, rotate, attention(visible), remat
  )
  return rms_norm(x, params['norm'], config.norm_eps)


def head(params: Params) -> Float[Array, 'D V']:
  """The output projection; the transposed embedding when tied."""
  return params['head'] if 'head' in params else params['embed'].T


def logits(
  params: Params, hidden: Float[Array, '*B D']
) -> Float[Array, '*B V']:
  """Float32 logits of hidden states."""
  return jnp.einsum(
    '...d,dv->...v', hidden, head(params), preferred_element_type=jnp.float32
  )
