"""What filters are made of: lifting a function, and watching one at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jax_rlvr import masked
from jax_rlvr.records import Tokens, TokenStats, Tracked

Filter = optax.GradientTransformationExtraArgs
Body = Callable[[TokenStats, TokenStats, Tokens, jax.Array | None], TokenStats]


def stateless(body: Body) -> Filter:
  """Lifts `body(grads, stats, tokens, key) -> grads` to a transformation.

  Unlike `optax.stateless` it hands on the evidence.

  >>> double = stateless(
  ...   lambda grads, stats, tokens, key: jax.tree.map(lambda g: 2 * g, grads)
  ... )
  """

  def init_fn(params):
    del params
    return optax.EmptyState()

  def update_fn(
    updates, state, params: Any = None, *, tokens: Any, key=None, **extra
  ):
    del extra
    return body(updates, params, tokens, key), state

  # pyrefly: ignore[bad-argument-type]: tokens is required, by design.
  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def keep(grads: TokenStats, kept: jax.Array) -> TokenStats:
  """Both leaves where `kept` is True, 0 elsewhere."""
  return jax.tree.map(lambda g: jnp.where(kept, g, 0.0), grads)


def scale(grads: TokenStats, factor: jax.Array) -> TokenStats:
  """Both leaves times a factor that broadcasts to [B, T]."""
  return jax.tree.map(lambda g: g * factor, grads)


def tracked(name: str, tx: optax.GradientTransformation) -> Filter:
  """Records what a filter does, as metrics `filters/<name>/…`.

  * `kept`: of the tokens that came with a gradient, the share that leaves
    with one; 1 where none came.
  * `mass`: Σ|logprob gradient| that leaves over what came; 1 where none came.
  """
  tx = optax.with_extra_args_support(tx)

  def report(before, after) -> dict[str, Any]:
    came, left = before.logprob != 0, after.logprob != 0
    mass = jnp.sum(jnp.abs(before.logprob))
    return {
      f'{name}/kept': _share(masked.count(came & left), masked.count(came)),
      f'{name}/mass': _share(jnp.sum(jnp.abs(after.logprob)), mass),
    }

  def init_fn(params):
    one = jnp.ones((), jnp.float32)
    return Tracked(tx.init(params), {f'{name}/kept': one, f'{name}/mass': one})

  def update_fn(updates, state, params=None, **extra):
    new, inner = tx.update(updates, state.inner, params, **extra)
    return new, Tracked(inner, report(updates, new))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _share(part, whole):
  return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 1.0)
