"""(params, rows) → per-token log-probability and entropy, in chunks.

Logits are never held for more than a chunk of tokens, forward or backward, and
only scored tokens are projected.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_rlvr import mesh as layouts
from jax_rlvr import policy
from jax_rlvr.policy import PolicyConfig, attention
from jax_rlvr.records import Rows, TokenStats

# Logits of a chunk, 128 MiB a device; but a chunk of fewer tokens would spend
# its time on reading the head and its gradient. One of a third as many tokens
# as the policy is wide takes a third of what that gradient takes.
CHUNK_LOGITS = 2**25
LEAST_TOKENS = 256


def token_stats(
  config: PolicyConfig,
  params,
  rows: Rows,
  *,
  temperature: float = 1.0,
  remat: policy.Remat = 'full',
  chunk_tokens: int | None = None,
  extras: tuple[str, ...] = (),
  backend: attention.Backend = attention.XLA,
) -> TokenStats:
  """Log-probability of each scored token and entropy of its distribution.

  Args:
    config: of the policy.
    params: of the policy.
    rows: R rows of W; tokens with place ≥ 0 are scored.
    temperature: the sampling temperature; logits are divided by it.
    remat: what the backward pass keeps of each layer, see `policy.forward`.
    chunk_tokens: tokens whose logits exist at one time on a device, about;
      chosen from the vocabulary if None.
    extras: names of further fields of `TokenStats` to fill; they have no
      gradient.
    backend: of attention.

  Returns:
    float32 [R, W] each, 0 where nothing is scored. Differentiable in `params`.
  """
  layout = policy.Layout(rows.positions, rows.group, rows.segment)
  scored = rows.place >= 0
  fullest = jnp.max(jnp.sum(scored, axis=1, dtype=jnp.int32))
  ids = layouts.after(rows.ids, fullest)
  hidden = policy.forward(
    config, params, ids, layout, remat=remat, backend=backend
  )
  # Each row's scored tokens first: chunks past the fullest row are skipped.
  order = jnp.argsort(~scored, axis=1, stable=True)

  def in_order(x):
    return jnp.take_along_axis(x, order, axis=1)

  hidden = jnp.take_along_axis(hidden, in_order(rows.before)[..., None], axis=1)
  head = params.get('head')
  axes = 'vd' if head is None else 'dv'
  head = params['embed'] if head is None else head
  shards = layouts.parts(hidden, layouts.ROWS)[0]
  if chunk_tokens is None:
    cut = layouts.parts(head, layouts.HEAD[axes])[axes.index('v')]
    chunk_tokens = suited_chunk(config.vocab_size, config.width, cut)
  count, length = rows.ids.shape
  width = chunk_columns(chunk_tokens, count, length, shards)
  pad = -length % width
  hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
  targets = jnp.pad(in_order(rows.ids), ((0, 0), (0, pad)))
  live = (fullest + width - 1) // width
  stats = _project(
    _Projection(width, shards, config.logit_softcap, axes, tuple(extras)),
    hidden,
    head,
    targets,
    live,
    temperature,
  )
  # Rank of each token among its row's scored ones leads back to its place.
  rank = jnp.maximum(jnp.cumsum(scored, axis=1) - 1, 0)

  def back(x):
    return jnp.where(scored, jnp.take_along_axis(x, rank, axis=1), 0.0)

  names = 'logprob', 'entropy', *extras
  return TokenStats(**dict(zip(names, map(back, stats), strict=True)))


def suited_chunk(vocab_size: int, width: int, cut: int) -> int:
  """Tokens of a chunk on a device, where `cut` of them share a vocabulary."""
  # A power of two: most rows are multiples of it.
  third = 2 ** (width // 3).bit_length() // 2
  return max(LEAST_TOKENS, third, CHUNK_LOGITS * cut // vocab_size)


def chunk_columns(
  chunk_tokens: int, rows: int, length: int, shards: int
) -> int:
  """Columns that a chunk has of [rows, length], where shards share the rows."""
  return min(length, max(1, chunk_tokens * shards // rows))


class _Projection(NamedTuple):
  """How hidden states become stats, beside arrays.

  Attributes:
    width: columns of a chunk.
    shards: parts in which devices hold the rows.
    softcap: of the logits, if any.
    head: axes of the head: 'vd' where it is the embedding, else 'dv'.
    extras: names of further stats.
  """

  width: int
  shards: int
  softcap: float | None
  head: str
  extras: tuple[str, ...]


def _scores(how, hidden, head, temperature):
  """Scaled logits [B, c, V] of a chunk, and their slope in what the head gives.

  The slope is a soft cap's.
  """
  scores = jnp.einsum(
    f'bcd,{how.head}->bcv', hidden, head, preferred_element_type=jnp.float32
  )
  slope = 1.0
  if how.softcap is not None:
    bent = jnp.tanh(scores / how.softcap)
    scores, slope = how.softcap * bent, 1.0 - bent**2
  return scores / temperature, slope


def _at(x, targets):
  return jnp.take_along_axis(x, targets[..., None], axis=-1)[..., 0]


def _slice(x, i, width):
  return jax.lax.dynamic_slice_in_dim(x, i * width, width, axis=1)


def _write(x, part, i, width):
  return jax.lax.dynamic_update_slice_in_dim(x, part, i * width, axis=1)


_EXTRAS = {
  'p2': lambda scores, logprobs, target: jnp.sum(jnp.exp(2 * logprobs), -1),
  'p2_logp': lambda scores, logprobs, target: jnp.sum(
    # 0 · −inf of a token that cannot be drawn is 0.
    jnp.where(logprobs > -jnp.inf, jnp.exp(2 * logprobs) * logprobs, 0.0),
    -1,
  ),
  'logit': lambda scores, logprobs, target: _at(scores, target),
  'confidence': lambda scores, logprobs, target: (
    jax.nn.logsumexp(scores, -1) - jnp.mean(scores, -1)
  ),
}


def _facts(how, hidden, head, targets, live, temperature):
  """Of the first `live` chunks, else 0, [B, T] each.

  The largest score and the log of the sum over it, logprob, entropy, extras.
  """

  # Once, not for each chunk.
  head = layouts.laid(head, layouts.HEAD[how.head])

  def step(i, facts):
    target = _slice(targets, i, how.width)
    scores, _ = _scores(how, _slice(hidden, i, how.width), head, temperature)
    top = jnp.max(scores, axis=-1, keepdims=True)
    total = jnp.log(jnp.sum(jnp.exp(scores - top), axis=-1, keepdims=True))
    logprobs = scores - top - total
    # exp underflows to 0 exactly where logprob is very low: 0 · −big, no NaN.
    entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
    new = [top[..., 0], total[..., 0], _at(logprobs, target), entropy]
    new += [_EXTRAS[name](scores, logprobs, target) for name in how.extras]
    return [
      _write(x, part, i, how.width) for x, part in zip(facts, new, strict=True)
    ]

  empty = jnp.zeros(targets.shape, jnp.float32)
  facts = [empty] * (4 + len(how.extras))
  return jax.lax.fori_loop(0, live, step, facts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(how, hidden, head, targets, live, temperature):
  """logprob, entropy and extras, [B, T], of the first `live` chunks, else 0."""
  return tuple(_facts(how, hidden, head, targets, live, temperature)[2:])


def _project_forward(how, hidden, head, targets, live, temperature):
  top, total, *stats = _facts(how, hidden, head, targets, live, temperature)
  entropy = stats[1]
  saved = hidden, head, targets, live, temperature, top, total, entropy
  return tuple(stats), saved


def _project_backward(how, saved, cotangents):
  """Recomputes each chunk's logits; sums the head's gradient in float32.

  Devices sum it over their own rows, and over one another's at the end.

  With p the softmax: dlogprob/dlogits = onehot − p and
  dentropy/dlogits = −p (log p + entropy), both over temperature. What a token
  needs of its whole softmax is kept, so that no chunk is read twice.
  """
  hidden, head, targets, live, temperature, *facts = saved
  columns = targets, *facts, *cotangents[:2]
  whole = layouts.laid(head, layouts.HEAD[how.head])

  def by_shard(x):
    return x.reshape(how.shards, -1, *x.shape[1:])

  def step(i, grads):
    hidden_grad, head_grad = grads
    x = _slice(hidden, i, how.width)
    target, top, total, entropy, to_logprob, to_entropy = (
      _slice(c, i, how.width)[..., None] for c in columns
    )
    scores, slope = _scores(how, x, whole, temperature)
    logprobs = scores - top - total
    pull = to_logprob + to_entropy * (logprobs + entropy)
    chosen = target == jnp.arange(scores.shape[-1])[None, None]
    logits_grad = jnp.where(chosen, to_logprob, 0.0) - jnp.exp(logprobs) * pull
    logits_grad = (logits_grad * slope / temperature).astype(head.dtype)
    part = jnp.einsum(
      f'bcv,{how.head}->bcd', logits_grad, whole,
      preferred_element_type=jnp.float32,
    )  # fmt: skip
    head_grad += jnp.einsum(
      f'sbcd,sbcv->s{how.head}', by_shard(x), by_shard(logits_grad),
      preferred_element_type=jnp.float32,
    )  # fmt: skip
    head_grad = layouts.laid(head_grad, layouts.HEAD_PARTS[how.head])
    part = part.astype(x.dtype)
    return _write(hidden_grad, part, i, how.width), head_grad

  start = (
    jnp.zeros_like(hidden),
    jnp.zeros((how.shards, *head.shape), jnp.float32),
  )
  hidden_grad, head_grad = jax.lax.fori_loop(0, live, step, start)
  # Cut before it is cast, or the sum would be of what is cast, and whole.
  head_grad = layouts.laid(
    jnp.sum(head_grad, axis=0), layouts.HEAD_GRADIENT[how.head]
  )
  return hidden_grad, head_grad.astype(head.dtype), None, None, None


_project.defvjp(_project_forward, _project_backward)
