"""The jitted step: stats → token gradients → weight gradients → optimizer.

One inner step sees its whole batch twice. First as [B, T] scalars: the token
stats, and the chain of filters over them. Then as microbatches: each token
gradient is carried to the weights by a vjp, rows without any left out. So the
gradient does not depend on how the batch was cut.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_rlvr import masked
from jax_rlvr.policy import PolicyConfig
from jax_rlvr.policy_gradient import log_ratio, token_gradients
from jax_rlvr.records import Tokens, TokenStats, Tracked, TrainState
from jax_rlvr.token_stats import token_stats

Measured = list[dict[str, jax.Array]]


def make_update(
  policy: PolicyConfig,
  filters: optax.GradientTransformation,
  optimizer: optax.GradientTransformation,
  *,
  inner_steps: int,
  microbatch_rows: int,
  temperature: float,
) -> Callable[[TrainState, Tokens, jax.Array], tuple[TrainState, Measured]]:
  """Builds `update(state, tokens, key) -> (state, measured)`.

  Params, optimizer and filter state are donated. `measured` has one dict of
  scalars an inner step, still on the device.

  Args:
    policy: shape of the policy.
    filters: the token-space chain.
    optimizer: the weight-space chain.
    inner_steps: weight updates per batch; divides the rows.
    microbatch_rows: rows that go through a vjp at one time.
    temperature: the rollout's.
  """
  stats_of = functools.partial(token_stats, policy, temperature=temperature)

  @functools.partial(jax.jit, donate_argnums=(0, 1, 2), static_argnums=(5,))
  def inner_step(params, opt_state, filter_state, tokens, key, on_policy):
    return _inner_step(
      stats_of, filters, optimizer, microbatch_rows,
      params, opt_state, filter_state, tokens, key, on_policy,
    )  # fmt: skip

  def update(state, tokens, key):
    rows = tokens.ids.shape[0] // inner_steps
    params, opt_state, filter_state = state[-3:]
    measured = []
    for i in range(inner_steps):
      part = jax.tree.map(lambda x: x[i * rows : (i + 1) * rows], tokens)
      params, opt_state, filter_state, scalars = inner_step(
        params, opt_state, filter_state, part,
        jax.random.fold_in(key, i), i == 0,
      )  # fmt: skip
      measured.append(scalars)
    state = state._replace(
      params=params, optimizer=opt_state, filters=filter_state
    )
    return state, measured

  return update


def _inner_step(
  stats_of, filters, optimizer, rows,
  params, opt_state, filter_state, tokens, key, on_policy,
):  # fmt: skip
  whole = tokens.ids.shape[0] <= rows
  if whole:
    stats, pullback = jax.vjp(
      lambda p: stats_of(p, tokens.ids, tokens.mask), params
    )
  if on_policy:
    # The weights are still those that sampled: its numbers cost nothing, and
    # every ratio is exactly 1.
    stats = TokenStats(tokens.old_logprob, tokens.old_entropy)
  elif not whole:
    stats = _stats_by_microbatch(stats_of, params, tokens, rows)
  token_grads, filter_state = token_gradients(
    filters, stats, tokens, key=key, state=filter_state
  )
  if whole:
    (grads,) = pullback(token_grads)
  else:
    grads = _pull_by_microbatch(stats_of, params, tokens, token_grads, rows)
  touched = jnp.any(_touched(token_grads))
  grad_norm = optax.tree.norm(grads)
  steps, next_opt_state = optimizer.update(grads, opt_state, params)
  good = touched & jnp.isfinite(grad_norm)

  def if_good(new, old):
    return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

  x = log_ratio(stats, tokens)
  measured = {
    'grad_norm': grad_norm,
    'ratio/max': masked.largest_value(jnp.exp(x), tokens.mask),
    'kl/old': masked.mean(jnp.expm1(x) - x, tokens.mask),
    'update/skipped': 1 - good.astype(jnp.int32),
    **_reports(filter_state),
  }
  params = if_good(optax.apply_updates(params, steps), params)
  return params, if_good(next_opt_state, opt_state), filter_state, measured


def _touched(token_grads: TokenStats) -> jax.Array:
  """Where any leaf of the token gradients is not 0, [B, T]."""
  leaves = [leaf != 0 for leaf in jax.tree.leaves(token_grads)]
  return functools.reduce(jnp.logical_or, leaves)


def _first(wanted: jax.Array, rows: int):
  """Row numbers with the wanted ones first, and how many microbatches."""
  order = jnp.argsort(~wanted, stable=True)
  order = jnp.pad(order, (0, -order.size % rows))
  count = jnp.sum(wanted, dtype=jnp.int32)
  return order, count, (count + rows - 1) // rows


def _stats_by_microbatch(stats_of, params, tokens, rows) -> TokenStats:
  order, count, trips = _first(jnp.any(tokens.mask, axis=1), rows)

  def body(i, stats):
    index, live = _microbatch(order, count, i, rows)
    part = stats_of(params, tokens.ids[index], tokens.mask[index] & live)
    # Surplus rows are added as zeros.
    return jax.tree.map(lambda x, new: x.at[index].add(new), stats, part)

  empty = jnp.zeros(tokens.mask.shape, jnp.float32)
  return jax.lax.fori_loop(0, trips, body, TokenStats(empty, empty))


def _pull_by_microbatch(stats_of, params, tokens, token_grads, rows) -> Any:
  """Weight gradients of the rows that have token gradients, in float32."""
  touched = _touched(token_grads)
  order, count, trips = _first(jnp.any(touched, axis=1), rows)

  def body(i, total):
    index, live = _microbatch(order, count, i, rows)
    ids, mask = tokens.ids[index], touched[index] & live
    _, pullback = jax.vjp(lambda p: stats_of(p, ids, mask), params)
    (grads,) = pullback(jax.tree.map(lambda g: g[index] * live, token_grads))
    return jax.tree.map(lambda a, g: a + g.astype(a.dtype), total, grads)

  zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
  return jax.lax.fori_loop(0, trips, body, zeros)


def _microbatch(order, count, i, rows):
  """Row numbers of microbatch i, and [rows, 1] True on those that count."""
  index = jax.lax.dynamic_slice_in_dim(order, i * rows, rows)
  live = i * rows + jnp.arange(rows) < count
  return index, live[:, None]


def _reports(filter_state) -> dict[str, jax.Array]:
  """What tracked filters say of themselves, wherever they sit in the chain."""
  def is_tracked(node):
    return isinstance(node, Tracked)

  found = {}
  for node in jax.tree.leaves(filter_state, is_leaf=is_tracked):
    if is_tracked(node):
      found |= {f'filters/{name}': x for name, x in node.report.items()}
      found |= _reports(node.inner)
  return found
