"""A cache in pages, for TPUs, read by the ragged paged attention kernel.

The kernel fetches the pages that a sequence has filled and no others, so that a
short one does not pay for a long one, nor for the room that it could fill.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as kernel
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_rlvr.mesh import PROMPTS, ROWS
from jax_rlvr.policy import attention
from jax_rlvr.policy.config import PolicyConfig
from jax_rlvr.policy.decoding import Rings

if TYPE_CHECKING:
  from jaxtyping import Array, Float, Int

  from jax_rlvr.policy.decoding import Prompts

# Tokens of a page, pages that are fetched together, and queries that are. What
# is fetched together is fetched whole: more of it means fewer fetches, and more
# that is of no use.
PAGE, PAGES, QUERIES = 128, 4, 8

# Size of a head that the kernel was made for.
LANES = 128


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['pages'],
  meta_fields=['widths', 'mesh'],
)
@dataclasses.dataclass(frozen=True)
class Pages:
  """A run of pages for each sequence, with its tokens from the first one on.

  Where a sequence's pages lie is known from its number. A layer that sees a
  window of the past writes the token after the window over its first one: in
  which order the tokens lie does not matter to attention.

  Attributes:
    pages: L arrays [S, T, 2K, H], T a multiple of the page; a key head, then
      its value head. Where the mesh cuts heads into more parts than K, heads
      that several devices need are there once for each.
    widths: L numbers of tokens after which a layer begins anew.
    mesh: over which slots and heads are cut; None for one device.
    spec: how it cuts them.
    widens: whether reading costs the room there is, so that narrow ones pay.
  """

  pages: tuple[jax.Array, ...]
  widths: tuple[int, ...]
  mesh: Mesh | None

  spec = PROMPTS
  widens = False

  @classmethod
  def empty(
    cls,
    config: PolicyConfig,
    slots: int,
    columns: int,
    dtype: jax.typing.DTypeLike,
    mesh: Mesh | None = None,
  ) -> Pages:
    """S slots with room for `columns` tokens each.

    Raises:
      ValueError: the kernel cannot read this policy's cache.
    """
    lacking = lacks(config, dtype, mesh)
    if lacking:
      raise ValueError(f'a cache in pages {lacking}; use Rings')
    widths = tuple(
      min(columns, config.window) if local and config.window else columns
      for local in config.is_local
    )
    rows = 2 * math.lcm(config.kv_heads, _tensor(mesh))
    pages = tuple(
      jnp.zeros((slots, -(-w // PAGE) * PAGE, rows, config.head_size), dtype)
      for w in widths
    )
    return cls(pages, widths, mesh)

  def admit(
    self,
    prompts: Prompts,
    slots: Int[Array, ' M'],
    sources: Int[Array, ' M'],
    lengths: Int[Array, ' M'],
    column: Int[Array, ''],
  ) -> Pages:
    """See `Cache`."""
    del column
    last = lengths[:, None] - 1

    def put(pages, width, key, value):
      places = jnp.arange(min(key.shape[1], width))[None]
      # The newest token of each place; what is none is never seen.
      t = jnp.maximum(last - (last - places) % width, 0)
      new = _rows(key, value, pages)[sources[:, None], t]
      return pages.at[slots, : places.size].set(new, mode='drop')

    return self.written(
      list(map(put, self.pages, self.widths, prompts.keys, prompts.values))
    )

  def repack(
    self,
    config: PolicyConfig,
    slots: Int[Array, ' M'],
    column: Int[Array, ''],
    columns: int,
  ) -> Pages:
    """See `Cache`."""
    del column
    like = jax.eval_shape(
      lambda: Pages.empty(config, 1, columns, self.pages[0].dtype, self.mesh)
    )

    def chosen(x, like):
      room = like.shape[1]
      # One by one: to gather them all, XLA would turn a copy of the cache.
      x = jax.lax.map(lambda slot: x[slot, :room], slots)
      return jnp.pad(x, [(0, 0), (0, room - x.shape[1]), (0, 0), (0, 0)])

    return like.written(list(map(chosen, self.pages, like.pages)))

  def attend(
    self,
    config: PolicyConfig,
    layer: int,
    lengths: Int[Array, ' S'],
    column: Int[Array, ''],
  ) -> attention.Attend:
    """See `Cache`."""
    del column
    pages = self.pages[layer]
    one_device = functools.partial(
      _one_device,
      width=self.widths[layer],
      scale=attention.scale(config),
      softcap=config.attention_softcap,
    )
    if self.mesh is not None:
      # XLA cannot cut a kernel by itself.
      heads = P(*ROWS, 'tensor')
      one_device = jax.shard_map(
        one_device,
        mesh=self.mesh,
        in_specs=(heads, heads, self.spec, ROWS),
        out_specs=(heads, self.spec),
        check_vma=False,  # Kernels do not say how their outputs vary.
      )

    def attend(query, key, value, local):
      del local  # A layer's width tells.
      return one_device(query, _rows(key, value, pages), pages, lengths)

    return attend

  def written(self, kept: list[Any]) -> Pages:
    """See `Cache`."""
    return dataclasses.replace(self, pages=tuple(kept))


def suited(
  config: PolicyConfig, dtype: jax.typing.DTypeLike, mesh: Mesh
) -> type[Rings] | type[Pages]:
  """The kind of cache for a policy: on TPUs pages, if the kernel can."""
  on_tpu = mesh.devices.flat[0].platform == 'tpu'
  can = on_tpu and lacks(config, dtype, mesh) is None
  return Pages if can else Rings


def lacks(
  config: PolicyConfig, dtype: jax.typing.DTypeLike, mesh: Mesh | None
) -> str | None:
  """Why the kernel cannot read a policy's cache; None where it can."""
  tensor = _tensor(mesh)
  if config.heads % tensor:
    return f'cannot cut {config.heads} query heads into tensor={tensor} parts'
  heads = math.lcm(config.kv_heads, tensor) // tensor
  # Four-byte words that a token has in each of H columns.
  words = 2 * heads * jnp.dtype(dtype).itemsize // 4
  size = config.head_size
  if size % LANES or (size > LANES and words > 1):
    return (
      f'takes heads of {LANES}, or one bfloat16 key head of a multiple of it a '
      f'device; here are {heads} of {size}'
    )
  if words % 8 and words not in (1, 2, 4):
    return (
      'takes 1, 2, 4 or a multiple of 8 key heads a device (of float32, 1, 2 '
      f'or a multiple of 4); here are {heads}'
    )
  return None


def _tensor(mesh: Mesh | None) -> int:
  return 1 if mesh is None else mesh.shape['tensor']


def _rows(key, value, pages) -> jax.Array:
  """[..., K, H] each → [..., 2K, H], as pages have them."""
  times = pages.shape[2] // (2 * key.shape[-2])
  pair = jnp.stack([jnp.repeat(x, times, axis=-2) for x in (key, value)], -2)
  return pair.reshape(*key.shape[:-2], *pages.shape[2:])


def _one_device(
  query: Float[Array, 'S N H'],
  new: Float[Array, 'S 2K H'],
  pages: Float[Array, 'S T 2K H'],
  lengths: Int[Array, ' S'],
  *,
  width: int,
  scale: float,
  softcap: float | None,
) -> tuple[Float[Array, 'S N H'], Float[Array, 'S T 2K H']]:
  """What each query takes in, and the pages with the new rows."""
  slots, room, *row = pages.shape
  pages = _write(pages, new, lengths % width)
  count = room // PAGE
  mixed = kernel.ragged_paged_attention(
    query,
    pages.reshape(-1, PAGE, *row),
    jnp.minimum(lengths + 1, width),
    jnp.arange(slots * count, dtype=jnp.int32).reshape(slots, count),
    jnp.arange(slots + 1, dtype=jnp.int32),
    jnp.array([slots], jnp.int32),
    sm_scale=scale,
    soft_cap=softcap,
    num_kv_pages_per_block=min(PAGES, count),
    num_queries_per_block=min(QUERIES, slots),
  )
  return mixed, pages


def _write(pages, new, places) -> jax.Array:
  """Puts a row into each slot's place, in the array that is there."""

  def write(places, new, old, pages, done):
    del old  # The same array.

    def copies(act):
      def one(slot, _):
        place = pages.at[slot, places[slot]]
        act(pltpu.make_async_copy(new.at[slot], place, done))

      jax.lax.fori_loop(0, places.size, one, None)

    # All at one time.
    copies(lambda copy: copy.start())
    copies(lambda copy: copy.wait())

  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  return pl.pallas_call(
    write,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      in_specs=[anywhere, anywhere],
      out_specs=anywhere,
      scratch_shapes=[pltpu.SemaphoreType.DMA],
    ),
    out_shape=jax.ShapeDtypeStruct(pages.shape, pages.dtype),
    input_output_aliases={2: 0},
  )(places, new, pages)
