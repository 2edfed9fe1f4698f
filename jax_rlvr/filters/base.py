"""What filters are made of: lifting a function, and watching one at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_rlvr import masked
from jax_rlvr.records import Report, Tokens, TokenStats, Tracked, Watched

EMPTY = optax.EmptyState()
Filter = optax.GradientTransformationExtraArgs
Body = Callable[[TokenStats, TokenStats, Tokens, jax.Array | None], Any]


def stateless(body: Body, mark: Any = EMPTY) -> Filter:
  """Lifts `body(grads, stats, tokens, key) -> grads` to a transformation.

  Unlike `optax.stateless` it hands on the evidence. Its state is `mark`, an
  empty tuple whose type may say something of the filter.

  >>> double = stateless(
  ...   lambda grads, stats, tokens, key: jax.tree.map(lambda g: 2 * g, grads)
  ... )
  """
  return _lifted(mark, lambda *arguments: (body(*arguments), mark))


def reporting(body: Body, *names: str, mark: Any = EMPTY) -> Filter:
  """As `stateless`, for a body that returns grads and a dict of scalars.

  `names` are its keys. They become metrics where the filter is `tracked`.
  """
  zeros = {name: np.zeros((), np.float32) for name in names}

  def with_report(*arguments):
    grads, scalars = body(*arguments)
    return grads, Report(scalars, mark)

  return _lifted(Report(zeros, mark), with_report)


def _lifted(initial, body) -> Filter:
  def init_fn(params):
    del params
    return jax.tree.map(jnp.asarray, initial)

  def update_fn(
    updates, state, params: Any = None, *, tokens: Any, key=None, **extra
  ):
    del state, extra
    return body(updates, params, tokens, key)

  # pyrefly: ignore[bad-argument-type]: tokens is required, by design.
  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def keep(grads: TokenStats, kept: jax.Array) -> TokenStats:
  """Both leaves where `kept` is True, 0 elsewhere."""
  return jax.tree.map(lambda g: jnp.where(kept, g, 0.0), grads)


def scale(grads: TokenStats, factor: jax.Array | float) -> TokenStats:
  """Both leaves times a factor that broadcasts to [B, T]."""
  return jax.tree.map(lambda g: g * factor, grads)


def evidence(tokens: Tokens, field: str, name: str) -> Any:
  """A field of tokens that the filter `name` cannot do without.

  Raises:
    ValueError: it is None.
  """
  found = getattr(tokens, field)
  if found is None:
    raise ValueError(f'{name} reads tokens.{field}, but it is None')
  return found


def tracked(name: str, tx: optax.GradientTransformation) -> Filter:
  """Records what a filter does, as metrics `filters/<name>/…`.

  * `kept`: of the tokens that came with a gradient, the share that leaves
    with one; 1 where none came.
  * `mass`: Σ|logprob gradient| that leaves over what came; 1 where none came.
  * whatever the filter reports of itself.

  Raises:
    ValueError: of the filters in `tx`, two report the same.

  >>> filters = optax.chain(tracked('clip', clip_ratio()), token_mean())
  """
  tx = optax.with_extra_args_support(tx)

  def report(before, after, inner) -> dict[str, Any]:
    came, left = before.logprob != 0, after.logprob != 0
    mass = jnp.sum(jnp.abs(before.logprob))
    kept = _share(masked.count(came & left), masked.count(came))
    mass = _share(jnp.sum(jnp.abs(after.logprob)), mass)
    return {f'{name}/kept': kept, f'{name}/mass': mass} | _reported(name, inner)

  def init_fn(params):
    one, inner = jnp.ones((), jnp.float32), tx.init(params)
    shares = {f'{name}/kept': one, f'{name}/mass': one}
    return Tracked(inner, shares | _reported(name, inner))

  def update_fn(updates: Any, state, params=None, **extra):
    watched = isinstance(state, Watched)
    before = (state.tracked if watched else state).inner
    result: Any = tx.update(updates, before, params, **extra)
    new, inner = result
    after = Tracked(inner, report(updates, new, inner))
    if watched:
      return new, Watched(after, updates.logprob, new.logprob)
    return new, after

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _reported(name, state) -> dict[str, Any]:
  """What the filters of a state report, those tracked on their own aside."""
  found = {}
  kinds = Report, Tracked
  for node in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds)):
    for key, x in node.scalars.items() if isinstance(node, Report) else ():
      if (metric := f'{name}/{key}') in found:
        raise ValueError(f'two filters report {metric}; track them one by one')
      found[metric] = x
  return found


def _share(part, whole):
  return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 1.0)


def per_microbatch(tx: optax.GradientTransformation, rows: int) -> Filter:
  """Lets a filter see only so many rows at a time, as reference codes do.

  Selections and means are then those of each microbatch, and the gradient
  depends on how the batch was cut: this exists to replicate published runs. To
  emulate their mean of microbatch means too, put the aggregation inside and
  `optax.scale(rows / B)` behind.

  Args:
    tx: the filter or chain.
    rows: consecutive sequences it sees at one time; divides the batch.

  Reports are means over the microbatches; other state is the first one's.

  >>> filters = optax.chain(per_microbatch(clip_cov(), rows=8), token_mean())
  """
  tx = optax.with_extra_args_support(tx)

  def update_fn(updates, state, params=None, *, tokens: Any, key=None, **extra):
    batch = tokens.mask.shape[0]
    if batch % rows:
      raise ValueError(
        f'per_microbatch: {rows=} does not divide the {batch} sequences of an '
        'inner batch'
      )

    def cut(tree):
      return jax.tree.map(
        lambda x: x.reshape(batch // rows, rows, *x.shape[1:]), tree
      )

    part = _first_rows(state, rows)

    def one(updates, params, tokens, key):
      return tx.update(updates, part, params, tokens=tokens, key=key, **extra)

    keys = None if key is None else jax.random.split(key, batch // rows)
    grads, states = jax.vmap(one)(cut(updates), cut(params), cut(tokens), keys)
    grads = jax.tree.map(lambda g: g.reshape(batch, *g.shape[2:]), grads)
    return grads, _joined(states)

  # pyrefly: ignore[bad-argument-type]: tokens is required, by design.
  return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def _first_rows(state: Any, rows: int) -> Any:
  """A state as a chain over so many rows has it."""

  def cut(node: Any) -> Any:
    if isinstance(node, Watched):
      inner = _first_rows(node.tracked, rows)
      return Watched(inner, node.came[:rows], node.left[:rows])
    return node

  return jax.tree.map(cut, state, is_leaf=lambda x: isinstance(x, Watched))


def _joined(states: Any) -> Any:
  """The states of the microbatches as one."""

  def mean(tree):
    return jax.tree.map(lambda x: x.mean(0), tree)

  def join(node: Any) -> Any:
    if isinstance(node, Report):
      return mean(node)
    if isinstance(node, Tracked):
      return Tracked(_joined(node.inner), mean(node.report))
    if isinstance(node, Watched):
      came, left = (x.reshape(-1, x.shape[-1]) for x in node[1:])
      return Watched(join(node.tracked), came, left)
    return node[0]

  kinds = Report, Tracked, Watched
  return jax.tree.map(join, states, is_leaf=lambda x: isinstance(x, kinds))
