"""Checksums of arrays: whether what was restored is what was saved."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
  from jaxtyping import Array, UInt


def checksums(tree: Any) -> dict[str, int]:
  """A 32-bit checksum of each array of a tree, by its path.

  Computed where the arrays lie, and the same however a mesh cuts them: it adds
  up integers that wrap, in any order. Any change of a single value is noticed,
  and of several with all but certainty.
  """
  named = {
    jax.tree_util.keystr(path, simple=True, separator='/'): x
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }
  # A program takes arrays of the same devices; one after the other, since each
  # waits for all of its devices.
  by_devices = collections.defaultdict(dict)
  for name, x in named.items():
    devices = x.devices() if isinstance(x, jax.Array) else ()
    by_devices[frozenset(devices)][name] = x
  found = {}
  for arrays in by_devices.values():
    found |= jax.device_get(_checksums(arrays))
  return {name: int(found[name]) for name in named}


@jax.jit
def _checksums(arrays: dict[str, Array]) -> dict[str, UInt[Array, '']]:
  return {name: _checksum(jnp.asarray(x)) for name, x in arrays.items()}


def _checksum(x: Array) -> UInt[Array, '']:
  bits = f'uint{8 * x.dtype.itemsize}'
  value = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    place *= jnp.uint32(size)
    place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  return jnp.sum(_mixed(value ^ _mixed(place)), dtype=jnp.uint32)


def _mixed(x: Array) -> Array:
  """A bijection of uint32 that spreads every bit over all: MurmurHash3's end.

  Reference: Appleby, `SMHasher <https://github.com/aappleby/smhasher>`_, 2016.
  """
  x ^= x >> 16
  x *= jnp.uint32(0x85EBCA6B)
  x ^= x >> 13
  x *= jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
