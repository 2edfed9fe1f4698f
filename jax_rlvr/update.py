"""The jitted step: stats → token gradients → weight gradients → optimizer.

One inner step sees its whole batch twice. First as [B, T] scalars: the token
stats, and the chain of filters over them. Then as microbatches of packed rows:
each token gradient is carried to the weights by a vjp, rows without any left
out. So the gradient does not depend on how the batch was cut.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_rlvr import evidence
from jax_rlvr import mesh as layouts
from jax_rlvr.packing import pack
from jax_rlvr.policy import PolicyConfig, Remat, attention, cast
from jax_rlvr.policy_gradient import watched_gradients
from jax_rlvr.records import (
  Rows,
  Shown,
  Tokens,
  TokenStats,
  Tracked,
  TrainState,
)
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
  remat: Remat = 'full',
  dtype: jax.typing.DTypeLike = jnp.float32,
  extras: Sequence[str] = (),
  shards: int = 1,
  share_prompts: bool = True,
  backend: attention.Backend = attention.XLA,
  place: Callable[[Any], Any] = jax.device_put,
  own: Sequence[int] | None = None,
  place_own: Callable[[Any], Any] | None = None,
  on_policy: bool = True,
  shown: Sequence[int] = (),
) -> Callable[
  [TrainState, Tokens, jax.Array], tuple[TrainState, Measured, list[Shown]]
]:
  """Builds `update(state, tokens, key) -> (state, measured, seen)`.

  Tokens are host arrays. Params and optimizer state are donated.
  `measured` has one dict of scalars an inner step, and `seen` the tokens'
  numbers of some sequences, still on the device.

  Args:
    policy: shape of the policy.
    filters: the token-space chain.
    optimizer: the weight-space chain.
    inner_steps: weight updates per batch; divides the sequences.
    row_tokens: W, tokens of a packed row.
    rows: R, packed rows of an inner batch at the most; a multiple of shards.
    microbatch_rows: rows that go through a vjp at one time, the same number
      from each shard and one at least.
    temperature: the rollout's.
    remat: what the backward pass keeps of each layer, see `policy.forward`.
    dtype: to compute in; weights, their gradients and the optimizer's state
      are float32 all the same.
    extras: names of further fields of `TokenStats` for filters to read.
    shards: parts in which `place` cuts rows.
    share_prompts: completions of a prompt share its tokens in a row.
    backend: of attention.
    place: puts host rows on the devices.
    own: shards whose rows this host packs; all if None.
    place_own: as `place`, of their rows alone; `place` if None.
    on_policy: all tokens were drawn with the weights that the first inner step
      begins with, so that it takes the sampler's own numbers.
    shown: which sequences of each inner batch are in `seen`.

  Raises:
    ValueError: prompts are to be shared, and the backend cannot.
  """
  if share_prompts and not backend.shares_prompts:
    raise ValueError(
      f'{backend.name} attention cannot share prompts; give share_prompts=False'
    )
  inner_step = make_inner_step(
    policy, filters, optimizer, microbatch_rows=microbatch_rows,
    temperature=temperature, remat=remat, dtype=dtype, extras=extras,
    shards=shards, backend=backend, on_policy=on_policy, shown=shown,
  )  # fmt: skip

  def update(
    state: TrainState, tokens: Tokens, key: jax.Array
  ) -> tuple[TrainState, Measured, list[Shown]]:
    sequences = tokens.mask.shape[0] // inner_steps
    params, opt_state, filter_state = (
      state.params, state.optimizer, state.filters,
    )  # fmt: skip
    measured: Measured = []
    seen: list[Shown] = []
    for i in range(inner_steps):
      inner = slice(i * sequences, (i + 1) * sequences)
      part = jax.tree.map(operator.itemgetter(inner), tokens)
      packed = (place_own or place)(
        pack(part, row_tokens, rows, shards, share_prompts, own)
      )
      params, opt_state, filter_state, scalars, some = inner_step(
        params, opt_state, filter_state, place(part), packed,
        jax.random.fold_in(key, i), state.reference, i == 0,
      )  # fmt: skip
      measured.append(scalars)
      seen.append(some)
    state = state._replace(
      params=params, optimizer=opt_state, filters=filter_state
    )
    return state, measured, seen

  return update


def make_inner_step(
  policy: PolicyConfig,
  filters: optax.GradientTransformation,
  optimizer: optax.GradientTransformation,
  *,
  microbatch_rows: int,
  temperature: float,
  remat: Remat = 'full',
  dtype: jax.typing.DTypeLike = jnp.float32,
  extras: Sequence[str] = (),
  shards: int = 1,
  backend: attention.Backend = attention.XLA,
  on_policy: bool = True,
  shown: Sequence[int] = (),
):
  """Builds the jitted inner step of `make_update`, where args are described.

  `inner_step(params, opt_state, filter_state, tokens, rows, key, reference,
  first) -> (params, opt_state, filter_state, scalars, shown)` takes an inner
  batch both as Tokens and packed. Params and optimizer state are donated;
  `reference` are the params of the reference policy, or None; `first`, whether
  the weights are those that sampled, is static.
  """
  stats_of = functools.partial(
    token_stats,
    policy,
    temperature=temperature,
    remat=remat,
    backend=backend,
  )

  @functools.partial(jax.jit, donate_argnums=(0, 1), static_argnums=(7,))
  def inner_step(
    params, opt_state, filter_state, tokens, packed, key, reference, first
  ):
    return _inner_step(
      stats_of, filters, optimizer, microbatch_rows, dtype, tuple(extras),
      shards, params, opt_state, filter_state, tokens, packed, key, reference,
      first, first and on_policy, tuple(shown),
    )  # fmt: skip

  return inner_step


def _inner_step(
  stats_of, filters, optimizer, microbatch_rows, dtype, extras, shards,
  params, opt_state, filter_state, tokens, packed, key, reference, first,
  on_policy, shown,
):  # fmt: skip
  shape = tokens.mask.shape
  if reference is not None:
    frozen = _stats_by_microbatch(
      stats_of, reference, packed, shape, microbatch_rows, shards
    )
    tokens = layouts.after(tokens, jnp.sum(frozen.logprob))
    tokens = tokens._replace(ref_logprob=frozen.logprob)
  # Once, whatever the number of microbatches.
  weights = layouts.laid_by(cast(params, dtype), layouts.TRAINING)
  if packed.ids.shape[0] <= max(microbatch_rows, shards):
    # One vjp serves both passes.

    def apart(weights):
      stats = _unpacked(stats_of(weights, packed, extras=extras), packed, shape)
      return _with_gradient(stats), stats

    _, of_all, stats = jax.vjp(apart, weights, has_aux=True)
    tokens = layouts.after(tokens, jnp.sum(stats.logprob))
    gap = evidence.gap(stats.logprob, _sampler(tokens), tokens.mask)

    def pullback(token_grads):
      (grads,) = of_all(layouts.after(token_grads, *gap))
      return grads, gap

  else:
    stats = TokenStats(tokens.old_logprob, tokens.old_entropy)
    if extras or not on_policy:
      stats = _stats_by_microbatch(
        functools.partial(stats_of, extras=extras), weights, packed, shape,
        microbatch_rows, shards,
      )  # fmt: skip
      tokens = layouts.after(tokens, jnp.sum(stats.logprob))
    pullback = functools.partial(
      _pull_by_microbatch, stats_of, weights, packed, microbatch_rows,
      sampler=_sampler(tokens), shards=shards,
    )  # fmt: skip
  if on_policy:
    # While the weights are those that sampled, the sampler's own numbers
    # serve: they cost nothing, and every ratio is exactly 1.
    stats = stats._replace(
      logprob=tokens.old_logprob, entropy=tokens.old_entropy
    )
  token_grads, next_filter_state, links = watched_gradients(
    filters, stats, tokens, key=key, state=filter_state
  )
  touched = jnp.any(_touched(token_grads))
  measured = evidence.summary(stats, tokens) | _reports(next_filter_state)
  cov = evidence.covariance(stats, tokens)
  seen = _of_rows(
    Shown(stats.logprob, stats.entropy, cov, token_grads.logprob, links), shown
  )
  # What there is to sum over devices before the weights' gradients.
  sums = touched, jnp.sum(seen.logprob), *measured.values()
  grads, gap = pullback(layouts.after(_with_gradient(token_grads), *sums))
  grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
  grad_norm = optax.tree.norm(grads)
  good = touched & jnp.isfinite(grad_norm)

  def step(params, opt_state, _):
    steps, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, steps)
    # As they came, or the next step would have to be compiled anew.
    params = layouts.laid_by(params, layouts.TRAINING)
    opt_state = layouts.laid_by(
      opt_state, layouts.TRAINING, layouts.state_shardings
    )
    return params, opt_state, next_filter_state

  measured |= {
    'grad_norm': grad_norm,
    'update/skipped': 1 - good.astype(jnp.int32),
  }
  if first:
    measured |= evidence.mismatch(gap)
  # Not a select, which would need old and new at one time.
  state = jax.lax.cond(
    good, step, lambda *state: state, params, opt_state, filter_state
  )
  return *state, measured, seen


def _of_rows(seen: Shown, rows: tuple[int, ...]) -> Shown:
  """Of those rows, [S, T], on every device: one collective for all of them."""
  arrays, tree = jax.tree.flatten(seen)
  few = jnp.stack(arrays)[:, np.array(rows, np.int32)]
  return jax.tree.unflatten(tree, layouts.laid(few, layouts.WHOLE))


def _sampler(tokens: Tokens) -> jax.Array:
  """Log-probabilities of the weights of now, NaN where older ones sampled."""
  if tokens.fresh is None:
    return tokens.old_logprob
  return jnp.where(tokens.fresh, tokens.old_logprob, jnp.nan)


def _with_gradient(stats: TokenStats) -> TokenStats:
  """The statistics that weights are reached through."""
  return TokenStats(stats.logprob, stats.entropy)


def _touched(token_grads: TokenStats) -> jax.Array:
  """Where any leaf of the token gradients is not 0."""
  leaves = [leaf != 0 for leaf in jax.tree.leaves(token_grads)]
  return functools.reduce(jnp.logical_or, leaves)


def _unpacked(stats: TokenStats, packed: Rows, shape) -> TokenStats:
  """[…, W] → [B, T]."""
  size = shape[0] * shape[1]
  place = layouts.after(packed.place, jnp.sum(stats.logprob))
  index = jnp.where(place < 0, size, place)

  def unpack(x):
    return jnp.zeros(size, x.dtype).at[index].add(x, mode='drop').reshape(shape)

  return jax.tree.map(unpack, stats)


def _packed(numbers, packed: Rows):
  """[B, T] → […, W], 0 where nothing is scored."""
  index = jnp.maximum(packed.place, 0)
  return jax.tree.map(
    lambda x: jnp.where(packed.place < 0, 0.0, x.reshape(-1)[index]), numbers
  )


def _stats_by_microbatch(
  stats_of, params, packed, shape, microbatch_rows, shards=1
) -> TokenStats:
  empty = jax.tree.map(
    lambda x: jnp.zeros((shards, x.shape[0] // shards, *x.shape[1:]), x.dtype),
    jax.eval_shape(stats_of, params, packed),
  )
  packed = _by_shard(packed, shards)
  trips, chosen = _microbatches(packed.place >= 0, microbatch_rows)

  def body(i, stats):
    index = chosen(i)
    part = _by_shard(stats_of(params, _rows(packed, index)), shards)
    return jax.tree.map(lambda x, p: _put(x, index, p), stats, part)

  stats = jax.lax.fori_loop(0, trips, body, empty)
  return _unpacked(stats, packed, shape)


def _pull_by_microbatch(
  stats_of, params, packed, microbatch_rows, token_grads, sampler, shards=1
) -> tuple[Any, evidence.Gap]:
  """Weight gradients of the rows that have token gradients, in float32.

  And how far these rows' log-probabilities are from the sampler's.
  """
  packed = _by_shard(packed, shards)
  cotangents, sampler = _packed((token_grads, sampler), packed)
  # What has no gradient need not be scored either.
  touched = _touched(cotangents)
  packed = packed._replace(place=jnp.where(touched, packed.place, -1))
  trips, chosen = _microbatches(touched, microbatch_rows)

  def body(i, carry):
    total, gap = carry
    index = chosen(i)
    rows = _rows(packed, index)
    stats, pullback = jax.vjp(lambda p: stats_of(p, rows), params)
    more = evidence.gap(stats.logprob, _take(sampler, index), rows.place >= 0)
    (grads,) = pullback(layouts.after(_take(cotangents, index), *more))
    total = jax.tree.map(lambda a, g: a + g.astype(a.dtype), total, grads)
    total = layouts.laid_by(total, layouts.TRAINING)
    return total, evidence.joined(gap, more)

  zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
  zero = jnp.float32(0)
  nothing = evidence.Gap(zero, zero, zero, jnp.int32(0))
  return jax.lax.fori_loop(0, trips, body, (zeros, nothing))


# Rows as each device holds them: [R, …] seen as [shards, n, …]. A microbatch
# takes as many of every shard, so that no row moves between devices.


def _by_shard(rows, shards: int):
  return jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]), rows)


def _microbatches(wanted: jax.Array, microbatch_rows: int):
  """How many there are, and i → which rows of each shard [shards, m].

  Only rows that have anything wanted [shards, n, W]; n stands for no row.
  """
  wanted = jnp.any(wanted, axis=2)
  shards, rows = wanted.shape
  # Never more than there are: what pads a microbatch goes through the policy.
  each = min(max(microbatch_rows // shards, 1), rows)
  order, trips = jax.vmap(_first, (0, None))(wanted, each)

  def chosen(i):
    return jax.lax.dynamic_slice_in_dim(order, i * each, each, axis=1)

  return jnp.max(trips), chosen


def _first(wanted: jax.Array, microbatch_rows: int):
  """Row numbers, the wanted ones first, then R for no row; microbatches."""
  count = jnp.sum(wanted, dtype=jnp.int32)
  order = jnp.argsort(~wanted, stable=True)
  order = jnp.where(jnp.arange(order.size) < count, order, order.size)
  order = jnp.pad(
    order, (0, -order.size % microbatch_rows), constant_values=order.size
  )
  return order, (count + microbatch_rows - 1) // microbatch_rows


def _take(tree, index):
  """Rows `index` [shards, m] of [shards, n, …] → [shards · m, …].

  All 0 for no row.
  """

  def take(x):
    rows = jax.vmap(lambda x, i: x.at[i].get(mode='fill', fill_value=0))
    return rows(x, index).reshape(-1, *x.shape[2:])

  return jax.tree.map(take, tree)


def _put(x, index, rows):
  return jax.vmap(lambda x, i, r: x.at[i].set(r, mode='drop'))(x, index, rows)


def _rows(packed: Rows, index) -> Rows:
  """A microbatch of rows, with padding for no row."""
  rows = _take(packed, index)
  live = index.reshape(-1, 1) < packed.ids.shape[1]
  return rows._replace(place=jnp.where(live, rows.place, -1))


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
