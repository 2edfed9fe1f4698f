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
from jax_rlvr.evidence import covariance, log_ratio, within
from jax_rlvr.filters.base import Filter, keep, reporting


def _chosen_count(fraction, mask, at_least_one):
  n = masked.share(fraction, masked.count(mask))
  floor = jnp.where(jnp.logical_and(at_least_one, fraction > 0), 1, 0)
  return jnp.maximum(n, floor)


def _described(chosen, stats, tokens):
  """Who was selected: share of tokens, share below the mean, probability."""
  mean = masked.mean(tokens.advantage, tokens.mask)
  below = chosen & (tokens.advantage < mean)
  selected = masked.count(chosen)
  return {
    'selected': selected / jnp.maximum(masked.count(tokens.mask), 1),
    'below_mean': masked.count(below) / jnp.maximum(selected, 1),
    'probability': masked.mean(jnp.exp(stats.logprob), chosen),
  }


_DESCRIPTION = 'selected', 'below_mean', 'probability'


def clip_cov(fraction=2e-4, lower=1.0, upper=5.0, at_least_one=True) -> Filter:
  """Clip-Cov: drops a few random tokens whose covariance is high.

  Of the tokens alive with lower < covariance < upper, ⌊fraction · N⌋ are drawn
  at random without replacement and silenced; N counts all completion tokens,
  and stays the denominator. Alive are completion tokens that no earlier filter
  has silenced: zero-advantage tokens are, as in the authors' code, and those
  beyond 20 nats of log ratio, whose gradient is 0 already, are not.

  Args:
    fraction: share of the completion tokens to drop, in [0, 1].
    lower, upper: edges of the band, open, nats × advantage.
    at_least_one: drop one even where fraction · N < 1, as the authors do.

  Reads: logprob, advantage, serial, key. Writes: both leaves. Kind: mask.
  Neutral: fraction 0.
  Reports: the share of tokens `selected`, the share of those with an advantage
  `below_mean`, their mean `probability`.
  Defaults: fraction 2e-4, lower 1.0, upper 5.0: Entropy Mechanism §4.3. At
  least one, an open band and clip_ratio(1, 1) before it: the authors' code;
  the paper has ⌊fraction · N⌋, a closed band and no ratio clip.
  Differs from the authors' code: chosen in the whole inner batch, not in each
  microbatch of each device.

  >>> filters = optax.chain(clip_ratio(1.0, 1.0), clip_cov(), token_mean())

  Reference: Cui et al., `The Entropy Mechanism
  <https://arxiv.org/abs/2505.22617>`_, 2025.
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
    chosen = masked.largest(lots, band, n, serial)
    return keep(grads, ~chosen), _described(chosen, stats, tokens)

  return reporting(body, *_DESCRIPTION)


def _uniform(key, serial):
  """One draw in [0, 1) per serial number, wherever the token lies."""

  def draw(number):
    return jax.random.uniform(jax.random.fold_in(key, number))

  return jax.vmap(jax.vmap(draw))(serial)


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
  ratio clip: that is the paper. Silent while current = old, and beyond 20 nats,
  where the authors clamp.

  Args:
    fraction: share of the completion tokens to penalise, in [0, 1].
    coef: weight of the penalty, advantage per nat.
    penalty: with x = logprob − old_logprob: 'abs' |x|, as the authors run;
      'k2' x²/2; 'k3' eˣ − 1 − x.
    at_least_one: penalise one even where fraction · N < 1.

  Reads: logprob, old_logprob, advantage, serial. Writes: logprob.
  Kind: penalty. Neutral: coef 0.
  Reports: as `clip_cov`.
  Defaults: fraction 2e-3 (7B; 2e-4 for 32B), coef 1.0: Entropy Mechanism §4.3;
  verl's own defaults are 2e-4 and 0.1. The paper writes a full KL; |x| and at
  least one are the authors' code.
  Differs from the authors' code: chosen in the whole inner batch, not in each
  microbatch of each device.

  >>> filters = optax.chain(kl_cov(fraction=2e-3), token_mean())

  Reference: Cui et al., `The Entropy Mechanism
  <https://arxiv.org/abs/2505.22617>`_, 2025.
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
    near = within(stats.logprob - tokens.old_logprob, tokens.mask)
    pull = coef * gradient(log_ratio(stats, tokens))
    pulled = grads.logprob + jnp.where(chosen & near, pull, 0.0)
    described = _described(chosen, stats, tokens)
    return grads._replace(logprob=pulled), described

  return reporting(body, *_DESCRIPTION)
