"""Aggregations: how a batch's tokens become one loss. They end a chain.

Named as verl and TRL name them. Rows without completion tokens count nowhere.
"""

from __future__ import annotations

import jax.numpy as jnp

from jax_rlvr import masked
from jax_rlvr.filters.base import Filter, scale, stateless
from jax_rlvr.records import Aggregated


def token_mean() -> Filter:
  """Every completion token of the batch weighs the same: Σ / N.

  DAPO's; verl's `token-mean`, TRL's `dapo`.

  Reads: mask. Writes: both leaves. Kind: aggregation.
  Neutral: none; dividing is what it is for.
  Defaults: none.

  >>> filters = optax.chain(clip_ratio(), token_mean())

  Reference: Yu et al., `DAPO <https://arxiv.org/abs/2503.14476>`_, 2025.
  """

  def body(grads, stats, tokens, key):
    del stats, key
    return scale(grads, 1.0 / jnp.maximum(masked.count(tokens.mask), 1))

  return stateless(body)


def sequence_mean_token_mean() -> Filter:
  """Every sequence weighs the same, whatever its length: GRPO as published.

  verl's `seq-mean-token-mean`, TRL's `grpo`.

  Reads: mask. Writes: both leaves. Kind: aggregation.
  Neutral: none; dividing is what it is for.
  Defaults: none.

  >>> filters = optax.chain(clip_ratio(), sequence_mean_token_mean())

  Reference: Shao et al., `DeepSeekMath <https://arxiv.org/abs/2402.03300>`_,
  2024.
  """

  def body(grads, stats, tokens, key):
    del stats, key
    length = jnp.maximum(jnp.sum(tokens.mask, -1, keepdims=True), 1)
    return scale(grads, 1.0 / length / _rows(tokens))

  return stateless(body, Aggregated())


def sequence_mean_token_sum(length=1.0) -> Filter:
  """Mean over sequences of token sums over a constant: Dr. GRPO.

  verl's `seq-mean-token-sum-norm`, TRL's `dr_grpo`.

  Args:
    length: the constant, tokens: the completion budget, or 1 for plain sums.

  Reads: mask. Writes: both leaves. Kind: aggregation.
  Neutral: none; dividing is what it is for.
  Defaults: length 1.0: REINFORCE over whole sequences. Dr. GRPO takes its
  completion budget, 3000 tokens.

  >>> filters = optax.chain(clip_ratio(), sequence_mean_token_sum(1024))

  Reference: Liu et al., `Understanding R1-Zero-Like Training
  <https://arxiv.org/abs/2503.20783>`_, 2025.
  """

  def body(grads, stats, tokens, key):
    del stats, key
    # Two divisions: length · rows may leave int32.
    return scale(grads, 1.0 / length / _rows(tokens))

  return stateless(body, Aggregated())


def token_sum(constant) -> Filter:
  """Σ over the completion tokens of the batch, over a constant.

  The one aggregation whose size follows the batch's: for trainers that
  normalise by a budget of their own.

  Args:
    constant: tokens.

  Reads: nothing. Writes: both leaves. Kind: aggregation.
  Neutral: constant 1.
  Defaults: none.

  >>> filters = optax.chain(clip_ratio(), token_sum(65_536))
  """

  def body(grads, stats, tokens, key):
    del stats, tokens, key
    return scale(grads, 1.0 / constant)

  return stateless(body, Aggregated())


def _rows(tokens):
  return jnp.maximum(masked.rows(tokens.mask), 1)
