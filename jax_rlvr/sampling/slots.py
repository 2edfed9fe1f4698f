"""The jitted programs of the sampler, over S slots.

A slot decodes one sequence. `segment` is the loop: it leaves after a number of
tokens, or when enough slots are idle, and the host fills those and calls again.
Slots lie in `shards` equal blocks, one a data shard; what is copied between
slots stays within its block, so that no program moves a cache between devices.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_rlvr import mesh as layouts
from jax_rlvr import policy
from jax_rlvr.policy import Cache, PolicyConfig, Prompts, Rings, attention
from jax_rlvr.policy.pages import Pages
from jax_rlvr.sampling.draw import Drawn, draw
from jax_rlvr.sampling.transforms import Transform

if TYPE_CHECKING:
  from jaxtyping import Array, Bool, Float, Int, Key, UInt


class Slots(NamedTuple):
  """S sequences, and where each of them is.

  Attributes:
    cache: keys and values of all but the newest token.
    column: int32 scalar, of the cache, to be written next.
    ids: int32 [S], the newest token.
    lengths: int32 [S], tokens before it.
    counts: int32 [S], completion tokens so far.
    limits: int32 [S], completion tokens at the most.
    keys: [S], one a completion; each token folds in its number.
    live: bool [S].
    seen: bool [S, V], tokens of the sequence; None where nothing reads it.
  """

  cache: Cache
  column: Int[Array, '']
  ids: Int[Array, ' S']
  lengths: Int[Array, ' S']
  counts: Int[Array, ' S']
  limits: Int[Array, ' S']
  keys: Key[Array, ' S']
  live: Bool[Array, ' S']
  seen: Bool[Array, 'S V'] | None


class Entries(NamedTuple):
  """M sequences for the slots, as many for each shard.

  Attributes:
    slots: int32 [M], within the shard; past its last for none.
    sources: int32 [M], which of the shard's prompts each one continues.
    ids: int32 [M], the newest token.
    lengths: int32 [M], tokens before it.
    counts: int32 [M], completion tokens among all these.
    limits: int32 [M], completion tokens at the most.
    keys: uint32 [M, 2], the data of one a completion.
    seen: bool [M, V], or None.
  """

  slots: Int[np.ndarray, ' M']
  sources: Int[np.ndarray, ' M']
  ids: Int[np.ndarray, ' M']
  lengths: Int[np.ndarray, ' M']
  counts: Int[np.ndarray, ' M']
  limits: Int[np.ndarray, ' M']
  keys: UInt[np.ndarray, 'M 2']
  seen: Bool[np.ndarray, 'M V'] | None


@functools.partial(
  jax.jit,
  static_argnames=(
    'config',
    'kind',
    'count',
    'columns',
    'dtype',
    'remembers',
    'mesh',
  ),
)
def empty(
  config: PolicyConfig,
  kind: type[Rings] | type[Pages],
  count: int,
  columns: int,
  dtype: jax.typing.DTypeLike,
  remembers: bool,
  mesh: Mesh,
) -> Slots:
  """S = `count` idle slots with `columns` columns each."""
  zeros = jnp.zeros(count, jnp.int32)
  seen = jnp.zeros((count, config.vocab_size), bool) if remembers else None
  slots = Slots(
    kind.empty(config, count, columns, dtype, mesh), jnp.int32(0),
    zeros, zeros, zeros, zeros,
    jnp.broadcast_to(jax.random.key(0), (count,)), zeros > 0, seen,
  )  # fmt: skip
  return _cut(mesh, slots)


@functools.partial(jax.jit, static_argnames=('config', 'backend', 'mesh'))
def prefill(
  config: PolicyConfig,
  weights: dict[str, Any],
  ids: Int[Array, 'P T'],
  backend: attention.Backend,
  mesh: Mesh,
) -> Prompts:
  """Keys and values of prompts, padded at the end."""
  kept = policy.prefill(config, weights, ids, backend)
  return layouts.cut(mesh, kept, layouts.PROMPTS)


@functools.partial(
  jax.jit, static_argnames=('shards', 'mesh'), donate_argnames='slots'
)
def admit(
  slots: Slots, prompts: Prompts, entries: Entries, shards: int, mesh: Mesh
) -> Slots:
  """Begins sequences, in slots that are idle."""

  def of_shard(slots, prompts, entries):
    _, column, *old = slots

    def put(x, new):
      return x.at[entries.slots].set(new, mode='drop')

    cache = slots.cache.admit(
      prompts, entries.slots, entries.sources, entries.lengths, column
    )
    keys = jax.random.wrap_key_data(entries.keys)
    live = jnp.ones_like(entries.slots, bool)
    new = (*entries[2:6], keys, live, entries.seen)
    return Slots(cache, column, *jax.tree.map(put, tuple(old), new))

  slots = _by_shard(of_shard, slots, shards, prompts, entries)
  return _cut(mesh, slots)


@functools.partial(
  jax.jit, static_argnames=('config', 'columns', 'shards', 'mesh')
)
def repack(
  config: PolicyConfig,
  slots: Slots,
  chosen: Int[Array, ' M'],
  columns: int,
  shards: int,
  mesh: Mesh,
) -> Slots:
  """As many chosen slots of each shard, with another number of columns."""

  def of_shard(slots, chosen):
    cache, column, *rest = slots
    cache = cache.repack(config, chosen, column, columns)
    return Slots(cache, column, *jax.tree.map(lambda x: x[chosen], rest))

  return _cut(mesh, _by_shard(of_shard, slots, shards, chosen))


@functools.partial(
  jax.jit,
  static_argnames=('config', 'steps', 'transform', 'mesh'),
  donate_argnames='slots',
)
def segment(
  config: PolicyConfig,
  weights: dict[str, Any],
  slots: Slots,
  temperature: Float[Array, ''],
  end_ids: Int[Array, ' E'],
  idle: Int[Array, ''],
  steps: int,
  transform: Transform | None,
  mesh: Mesh,
) -> tuple[Slots, Drawn]:
  """Decodes until all slots have drawn `steps` tokens, or some are idle.

  Args:
    config: of the policy.
    weights: of the policy, unstacked.
    slots: all of them, idle ones too.
    temperature: 0 for argmax.
    end_ids: any of them ends a completion.
    idle: number of idle slots at which to leave.
    steps: tokens M at the most.
    transform: of the distribution that is drawn from.
    mesh: the devices.

  Returns:
    The slots, and what they drew, [S, M]: a slot that was live at the start has
    as many numbers as its count has grown.
  """
  fold = jax.vmap(jax.random.fold_in)

  def body(carry):
    step, slots, drawn = carry
    hidden, cache = policy.decode(
      config, weights, slots.cache, slots.ids, slots.lengths, slots.column
    )
    new = draw(
      fold(slots.keys, slots.counts),
      policy.logits(config, weights, hidden),
      temperature,
      transform,
      slots.seen,
    )
    drawn = jax.tree.map(
      lambda x, n: jax.lax.dynamic_update_index_in_dim(x, n, step, 1),
      drawn,
      new,
    )
    live = slots.live
    counts = slots.counts + live
    ended = jnp.any(new.ids[:, None] == end_ids[None], axis=1)
    seen = slots.seen
    if seen is not None:
      seen = seen.at[jnp.arange(live.size), new.ids].max(live)
    slots = slots._replace(
      cache=cache,
      column=slots.column + 1,
      ids=jnp.where(live, new.ids, slots.ids),
      lengths=slots.lengths + live,
      counts=counts,
      live=live & new.finite & ~ended & (counts < slots.limits),
      seen=seen,
    )
    return step + 1, slots, drawn

  def goes_on(carry):
    step, slots, _ = carry
    busy = jnp.sum(slots.live, dtype=jnp.int32)
    return (step < steps) & (busy > 0) & (slots.live.size - busy < idle)

  count = slots.live.size
  one = jax.eval_shape(
    lambda: draw(
      slots.keys, jnp.zeros((count, config.vocab_size)), temperature, transform,
      slots.seen,
    )
  )  # fmt: skip
  drawn = jax.tree.map(lambda x: jnp.zeros((count, steps), x.dtype), one)
  drawn = layouts.cut(mesh, drawn, layouts.ROWS)
  _, slots, drawn = jax.lax.while_loop(
    goes_on, body, (jnp.int32(0), slots, drawn)
  )
  return _cut(mesh, slots), drawn


def _cut(mesh: Mesh, slots: Slots) -> Slots:
  """Slots over the data axes, heads over the others."""
  cache, column, *rest = slots
  rows = layouts.cut(mesh, tuple(rest), layouts.ROWS)
  return Slots(layouts.cut(mesh, cache, cache.spec), column, *rows)


def _by_shard(f, slots: Slots, shards: int, *others) -> Slots:
  """f of each shard's slots, and of its part of the others."""
  cache, column, *rest = slots

  def of_one(part, *others):
    cache, *rest = part
    cache, _, *rest = f(Slots(cache, column, *rest), *others)
    return cache, *rest

  parts = jax.tree.map(
    lambda x: x.reshape(shards, -1, *x.shape[1:]), ((cache, *rest), *others)
  )
  done = jax.vmap(of_one)(*parts)
  cache, *rest = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), done)
  return Slots(cache, column, *rest)
