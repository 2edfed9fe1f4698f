"""Corrections for a sampler that is not the policy the ratio starts from.

They read old_logprob − sampled_logprob: how far the trainer's old policy is
from the distribution the tokens were drawn from. Where both are one, every
filter here is the identity. N, what the aggregation divides by, stays.
"""

from __future__ import annotations

import jax.numpy as jnp

from jax_rlvr import masked
from jax_rlvr.evidence import bounded
from jax_rlvr.filters.base import Filter, evidence, keep, reporting, scale


def tis(cap=2.0, scope='token') -> Filter:
  """Truncated importance sampling: weighs by min(old / sampled, cap).

  Args:
    cap: the largest weight.
    scope: 'token', or 'sequence' for one weight a sequence, its tokens'
      product.

  Reads: old_logprob, sampled_logprob. Writes: both leaves. Kind: weight.
  Neutral: none of its own; it is the identity where sampled = old.
  Reports: the mean `weight`.
  Defaults: cap 2.0: verl, TRL, slime and OpenRLHF.

  >>> filters = optax.chain(clip_ratio(), tis(), token_mean())

  Reference: Yao et al., `Your Efficient RL Framework Secretly Brings You
  Off-Policy RL Training
  <https://fengyao.notion.site/off-policy-rl>`_, 2025.
  """
  _check_scope(scope)

  def body(grads, stats, tokens, key):
    del stats, key
    weight = jnp.minimum(_weight(tokens, scope, 'tis'), cap)
    return scale(grads, weight), {'weight': masked.mean(weight, tokens.mask)}

  return reporting(body, 'weight')


def icepop(lower=0.5, upper=5.0, scope='token') -> Filter:
  """IcePop, and MIS: weighs by old / sampled, and drops what leaves a band.

  Args:
    lower, upper: edges of the band, closed.
    scope: 'token' is IcePop; 'sequence' is MIS: one weight a sequence, its
      tokens' product.

  Reads: old_logprob, sampled_logprob. Writes: both leaves. Kind: weight.
  Neutral: none of its own; it is the identity where sampled = old.
  Reports: the mean `weight`.
  Defaults: lower 0.5, upper 5.0: verl's IcePop; TRL's sequence MIS has
  (0.5, 2).

  >>> filters = optax.chain(clip_ratio(), icepop(), token_mean())

  Reference: `Every Step Evolves <https://arxiv.org/abs/2510.18855>`_, 2025.
  """
  _check_scope(scope)

  def body(grads, stats, tokens, key):
    del stats, key
    weight = _weight(tokens, scope, 'icepop')
    weight = jnp.where((lower <= weight) & (weight <= upper), weight, 0.0)
    return scale(grads, weight), {'weight': masked.mean(weight, tokens.mask)}

  return reporting(body, 'weight')


def sequence_mask(lower=0.999, upper=1.001) -> Filter:
  """Drops sequences whose mean ratio old / sampled leaves a band.

  The mean is geometric: exp(mean of old_logprob − sampled_logprob).

  Args:
    lower, upper: edges of the band, closed.

  Reads: old_logprob, sampled_logprob. Writes: both leaves. Kind: mask.
  Neutral: lower 0, upper inf.
  Reports: the mean geometric `ratio`.
  Defaults: lower 0.999, upper 1.001: verl. verl also takes what it drops out of
  the denominator; here that stays.

  >>> filters = optax.chain(clip_ratio(), sequence_mask(), token_mean())
  """

  def body(grads, stats, tokens, key):
    del stats, key
    ratio = jnp.exp(_row_mean(_gap(tokens, 'sequence_mask'), tokens.mask))
    kept = (lower <= ratio) & (ratio <= upper)
    everywhere = jnp.broadcast_to(ratio, tokens.mask.shape)
    return keep(grads, kept), {'ratio': masked.mean(everywhere, tokens.mask)}

  return reporting(body, 'ratio')


def opsm(delta=0.5) -> Filter:
  """Off-policy sequence masking: drops bad sequences that have grown unlikely.

  A sequence is dropped where its advantage is negative and the mean of
  sampled_logprob − logprob is above delta.

  Args:
    delta: nats a token.

  Reads: logprob, sampled_logprob, advantage. Writes: both leaves. Kind: mask.
  Neutral: delta inf.
  Reports: the mean `gap`, nats.
  Defaults: delta 0.5: TRL; slime has 1e-4.

  >>> filters = optax.chain(clip_ratio(), opsm(), token_mean())

  Reference: `DeepSeek-V3.2 <https://arxiv.org/abs/2512.02556>`_, 2025.
  """

  def body(grads, stats, tokens, key):
    del key
    sampled = evidence(tokens, 'sampled_logprob', 'opsm')
    gap = bounded(sampled - stats.logprob, tokens.mask)
    dropped = (tokens.advantage < 0) & (_row_mean(gap, tokens.mask) > delta)
    return keep(grads, ~dropped), {'gap': masked.mean(gap, tokens.mask)}

  return reporting(body, 'gap')


def _check_scope(scope):
  if scope not in ('token', 'sequence'):
    raise ValueError(f"{scope=} is unknown; choose 'token' or 'sequence'")


def _gap(tokens, name):
  sampled = evidence(tokens, 'sampled_logprob', name)
  return bounded(tokens.old_logprob - sampled, tokens.mask)


def _weight(tokens, scope, name):
  gap = _gap(tokens, name)
  if scope == 'sequence':
    gap = jnp.sum(gap, axis=-1, keepdims=True)
    gap = jnp.broadcast_to(jnp.clip(gap, -20.0, 20.0), tokens.mask.shape)
  return jnp.exp(gap)


def _row_mean(x, mask):
  return masked.row_mean(x, mask)[:, None]
