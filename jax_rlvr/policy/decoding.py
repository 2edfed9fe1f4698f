"""The decoder one token at a time, against a cache of what came before.

S sequences are decoded together. Layers are unstacked here: inside a decoding
loop XLA would copy every slice of a stacked weight.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_rlvr.mesh import CACHE
from jax_rlvr.policy import attention, decoder
from jax_rlvr.policy.config import PolicyConfig

if TYPE_CHECKING:
  from typing import Self

  from jaxtyping import Array, Float, Int


# Rows for which `turned` turns the product.
FEW = 256


class Prompts(NamedTuple):
  """Keys and values of P prompts, L arrays [P, T, K, H] each."""

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]


class Cache(Protocol):
  """Keys and values of what S sequences have read: a pytree of arrays.

  `column` counts the tokens that have been decoded, whatever the sequence.
  """

  @property
  def spec(self) -> P:
    """How the mesh cuts its arrays."""
    ...

  @property
  def widens(self) -> bool:
    """Whether reading costs the room there is, so that narrow ones pay."""
    ...

  def admit(
    self,
    prompts: Prompts,
    slots: Int[Array, ' M'],
    sources: Int[Array, ' M'],
    lengths: Int[Array, ' M'],
    column: Int[Array, ''],
  ) -> Self:
    """Gives M slots the first tokens of prompts.

    Args:
      prompts: P of them.
      slots: to fill; number S is nobody's.
      sources: which prompt each takes.
      lengths: how many of its tokens.
      column: that is written next.
    """
    ...

  def repack(
    self,
    config: PolicyConfig,
    slots: Int[Array, ' M'],
    column: Int[Array, ''],
    columns: int,
  ) -> Self:
    """M of the slots, with room for another number of tokens."""
    ...

  def attend(
    self,
    config: PolicyConfig,
    layer: int,
    lengths: Int[Array, ' S'],
    column: Int[Array, ''],
  ) -> attention.Attend:
    """`attend(query [S, N, H], key [S, K, H], value, local)` of a layer.

    It reads what came before and the token itself, and hands on what `written`
    wants of the layer.
    """
    ...

  def written(self, kept: list[Any]) -> Self:
    """The cache with the newest token of every layer."""
    ...


class Rings(NamedTuple):
  """A ring of columns for each sequence, all written at the same column.

  Each ring turns by one a token. A sequence's newest token lies in the column
  just written, the one before it in the column before, and so on; where its
  first one lies is nobody's concern. So no write is a scatter, and attention
  reads a window as wide as the longest sequence, not the longest that could be.
  A layer that sees a window of the past keeps no more than that.

  Attributes:
    keys: L arrays [S, K, H, W]; columns last, as scores want them.
    values: L arrays [S, K, W, H].
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]

  spec = CACHE
  widens = True

  @classmethod
  def empty(
    cls,
    config: PolicyConfig,
    slots: int,
    columns: int,
    dtype: jax.typing.DTypeLike,
    mesh: Mesh | None = None,
  ) -> Rings:
    """S slots with room for `columns` tokens each."""
    widths = [
      min(columns, config.window) if local and config.window else columns
      for local in config.is_local
    ]
    heads, size = config.kv_heads, config.head_size
    return cls(
      tuple(jnp.zeros((slots, heads, size, width), dtype) for width in widths),
      tuple(jnp.zeros((slots, heads, width, size), dtype) for width in widths),
    )

  def admit(self, prompts, slots, sources, lengths, column) -> Rings:
    """See `Cache`."""

    def put(x, prompt, axis):
      t = lengths[:, None] - 1 - _ages(column, x.shape[axis])[None]
      # [M, W, K, H]; columns older than the prompt are never seen.
      row = prompt[sources[:, None], jnp.clip(t, 0, prompt.shape[1] - 1)]
      row = row.transpose((0, 2, 3, 1) if axis == 3 else (0, 2, 1, 3))
      return x.at[slots].set(row, mode='drop')

    return Rings(
      tuple(map(functools.partial(put, axis=3), self.keys, prompts.keys)),
      tuple(map(functools.partial(put, axis=2), self.values, prompts.values)),
    )

  def repack(self, config, slots, column, columns) -> Rings:
    """See `Cache`."""
    dtype = self.keys[0].dtype
    shape = jax.eval_shape(lambda: Rings.empty(config, 1, columns, dtype))

    def turned(x, like, axis):
      old = (column - 1 - _ages(column, like.shape[axis])) % x.shape[axis]
      return jnp.take(x[slots], old, axis=axis)

    return Rings(
      tuple(map(functools.partial(turned, axis=3), self.keys, shape.keys)),
      tuple(map(functools.partial(turned, axis=2), self.values, shape.values)),
    )

  def attend(self, config, layer, lengths, column) -> attention.Attend:
    """See `Cache`."""

    def attend(query, key, value, local):
      width = self.keys[layer].shape[3]
      write = jax.lax.dynamic_update_slice_in_dim
      here = column % width
      keys = write(self.keys[layer], key[..., None], here, axis=3)
      values = write(self.values[layer], value[:, :, None], here, axis=2)
      s, n, h = query.shape
      scores = jnp.einsum(
        'skrh,skht->skrt',
        query.reshape(s, key.shape[1], -1, h),
        keys,
        preferred_element_type=jnp.float32,
      )
      scores = attention.capped(
        scores * attention.scale(config), config.attention_softcap
      )
      age = _ages(column + 1, width)
      seen = age[None] <= lengths[:, None]
      if local:
        seen &= (age < config.window)[None]
      scores = jnp.where(seen[:, None, None], scores, attention.UNSEEN)
      weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
      mixed = jnp.einsum(
        'skrt,skth->skrh', weights, values, preferred_element_type=jnp.float32
      )
      return mixed.astype(value.dtype).reshape(s, n, h), (keys, values)

    return attend

  def written(self, kept) -> Rings:
    """See `Cache`."""
    return Rings(*zip(*kept, strict=True))


def _ages(column, width: int) -> jax.Array:
  """Tokens between each column of a ring and the newest before `column`."""
  return (column - 1 - jnp.arange(width)) % width


def unstack(params: decoder.Params, turn: bool = False) -> dict[str, Any]:
  """Parameters with the blocks as a list of L layers.

  Args:
    params: stacked.
    turn: matrices of layers as [F, D], for `turned`.
  """
  leaves, tree = jax.tree.flatten(params['blocks'])
  layers = [tree.unflatten(layer) for layer in zip(*leaves, strict=True)]
  if turn:
    layers = [
      {name: _turned(name, x) for name, x in layer.items()} for layer in layers
    ]
  return params | {'blocks': layers}


def _turned(name: str, weight: jax.Array) -> jax.Array:
  if weight.ndim == 1 or name.endswith('_bias'):
    return weight
  if name == 'output':
    return weight.reshape(-1, weight.shape[-1]).T
  return weight.reshape(weight.shape[0], -1).T


def turned(
  x: jax.Array, weight: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
  """`decoder.product` for a weight [F, D], faster on CPUs for few rows.

  XLA:CPU's matrix product packs its right operand each time: that had better
  be the activations, while there are few.
  """
  rows = x.reshape(-1, weight.shape[1])
  if len(rows) > FEW:
    out = rows @ weight.T
  else:
    out = jnp.einsum('fd,sd->fs', weight, rows)
    # Else XLA would turn the product itself.
    out = jax.lax.optimization_barrier(out).T
  return out.reshape(*x.shape[:-1], *shape)


def _product(params) -> decoder.Product:
  """What the layers of unstacked parameters are made for."""
  is_turned = params['blocks'][0]['query'].ndim == 2
  return turned if is_turned else decoder.product


def prefill(
  config: PolicyConfig,
  params: dict[str, Any],
  ids: Int[Array, 'P T'],
  backend: attention.Backend = attention.XLA,
) -> Prompts:
  """Reads prompts, padded at the end; `params` are unstacked."""
  layout = attention.plain(*ids.shape)
  attend = backend.attend(config, layout)

  def keeping(query, key, value, local):
    return attend(query, key, value, local)[0], (key, value)

  rotate = decoder.rotary(config, layout.positions)
  x = decoder.embed(config, params, ids)
  kept = []
  for weights, local in zip(params['blocks'], config.is_local, strict=True):
    block = decoder.block_from(config, weights)
    x, pair = block(x, rotate, keeping, local, _product(params))
    kept.append(pair)
  return Prompts(*zip(*kept, strict=True))


def decode(
  config: PolicyConfig,
  params: dict[str, Any],
  cache: Cache,
  ids: Int[Array, ' S'],
  lengths: Int[Array, ' S'],
  column: Int[Array, ''],
) -> tuple[Float[Array, 'S D'], Cache]:
  """Reads a token of every sequence.

  Args:
    config: of the policy.
    params: unstacked.
    cache: of what came before.
    ids: the tokens.
    lengths: tokens before each.
    column: to write.

  Returns:
    The hidden states that score the next tokens, and the cache.
  """
  rotate = decoder.rotary(config, lengths)
  x = decoder.embed(config, params, ids)
  kept = []
  for layer, local in enumerate(config.is_local):
    block = decoder.block_from(config, params['blocks'][layer])
    attend = cache.attend(config, layer, lengths, column)
    x, new = block(x, rotate, attend, local, _product(params))
    kept.append(new)
  hidden = decoder.rms_norm(config, x, params['norm'])
  return hidden, cache.written(kept)
