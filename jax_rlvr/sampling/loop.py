"""Prefill and decode of P prompts with G completions each, in one jit."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from jax_rlvr import policy
from jax_rlvr.sampling.draw import Drawn, draw

if TYPE_CHECKING:
  from jaxtyping import Array, Bool, Float, Int, Key


class Sampled(NamedTuple):
  """Completions, padded to the token limit; see `Drawn` for the numbers.

  Attributes:
    tokens: ids and their numbers, [P, G, Tc].
    lengths: int32 [P, G], completion tokens, the end token included.
    ended: bool [P, G], False where the limit came first.
  """

  tokens: Drawn
  lengths: Int[Array, 'P G']
  ended: Bool[Array, 'P G']


@functools.partial(jax.jit, static_argnames=('config', 'max_tokens'))
def sample(
  config: policy.PolicyConfig,
  params,
  prompts: Int[Array, 'P Tp'],
  lengths: Int[Array, ' P'],
  keys: Key[Array, 'P G'],
  temperature: Float[Array, ''],
  end_ids: Int[Array, ' E'],
  *,
  max_tokens: int,
) -> Sampled:
  """Completes every prompt G times.

  A completion depends on its key, its prompt and the policy alone. The loop
  ends when all have ended.

  Args:
    config: of the policy.
    params: of the policy, stacked.
    prompts: padded at the end.
    lengths: prompt tokens, each ≥ 1.
    keys: one a completion; each token folds in its number.
    temperature: 0 for argmax.
    end_ids: any of them ends a completion.
    max_tokens: token limit Tc.
  """
  count, samples = keys.shape
  fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))
  hidden, cache = policy.prefill(
    config, params, prompts, lengths, samples, max_tokens
  )
  weights = policy.unstack(params)

  def next_token(hidden, step):
    return draw(
      fold(keys, step), policy.logits(config, params, hidden), temperature
    )

  def write(all_tokens, new, step):
    return jax.tree.map(
      lambda x, part: jax.lax.dynamic_update_index_in_dim(x, part, step, 2),
      all_tokens,
      new,
    )

  def is_end(ids):
    return jnp.any(ids[..., None] == end_ids[None, None], axis=-1)

  # All G completions of a prompt draw their first token from one state.
  shared = jnp.broadcast_to(hidden[:, None], (count, samples, hidden.shape[-1]))
  first = next_token(shared, 0)
  blank = jax.tree.map(
    lambda x: jnp.zeros((*x.shape, max_tokens), x.dtype), first
  )

  def body(carry):
    step, cache, last, ended, lengths, tokens = carry
    hidden, cache = policy.decode(config, weights, cache, last, step - 1)
    new = next_token(hidden, step)
    tokens = write(tokens, new, step)
    lengths = jnp.where(ended, lengths, step + 1)
    return step + 1, cache, new.ids, ended | is_end(new.ids), lengths, tokens

  def live(carry):
    step, _, _, ended, _, _ = carry
    return (step < max_tokens) & ~jnp.all(ended)

  lengths = jnp.ones((count, samples), jnp.int32)
  start = (
    jnp.int32(1),
    cache,
    first.ids,
    is_end(first.ids),
    lengths,
    write(blank, first, 0),
  )
  _, _, _, ended, lengths, tokens = jax.lax.while_loop(live, body, start)
  return Sampled(tokens, lengths, ended)
