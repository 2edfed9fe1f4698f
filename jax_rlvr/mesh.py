"""Devices and where arrays lie on them: one table a layout.

Axes: `slice` (over the data-centre network), `fsdp` (rows of a batch; also
parameters, in training), `tensor` (heads, feed-forward and vocabulary). Model
code and filters never name an axis.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ('slice', 'fsdp', 'tensor')

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
WHOLE = P()
# Of the sampler: [S, K, …] and [P, T, K, H].
CACHE = P(*ROWS, 'tensor')
PROMPTS = P(*ROWS, None, 'tensor')
# Of the head, [V, D] or [D, V]: as it multiplies, and its gradient; and of
# each shard's part of the gradient, [shards, …].
HEAD = {'vd': P('tensor', None), 'dv': P(None, 'tensor')}
HEAD_GRADIENT = {'vd': P('tensor', 'fsdp'), 'dv': P('fsdp', 'tensor')}
HEAD_PARTS = {name: P(*ROWS, *spec) for name, spec in HEAD.items()}


def make(
  *,
  slices: int = 1,
  fsdp: int = -1,
  tensor: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """The mesh of the devices; fsdp = −1 takes what the others leave.

  Neighbours on the axes `fsdp` and `tensor` are neighbours in the slice;
  devices that know no slice, such as CPUs, are cut into slices in their order.

  Args:
    slices: that the data-centre network joins.
    fsdp, tensor: of a slice.
    devices: all there are if None.

  Raises:
    ValueError: the product is not the number of devices, the devices lie in
      another number of slices, or a layer's share lies on part of a host that
      also has part of another's.
  """
  devices = jax.devices() if devices is None else list(devices)
  count = len(devices)
  if fsdp == -1:
    fsdp = max(count // (slices * tensor), 1)
  if slices * fsdp * tensor != count:
    raise ValueError(
      f'mesh {slices} × {fsdp} × {tensor} (slice × fsdp × tensor) is not the '
      f'{count} devices here; fsdp=-1 takes what the others leave'
    )
  found = len({getattr(device, 'slice_index', 0) for device in devices})
  if found not in (1, slices):
    raise ValueError(
      f'the devices lie in {found} slices, and {slices=}; give slices={found}'
    )
  if found > 1:
    grid = mesh_utils.create_hybrid_device_mesh(
      (1, fsdp, tensor), (slices, 1, 1), devices,
      allow_split_physical_axes=True,
    )  # fmt: skip
  else:
    # Else tensor=2 would have no place on a torus of 4 × 8.
    grid = mesh_utils.create_device_mesh(
      (slices, fsdp, tensor), devices, allow_split_physical_axes=True
    )
  mesh = Mesh(
    grid,
    AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )
  _check_hosts(mesh)
  return mesh


def folded(mesh: Mesh, tensor: int) -> Mesh:
  """The devices of a mesh in their order, with another `tensor` axis.

  The order is the same, so a program can take arrays of one to the other.

  Raises:
    ValueError: it does not divide the devices of a slice, or a layer's share
      lies on part of a host that also has part of another's.
  """
  slices = mesh.shape['slice']
  if mesh.size // slices % tensor:
    raise ValueError(
      f'{mesh.size // slices} devices of a slice do not divide by {tensor}, '
      'the tensor axis to sample with'
    )
  grid = mesh.devices.reshape(slices, -1, tensor)
  other = Mesh(grid, AXES, axis_types=mesh.axis_types)
  _check_hosts(other)
  return other


def _check_hosts(mesh: Mesh) -> None:
  """Hosts that share one row shard have to share all of theirs."""
  of_host = {frozenset(shards) for shards in _shards_by_host(mesh).values()}
  if sum(map(len, of_host)) > row_shards(mesh):
    raise ValueError(
      f'tensor={mesh.shape["tensor"]} spreads rows over parts of hosts; give '
      'one that divides the devices of a host, or a multiple of them'
    )


@functools.cache
def _shards_by_host(mesh: Mesh) -> dict[int, set[int]]:
  """Which row shards the devices of each host have.

  Kept: the sampler asks between any two segments, and pods have many devices.
  """
  found: dict[int, set[int]] = {}
  by_shard = mesh.devices.reshape(row_shards(mesh), -1)
  for shard, devices in enumerate(by_shard):
    for device in devices:
      found.setdefault(device.process_index, set()).add(shard)
  return found


def own_shards(mesh: Mesh) -> list[int]:
  """The row shards that this host has a part in, ascending."""
  return sorted(_shards_by_host(mesh).get(jax.process_index(), ()))


def crew(mesh: Mesh) -> list[int]:
  """The hosts that have the row shards of this one; they do the same work."""
  by_host = _shards_by_host(mesh)
  mine = by_host.get(jax.process_index())
  return sorted(host for host, shards in by_host.items() if shards == mine)


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
    spec = _rule(table, _name(path))
    return NamedSharding(mesh, _fitting(mesh, spec, leaf.shape))

  return jax.tree_util.tree_map_with_path(one, tree)


def check_heads(mesh: Mesh, heads: int) -> None:
  """Refuses to give devices unequal shares of the query heads.

  Raises:
    ValueError: they do not divide by the mesh's tensor axis.
  """
  tensor = mesh.shape['tensor']
  if heads % tensor:
    fitting = [str(n) for n in range(1, heads + 1) if heads % n == 0]
    raise ValueError(
      f'{heads} query heads do not divide by {tensor=}; give one of '
      f'{", ".join(fitting)}'
    )


def uncut(mesh: Mesh, tree: Any, table: Table) -> list[str]:
  """Which arrays are whole where the table would cut them, and why."""
  found = []

  def one(path, leaf, sharding):
    name = _name(path)
    wanted = _rule(table, name)
    for axis, kept, size in zip(
      wanted, sharding.spec, leaf.shape, strict=False
    ):
      if axis and kept is None and _parts(mesh, axis) > 1:
        found.append(f'{name}: {size} over {axis}={_parts(mesh, axis)}')

  jax.tree_util.tree_map_with_path(one, tree, shardings(mesh, tree, table))
  return found


def state_shardings(mesh: Mesh, state: Any, table: Table) -> Any:
  """The sharding of every array of an optimizer's state.

  As that of the parameter whose path its path ends with, if any; else whole.
  """
  anywhere = tuple((f'(.*/)?({pattern})', spec) for pattern, spec in table)
  return shardings(mesh, state, (*anywhere, ('.*', P())))


def _rule(table: Table, name: str) -> P:
  for pattern, spec in table:
    if re.fullmatch(pattern, name):
      return spec
  raise ValueError(f'no rule of the sharding table matches {name!r}')


def _name(path) -> str:
  return '/'.join(str(getattr(k, 'key', k)) for k in path)


def _fitting(mesh, spec, shape):
  fits = (
    axis if axis and size % _parts(mesh, axis) == 0 else None
    for axis, size in zip(spec, shape, strict=False)
  )
  return P(*fits)


def _parts(mesh, axis):
  axes = axis if isinstance(axis, tuple) else (axis,)
  return math.prod(mesh.shape[a] for a in axes)


def fitted(mesh: Mesh, tree: Any, spec: P) -> Any:
  """The sharding of arrays by one spec, as far as it fits each."""
  return jax.tree.map(
    lambda x: NamedSharding(mesh, _fitting(mesh, spec, x.shape)), tree
  )


def cut(mesh: Mesh, tree: Any, spec: P) -> Any:
  """Arrays within a jitted function, laid out by a spec as far as it fits."""

  return jax.lax.with_sharding_constraint(tree, fitted(mesh, tree, spec))


# Within a program. An array's type knows the mesh that it lies on, so that
# whoever computes with it need not; and without a mesh nothing is asked.


def laid(x: jax.Array, spec: P) -> jax.Array:
  """An array within a program, laid out by a spec as far as it fits."""
  mesh = _mesh_of(x)
  return x if mesh is None else cut(mesh, x, spec)


def laid_by(
  tree: Any, table: Table, rule: Callable[..., Any] = shardings
) -> Any:
  """A tree within a program, laid out by a table.

  Args:
    tree: of parameters, or an optimizer's state.
    table: of the layout.
    rule: `shardings` or `state_shardings`.

  Raises:
    ValueError: no pattern matches an array's path.
  """
  for leaf in jax.tree.leaves(tree):
    mesh = _mesh_of(leaf)
    if mesh is not None:
      return jax.lax.with_sharding_constraint(tree, rule(mesh, tree, table))
  return tree


def after(tree: Any, *events: jax.Array) -> Any:
  """The same arrays; in CPU programs they wait for the events, scalars.

  XLA:CPU (jaxlib 0.10) goes on to the next collective while a loop has yet to
  begin some of its own, unless data flow from one to the other: devices then
  wait for one another in different collectives, for good. Compilers for other
  chips keep collectives in one order and see nothing of this.
  """

  def tied(tree, events):
    # Never true, which the compiler does not know.
    floats = [event.astype(jnp.float32) for event in events]
    never = functools.reduce(
      jnp.logical_or, [(x > 1) & (x < 0) for x in floats]
    )
    return jax.tree.map(lambda x: x + never.astype(x.dtype), tree)

  return jax.lax.platform_dependent(
    tree, events, cpu=tied, default=lambda tree, _: tree
  )


def parts(x: jax.Array, spec: P) -> tuple[int, ...]:
  """In how many parts `laid` cuts each of the spec's axes."""
  mesh = _mesh_of(x)
  if mesh is None:
    return (1,) * len(spec)
  fitted = _fitting(mesh, spec, x.shape)
  return tuple(1 if axis is None else _parts(mesh, axis) for axis in fitted)


def _mesh_of(x) -> Any:
  """The mesh of an array within a program, if it is one of `make`."""
  mesh = jax.typeof(x).sharding.mesh
  auto = jax.sharding.AxisType.Auto
  if mesh.axis_names != AXES or set(mesh.axis_types) != {auto}:
    return None
  return mesh


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


def init_optimizer(
  optimizer: optax.GradientTransformation, params: Any
) -> optax.OptState:
  """The optimizer's first state; each moment lies as its parameter does.

  Zeros depend on no parameter: left alone, they would all be on one device.
  """
  mesh = getattr(jax.tree.leaves(params)[0].sharding, 'mesh', None)
  if mesh is None:
    return optimizer.init(params)
  state = jax.eval_shape(optimizer.init, params)
  moments = state_shardings(mesh, state, TRAINING)
  return jax.jit(optimizer.init, out_shardings=moments)(params)


def place_rows(mesh: Mesh, tree: Any) -> Any:
  """Host arrays with a leading row axis, cut over the data axes.

  All rows are given on every host, which passes on its own.
  """
  return jax.tree.map(
    lambda x: _from_host(mesh, x, range(row_shards(mesh))), tree
  )


def place_own_rows(mesh: Mesh, tree: Any) -> Any:
  """As `place_rows`, of the rows of `own_shards` alone."""
  own = own_shards(mesh)
  return jax.tree.map(lambda x: _from_host(mesh, x, own), tree)


def _from_host(mesh: Mesh, x: np.ndarray, shards: Sequence[int]) -> jax.Array:
  sharding = NamedSharding(mesh, ROWS)
  if mesh.is_multi_process:
    each = len(x) // len(shards)
    place = {shard * each: i * each for i, shard in enumerate(shards)}

    def part(index):
      first = place[index[0].start or 0]
      return x[first : first + each]

    shape = (each * row_shards(mesh), *x.shape[1:])
    return jax.make_array_from_callback(shape, sharding, part)
  return jax.device_put(x, sharding)


def own_rows(tree: Any) -> Any:
  """Arrays cut over rows: those of `own_shards`, on the host."""
  parts = jax.device_get(jax.tree.map(_own_parts, tree))
  return jax.tree.map(
    np.concatenate, parts, is_leaf=lambda x: isinstance(x, list)
  )


def _own_parts(x: jax.Array) -> list[jax.Array]:
  if x.is_fully_addressable:
    return [x]
  # By its first row: devices that share the rows have them once more.
  parts = {
    shard.index[0].start or 0: shard.data for shard in x.addressable_shards
  }
  return [parts[first] for first in sorted(parts)]


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
