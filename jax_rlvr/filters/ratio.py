"""Filters that read the ratio of the current to the old policy."""

from __future__ import annotations

import jax.numpy as jnp

from jax_rlvr.filters.base import Filter, keep, stateless
from jax_rlvr.policy_gradient import log_ratio


def clip_ratio(low=0.2, high=0.2, dual=None) -> Filter:
  """PPO's clip: silences tokens whose ratio has gone far enough.

  A token is dropped where the advantage is positive and ratio > 1 + high, or
  negative and ratio < 1 − low: there min(r·A, clip(r)·A) is constant. With
  `dual` = c also where the advantage is negative and ratio > c.

  Args:
    low, high: distances from 1. Infinite ones make it the identity.
    dual: the bound c > 1 of dual-clip PPO, or None.

  Reads: logprob, old_logprob, advantage. Writes: both leaves. Kind: mask.

  >>> filters = optax.chain(clip_ratio(0.2, 0.28), token_mean())

  References: Schulman et al., `PPO <https://arxiv.org/abs/1707.06347>`_, 2017;
  Ye et al., `dual clip <https://arxiv.org/abs/1912.09729>`_, 2020.
  """

  def body(grads, stats, tokens, key):
    del key
    # The bound of the log ratio keeps exp finite, far outside any clip.
    ratio = jnp.exp(jnp.clip(log_ratio(stats, tokens), -80.0, 80.0))
    up, down = tokens.advantage > 0, tokens.advantage < 0
    dropped = (up & (ratio > 1.0 + high)) | (down & (ratio < 1.0 - low))
    if dual is not None:
      dropped |= down & (ratio > dual)
    return keep(grads, ~dropped)

  return stateless(body)
