"""The decoder one token at a time, against a cache.

A prompt's keys and values are kept once and shared by its G completions; each
completion keeps its own beside them. Layers are unstacked here: inside a
decoding loop XLA would copy every slice of a stacked weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_rlvr.policy import attention, decoder
from jax_rlvr.policy.config import PolicyConfig

if TYPE_CHECKING:
  from jaxtyping import Array, Float, Int


class Cache(NamedTuple):
  """Keys and values of P prompts and of their G completions, a layer each.

  Attributes:
    prompt: L pairs [P, Tp, K, H].
    completion: L pairs [P, G, Tc, K, H].
    lengths: int32 [P], prompt tokens.
  """

  prompt: tuple
  completion: tuple
  lengths: Int[Array, ' P']


def unstack(params: decoder.Params) -> dict[str, Any]:
  """Parameters with the blocks as a list of L layers."""
  leaves, tree = jax.tree.flatten(params['blocks'])
  layers = [tree.unflatten(layer) for layer in zip(*leaves, strict=True)]
  return params | {'blocks': layers}


def prefill(
  config: PolicyConfig,
  params: decoder.Params,
  ids: Int[Array, 'P Tp'],
  lengths: Int[Array, ' P'],
  samples: int,
  max_tokens: int,
) -> tuple[Float[Array, 'P D'], Cache]:
  """Reads the prompts; returns the hidden state of their last token."""
  x = decoder.embed(config, params, ids)
  layout = attention.plain(*ids.shape)
  rotate = decoder.rotary(config, layout.positions)
  attend = attention.xla(config, layout, keep=True)
  x, kept = decoder.scan_blocks(
    config, params['blocks'], x, rotate, attend, remat='none'
  )
  last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
  shape = (ids.shape[0], samples, max_tokens, config.kv_heads, config.head_size)
  empty = jnp.zeros(shape, x.dtype)
  prompt = tuple((kept[0][i], kept[1][i]) for i in range(config.layers))
  completion = tuple((empty, empty) for _ in prompt)
  hidden = decoder.rms_norm(config, last, params['norm'])
  return hidden, Cache(prompt, completion, lengths)


def decode(
  config: PolicyConfig,
  params: dict[str, Any],
  cache: Cache,
  ids: Int[Array, 'P G'],
  step: Int[Array, ''],
) -> tuple[Float[Array, 'P G D'], Cache]:
  """Reads completion token number `step` of every sequence.

  `params` are unstacked. Returns the hidden states that score the next token.
  """
  positions = (cache.lengths + step)[:, None]
  rotate = decoder.rotary(config, positions)
  x = decoder.embed(config, params, ids)
  completion = []
  for weights, prompt, own, local in zip(
    params['blocks'],
    cache.prompt,
    cache.completion,
    config.is_local,
    strict=True,
  ):
    attend = _attend(config, prompt, own, cache.lengths, step)
    x, kept = decoder.block_from(config, weights)(x, rotate, attend, local)
    completion.append(kept)
  hidden = decoder.rms_norm(config, x, params['norm'])
  return hidden, cache._replace(completion=tuple(completion))


def _attend(config, prompt, own, lengths, step):
  """One query per sequence over its prompt and its own tokens so far."""

  def attend(query, key, value, local):
    def write(cached, new):
      return jax.lax.dynamic_update_slice_in_dim(
        cached, new[:, :, None], step, axis=2
      )

    keys, values = write(own[0], key), write(own[1], value)
    p, g, n, h = query.shape
    query = query.reshape(p, g, key.shape[2], -1, h)
    on_prompt = jnp.einsum(
      'pgkrh,ptkh->pgkrt', query, prompt[0], preferred_element_type=jnp.float32
    )
    on_own = jnp.einsum(
      'pgkrh,pgtkh->pgkrt', query, keys, preferred_element_type=jnp.float32
    )

    def scored(raw, visible):
      raw = attention.capped(
        raw * attention.scale(config), config.attention_softcap
      )
      return jnp.where(visible, raw, attention.UNSEEN)

    place = jnp.arange(prompt[0].shape[1])[None]
    seen = place < lengths[:, None]
    number = jnp.arange(keys.shape[2])[None]
    written = number <= step
    if local:
      seen &= lengths[:, None] + step - place < config.window
      written &= step - number < config.window
    scores = jnp.concatenate(
      [
        scored(on_prompt, seen[:, None, None, None]),
        scored(on_own, written[:, None, None, None]),
      ],
      axis=-1,
    )
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    split = prompt[0].shape[1]
    mixed = jnp.einsum(
      'pgkrt,ptkh->pgkrh', weights[..., :split], prompt[1],
      preferred_element_type=jnp.float32,
    ) + jnp.einsum(
      'pgkrt,pgtkh->pgkrh', weights[..., split:], values,
      preferred_element_type=jnp.float32,
    )  # fmt: skip
    return mixed.astype(value.dtype).reshape(p, g, n, h), (keys, values)

  return attend
