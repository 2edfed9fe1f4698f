"""Devices and where arrays lie on them: one table a layout.

Axes: `slice` (over the data-centre network), `fsdp` (rows of a batch; also
parameters, in training), `tensor` (heads, feed-forward and vocabulary). Model
code and filters never name an axis.
"""

from __future__ import annotations

import math
import os
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Table = tuple[tuple[str, P], ...]

# First match wins. Blocks lead with the layer axis, which is never cut.
TRAINING: Table = (
  (r'embed', P('tensor', 'fsdp')),
  (r'head', P('fsdp', 'tensor')),
  (r'blocks/(query|key|value)', P(None, 'fsdp', 'tensor')),
  (r'blocks/(query|key|value)_bias', P(None, 'tensor')),
  (r'blocks/output', P(None, 'tensor', None, 'fsdp')),
  (r'blocks/(gate|up)', P(None, 'fsdp', 'tensor')),
  (r'blocks/down', P(None, 'tensor', 'fsdp')),
  (r'(blocks/.*)?norm', P()),
)
SAMPLING: Table = tuple(
  (pattern, P(*(None if axis == 'fsdp' else axis for axis in spec)))
  for pattern, spec in TRAINING
)
ROWS = P(('slice', 'fsdp'))
# Of the sampler: [S, K, …] and [P, T, K, H].
CACHE = P(*ROWS, 'tensor')
PROMPTS = P(*ROWS, None, 'tensor')


def make(*, slices: int = 1, fsdp: int = -1, tensor: int = 1) -> Mesh:
  """The mesh of all devices; fsdp = −1 takes what the others leave.

  Raises:
    ValueError: the product is not the number of devices.
  """
  devices = jax.device_count()
  if fsdp == -1:
    fsdp = max(devices // (slices * tensor), 1)
  if slices * fsdp * tensor != devices:
    raise ValueError(
      f'mesh {slices} × {fsdp} × {tensor} (slice × fsdp × tensor) is not the '
      f'{devices} devices here; fsdp=-1 takes what the others leave'
    )
  return jax.make_mesh(
    (slices, fsdp, tensor),
    ('slice', 'fsdp', 'tensor'),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )


def compute_dtype(name: str, mesh: Mesh) -> np.dtype:
  """The named float type; of 'auto', what the devices multiply fastest."""
  if name == 'auto':
    on_cpu = mesh.devices.flat[0].platform == 'cpu'
    name = 'float32' if on_cpu else 'bfloat16'
  return jax.dtypes.canonicalize_dtype(name)


def shardings(mesh: Mesh, tree: Any, table: Table) -> Any:
  """The sharding of every array of a parameter tree.

  A dimension that its axis does not divide is replicated.

  Raises:
    ValueError: no pattern matches an array's path.
  """

  def one(path, leaf):
    name = '/'.join(str(getattr(k, 'key', k)) for k in path)
    for pattern, spec in table:
      if re.fullmatch(pattern, name):
        return NamedSharding(mesh, _fitting(mesh, spec, leaf.shape))
    raise ValueError(f'no rule of the sharding table matches {name!r}')

  return jax.tree_util.tree_map_with_path(one, tree)


def _fitting(mesh, spec, shape):
  def parts(axis):
    axes = axis if isinstance(axis, tuple) else (axis,)
    return int(np.prod([mesh.shape[a] for a in axes]))

  fits = (
    axis if axis and size % parts(axis) == 0 else None
    for axis, size in zip(spec, shape, strict=False)
  )
  return P(*fits)


def fitted(mesh: Mesh, tree: Any, spec: P) -> Any:
  """The sharding of arrays by one spec, as far as it fits each."""
  return jax.tree.map(
    lambda x: NamedSharding(mesh, _fitting(mesh, spec, x.shape)), tree
  )


def cut(mesh: Mesh, tree: Any, spec: P) -> Any:
  """Arrays within a jitted function, laid out by a spec as far as it fits."""

  return jax.lax.with_sharding_constraint(tree, fitted(mesh, tree, spec))


def abstract(mesh: Mesh, tree: Any, table: Table) -> Any:
  """A tree's ShapeDtypeStructs, laid out by a table."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings(mesh, tree, table),
  )


def place(mesh: Mesh, params: Any, table: Table) -> Any:
  """Parameters laid out by a table; no copy where they already lie so."""
  return jax.device_put(params, shardings(mesh, params, table))


def place_rows(mesh: Mesh, tree: Any) -> Any:
  """Host arrays with a leading row axis, cut over the data axes."""
  return jax.device_put(tree, NamedSharding(mesh, ROWS))


def memory(mesh: Mesh) -> int | None:
  """Bytes that each device has; None where it does not say."""
  stats = mesh.local_devices[0].memory_stats() or {}
  if 'bytes_limit' in stats:
    return stats['bytes_limit']
  if mesh.local_devices[0].platform == 'cpu':
    whole = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return whole // len(mesh.local_devices)
  return None


def bytes_per_device(tree: Any, shardings: Any) -> int:
  """What arrays laid out so take on each device."""
  held = jax.tree.map(
    lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize,
    tree,
    shardings,
  )
  return sum(jax.tree.leaves(held))


def row_shards(mesh: Mesh) -> int:
  """In how many parts a leading row axis is cut; row counts divide by it."""
  return int(np.prod([mesh.shape[axis] for axis in ('slice', 'fsdp')]))
