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
  whole, millionths = _product(fraction, n)
  return whole + (millionths > 0) if up else whole


def _product(fraction, n):
  """fraction · n as a whole part and millionths, both int32."""
  fraction = jnp.round(jnp.float32(fraction) * 1e6).astype(jnp.int32)
  n = jnp.asarray(n, jnp.int32)
  # n = 10⁶ a + 10³ b + c, so that no product below leaves int32.
  a, b, c = n // 1_000_000, n % 1_000_000 // 1_000, n % 1_000
  units = fraction * c
  thousands = fraction * b + units // 1_000
  whole = fraction * a + thousands // 1_000
  return whole, thousands % 1_000 * 1_000 + units % 1_000


def largest(
  score: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  count: Int[Array, ''] | Int[Array, 'B 1'],
  serial: UInt[Array, 'B T'],
  *,
  axis: int | None = None,
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
    axis: None chooses in the whole batch; −1 in each row, `count` then is
      [B, 1].
  """
  mask = mask & ~jnp.isnan(score)
  image = _ordered(score)
  threshold = _kth_largest(image, mask, count, axis)
  above = mask & (image > threshold)
  tied = mask & (image == threshold)
  missing = count - _counted(above, axis)
  first = ~serial
  last = _kth_largest(first, tied, missing, axis)
  return above | (tied & (first >= last) & (missing > 0))


def quantile(
  x: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  q,
  *,
  axis: int | None = None,
):
  """Linear-interpolation quantile over the mask, NaN where it is empty.

  As `numpy.nanquantile` of the masked values.

  Args:
    x: any float32; NaN does not count.
    mask: what counts.
    q: in [0, 1], read to a millionth; may be traced.
    axis: None for one quantile of the batch; −1 for one a row, [B, 1].
  """
  mask = mask & ~jnp.isnan(x)
  n = _counted(mask, axis)
  below, millionths = _product(q, jnp.maximum(n - 1, 0))
  image = _ordered(x)

  def at(rank_from_bottom):
    k = jnp.maximum(n - rank_from_bottom, 1)
    return _from_ordered(_kth_largest(image, mask, k, axis))

  low, high = at(below), at(below + (millionths > 0))
  weight = millionths / 1e6
  # Weights, not a step from low: from −inf no step leads anywhere but to NaN.
  # Rounding must not lead out of the interval.
  between = jnp.clip(low * (1.0 - weight) + high * weight, low, high)
  between = jnp.where(low == high, low, between)
  return jnp.where(n > 0, between, jnp.nan)


def top_mean(x: Float[Array, 'B T'], mask: Bool[Array, 'B T'], count):
  """Mean of the `count` largest of the mask; 0 where there are none."""
  mask = mask & ~jnp.isnan(x)
  count = jnp.minimum(count, jnp.sum(mask, dtype=jnp.int32))
  threshold = _from_ordered(_kth_largest(_ordered(x), mask, count, None))
  above = mask & (x > threshold)
  ties = count - jnp.sum(above, dtype=jnp.int32)
  tied = jnp.where(ties > 0, ties * threshold, 0.0)
  top = (total(x, above) + tied) / jnp.maximum(count, 1)
  return jnp.where(count > 0, top, 0.0)


def _counted(mask: jax.Array, axis: int | None) -> jax.Array:
  return jnp.sum(mask, axis, dtype=jnp.int32, keepdims=axis is not None)


def _ordered(x: jax.Array) -> jax.Array:
  """uint32 image of float32 that preserves order; −0 is 0."""
  x = jnp.where(x == 0, 0.0, x).astype(jnp.float32)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _from_ordered(image: jax.Array) -> jax.Array:
  bits = jnp.where(image >> 31 == 1, image & jnp.uint32((1 << 31) - 1), ~image)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _kth_largest(image, mask, k, axis):
  """The largest threshold that at least k images reach; 0 if fewer than k."""
  k = jnp.asarray(k, jnp.int32)

  def refine(i, threshold):
    raised = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
    reached = _counted(mask & (image >= raised), axis)
    return jnp.where(reached >= k, raised, threshold)

  return jax.lax.fori_loop(0, 32, refine, jnp.zeros_like(k, jnp.uint32))


def serial(tokens) -> UInt[Array, 'B T']:
  """The number that names each token; its place where none was given."""
  if tokens.serial is not None:
    return tokens.serial
  batch, length = tokens.mask.shape
  place = jnp.arange(batch * length, dtype=jnp.uint32)
  return place.reshape(batch, length)
