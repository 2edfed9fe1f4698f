"""(params, rows) → per-token log-probability and entropy, in chunks.

The one place that shifts by one: the hidden state at t − 1 scores the token at
t. Logits are never held for more than a chunk of tokens, forward or backward,
and only completion tokens are projected.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jax_rlvr import policy
from jax_rlvr.policy import PolicyConfig
from jax_rlvr.records import TokenStats

if TYPE_CHECKING:
  from jaxtyping import Array, Bool, Float, Int


def token_stats(
  config: PolicyConfig,
  params,
  ids: Int[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  temperature: float = 1.0,
  chunk_tokens: int = 1024,
) -> TokenStats:
  """Log-probability of each masked token and entropy of its distribution.

  Args:
    config: of the policy.
    params: of the policy.
    ids: prompt and completion, padded at the end; mask[:, 0] is False.
    mask: True on the tokens to score.
    temperature: the sampling temperature; logits are divided by it.
    chunk_tokens: tokens whose logits exist at one time, about.

  Returns:
    float32 [B, T] each, 0 outside the mask. Differentiable in `params`.
  """
  rows, length = ids.shape
  hidden = policy.forward(config, params, ids)
  # Each row's masked tokens first: chunks past the longest row are skipped.
  order = jnp.argsort(~mask, axis=1, stable=True)
  before = jnp.maximum(order - 1, 0)
  hidden = jnp.take_along_axis(hidden, before[..., None], axis=1)
  targets = jnp.take_along_axis(ids, order, axis=1)
  width = min(length, max(1, chunk_tokens // rows))
  steps = -(-length // width)
  pad = steps * width - length
  hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
  targets = jnp.pad(targets, ((0, 0), (0, pad)))
  longest = jnp.max(jnp.sum(mask, axis=1, dtype=jnp.int32))
  live = (longest + width - 1) // width
  stats = _project(
    hidden, policy.head(params), targets, live, temperature, width
  )
  # Rank of each token among its row's masked ones leads back to its place.
  rank = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)

  def place(x):
    return jnp.where(mask, jnp.take_along_axis(x, rank, axis=1), 0.0)

  return TokenStats(*map(place, stats))


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
    return [_write(x, part, i, width) for x, part in zip(stats, new)]

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
