"""Decoding with a cache in pages, compiled for TPUs that need not be there.

It also runs as a script, see `tests.libtpu`.
"""

import functools
import json
import math
import re
import sys

import pytest

from tests import libtpu

pytestmark = libtpu.needed


@pytest.fixture(scope='module')
def compiled():
  """topology → what this file, run as a script, says of it."""

  return functools.cache(functools.partial(libtpu.found_by, __file__))


of_each_kind = pytest.mark.parametrize(
  'topology', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2']
)


@of_each_kind
@pytest.mark.parametrize(
  'what', ['one', 'one, two kinds of layers', 'one, one head of 256']
)
def test_decoding_copies_no_pages(compiled, topology, what):
  found = compiled(topology)[what]
  # Each layer writes, and each kind of layer attends.
  assert found['kernels'] == (4 if 'two kinds' in what else 3)
  assert found['copies'] == 0
  assert found['aliased'] == found['cache']
  assert found['temporary'] < found['cache'] / 4


@of_each_kind
@pytest.mark.parametrize('what', ['mesh', 'mesh, two kinds of layers'])
def test_decoding_on_a_mesh_copies_no_pages(compiled, topology, what):
  found, whole = compiled(topology)[what], compiled(topology)['one']
  assert found['kernels'] == (4 if 'two kinds' in what else 3)
  assert found['aliased'] == found['cache']
  assert found['temporary'] < found['cache'] / 4
  if what == 'mesh':
    # Half of the slots, half of the heads.
    assert found['cache'] == whole['cache'] // 4


@of_each_kind
def test_moving_slots_copies_no_pages_but_theirs(compiled, topology):
  found = compiled(topology)
  assert found['admit']['aliased'] == found['admit']['cache']
  assert found['admit']['temporary'] < found['admit']['cache'] / 4
  assert found['repack']['temporary'] < found['repack']['cache'] / 4


def test_control_tells_copies(compiled):
  found = compiled('v5e:2x2')['control']
  assert found['aliased'] == 0
  # One of each layer.
  assert found['copies'] == 2


# Below is the script.


def programs(topology):
  """What is compiled: its name, the program lowered, and its cache."""
  import dataclasses

  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.experimental import topologies
  from jax.sharding import Mesh, NamedSharding
  from jax.sharding import PartitionSpec as P

  from jax_rlvr import mesh as layouts
  from jax_rlvr import policy
  from jax_rlvr.policy.pages import Pages

  devices = np.array(topologies.get_topology_desc(topology, 'tpu').devices)
  llama = policy.PolicyConfig(
    vocab_size=512,
    layers=2,
    width=256,
    heads=32,
    kv_heads=8,
    head_size=128,
    feed_forward=256,
  )
  several = dataclasses.replace(
    llama, window=500, local=(True, False), attention_softcap=50.0
  )
  gemma = dataclasses.replace(llama, heads=4, kv_heads=1, head_size=256)
  slots, columns = 64, 1500

  def mesh_of(count):
    axes = ('slice', 'fsdp', 'tensor')
    kinds = (jax.sharding.AxisType.Auto,) * 3
    parts = devices[:count].reshape(1, -1, 2 if count == 4 else 1)
    return Mesh(parts, axes, axis_types=kinds)

  def placed(tree, places):
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      tree,
      places,
    )

  def cache_of(config, mesh):
    cache = jax.eval_shape(
      lambda: Pages.empty(config, slots, columns, jnp.bfloat16, mesh)
    )
    return placed(cache, layouts.fitted(mesh, cache, cache.spec))

  def integers(mesh, count):
    place = NamedSharding(mesh, layouts.ROWS if count else P())
    return jax.ShapeDtypeStruct(
      (count,) * bool(count), jnp.int32, sharding=place
    )

  def decoding(config, count, donated=True):
    mesh = mesh_of(count)
    cache, numbers = cache_of(config, mesh), integers(mesh, slots)
    params = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
      policy.abstract_params(config),
    )
    params = placed(params, layouts.shardings(mesh, params, layouts.SAMPLING))

    def decode(params, cache, ids, lengths):
      weights = policy.unstack(params)

      def body(step, carry):
        cache, ids, lengths = carry
        hidden, cache = policy.decode(
          config, weights, cache, ids, lengths, step
        )
        logits = policy.logits(config, weights, hidden)
        return cache, jnp.argmax(logits, axis=1).astype(jnp.int32), lengths + 1

      cache, *_ = jax.lax.fori_loop(0, 32, body, (cache, ids, lengths))
      return layouts.cut(mesh, cache, cache.spec)

    run = jax.jit(decode, donate_argnames='cache' if donated else None)
    return run.lower(params, cache, numbers, numbers), cache

  def moving(what):
    mesh = mesh_of(4)
    shards = layouts.row_shards(mesh)
    cache = cache_of(several, mesh)
    some, column = integers(mesh, slots // 2), integers(mesh, 0)
    row = jax.ShapeDtypeStruct(
      (8, 256, several.kv_heads, several.head_size),
      jnp.bfloat16,
      sharding=NamedSharding(mesh, layouts.PROMPTS),
    )
    prompts = policy.Prompts((row, row), (row, row))

    def by_shard(f, *args):
      parts = jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]), args)
      moved = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]), jax.vmap(f)(*parts)
      )
      return layouts.cut(mesh, moved, moved.spec)

    @functools.partial(jax.jit, donate_argnames='cache')
    def admit(cache, prompts, slots, sources, lengths, column):
      return by_shard(
        lambda cache, *rest: cache.admit(*rest, column),
        cache, prompts, slots, sources, lengths,
      )  # fmt: skip

    @jax.jit
    def repack(cache, slots, column):
      return by_shard(
        lambda cache, slots: cache.repack(several, slots, column, columns),
        cache,
        slots,
      )

    if what == 'admit':
      return admit.lower(cache, prompts, some, some, some, column), cache
    return repack.lower(cache, some, column), cache

  yield 'one', *decoding(llama, 1)
  yield 'one, two kinds of layers', *decoding(several, 1)
  yield 'one, one head of 256', *decoding(gemma, 1)
  yield 'mesh', *decoding(llama, 4)
  yield 'mesh, two kinds of layers', *decoding(several, 4)
  yield 'admit', *moving('admit')
  yield 'repack', *moving('repack')
  if topology == 'v5e:2x2':
    yield 'control', *decoding(llama, 1, donated=False)


def main(topology):
  import jax

  found = {}
  for what, lowered, cache in programs(topology):
    arrays = jax.tree.leaves(cache)
    program = lowered.compile()
    memory = program.memory_analysis()
    found[what] = {
      'kernels': lowered.as_text().count('@tpu_custom_call'),
      'cache': sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in arrays
      ),
      'aliased': memory.alias_size_in_bytes,
      'temporary': memory.temp_size_in_bytes,
    }
    if what.startswith(('one', 'control')):
      # A program of several devices cannot be written out.
      shapes = {str(list(x.shape)).replace(' ', '') for x in arrays}
      found[what]['copies'] = sum(
        shape in shapes
        for shape in re.findall(
          r'= \(?bf16(\[[\d,]+\])\S* copy(?:-start)?\(', program.as_text()
        )
      )
  print(json.dumps(found))


if __name__ == '__main__':
  main(sys.argv[1])
