"""Filters that read the ratio of the current to the old policy.

`clip_ratio` masks what has come so far. The others are heads: they put another
surrogate's gradient in place of what has come, and so are written first.
"""

from __future__ import annotations

import jax.numpy as jnp

from jax_rlvr import masked
from jax_rlvr.evidence import log_ratio
from jax_rlvr.filters.base import Filter, keep, stateless


def clip_ratio(low=0.2, high=0.2, dual=None) -> Filter:
  """PPO's clip: silences tokens whose ratio has gone far enough.

  A token is dropped where the advantage is positive and ratio > 1 + high, or
  negative and ratio < 1 − low: there min(r·A, clip(r)·A) is constant. With
  `dual` = c also where the advantage is negative and ratio > c.

  Args:
    low, high: distances from 1.
    dual: the bound c > 1 of dual-clip PPO, or None.

  Reads: logprob, old_logprob, advantage. Writes: both leaves. Kind: mask.
  Neutral: low inf, high inf, dual None or inf.
  Defaults: low 0.2, high 0.2: PPO §6.1. DAPO has high 0.28; verl has dual 3.

  >>> filters = optax.chain(clip_ratio(0.2, 0.28), token_mean())

  References: Schulman et al., `PPO <https://arxiv.org/abs/1707.06347>`_, 2017;
  Ye et al., `dual clip <https://arxiv.org/abs/1912.09729>`_, 2020.
  """

  def body(grads, stats, tokens, key):
    del key
    ratio = jnp.exp(log_ratio(stats, tokens))
    dropped = _flat(ratio, tokens.advantage, low, high)
    if dual is not None:
      dropped |= (tokens.advantage < 0) & (ratio > dual)
    return keep(grads, ~dropped)

  return stateless(body)


def gspo(low=3e-4, high=4e-4) -> Filter:
  """GSPO: one ratio a sequence, the geometric mean of its tokens'.

  s = exp(mean log ratio). Each token's gradient is −s·A; a sequence is silent
  where min(s·A, clip(s)·A) is constant.

  Args:
    low, high: distances of s from 1.

  Reads: logprob, old_logprob, advantage. Writes: both leaves. Kind: head.
  Neutral: none; it replaces the token ratio.
  Defaults: low 3e-4, high 4e-4: GSPO §5.1; ends with sequence_mean_token_mean.

  >>> filters = optax.chain(gspo(), sequence_mean_token_mean())

  Reference: Zheng et al., `Group Sequence Policy Optimization
  <https://arxiv.org/abs/2507.18071>`_, 2025.
  """

  def body(grads, stats, tokens, key):
    del key
    ratio = jnp.exp(_row_mean(log_ratio(stats, tokens), tokens.mask))
    dropped = _flat(ratio, tokens.advantage, low, high)
    return _head(grads, ~dropped, -ratio * tokens.advantage, stats, tokens)

  return stateless(body)


def gmpo(low=0.4, high=0.4) -> Filter:
  """GMPO: a sequence's geometric mean of ratios, clipped token by token.

  Log ratios are held to high where the advantage is positive and to −low where
  it is negative; s = exp(their mean). The gradient is −s·A on tokens that were
  not held, 0 on the others.

  Args:
    low, high: bounds of a token's log ratio, nats.

  Reads: logprob, old_logprob, advantage. Writes: both leaves. Kind: head.
  Neutral: none; it replaces the token ratio.
  Defaults: low 0.4, high 0.4: GMPO §4; ends with sequence_mean_token_mean.

  >>> filters = optax.chain(gmpo(), sequence_mean_token_mean())

  Reference: Zhao et al., `Geometric-Mean Policy Optimization
  <https://arxiv.org/abs/2507.20673>`_, 2025.
  """

  def body(grads, stats, tokens, key):
    del key
    x = log_ratio(stats, tokens)
    up = tokens.advantage > 0
    held = jnp.where(up, jnp.minimum(x, high), jnp.maximum(x, -low))
    ratio = jnp.exp(_row_mean(held, tokens.mask))
    return _head(grads, held == x, -ratio * tokens.advantage, stats, tokens)

  return stateless(body)


def cispo(low=1.0, high=4.0) -> Filter:
  """CISPO: REINFORCE, weighed by a clipped ratio that is not differentiated.

  The gradient is −clip(ratio, 1 − low, 1 + high)·A: a clipped token keeps one.

  Args:
    low, high: distances of the ratio from 1; low = 1 is no lower bound.

  Reads: logprob, old_logprob, advantage. Writes: both leaves. Kind: head.
  Neutral: low inf, high inf, within 20 nats of log ratio.
  Defaults: low 1.0: MiniMax-M1 has no lower bound; high 4.0: ScaleRL and TRL
  clip at 5 = 1 + 4, MiniMax gives no number.

  >>> filters = optax.chain(cispo(), token_mean())

  Reference: `MiniMax-M1 <https://arxiv.org/abs/2506.13585>`_, 2025.
  """

  def body(grads, stats, tokens, key):
    del key
    ratio = jnp.exp(log_ratio(stats, tokens))
    weight = jnp.clip(ratio, 1.0 - low, 1.0 + high)
    return _head(grads, True, -weight * tokens.advantage, stats, tokens)

  return stateless(body)


def _flat(ratio, advantage, low, high):
  """Where PPO's clipped surrogate is constant."""
  up, down = advantage > 0, advantage < 0
  return (up & (ratio > 1.0 + high)) | (down & (ratio < 1.0 - low))


def _row_mean(x, mask):
  return masked.row_mean(x, mask)[:, None]


def _head(grads, kept, gradient, stats, tokens):
  """The surrogate's gradient in place of what has come."""
  kept = kept & tokens.mask & jnp.isfinite(stats.logprob)
  gradient = jnp.where(kept, gradient, 0.0)
  silent = None if grads.entropy is None else jnp.zeros_like(grads.entropy)
  return grads._replace(logprob=gradient, entropy=silent)
