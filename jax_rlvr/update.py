"""The jitted step: stats → token gradients → weight gradients → optimizer.

One inner step sees its whole batch twice. First as [B, T] scalars: the token
stats, and the chain of filters over them. Then as microbatches of packed rows:
each token gradient is carried to the weights by a vjp, rows without any left
out. So the gradient does not depend on how the batch was cut.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_rlvr import evidence
from jax_rlvr.packing import pack
from jax_rlvr.policy import PolicyConfig
from jax_rlvr.policy_gradient import token_gradients
from jax_rlvr.records import Rows, Tokens, TokenStats, Tracked, TrainState
from jax_rlvr.token_stats import token_stats

Measured = list[dict[str, jax.Array]]


def make_update(
  policy: PolicyConfig,
  filters: optax.GradientTransformation,
  optimizer: optax.GradientTransformation,
  *,
  inner_steps: int,
  row_tokens: int,
  rows: int,
  microbatch_rows: int,
  temperature: float,
  remat: bool = True,
  place: Callable[[Any], Any] = jax.device_put,
) -> Callable[[TrainState, Tokens, jax.Array], tuple[TrainState, Measured]]:
  """Builds `update(state, tokens, key) -> (state, measured)`.

  Tokens are host arrays. Params and optimizer state are donated.
  `measured` has one dict of scalars an inner step, still on the device.

  Args:
    policy: shape of the policy.
    filters: the token-space chain.
    optimizer: the weight-space chain.
    inner_steps: weight updates per batch; divides the sequences.
    row_tokens: W, tokens of a packed row.
    rows: R, packed rows of an inner batch at the most.
    microbatch_rows: rows that go through a vjp at one time.
    temperature: the rollout's.
    remat: recompute each layer in the backward pass instead of keeping it.
    place: puts host rows on the devices.
  """
  stats_of = functools.partial(
    token_stats, policy, temperature=temperature, remat=remat
  )

  @functools.partial(jax.jit, donate_argnums=(0, 1), static_argnums=(6,))
  def inner_step(params, opt_state, filter_state, tokens, packed, key, first):
    return _inner_step(
      stats_of, filters, optimizer, microbatch_rows,
      params, opt_state, filter_state, tokens, packed, key, first,
    )  # fmt: skip

  def update(
    state: TrainState, tokens: Tokens, key: jax.Array
  ) -> tuple[TrainState, Measured]:
    sequences = tokens.mask.shape[0] // inner_steps
    _, _, params, opt_state, filter_state = state
    measured: Measured = []
    for i in range(inner_steps):
      inner = slice(i * sequences, (i + 1) * sequences)
      part = jax.tree.map(operator.itemgetter(inner), tokens)
      params, opt_state, filter_state, scalars = inner_step(
        params, opt_state, filter_state, place(part),
        place(pack(part, row_tokens, rows)), jax.random.fold_in(key, i), i == 0,
      )  # fmt: skip
      measured.append(scalars)
    state = state._replace(
      params=params, optimizer=opt_state, filters=filter_state
    )
    return state, measured

  return update


def _inner_step(
  stats_of, filters, optimizer, microbatch_rows,
  params, opt_state, filter_state, tokens, packed, key, on_policy,
):  # fmt: skip
  # While the weights are those that sampled, the sampler's own numbers serve:
  # they cost nothing, and every ratio is exactly 1.
  sampled = TokenStats(tokens.old_logprob, tokens.old_entropy)
  if packed.ids.shape[0] <= microbatch_rows:
    # One vjp serves both passes.
    stats, pullback = jax.vjp(
      lambda p: _unpacked(stats_of(p, packed), packed, tokens.mask.shape),
      params,
    )
    stats = sampled if on_policy else stats
  else:
    stats = sampled
    if not on_policy:
      stats = _stats_by_microbatch(
        stats_of, params, packed, tokens.mask.shape, microbatch_rows
      )
    pullback = functools.partial(
      _pull_by_microbatch, stats_of, params, packed, microbatch_rows
    )
  token_grads, next_filter_state = token_gradients(
    filters, stats, tokens, key=key, state=filter_state
  )
  (grads,) = pullback(token_grads)
  grad_norm = optax.tree.norm(grads)
  steps, next_opt_state = optimizer.update(grads, opt_state, params)
  good = jnp.any(_touched(token_grads)) & jnp.isfinite(grad_norm)

  def if_good(new, old):
    return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

  measured = {
    'grad_norm': grad_norm,
    'update/skipped': 1 - good.astype(jnp.int32),
    **evidence.summary(stats, tokens),
    **_reports(next_filter_state),
  }
  state = if_good(
    (optax.apply_updates(params, steps), next_opt_state, next_filter_state),
    (params, opt_state, filter_state),
  )
  return *state, measured


def _touched(token_grads: TokenStats) -> jax.Array:
  """Where any leaf of the token gradients is not 0."""
  leaves = [leaf != 0 for leaf in jax.tree.leaves(token_grads)]
  return functools.reduce(jnp.logical_or, leaves)


def _unpacked(stats: TokenStats, packed: Rows, shape) -> TokenStats:
  """[R, W] → [B, T]."""
  size = shape[0] * shape[1]
  index = jnp.where(packed.place < 0, size, packed.place)

  def unpack(x):
    return jnp.zeros(size, x.dtype).at[index].add(x, mode='drop').reshape(shape)

  return jax.tree.map(unpack, stats)


def _packed(token_grads: TokenStats, packed: Rows) -> TokenStats:
  """[B, T] → [R, W], 0 where nothing is scored."""
  index = jnp.maximum(packed.place, 0)
  return jax.tree.map(
    lambda x: jnp.where(packed.place < 0, 0.0, x.reshape(-1)[index]),
    token_grads,
  )


def _stats_by_microbatch(
  stats_of, params, packed, shape, microbatch_rows
) -> TokenStats:
  order, trips = _first(jnp.any(packed.place >= 0, axis=1), microbatch_rows)

  def body(i, stats):
    rows = _microbatch(packed, order, i, microbatch_rows)
    part = _unpacked(stats_of(params, rows), rows, shape)
    return jax.tree.map(jnp.add, stats, part)

  empty = jnp.zeros(shape, jnp.float32)
  return jax.lax.fori_loop(0, trips, body, TokenStats(empty, empty))


def _pull_by_microbatch(
  stats_of, params, packed, microbatch_rows, token_grads
) -> tuple[Any]:
  """Weight gradients of the rows that have token gradients, in float32."""
  cotangents = _packed(token_grads, packed)
  # What has no gradient need not be scored either.
  touched = _touched(cotangents)
  packed = packed._replace(place=jnp.where(touched, packed.place, -1))
  order, trips = _first(jnp.any(touched, axis=1), microbatch_rows)

  def body(i, total):
    rows = _microbatch(packed, order, i, microbatch_rows)
    _, pullback = jax.vjp(lambda p: stats_of(p, rows), params)
    (grads,) = pullback(_packed(token_grads, rows))
    return jax.tree.map(lambda a, g: a + g.astype(a.dtype), total, grads)

  zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
  return (jax.lax.fori_loop(0, trips, body, zeros),)


def _first(wanted: jax.Array, microbatch_rows: int):
  """Row numbers, the wanted ones first, then R for no row; microbatches."""
  count = jnp.sum(wanted, dtype=jnp.int32)
  order = jnp.argsort(~wanted, stable=True)
  order = jnp.where(jnp.arange(order.size) < count, order, order.size)
  order = jnp.pad(
    order, (0, -order.size % microbatch_rows), constant_values=order.size
  )
  return order, (count + microbatch_rows - 1) // microbatch_rows


def _microbatch(packed: Rows, order, i, microbatch_rows: int) -> Rows:
  """Rows of microbatch i; those past the last are padding."""
  index = jax.lax.dynamic_slice_in_dim(
    order, i * microbatch_rows, microbatch_rows
  )
  rows = jax.tree.map(lambda x: jnp.take(x, index, 0, mode='clip'), packed)
  live = index < packed.ids.shape[0]
  return rows._replace(place=jnp.where(live[:, None], rows.place, -1))


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
