"""Filters that read the covariance of log-probability and advantage.

Policy entropy falls at the rate of this covariance: tokens that are both likely
and better than average (or rare and worse) are what makes it collapse.

Reference: Cui et al., `The Entropy Mechanism of Reinforcement Learning for
Reasoning Language Models <https://arxiv.org/abs/2505.22617>`_, 2025. Unlike the
authors' code, which chooses within each microbatch of each device, these
choose among all tokens of the inner batch, as the paper's equations do.
"""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp

from jax_rlvr import masked
from jax_rlvr.filters.base import Filter, keep, stateless
from jax_rlvr.policy_gradient import log_ratio
from jax_rlvr.records import Tokens, TokenStats


def covariance(stats: TokenStats, tokens: Tokens) -> jax.Array:
  """(logprob − mean logprob)(advantage − mean advantage), [B, T]; Eq. 10.

  Means over the completion tokens of the batch; nats × advantage; 0 outside
  the mask.
  """
  logprob = stats.logprob - masked.mean(stats.logprob, tokens.mask)
  advantage = tokens.advantage - masked.mean(tokens.advantage, tokens.mask)
  return jnp.where(tokens.mask, logprob * advantage, 0.0)


def _chosen_count(fraction, mask, at_least_one):
  n = masked.share(fraction, masked.count(mask))
  floor = jnp.where(jnp.logical_and(at_least_one, fraction > 0), 1, 0)
  return jnp.maximum(n, floor)


def clip_cov(fraction=2e-4, lower=1.0, upper=5.0, at_least_one=True) -> Filter:
  """Clip-Cov: drops a few random tokens whose covariance is high.

  Of the tokens alive with lower < covariance < upper, ⌊fraction · N⌋ are drawn
  at random without replacement and silenced; N counts all completion tokens,
  and stays the denominator.

  Args:
    fraction: share of the completion tokens to drop, in [0, 1]; 0 makes it the
      identity.
    lower, upper: edges of the band, open, nats × advantage.
    at_least_one: drop one even where fraction · N < 1, as the authors do.

  Reads: logprob, advantage, serial, key. Writes: both leaves. Kind: mask.
  Alive: completion tokens that no earlier filter has silenced; zero-advantage
  tokens are, as in the authors' code.

  >>> filters = optax.chain(clip_ratio(1.0, 1.0), clip_cov(), token_mean())
  """
  stream = zlib.crc32(b'clip_cov')

  def body(grads, stats, tokens, key):
    if key is None:
      raise ValueError('clip_cov draws tokens at random: pass key=')
    alive = tokens.mask & ((grads.logprob != 0) | (tokens.advantage == 0))
    cov = covariance(stats, tokens)
    band = alive & (lower < cov) & (cov < upper)
    n = _chosen_count(fraction, tokens.mask, at_least_one)
    serial = masked.serial(tokens)
    lots = _uniform(jax.random.fold_in(key, stream), serial)
    return keep(grads, ~masked.largest(lots, band, n, serial))

  return stateless(body)


def _uniform(key, serial):
  """One draw in [0, 1) per serial number, wherever the token lies."""
  draw = jax.vmap(lambda s: jax.random.uniform(jax.random.fold_in(key, s)))
  return draw(serial.reshape(-1)).reshape(serial.shape)


_PENALTY_GRADIENTS = {
  # jnp.sign, not the gradient of jnp.abs: that is +1 at 0 in JAX, and would
  # push tokens down on the first, on-policy inner step.
  'abs': jnp.sign,
  'k2': lambda x: x,
  'k3': lambda x: jnp.expm1(x),
}


def kl_cov(fraction=2e-3, coef=1.0, penalty='abs', at_least_one=True) -> Filter:
  """KL-Cov: holds the tokens of highest covariance near the old policy.

  The ⌊fraction · N⌋ completion tokens of highest covariance get the gradient of
  coef · KL(old ‖ current), estimated on the sampled token. Its chain has no
  ratio clip: that is the paper. Silent while current = old.

  Args:
    fraction: share of the completion tokens to penalise, in [0, 1].
    coef: weight of the penalty, advantage per nat; 0 makes it the identity.
    penalty: with x = logprob − old_logprob: 'abs' |x|, as the authors run;
      'k2' x²/2; 'k3' eˣ − 1 − x.
    at_least_one: penalise one even where fraction · N < 1.

  Reads: logprob, old_logprob, advantage, serial. Writes: logprob.
  Kind: penalty.

  >>> filters = optax.chain(kl_cov(fraction=2e-3), token_mean())
  """
  if penalty not in _PENALTY_GRADIENTS:
    raise ValueError(
      f'{penalty=} is unknown; choose from {sorted(_PENALTY_GRADIENTS)}'
    )
  gradient = _PENALTY_GRADIENTS[penalty]

  def body(grads, stats, tokens, key):
    del key
    n = _chosen_count(fraction, tokens.mask, at_least_one)
    cov = covariance(stats, tokens)
    chosen = masked.largest(cov, tokens.mask, n, masked.serial(tokens))
    x = jnp.clip(log_ratio(stats, tokens), -20.0, 20.0)
    pull = jnp.where(chosen, coef * gradient(x), 0.0)
    return grads._replace(logprob=grads.logprob + pull)

  return stateless(body)
