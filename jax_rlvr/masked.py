"""Statistics over the completion tokens of a batch, wherever they live.

All of it is reductions to scalars: under any sharding a choice among all
tokens of the pod costs scalar all-reduces, never a sort or an all-gather.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
  from jaxtyping import Array, Bool, Float, Int, UInt


def count(mask: Bool[Array, 'B T']) -> Int[Array, '']:
  """True entries, int32: exact to 2³¹ where float32 stops at 2²⁴."""
  return jnp.sum(mask, dtype=jnp.int32)


def rows(mask: Bool[Array, 'B T']) -> Int[Array, '']:
  """Rows with any completion token, int32."""
  return count(jnp.any(mask, axis=-1))


def total(x: Float[Array, 'B T'], mask: Bool[Array, 'B T']):
  """Sum over the mask; what lies outside, NaN included, does not count."""
  return jnp.sum(jnp.where(mask, x, 0.0))


def mean(x: Float[Array, 'B T'], mask: Bool[Array, 'B T']):
  """Mean over the mask; 0 where the mask is empty."""
  return total(x, mask) / jnp.maximum(count(mask), 1)


def row_mean(x: Float[Array, 'B T'], mask: Bool[Array, 'B T']):
  """Mean over the mask of each row, [B]; 0 for rows without any."""
  tokens = jnp.sum(mask, axis=-1)
  return jnp.sum(jnp.where(mask, x, 0.0), -1) / jnp.maximum(tokens, 1)


def largest_value(x: Float[Array, 'B T'], mask: Bool[Array, 'B T']):
  """Maximum over the mask; 0 where the mask is empty."""
  top = jnp.max(jnp.where(mask, x, -jnp.inf))
  return jnp.where(jnp.any(mask), top, 0.0)


def share(fraction, n, *, up: bool = False) -> Int[Array, '']:
  """⌊fraction · n⌋, or ⌈fraction · n⌉ with `up`, as int32.

  Exact in integers for n below 2³¹; the fraction is read to a millionth, so
  that ⌈0.3 · 50⌉ is 15, where float32 arithmetic says 16.

  >>> int(share(0.3, 50, up=True)), int(share(2e-4, 2**31 - 1))
  (15, 429496)
  """
  millionths = jnp.round(jnp.float32(fraction) * 1e6).astype(jnp.int32)
  n = jnp.int32(n)
  # n = 10⁶ a + 10³ b + c, so that no product below leaves int32.
  a, b, c = n // 1_000_000, n % 1_000_000 // 1_000, n % 1_000
  units = millionths * c
  thousands = millionths * b + units // 1_000
  whole = millionths * a + thousands // 1_000
  remainder = (thousands % 1_000 > 0) | (units % 1_000 > 0)
  return whole + remainder if up else whole


def largest(
  score: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  count: Int[Array, ''],
  serial: UInt[Array, 'B T'],
) -> Bool[Array, 'B T']:
  """Chooses the `count` largest scores of the mask, exactly.

  The threshold is found by bisection on the bits of the score: 32 counts for
  its value and 32 for the serial number that divides the ties. Of equal
  scores those with the lowest serial are chosen. NaN is never chosen.

  Args:
    score: any float32; ±inf are ordinary, −0 equals 0.
    mask: where choosing is allowed.
    count: how many, int32, may be traced; all if there are fewer.
    serial: uint32, distinct over the mask.
  """
  mask = mask & ~jnp.isnan(score)
  image = _ordered(score)
  threshold = _kth_largest(image, mask, count)
  above = mask & (image > threshold)
  tied = mask & (image == threshold)
  missing = count - jnp.sum(above, dtype=jnp.int32)
  first = ~serial
  return above | (
    tied & (first >= _kth_largest(first, tied, missing)) & (missing > 0)
  )


def quantile(x: Float[Array, 'B T'], mask: Bool[Array, 'B T'], q):
  """Linear-interpolation quantile over the mask, NaN where it is empty.

  As `numpy.quantile` of the masked values; q in [0, 1], may be traced.
  """
  n = count(mask)
  rank = jnp.float32(q) * (n - 1).astype(jnp.float32)
  below = jnp.floor(rank)
  image = _ordered(x)

  def at(rank_from_bottom):
    k = n - rank_from_bottom.astype(jnp.int32)
    return _from_ordered(_kth_largest(image, mask, jnp.clip(k, 1, n)))

  low, high = at(below), at(jnp.ceil(rank))
  # Weights, not a step from low: from −inf no step leads anywhere but to NaN.
  weight = rank - below
  between = jnp.where(high == low, low, low * (1.0 - weight) + high * weight)
  return jnp.where(n > 0, between, jnp.nan)


def _ordered(x: jax.Array) -> jax.Array:
  """uint32 image of float32 that preserves order; −0 is 0."""
  x = jnp.where(x == 0, 0.0, x).astype(jnp.float32)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _from_ordered(image: jax.Array) -> jax.Array:
  bits = jnp.where(image >> 31 == 1, image & jnp.uint32((1 << 31) - 1), ~image)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _kth_largest(image, mask, k):
  """The largest threshold that at least k images reach; 0 if fewer than k."""

  def refine(i, threshold):
    raised = threshold | (jnp.uint32(1 << 31) >> i)
    reached = jnp.sum(mask & (image >= raised), dtype=jnp.int32)
    return jnp.where(reached >= k, raised, threshold)

  return jax.lax.fori_loop(
    0, 32, lambda i, t: refine(i.astype(jnp.uint32), t), jnp.uint32(0)
  )


def serial(tokens) -> UInt[Array, 'B T']:
  """The number that names each token; its place where none was given."""
  if tokens.serial is not None:
    return tokens.serial
  batch, length = tokens.mask.shape
  place = jnp.arange(batch * length, dtype=jnp.uint32)
  return place.reshape(batch, length)
