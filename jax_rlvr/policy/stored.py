"""How files hold the arrays of a policy, and the way from there to devices.

Weights go to their devices in blocks of bounded size: a host reads its own
shards only, and never holds a whole array.
"""

from __future__ import annotations

import collections
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_rlvr.policy import decoder
from jax_rlvr.policy.config import PolicyConfig
from jax_rlvr.tokenizer import Tokenizer

# Bytes on their way to a device at one time, as float32.
BLOCK = 1 << 23

# Leaf → its axes here, a letter each, and those of a file: linear maps are
# [out, in] there, with heads folded into either.
FORMS = {
  'embed': ('vd', 'v d'),
  'head': ('dv', 'v d'),
  'query': ('dnh', 'nh d'),
  'key': ('dnh', 'nh d'),
  'value': ('dnh', 'nh d'),
  'output': ('nhd', 'd nh'),
  'query_bias': ('nh', 'nh'),
  'key_bias': ('nh', 'nh'),
  'value_bias': ('nh', 'nh'),
  'gate': ('df', 'f d'),
  'up': ('df', 'f d'),
  'down': ('fd', 'd f'),
} | dict.fromkeys(
  'norm attention_norm attention_post_norm feed_forward_norm '
  'feed_forward_post_norm query_norm key_norm'.split(),
  ('d', 'd'),
)


class Pretrained(NamedTuple):
  """A policy in files, none of its weights read yet.

  Attributes:
    config: its shape.
    tokenizer: of the policy; None where the files bring none.
    read: `read(shardings) -> params`, float32, laid out by a tree of shardings.
  """

  config: PolicyConfig
  tokenizer: Tokenizer | None
  read: Callable[[Any], decoder.Params]


class Tensor(NamedTuple):
  """One array of a file, or one layer of an array here.

  Attributes:
    name: in the file.
    shape: in the file.
    leaf: key of the array here.
    layer: of a stacked array.
  """

  name: str
  shape: tuple[int, ...]
  leaf: str
  layer: int | None


def tensors(config: PolicyConfig, names: Mapping[str, str]) -> list[Tensor]:
  """All that files must hold of a policy.

  Args:
    config: of the policy.
    names: leaf → name, with a place for the layer in those of blocks.
  """
  abstract = decoder.abstract_params(config)
  found = []
  for leaf, x in abstract.items():
    if leaf != 'blocks':
      found.append(Tensor(names[leaf], _there(leaf, x.shape), leaf, None))
  for layer in range(config.layers):
    for leaf, x in abstract['blocks'].items():
      name, shape = names[leaf].format(layer), _there(leaf, x.shape[1:])
      found.append(Tensor(name, shape, leaf, layer))
  return found


def check(
  expected: list[Tensor],
  found: Mapping[str, tuple[pathlib.Path, tuple[int, ...]]],
  source: pathlib.Path,
  remedy: str,
) -> None:
  """Refuses files whose tensors are not exactly those of the policy.

  Args:
    expected: all that the policy needs.
    found: name → file and shape.
    source: named where a tensor is missing.
    remedy: for files that are not whole.

  Raises:
    ValueError: one line that names file, tensor and remedy.
  """
  names = {tensor.name for tensor in expected}
  if missing := sorted(names - set(found)):
    raise ValueError(f'{source} has no {missing[0]}; {remedy}')
  if unexpected := sorted(set(found) - names):
    raise ValueError(
      f'{found[unexpected[0]][0]} has {unexpected[0]}, which this decoder '
      'lacks; use another model'
    )
  for tensor in expected:
    file, shape = found[tensor.name]
    if shape != tensor.shape:
      raise ValueError(
        f'{file}: {tensor.name} is {shape} where the configuration asks for '
        f'{tensor.shape}; {remedy}'
      )


def to_file(leaf: str, array: np.ndarray) -> np.ndarray:
  """An array of one layer in the form that files have."""
  here, there = FORMS[leaf]
  order = [here.index(axis) for axis in there.replace(' ', '')]
  return array.transpose(order).reshape(_there(leaf, array.shape))


def _there(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  here, there = FORMS[leaf]
  sizes = dict(zip(here, shape, strict=True))
  return tuple(math.prod(sizes[a] for a in axes) for axes in there.split())


def stream(
  config: PolicyConfig,
  names: Mapping[str, str],
  shardings: Any,
  fetch: Callable[[str, tuple[slice, ...]], np.ndarray],
) -> decoder.Params:
  """Builds the parameters on their devices, a block of a file at a time.

  Args:
    config: of the policy.
    names: as in `tensors`.
    shardings: one for each parameter.
    fetch: (name, slices) → that part of a tensor, in the file's number type.
  """

  def one(path, array, sharding):
    leaf = path[-1].key
    return _place(array, sharding, leaf, names[leaf], len(path) > 1, fetch)

  abstract = decoder.abstract_params(config)
  return jax.tree_util.tree_map_with_path(one, abstract, shardings)


def _place(array, sharding, leaf, name, stacked, fetch) -> jax.Array:
  # Devices that hold the same part share what is read for it.
  parts = collections.defaultdict(list)
  everywhere = sharding.addressable_devices_indices_map(array.shape)
  for device, index in everywhere.items():
    bounds = (s.indices(n)[:2] for s, n in zip(index, array.shape, strict=True))
    parts[tuple(bounds)].append(device)
  here, there = FORMS[leaf]
  order = tuple(there.replace(' ', '').index(axis) for axis in here)
  shards = {
    bounds: [
      jnp.zeros([b - a for a, b in bounds], array.dtype, device=device)
      for device in devices
    ]
    for bounds, devices in parts.items()
  }
  # Layers outside: who reads by whole tensors reads each only once.
  for layer in range(array.shape[0]) if stacked else (None,):
    for bounds, devices in parts.items():
      lead, within, shape = (), bounds, array.shape
      if layer is not None:
        (begin, end), *within = bounds
        if not begin <= layer < end:
          continue
        lead, shape = (layer - begin,), shape[1:]
      for block in _blocks(leaf, shape, within):
        numbers = fetch(name.format(layer), block.index)
        numbers = numbers.reshape(block.unfolded)[block.cut]
        # While one block travels the next is read, and no more than that.
        jax.block_until_ready(shards[bounds])
        shards[bounds] = [
          _write(shard, jax.device_put(numbers, device), lead + block.at, order)
          for shard, device in zip(shards[bounds], devices, strict=True)
        ]
  return jax.make_array_from_single_device_arrays(
    array.shape, sharding, [x for part in shards.values() for x in part]
  )


class _Block(NamedTuple):
  """A part of a tensor and where it goes.

  Attributes:
    index: of it in the file.
    unfolded: its shape with an axis for each letter of the file's form.
    cut: what of that is wanted.
    at: its place in the shard.
  """

  index: tuple[slice, ...]
  unfolded: tuple[int, ...]
  cut: tuple[slice, ...]
  at: tuple[int, ...]


def _blocks(leaf, shape, bounds) -> Iterator[_Block]:
  """The blocks of one layer of a shard, cut along the file's first axis."""
  here, there = FORMS[leaf]
  sizes = dict(zip(here, shape, strict=True))
  bounds = dict(zip(here, bounds, strict=True))
  first, *others = there.replace(' ', '')
  begin, end = bounds[first]
  row = 4 * math.prod(bounds[a][1] - bounds[a][0] for a in others)
  least = -(-(end - begin) * row // BLOCK)
  # Of one size if it can be, for each size is compiled.
  even = (n for n in range(least, 2 * least) if (end - begin) % n == 0)
  rows = max(1, -(-(end - begin) // next(even, least)))
  for start in range(begin, end, rows):
    spans = bounds | {first: (start, min(start + rows, end))}
    index, unfolded, cut = [], [], []
    for outer, *folded in there.split():
      low, high = spans[outer]
      fold = math.prod(sizes[axis] for axis in folded)
      index.append(slice(low * fold, high * fold))
      unfolded += [high - low, *(sizes[axis] for axis in folded)]
      cut += [slice(None), *(slice(*spans[axis]) for axis in folded)]
    at = tuple(spans[axis][0] - bounds[axis][0] for axis in here)
    yield _Block(tuple(index), tuple(unfolded), tuple(cut), at)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _write(shard, numbers, at, order):
  """The shard with a block of a file in its place."""
  numbers = jnp.transpose(numbers, order).astype(shard.dtype)
  numbers = numbers.reshape((1,) * (shard.ndim - numbers.ndim) + numbers.shape)
  return jax.lax.dynamic_update_slice(shard, numbers, at)
