"""What stats and tokens say of a batch, for filters and for metrics."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_rlvr import masked
from jax_rlvr.records import Tokens, TokenStats


def log_ratio(stats: TokenStats, tokens: Tokens) -> jax.Array:
  """logprob − old_logprob, [B, T], nats; 0 outside the mask.

  Held to ±20, as verl does, so that its exp is finite; 0 where both are −inf.
  """
  return bounded(stats.logprob - tokens.old_logprob, tokens.mask)


def bounded(x: jax.Array, mask: jax.Array) -> jax.Array:
  """A difference of log-probabilities, held to ±20; 0 where NaN or masked."""
  return jnp.clip(jnp.where(mask & ~jnp.isnan(x), x, 0.0), -20.0, 20.0)


def within(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Where `bounded` leaves a difference as it is: a clamp's gradient is 1."""
  return mask & (jnp.abs(x) <= 20.0)


def covariance(stats: TokenStats, tokens: Tokens) -> jax.Array:
  """(logprob − mean logprob)(advantage − mean advantage), [B, T].

  Equation 10 of Cui et al., `The Entropy Mechanism
  <https://arxiv.org/abs/2505.22617>`_, 2025: its mean is the rate at which a
  natural policy gradient lowers the entropy. Means over the completion tokens
  of the batch, those of logprob −inf aside; nats × advantage; 0 outside the
  mask.
  """
  finite = tokens.mask & jnp.isfinite(stats.logprob)
  logprob = stats.logprob - masked.mean(stats.logprob, finite)
  advantage = tokens.advantage - masked.mean(tokens.advantage, tokens.mask)
  product = jnp.where(advantage == 0, 0.0, logprob * advantage)
  return jnp.where(tokens.mask, product, 0.0)


def summary(stats: TokenStats, tokens: Tokens) -> dict[str, jax.Array]:
  """Scalars that explain an inner step, before its weights move.

  * `ratio/max`, and `kl/old`: k3 estimate of KL(old ‖ current), nats;
    `kl/reference`: of KL(current ‖ reference), where there is one.
  * `covariance/mean`, and `covariance/top_…`: mean covariance of that share of
    the tokens, as in Table 1 of the Entropy Mechanism; finite ones only.
    `covariance/p01` to `p99`: percentiles over the same tokens.
  * `entropy/p50`, `p80`, `p95`: percentiles of token entropy, nats; the 80th
    is where the 80/20 paper cuts.
  """
  mask = tokens.mask
  x = log_ratio(stats, tokens)
  cov = covariance(stats, tokens)
  n = masked.count(mask)
  shares = (2e-4, 2e-3, 2e-2, 0.2, 0.5)
  counts = jnp.stack([jnp.maximum(masked.share(s, n), 1) for s in shares])
  finite = mask & jnp.isfinite(cov)
  tops = jax.vmap(lambda count: masked.top_mean(cov, finite, count))(counts)
  percentiles = _percentiles(cov, finite, (1, 5, 25, 50, 75, 95, 99))
  scalars = {
    'ratio/max': masked.largest_value(jnp.exp(x), mask),
    'kl/old': masked.mean(jnp.expm1(x) - x, mask),
    'covariance/mean': masked.mean(cov, finite),
    **{f'covariance/top_{s:g}': tops[i] for i, s in enumerate(shares)},
    **{f'covariance/{p}': x for p, x in percentiles.items()},
  }
  if tokens.ref_logprob is not None:
    y = bounded(tokens.ref_logprob - stats.logprob, mask)
    scalars['kl/reference'] = masked.mean(jnp.expm1(y) - y, mask)
  if stats.entropy is not None:
    percentiles = _percentiles(stats.entropy, mask, (50, 80, 95))
    scalars |= {f'entropy/{p}': x for p, x in percentiles.items()}
  return scalars


def _percentiles(
  x: jax.Array, mask: jax.Array, percents: tuple[int, ...]
) -> dict[str, jax.Array]:
  """`p01` and so on; 0 where the mask is empty."""
  values = jax.vmap(lambda q: masked.quantile(x, mask, q))(
    jnp.array(percents) / 100
  )
  values = jnp.where(jnp.any(mask), values, 0.0)
  return {f'p{p:02}': values[i] for i, p in enumerate(percents)}


class Gap(NamedTuple):
  """How far the sampler is from the trainer, added up over tokens.

  Attributes:
    absolute: of the differences of log-probability, nats.
    largest: of the same.
    k3: estimates of KL(sampler ‖ trainer), nats.
    count: int32, tokens.
  """

  absolute: jax.Array
  largest: jax.Array
  k3: jax.Array
  count: jax.Array


def gap(trainer: jax.Array, sampler: jax.Array, mask: jax.Array) -> Gap:
  """Of log-probabilities of the same tokens under the same weights.

  A token for which the sampler has NaN does not count.
  """
  mask = mask & ~jnp.isnan(sampler)
  x = bounded(trainer - sampler, mask)
  apart = jnp.abs(x)
  k3 = jnp.sum(jnp.expm1(x) - x)
  return Gap(jnp.sum(apart), jnp.max(apart), k3, masked.count(mask))


def joined(a: Gap, b: Gap) -> Gap:
  """Of the tokens of both."""
  return Gap(
    a.absolute + b.absolute,
    jnp.maximum(a.largest, b.largest),
    a.k3 + b.k3,
    a.count + b.count,
  )


def mismatch(gap: Gap) -> dict[str, jax.Array]:
  """`mismatch/mean` and `/max` of |Δ log-probability|, `mismatch/kl`; nats.

  Before the weights move sampler and trainer should say the same: what is
  here is numerics, or a fault.
  """
  n = jnp.maximum(gap.count, 1)
  return {
    'mismatch/mean': gap.absolute / n,
    'mismatch/max': gap.largest,
    'mismatch/kl': gap.k3 / n,
  }
