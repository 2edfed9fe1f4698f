"""(params, rows) → per-token log-probability and entropy, in chunks.

Logits are never held for more than a chunk of tokens, forward or backward, and
only scored tokens are projected.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jax_rlvr import policy
from jax_rlvr.policy import PolicyConfig
from jax_rlvr.records import Rows, TokenStats

if TYPE_CHECKING:
  from jaxtyping import Array, Bool


def token_stats(
  config: PolicyConfig,
  params,
  rows: Rows,
  *,
  temperature: float = 1.0,
  remat: bool = True,
  chunk_tokens: int = 256,
) -> TokenStats:
  """Log-probability of each scored token and entropy of its distribution.

  Args:
    config: of the policy.
    params: of the policy.
    rows: R rows of W; tokens with place ≥ 0 are scored.
    temperature: the sampling temperature; logits are divided by it.
    remat: recompute each layer in the backward pass instead of keeping it.
    chunk_tokens: tokens whose logits exist at one time, about.

  Returns:
    float32 [R, W] each, 0 where nothing is scored. Differentiable in `params`.
  """
  hidden = policy.forward(
    config, params, rows.ids, rows.positions, _visible(rows), remat=remat
  )
  # Each row's scored tokens first: chunks past the fullest row are skipped.
  scored = rows.place >= 0
  order = jnp.argsort(~scored, axis=1, stable=True)

  def in_order(x):
    return jnp.take_along_axis(x, order, axis=1)

  hidden = jnp.take_along_axis(hidden, in_order(rows.before)[..., None], axis=1)
  count, length = rows.ids.shape
  width = min(length, max(1, chunk_tokens // count))
  pad = -length % width
  hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
  targets = jnp.pad(in_order(rows.ids), ((0, 0), (0, pad)))
  fullest = jnp.max(jnp.sum(scored, axis=1, dtype=jnp.int32))
  live = (fullest + width - 1) // width
  stats = _project(
    hidden, policy.head(params), targets, live, temperature, width
  )
  # Rank of each token among its row's scored ones leads back to its place.
  rank = jnp.maximum(jnp.cumsum(scored, axis=1) - 1, 0)

  def back(x):
    return jnp.where(scored, jnp.take_along_axis(x, rank, axis=1), 0.0)

  return TokenStats(*map(back, stats))


def _visible(rows: Rows) -> Bool[Array, 'R W W']:
  """A token sees its own segment's past and its group's prompt."""
  group, segment = rows.group, rows.segment
  same_group = group[:, :, None] == group[:, None, :]
  same_segment = segment[:, :, None] == segment[:, None, :]
  on_prompt = segment[:, None, :] == 0
  past = rows.positions[:, :, None] >= rows.positions[:, None, :]
  return same_group & (same_segment | on_prompt) & past


def _chunk(hidden, head, targets, temperature):
  """Scaled logits' log-softmax facts for one chunk [B, c]."""
  scores = jnp.einsum(
    'bcd,dv->bcv', hidden, head, preferred_element_type=jnp.float32
  )
  scores = scores / temperature
  logprobs = jax.nn.log_softmax(scores, axis=-1)
  picked = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
  # exp underflows to 0 exactly where logprob is very low: 0 · −big, never NaN.
  entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
  return logprobs, picked, entropy


def _slice(x, i, width):
  return jax.lax.dynamic_slice_in_dim(x, i * width, width, axis=1)


def _write(x, part, i, width):
  return jax.lax.dynamic_update_slice_in_dim(x, part, i * width, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _project(hidden, head, targets, live, temperature, width):
  """(logprob, entropy) [B, T] of the first `live` chunks, 0 beyond."""

  def step(i, stats):
    _, *new = _chunk(
      _slice(hidden, i, width), head, _slice(targets, i, width), temperature
    )
    return [
      _write(x, part, i, width) for x, part in zip(stats, new, strict=True)
    ]

  empty = jnp.zeros(targets.shape, jnp.float32)
  return tuple(jax.lax.fori_loop(0, live, step, [empty, empty]))


def _project_forward(hidden, head, targets, live, temperature, width):
  out = _project(hidden, head, targets, live, temperature, width)
  return out, (hidden, head, targets, live, temperature)


def _project_backward(width, saved, cotangents):
  """Recomputes each chunk's logits; sums the head's gradient in float32.

  With p the softmax: dlogprob/dlogits = onehot − p and
  dentropy/dlogits = −p (log p + entropy), both over temperature.
  """
  hidden, head, targets, live, temperature = saved

  def step(i, grads):
    hidden_grad, head_grad = grads
    x, target = _slice(hidden, i, width), _slice(targets, i, width)
    to_logprob, to_entropy = (_slice(c, i, width) for c in cotangents)
    logprobs, _, entropy = _chunk(x, head, target, temperature)
    pull = to_logprob[..., None] + to_entropy[..., None] * (
      logprobs + entropy[..., None]
    )
    onehot = jax.nn.one_hot(target, logprobs.shape[-1], dtype=jnp.float32)
    logits_grad = to_logprob[..., None] * onehot - jnp.exp(logprobs) * pull
    logits_grad = (logits_grad / temperature).astype(head.dtype)
    part = jnp.einsum('bcv,dv->bcd', logits_grad, head)
    head_grad += jnp.einsum(
      'bcd,bcv->dv', x, logits_grad, preferred_element_type=jnp.float32
    )
    return _write(hidden_grad, part.astype(x.dtype), i, width), head_grad

  start = jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32)
  hidden_grad, head_grad = jax.lax.fori_loop(0, live, step, start)
  return hidden_grad, head_grad.astype(head.dtype), None, None, None


_project.defvjp(_project_forward, _project_backward)
