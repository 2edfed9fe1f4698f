"""Attention by the Splash kernel, on TPUs.

The kernel holds the scores of one tile at a time, forward and backward, and
skips the tiles that a causal or a local mask leaves empty.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as masks,
)
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_rlvr.mesh import ROWS

if TYPE_CHECKING:
  from jaxtyping import Array, Float, Int

# Tokens of a tile's side at the most, and what its sides are multiples of.
TILE, LANES = 512, 128

# Name of what the backward kernels want of the forward one.
KEPT = 'attention'


def attend(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B T K H'],
  value: Float[Array, 'B T K H'],
  group: Int[Array, 'B T'],
  *,
  window: int | None,
  softcap: float | None,
  mesh: Mesh | None,
  interpret: bool = False,
) -> Float[Array, 'B T N H']:
  """Each token takes in the columns of its group up to its own.

  Args:
    query: multiplied by the factor of the scores already.
    key: of K heads; K divides N.
    value: of the keys.
    group: one number a sequence; what pads a row may be a group.
    window: columns that a token sees, its own included; None for all.
    softcap: scores go through softcap · tanh(score / softcap).
    mesh: over which rows and heads are cut; None for one device.
    interpret: run on any device, slowly.
  """
  length = query.shape[1]
  tile = LANES * math.ceil(length / math.ceil(length / TILE) / LANES)
  # What fills the last tile comes after all who could see it.
  fill = ((0, 0), (0, -length % tile))
  group = jnp.pad(group, fill)
  query, key, value = (
    jnp.moveaxis(jnp.pad(x, (*fill, (0, 0), (0, 0))), 2, 1)
    for x in (query, key, value)
  )
  one_device = functools.partial(
    _one_device, tile=tile, window=window, softcap=softcap, interpret=interpret
  )
  if mesh is not None:
    # XLA cannot cut a kernel by itself.
    heads, tensor = None, mesh.shape['tensor']
    if query.shape[1] % tensor == 0:
      heads = 'tensor'
      # With fewer key heads than devices, some hold the same.
      times = math.lcm(key.shape[1], tensor) // key.shape[1]
      key, value = (jnp.repeat(x, times, axis=1) for x in (key, value))
    spec = P(*ROWS, heads)
    one_device = jax.shard_map(
      one_device,
      mesh=mesh,
      in_specs=(spec, spec, spec, ROWS),
      out_specs=spec,
      check_vma=False,  # Kernels do not say how their outputs vary.
    )
  mixed = one_device(query, key, value, group)
  return jnp.moveaxis(mixed, 1, 2)[:, :length]


def _one_device(
  query, key, value, group, *, tile, window, softcap, interpret
) -> Any:  # An array, but the kernel's type tells of residuals, too.
  """The same of [B, heads, T, H], whole tiles."""
  heads, length = query.shape[1:3]
  if window is None:
    mask = masks.CausalMask((length, length))
  else:
    mask = masks.LocalMask((length, length), (window - 1, 0), offset=0)
  of_row = kernel.make_splash_mha(
    mask=masks.MultiHeadMask([mask] * heads),
    # The fused backward kernel would need less time, but a copy of the
    # queries' gradient for each tile of keys.
    block_sizes=kernel.BlockSizes(
      block_q=tile,
      block_kv=tile,
      block_kv_compute=tile,
      block_q_dkv=tile,
      block_kv_dkv=tile,
      block_kv_dkv_compute=tile,
      block_q_dq=tile,
      block_kv_dq=tile,
    ),
    attn_logits_soft_cap=softcap,
    residual_checkpoint_name=KEPT,
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  same = kernel.SegmentIds(group, group)
  return jax.vmap(of_row)(query, key, value, same)
