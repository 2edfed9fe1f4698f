"""Attention: who sees whom, and the backends that compute it.

A token sees the past of its own segment, and the past of its group's prompt
(segment 0); in a local layer, only what lies within the window. All of that
lies in columns up to its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_rlvr.policy import splash as kernel
from jax_rlvr.policy.config import PolicyConfig

if TYPE_CHECKING:
  from jaxtyping import Array, Bool, Int

Attend = Callable[..., tuple[jax.Array, Any]]

# Queries whose scores exist at one time, for each row and head.
QUERY_BLOCK = 512

# Parts of a row that leave out the keys after them. Four spare three eighths
# of the work; more spare little, and each is compiled by itself.
STRIPES = 4

# Blocks are multiples of it.
LANES = 128

# Finite: a row that sees nothing must not make NaN of its neighbours' gradient.
UNSEEN = -1e30


class Layout(NamedTuple):
  """Where each token of a row stands, int32 [B, T] each; see `Rows`."""

  positions: Int[Array, 'B T']
  group: Int[Array, 'B T']
  segment: Int[Array, 'B T']


class Backend(NamedTuple):
  """A way to compute attention.

  Attributes:
    name: of it.
    attend: (config, layout) → `attend(query [B, T, N, H], key [B, T, K, H],
      value, local) -> (mixed [B, T, N, H], None)`; `local` may be traced.
    shares_prompts: whether completions can share the tokens of their prompt;
      else a group must be one sequence.
  """

  name: str
  attend: Callable[[PolicyConfig, Layout], Attend]
  shares_prompts: bool


def choose(
  name: str, config: PolicyConfig, dtype: jax.typing.DTypeLike, mesh: Mesh
) -> Backend:
  """The backend 'xla', 'splash' or 'cudnn'; 'auto' is what suits the devices.

  Args:
    name: of it.
    config: of the policy.
    dtype: of queries, keys and values.
    mesh: the devices.

  Raises:
    ValueError: it does not run there, or cannot compute this policy.
  """
  platform = mesh.devices.flat[0].platform
  lacking = _cudnn_lacks(config, dtype)
  if name == 'auto':
    on_gpu = 'xla' if lacking else 'cudnn'
    name = {'tpu': 'splash', 'gpu': on_gpu}.get(platform, 'xla')
  if name == 'xla':
    return XLA
  device = {'splash': 'tpu', 'cudnn': 'gpu'}[name]
  if platform != device:
    raise ValueError(
      f'attention={name!r} needs a {device.upper()}, and devices here are of '
      f"kind {platform!r}; choose 'auto' or 'xla'"
    )
  if name == 'splash':
    return splash(mesh)
  if lacking:
    raise ValueError(f"attention='cudnn' {lacking}; choose 'auto' or 'xla'")
  return CUDNN


def plain(batch: int, length: int) -> Layout:
  """Rows of one sequence each.

  Padding at the end needs no mark: only padding sees it.
  """
  zeros = jnp.zeros((batch, length), jnp.int32)
  columns = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), zeros.shape)
  return Layout(columns, zeros, zeros)


def xla(config: PolicyConfig, layout: Layout, keep: bool = False) -> Attend:
  """Attention in plain XLA, a block of queries at a time.

  Args:
    config: of the policy.
    layout: of the rows.
    keep: hand on keys and values in place of None, for a cache.
  """

  def attend(query, key, value, local):
    batch, length, heads, size = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, size)
    block, stripe = _cut(length)
    parts = []
    for start in range(0, length, stripe):
      stop = min(start + stripe, length)
      mine = _columns((grouped, layout), start, stop)
      of_block = functools.partial(
        _mixed, config, local, *_columns((key, value, layout), 0, stop)
      )
      if block == stripe:
        parts.append(of_block(mine))
      else:
        # One after another, or all their scores would exist at one time.
        blocks = jax.tree.map(functools.partial(_blocks, block), mine)
        part = jax.lax.map(jax.checkpoint(of_block), blocks)
        part = jnp.moveaxis(part, 0, 1).reshape(batch, -1, *part.shape[3:])
        parts.append(part[:, : stop - start])
    mixed = jnp.concatenate(parts, axis=1).reshape(query.shape)
    return mixed, (key, value) if keep else None

  return attend


def splash(mesh: Mesh | None, interpret: bool = False) -> Backend:
  """The Splash kernel, for TPUs; it tells groups apart, not segments.

  Args:
    mesh: over which rows and heads are cut; None for one device.
    interpret: run on any device, slowly.
  """

  def backend(config: PolicyConfig, layout: Layout) -> Attend:
    far, near = (
      functools.partial(
        kernel.attend,
        window=window,
        softcap=config.attention_softcap,
        mesh=mesh,
        interpret=interpret,
      )
      for window in (None, config.window)
    )

    def attend(query, key, value, local):
      # The kernel knows no factor. One rounded to bfloat16 would be a bias.
      scaled = query.astype(jnp.float32) * scale(config)
      query = scaled.astype(query.dtype)
      args = query, key, value, layout.group
      if isinstance(local, bool):
        return (near if local else far)(*args), None
      return jax.lax.cond(local, near, far, *args), None

    return attend

  return Backend('splash', backend, shares_prompts=False)


def cudnn(config: PolicyConfig, layout: Layout) -> Attend:
  """cuDNN's flash attention, for GPUs.

  Scores are never whole; but who sees whom goes in as a bias, of two bytes for
  each pair of columns, and comes out with a gradient.
  """

  def attend(query, key, value, local):
    # Its backward pass takes even lengths only.
    even = functools.partial(_filled, multiple=2)
    here = jax.tree.map(even, layout)
    mixed = jax.nn.dot_product_attention(
      even(query),
      even(key),
      even(value),
      mask=visible(config, here, here, local)[:, None],
      scale=scale(config),
      is_causal=True,
      implementation='cudnn',
    )
    return mixed[:, : query.shape[1]], None

  return attend


XLA = Backend('xla', xla, shares_prompts=True)
CUDNN = Backend('cudnn', cudnn, shares_prompts=True)


def visible(
  config: PolicyConfig, query: Layout, key: Layout, local
) -> Bool[Array, 'B Q T']:
  """Which tokens each query sees."""

  def pairs(field, compare):
    return compare(
      getattr(query, field)[:, :, None], getattr(key, field)[:, None, :]
    )

  same_group = pairs('group', jnp.equal)
  same_segment = pairs('segment', jnp.equal)
  on_prompt = key.segment[:, None, :] == 0
  past = pairs('positions', jnp.greater_equal)
  seen = same_group & (same_segment | on_prompt) & past
  if config.window is None:
    return seen
  near = pairs('positions', jnp.subtract) < config.window
  return seen & (near | ~jnp.asarray(local))


def scale(config: PolicyConfig) -> float:
  """Factor of the attention scores."""
  if config.query_scale is None:
    return config.head_size**-0.5
  return config.query_scale


def capped(x: jax.Array, softcap: float | None) -> jax.Array:
  """softcap · tanh(x / softcap); x where there is none."""
  return x if softcap is None else softcap * jnp.tanh(x / softcap)


def _mixed(config, local, key, value, layout, block):
  """What a block of queries takes in."""
  query, mine = block
  scores = jnp.einsum(
    'btkrh,bskh->bkrts', query, key, preferred_element_type=jnp.float32
  )
  scores = capped(scores * scale(config), config.attention_softcap)
  seen = visible(config, mine, layout, local)[:, None, None]
  weights = jax.nn.softmax(jnp.where(seen, scores, UNSEEN), axis=-1)
  return jnp.einsum('bkrts,bskh->btkrh', weights.astype(value.dtype), value)


def _cut(length: int) -> tuple[int, int]:
  """Queries of a block, and of a stripe: whole blocks, one in a short row."""
  stripe = -(-length // STRIPES)
  count = 1 if length <= QUERY_BLOCK else max(2, -(-stripe // QUERY_BLOCK))
  block = -(-stripe // (count * LANES)) * LANES
  return block, count * block


def _columns(tree, start: int, stop: int):
  return jax.tree.map(lambda x: x[:, start:stop], tree)


def _filled(x: jax.Array, multiple: int) -> jax.Array:
  """[B, T, …] with T filled up to a multiple; nobody reads what that sees."""
  rest = [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple), *rest])


def _blocks(block: int, x: jax.Array) -> jax.Array:
  """[B, T, …] → [T / block, B, block, …]."""
  x = _filled(x, block)
  blocks = x.reshape(x.shape[0], -1, block, *x.shape[2:])
  return jnp.moveaxis(blocks, 1, 0)


def _cudnn_lacks(config: PolicyConfig, dtype) -> str | None:
  """Why cuDNN cannot compute a policy."""
  if config.attention_softcap is not None:
    cap = config.attention_softcap
    return f'cannot cap scores, and the policy has attention_softcap={cap}'
  if config.head_size % 8 or config.head_size > 128:
    return f'takes heads of 8 to 128 by eights, not of {config.head_size}'
  if jnp.dtype(dtype).itemsize != 2:
    return f'takes bfloat16 or float16, not {jnp.dtype(dtype)}'
  return None
