"""Token gradients: where every chain of filters starts and how it is run.

All of the policy gradient reaches the weights through per-token statistics, so
dL/dparams = vjp(token_stats)(dL/dstats). A chain of filters is an optax
transformation of dL/dstats: `params` are the stats, `updates` the token
gradients, `tokens` and `key` the extra arguments.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from jax_rlvr.evidence import log_ratio, within
from jax_rlvr.records import (
  Aggregated,
  Rescaled,
  Tokens,
  TokenStats,
  Tracked,
  Watched,
)


def policy_gradient(stats: TokenStats, tokens: Tokens) -> TokenStats:
  """d/dstats of the loss −Σ ratio · advantage over the mask.

  As with verl's clamp, the gradient is 0 where |log ratio| > 20.
  """
  alive = within(stats.logprob - tokens.old_logprob, tokens.mask)
  ratio = jnp.exp(log_ratio(stats, tokens))
  gradient = jnp.where(alive, -ratio * tokens.advantage, 0.0)
  silent = None if stats.entropy is None else jnp.zeros_like(stats.entropy)
  return TokenStats(gradient, silent)


def token_gradients(
  filters: optax.GradientTransformation,
  stats: TokenStats,
  tokens: Tokens,
  *,
  key: jax.Array | None = None,
  state: Any = None,
) -> tuple[TokenStats, Any]:
  """Runs a chain of filters over the whole batch.

  Args:
    filters: optax transformation over TokenStats, ended by an aggregation.
    stats: of the current policy, float32 [B, T].
    tokens: the evidence.
    key: for filters that draw; needed only if one does.
    state: of the chain; a fresh one if None.

  Returns:
    dL/dstats, 0 outside the mask, and the chain's next state.

  Raises:
    AssertionError: stats and evidence are not of one shape.
    ValueError: a filter misses its evidence, or the chain contradicts itself.
  """
  evidence = (tokens.mask, tokens.advantage, tokens.old_logprob)
  chex.assert_equal_shape([*jax.tree.leaves(stats), *evidence])
  stats = jax.lax.stop_gradient(stats)
  chain: Any = optax.with_extra_args_support(filters)
  if state is None:
    state = chain.init(stats)
  _check_end(state)
  grads = policy_gradient(stats, tokens)
  return chain.update(grads, state, stats, tokens=tokens, key=key)


def watched_gradients(
  filters: optax.GradientTransformation,
  stats: TokenStats,
  tokens: Tokens,
  *,
  key: jax.Array | None = None,
  state: Any = None,
):
  """As `token_gradients`, and what each tracked filter did.

  Returns:
    dL/dstats, the chain's next state, and for each of `tracked_names` the
    logprob gradients that came and that left, [B, T] each.
  """
  chain: Any = filters
  if state is None:
    state = chain.init(stats)
  # Before the chain, so that a filter that runs or not returns one structure.
  nothing = jnp.zeros_like(stats.logprob)

  def watch(node):
    if _name(node):
      inner = _each(watch, node.inner, Tracked)
      return Watched(Tracked(inner, node.report), nothing, nothing)
    return node

  grads, state = token_gradients(
    chain, stats, tokens, key=key, state=_each(watch, state, Tracked)
  )
  seen = []

  def unwatch(node):
    if isinstance(node, Watched):
      seen.append((node.came, node.left))
      inner = _each(unwatch, node.tracked.inner, Watched)
      return Tracked(inner, node.tracked.report)
    return node

  return grads, _each(unwatch, state, Watched), tuple(seen)


def tracked_names(state: Any) -> list[str]:
  """Of the tracked filters in a chain's state, outer before inner, in order."""
  names = []

  def visit(node):
    if _name(node):
      names.append(_name(node))
      _each(visit, node.inner, Tracked)

  _each(visit, state, Tracked)
  return names


def _name(node: Any) -> str:
  """That a filter is tracked under; '' of other states."""
  report = node.report if isinstance(node, Tracked) else ()
  names = [key.removesuffix('/kept') for key in report if key.endswith('/kept')]
  return min(names, key=len, default='')


def _each(f, tree: Any, kind: type) -> Any:
  return jax.tree.map(f, tree, is_leaf=lambda node: isinstance(node, kind))


def _check_end(state: Any) -> None:
  """Refuses an aggregation that would undo a filter's own denominator."""

  def has(kind):
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    return any(isinstance(node, kind) for node in nodes)

  if has(Rescaled) and has(Aggregated):
    raise ValueError(
      'rescale=True divides by the selected tokens, which only token_mean() '
      'goes with; end the chain with it or give rescale=False'
    )


def as_loss(filters: optax.GradientTransformation):
  """The chain as a loss, for a trainer of one's own.

  Returns `loss(stats, tokens, key=None, state=None) -> (scalar, state)` whose
  gradient with respect to the stats is the chain's; its value means nothing
  beyond that.
  """

  def loss(stats, tokens, key=None, state=None):
    grads, state = token_gradients(filters, stats, tokens, key=key, state=state)
    fixed = jax.lax.stop_gradient(grads)
    # Extras have no gradient.
    stats = TokenStats(stats.logprob, stats.entropy)
    # −inf logprobs carry gradient 0 or are masked; 0 · inf must not poison.
    parts = jax.tree.map(
      lambda g, x: jnp.sum(jnp.where(g == 0, 0.0, g * x)), fixed, stats
    )
    return sum(jax.tree.leaves(parts)), state

  return loss
