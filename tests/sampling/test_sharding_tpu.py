"""The sampler compiled for a TPU slice that need not be there.

It also runs as a script, see `tests.libtpu`.
"""

import json
import re

import pytest

from tests import libtpu

pytestmark = libtpu.needed

DATA, TENSOR = 4, 4


@pytest.fixture(scope='module')
def compiled():
  """Program → its collectives, as (kind, numbers, devices of each group)."""
  return libtpu.found_by(__file__)


def between_shards(collectives):
  """Those in which devices of different data shards take part."""
  return [
    (kind, numbers)
    for kind, numbers, groups in collectives
    if any(len({device // TENSOR for device in group}) > 1 for group in groups)
  ]


def test_decoding_asks_other_data_shards_for_nothing_but_a_scalar(compiled):
  collectives = compiled['segment']
  # Heads are summed within a shard, in every layer.
  assert len(collectives) - len(between_shards(collectives)) >= 2
  for kind, numbers in between_shards(collectives):
    assert kind == 'all-reduce' and numbers == 1


@pytest.mark.parametrize('program', ['prefill', 'admit', 'repack'])
def test_no_cache_moves_between_data_shards(compiled, program):
  assert not between_shards(compiled[program])


def test_a_gather_between_shards_would_be_seen(compiled):
  assert between_shards(compiled['control'])


# Below is the script.


def programs():
  """What is compiled: its name, and the program lowered."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.experimental import topologies
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  from jax_rlvr import mesh as layouts
  from jax_rlvr import policy
  from jax_rlvr.policy import attention
  from jax_rlvr.sampling import slots

  config = policy.PolicyConfig(
    vocab_size=4096, layers=2, width=512, heads=8, kv_heads=4, head_size=128,
    feed_forward=1024,
  )  # fmt: skip
  devices = topologies.get_topology_desc('v5e:4x4', 'tpu').devices
  mesh = Mesh(
    np.array(devices).reshape(1, DATA, TENSOR),
    ('slice', 'fsdp', 'tensor'),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )

  def laid(tree, shardings):
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      tree,
      shardings,
    )

  def rows(tree):
    return laid(tree, layouts.fitted(mesh, tree, layouts.ROWS))

  whole = NamedSharding(mesh, PartitionSpec())
  stacked = jax.eval_shape(
    lambda p: policy.cast(p, jnp.bfloat16), policy.abstract_params(config)
  )
  unstack = jax.jit(policy.unstack).lower(
    laid(stacked, layouts.shardings(mesh, stacked, layouts.SAMPLING))
  )
  shardings = unstack.compile().output_shardings
  weights = laid(unstack.out_info, shardings)
  count, columns = 32, 256
  idle = jax.eval_shape(
    lambda: slots.Slots(
      policy.Rings.empty(config, count, columns, jnp.bfloat16),
      jnp.int32(0),
      *jnp.zeros((4, count), jnp.int32),
      jax.random.split(jax.random.key(0), count),
      jnp.zeros(count, bool),
      None,
    )
  )
  idle = slots.Slots(
    laid(idle.cache, layouts.fitted(mesh, idle.cache, layouts.CACHE)),
    laid(idle.column, whole),
    *rows(tuple(idle[2:])),
  )
  number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
  of_shards = jax.ShapeDtypeStruct((DATA * 4,), jnp.int32)
  entries = slots.Entries(
    *[of_shards] * 6,
    jax.ShapeDtypeStruct((DATA * 4, 2), jnp.uint32),
    None,
  )
  ids = rows(jax.ShapeDtypeStruct((DATA * 2, 128), jnp.int32))
  prefill = slots.prefill.lower(config, weights, ids, attention.XLA, mesh)
  yield 'prefill', prefill
  prompts = prefill.out_info
  prompts = laid(prompts, layouts.fitted(mesh, prompts, layouts.PROMPTS))
  yield 'admit', slots.admit.lower(idle, prompts, rows(entries), DATA, mesh)
  chosen = rows(jax.ShapeDtypeStruct((count // 2,), jnp.int32))
  yield 'repack', slots.repack.lower(config, idle, chosen, 512, DATA, mesh)
  yield (
    'segment',
    slots.segment.lower(
      config,
      weights,
      idle,
      jax.ShapeDtypeStruct((), jnp.float32, sharding=whole),
      jax.ShapeDtypeStruct((2,), jnp.int32, sharding=whole),
      number,
      8,
      None,
      mesh,
    ),
  )
  yield (
    'control',
    jax.jit(lambda x: x[::-1], out_shardings=whole).lower(idle.ids),
  )


def collectives(text):
  """(kind, numbers, groups of devices) of each collective of a program."""
  import math

  found = []
  pattern = (
    r'= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|'
    r'collective-permute)(?:-start)?\((.*)'
  )
  for shapes, kind, rest in re.findall(pattern, text):
    widths = [
      math.prod(map(int, filter(None, dims.split(','))))
      for dims in re.findall(r'\[([\d,]*)\]', shapes)
    ]
    groups = libtpu.groups(rest, DATA * TENSOR)
    found.append((kind, max(widths), groups))
  return found


if __name__ == '__main__':
  print(
    json.dumps(
      {
        name: collectives(lowered.compile().as_text())
        for name, lowered in programs()
      }
    )
  )
