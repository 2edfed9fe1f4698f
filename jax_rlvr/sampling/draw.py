"""From logits to one token each, and what the trainer wants to know of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
  from jaxtyping import Array, Bool, Float, Int, Key

# The lanes of a TPU register; most vocabularies are padded to a multiple.
BLOCK = 128


class Drawn(NamedTuple):
  """One token a row, and its numbers in nats.

  Attributes:
    ids: int32.
    logprob: under the full softmax at the temperature, before any transform;
      temperature 1 where the argmax was taken.
    sampled_logprob: of the distribution drawn from; 0 for the argmax.
    entropy: of the same softmax as `logprob`.
    finite: False where a row of logits holds NaN or +inf, or nothing else than
      −inf, before the transform or after; its id and numbers are 0 then.
  """

  ids: Int[Array, '*B']
  logprob: Float[Array, '*B']
  sampled_logprob: Float[Array, '*B']
  entropy: Float[Array, '*B']
  finite: Bool[Array, '*B']


class Softmax(NamedTuple):
  """A distribution a row, not yet divided by its sum.

  Attributes:
    shifted: logits below their maximum, nats, ≤ 0.
    weights: their exponentials, 1 at the maximum.
    total: sum of the weights, from 1 to V, NaN where there is no distribution.
  """

  shifted: Float[Array, '*B V']
  weights: Float[Array, '*B V']
  total: Float[Array, '*B']

  def logprob(self, ids: Int[Array, '*B']) -> Float[Array, '*B']:
    return _at(self.shifted, ids[..., None])[..., 0] - jnp.log(self.total)

  def entropy(self) -> Float[Array, '*B']:
    # Both terms are ≥ 0: nothing cancels. A weight of 0 may stand beside −inf.
    terms = jnp.where(self.weights > 0, self.weights * self.shifted, 0.0)
    return jnp.log(self.total) - jnp.sum(terms, axis=-1) / self.total


def softmax(logits: Float[Array, '*B V'], temperature=1.0) -> Softmax:
  shifted = (logits - jnp.max(logits, -1, keepdims=True)) / temperature
  weights = jnp.exp(shifted)
  return Softmax(shifted, weights, jnp.sum(weights, axis=-1))


def draw(
  keys: Key[Array, '*B'],
  logits: Float[Array, '*B V'],
  temperature,
  transform: Callable | None = None,
  seen: Bool[Array, '*B V'] | None = None,
) -> Drawn:
  """Draws a token a row; temperature 0 takes the argmax.

  A token of probability 0 is never drawn.

  Args:
    keys: one uniform is drawn from each.
    logits: float32.
    temperature: ≥ 0, a scalar, may be traced.
    transform: from `transforms`, applied to logits / temperature (at 0 to the
      logits) before the draw or argmax.
    seen: the tokens of each row's sequence so far, for a transform that
      `reads_seen`.
  """
  greedy = jnp.equal(temperature, 0)
  temperature = jnp.where(greedy, 1.0, temperature)
  full = drawn_from = softmax(logits, temperature)
  if transform is not None:
    drawn_from = softmax(transform(logits / temperature, seen))

  def argmax():
    # On a CPU jnp.argmax would take three times as long as all the rest.
    # Not compared with 0: of logits that are products (a soft cap) the compiler
    # may fuse multiplying and subtracting, and miss 0 by a rounding error.
    shifted = drawn_from.shifted
    top = shifted == jnp.max(shifted, -1, keepdims=True)
    return inverse_cdf(top.astype(jnp.float32), jnp.ones(keys.shape))

  def random():
    uniform = jax.vmap(jax.random.uniform)(keys.reshape(-1))
    mass = uniform.reshape(keys.shape) * drawn_from.total
    return inverse_cdf(drawn_from.weights, mass)

  ids = jax.lax.cond(greedy, argmax, random)
  # Any NaN or +inf, and −inf throughout, turns the total into NaN.
  finite = jnp.isfinite(full.total) & jnp.isfinite(drawn_from.total)
  return Drawn(
    ids=jnp.where(finite, ids, 0),
    logprob=jnp.where(finite, full.logprob(ids), 0.0),
    sampled_logprob=jnp.where(finite & ~greedy, drawn_from.logprob(ids), 0.0),
    entropy=jnp.where(finite, full.entropy(), 0.0),
    finite=finite,
  )


def inverse_cdf(
  weights: Float[Array, '*B V'], mass: Float[Array, '*B']
) -> Int[Array, '*B']:
  """The first entry at which the running sum of `weights` reaches `mass`.

  With mass uniform up to their total a draw: one uniform a row instead of a
  Gumbel a vocabulary entry. The sum runs over blocks and then within one, so
  that no running sum is V long. An entry of weight 0 is never chosen, whatever
  the mass or the rounding, unless all are 0.
  """
  blocks = _blocks(weights)
  block, mass = _reach(jnp.sum(blocks, axis=-1), mass[..., None])
  inner = jnp.take_along_axis(blocks, block[..., None], axis=-2)
  within, _ = _reach(inner[..., 0, :], mass)
  return (block * BLOCK + within)[..., 0]


def _blocks(x):
  pad = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % BLOCK)]
  return jnp.pad(x, pad).reshape(*x.shape[:-1], -1, BLOCK)


def _reach(weights, mass):
  """`inverse_cdf` in one go, and what the entry supplies of the mass."""
  # A parallel running sum need not be monotone to the last bit: entries of
  # weight 0 stand aside, and `mass` may not lie above all of it.
  sums = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), -jnp.inf)
  reached = sums >= jnp.minimum(mass, jnp.max(sums, -1, keepdims=True))
  index = jnp.argmax(reached, -1, keepdims=True).astype(jnp.int32)
  return index, mass - (_at(sums, index) - _at(weights, index))


def _at(x, index):
  return jnp.take_along_axis(x, index, axis=-1)
