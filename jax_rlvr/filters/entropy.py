"""Filters that read, or write, the entropy of the policy at each token."""

from __future__ import annotations

import jax.numpy as jnp

from jax_rlvr import masked
from jax_rlvr.filters import base
from jax_rlvr.filters.base import Filter, stateless


def forking_tokens(fraction=0.2, keep='top', rescale=True) -> Filter:
  """Updates only the forking tokens, those of highest entropy.

  Keeps exactly max(1, ⌈fraction · N⌉) of the batch's N completion tokens.

  Args:
    fraction: share to keep, in (0, 1]; 1 makes it the identity.
    keep: 'top' keeps the highest entropies, 'bottom' the lowest (the paper's
      ablation).
    rescale: multiply what has come so far by N / selected, so that a closing
      `token_mean` divides by the selected tokens: version 2 of the paper and
      its code. False leaves all tokens in the denominator: version 1, and TRL.

  Reads: entropy, serial. Writes: both leaves. Kind: mask.
  Differs from the authors' code: chosen in the whole inner batch, not in each
  microbatch of each device.

  >>> filters = optax.chain(
  ...   clip_ratio(0.2, 0.28), forking_tokens(0.2), token_mean()
  ... )

  Reference: Wang et al., `Beyond the 80/20 Rule
  <https://arxiv.org/abs/2506.01939>`_, 2025.
  """
  if keep not in ('top', 'bottom'):
    raise ValueError(f"{keep=} is unknown; choose 'top' or 'bottom'")

  def body(grads, stats, tokens, key):
    del key
    entropy = _entropy(stats, 'forking_tokens')
    n = masked.count(tokens.mask)
    selected = jnp.maximum(masked.share(fraction, n, up=True), 1)
    score = entropy if keep == 'top' else -entropy
    chosen = masked.largest(score, tokens.mask, selected, masked.serial(tokens))
    factor = jnp.where(rescale, n / selected, 1.0)
    return base.scale(base.keep(grads, chosen), factor)

  return stateless(body)


def entropy_bonus(coef=1e-3) -> Filter:
  """Adds −coef · entropy to the loss of every completion token.

  Args:
    coef: advantage per nat; 0 makes it the identity.

  Reads: mask. Writes: entropy. Kind: penalty.

  >>> filters = optax.chain(clip_ratio(), entropy_bonus(1e-3), token_mean())
  """

  def body(grads, stats, tokens, key):
    del key
    _entropy(stats, 'entropy_bonus')
    push = jnp.where(tokens.mask, coef, 0.0)
    return grads._replace(entropy=grads.entropy - push)

  return stateless(body)


def _entropy(stats, name):
  if stats.entropy is None:
    raise ValueError(f'{name} reads the entropy, but stats.entropy is None')
  return stats.entropy
