"""From logits to one token each, and what the trainer wants to know of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
  from jaxtyping import Array, Float, Int, Key


class Drawn(NamedTuple):
  """One token a row, with nats under the temperature-scaled full softmax.

  `sampled_logprob` is of the distribution that was drawn from: 0 for argmax.
  """

  ids: Int[Array, '*B']
  logprob: Float[Array, '*B']
  sampled_logprob: Float[Array, '*B']
  entropy: Float[Array, '*B']


def draw(
  keys: Key[Array, '*B'], logits: Float[Array, '*B V'], temperature
) -> Drawn:
  """Draws a token a row; temperature 0 takes the argmax.

  At temperature 0 logprob and entropy are those of temperature 1.
  """
  greedy = temperature == 0
  scaled = logits / jnp.where(greedy, 1.0, temperature)
  logprobs = jax.nn.log_softmax(scaled, axis=-1)
  probs = jnp.exp(logprobs)
  entropy = -jnp.sum(probs * logprobs, axis=-1)
  flat_keys = keys.reshape(-1)
  uniform = jax.vmap(jax.random.uniform)(flat_keys).reshape(keys.shape)
  ids = jnp.where(greedy, jnp.argmax(logits, -1), inverse_cdf(probs, uniform))
  logprob = jnp.take_along_axis(logprobs, ids[..., None], axis=-1)[..., 0]
  return Drawn(ids, logprob, jnp.where(greedy, 0.0, logprob), entropy)


def inverse_cdf(
  weights: Float[Array, '*B V'], uniform: Float[Array, '*B']
) -> Int[Array, '*B']:
  """The entry where the running sum of `weights` passes uniform · total.

  One uniform a row instead of a Gumbel a vocabulary entry. The sum runs over
  √V blocks and then within one, so that no running sum is V long. Entries of
  weight 0 are never chosen.
  """
  size = weights.shape[-1]
  block = max(1, round(size**0.5))
  pad = -size % block
  padded = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, pad)])
  blocks = padded.reshape(*weights.shape[:-1], -1, block)
  sums = jnp.cumsum(jnp.sum(blocks, axis=-1), axis=-1)
  target = uniform * sums[..., -1]
  chosen, before = _passed(sums, target)
  inner = jnp.take_along_axis(blocks, chosen[..., None, None], axis=-2)
  within, _ = _passed(jnp.cumsum(inner[..., 0, :], axis=-1), target - before)
  return chosen * block + within


def _passed(sums, target):
  """First index whose running sum exceeds target, and the sum before it."""
  # Rounding may leave target at the total: stop at the last that adds to it.
  last = jnp.sum(sums < sums[..., -1:], axis=-1)
  index = jnp.minimum(jnp.sum(sums <= target[..., None], axis=-1), last)
  index = index.astype(jnp.int32)
  previous = jnp.take_along_axis(
    sums, jnp.maximum(index - 1, 0)[..., None], axis=-1
  )[..., 0]
  return index, jnp.where(index > 0, previous, 0.0)
