"""Filters that read, or write, the entropy of the policy at each token."""

from __future__ import annotations

import jax.numpy as jnp

from jax_rlvr import masked
from jax_rlvr.filters import base
from jax_rlvr.filters.base import Filter, stateless
from jax_rlvr.records import Rescaled


def forking_tokens(
  fraction=0.2, keep='top', rescale=True, *, rule='exact', scope='batch'
) -> Filter:
  """Updates only the forking tokens, those of highest entropy.

  Keeps exactly max(1, ⌈fraction · N⌉) of the batch's N completion tokens.

  Args:
    fraction: share to keep, in (0, 1].
    keep: 'top' keeps the highest entropies, 'bottom' the lowest (the paper's
      ablation).
    rescale: multiply what has come so far by N / selected, so that a closing
      `token_mean` divides by the selected tokens: version 2 of the paper and
      its code. Refused with another aggregation. False leaves all tokens in
      the denominator: version 1, and TRL.
    rule: 'exact' selects that number, ties going by serial; 'quantile' selects
      what reaches the interpolated quantile, as TRL does: among equal
      entropies, which collapsed policies have, that may be all.
    scope: 'batch', or 'sequence' to select within each sequence, as LightRFT
      and Archer do.

  Reads: entropy, serial. Writes: both leaves. Kind: mask.
  Neutral: fraction 1.
  Reports: the share of tokens `selected`, and the lowest (under 'bottom' the
  highest) entropy among them, `threshold`, nats.
  Defaults: fraction 0.2: 80/20 §5.2.
  Differs from the authors' code: chosen in the whole inner batch, not in each
  microbatch of each device.

  >>> filters = optax.chain(
  ...   clip_ratio(0.2, 0.28),
  ...   forking_tokens(0.2),
  ...   token_mean(),
  ... )

  Reference: Wang et al., `Beyond the 80/20 Rule
  <https://arxiv.org/abs/2506.01939>`_, 2025.
  """
  _check('rule', rule, ('exact', 'quantile'))
  _check('scope', scope, ('batch', 'sequence'))
  axis = None if scope == 'batch' else -1

  def choose(score, tokens):
    if rule == 'quantile':
      q = 1.0 - fraction
      return score >= masked.quantile(score, tokens.mask, q, axis=axis)
    n = jnp.sum(tokens.mask, axis, dtype=jnp.int32, keepdims=axis is not None)
    wanted = jnp.maximum(masked.share(fraction, n, up=True), 1)
    serial = masked.serial(tokens)
    return masked.largest(score, tokens.mask, wanted, serial, axis=axis)

  return _selecting('forking_tokens', keep, rescale, choose)


def entropy_above(threshold=0.672, keep='top', rescale=True) -> Filter:
  """Updates only tokens whose entropy reaches a fixed threshold.

  Forking tokens by an absolute bound: their share may change as the policy
  does.

  Args:
    threshold: nats.
    keep: 'top' keeps entropy ≥ threshold, 'bottom' entropy ≤ threshold.
    rescale: as in `forking_tokens`.

  Reads: entropy. Writes: both leaves. Kind: mask.
  Neutral: threshold −inf, under 'bottom' inf.
  Reports: as `forking_tokens`.
  Defaults: threshold 0.672: the 80th percentile of Qwen3-8B, 80/20 §3;
  ReasonMaxxer has 1.4.

  >>> filters = optax.chain(clip_ratio(), entropy_above(0.672), token_mean())

  References: Wang et al., `Beyond the 80/20 Rule
  <https://arxiv.org/abs/2506.01939>`_, 2025; `ReasonMaxxer
  <https://arxiv.org/abs/2605.06241>`_, 2026.
  """
  sign = 1.0 if keep == 'top' else -1.0

  def choose(score, tokens):
    return tokens.mask & (score >= sign * threshold)

  return _selecting('entropy_above', keep, rescale, choose)


def _selecting(name, keep, rescale, choose) -> Filter:
  _check('keep', keep, ('top', 'bottom'))
  sign = 1.0 if keep == 'top' else -1.0

  def body(grads, stats, tokens, key):
    del key
    entropy = _entropy(stats, name)
    chosen = choose(sign * entropy, tokens) & tokens.mask
    n, selected = masked.count(tokens.mask), masked.count(chosen)
    factor = n / jnp.maximum(selected, 1) if rescale else 1.0
    lowest = -sign * masked.largest_value(-sign * entropy, chosen)
    return base.scale(base.keep(grads, chosen), factor), {
      'selected': selected / jnp.maximum(n, 1),
      'threshold': lowest,
    }

  mark = Rescaled() if rescale else base.EMPTY
  return base.reporting(body, 'selected', 'threshold', mark=mark)


def entropy_bonus(coef=1e-3) -> Filter:
  """Adds −coef · entropy to the loss of every completion token.

  Args:
    coef: weight of the entropy, advantage per nat.

  Reads: mask. Writes: entropy. Kind: penalty.
  Neutral: coef 0.
  Defaults: coef 1e-3: of the Entropy Mechanism's sweep (Fig. 9), where 1e-4
  and 1e-3 hardly act, 5e-3 steadies the entropy and 1e-2 makes it explode.

  >>> filters = optax.chain(clip_ratio(), entropy_bonus(1e-3), token_mean())

  Reference: Cui et al., `The Entropy Mechanism
  <https://arxiv.org/abs/2505.22617>`_, 2025.
  """

  def body(grads, stats, tokens, key):
    del key
    _entropy(stats, 'entropy_bonus')
    push = jnp.where(tokens.mask, coef, 0.0)
    return grads._replace(entropy=grads.entropy - push)

  return stateless(body)


def _check(name, chosen, known):
  if chosen not in known:
    choices = ' or '.join(map(repr, known))
    raise ValueError(f'{name}={chosen!r} is unknown; choose {choices}')


def _entropy(stats, name):
  if stats.entropy is None:
    raise ValueError(f'{name} reads the entropy, but stats.entropy is None')
  return stats.entropy
