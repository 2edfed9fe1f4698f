"""The Splash kernel compiled for TPUs that need not be there.

It also runs as a script, see `tests.libtpu`.
"""

import functools
import json
import re
import sys

import pytest

from tests import libtpu

pytestmark = libtpu.needed


@pytest.fixture(scope='module')
def compiled():
  """topology → what this file, run as a script, says of it."""

  return functools.cache(functools.partial(libtpu.found_by, __file__))


@pytest.mark.parametrize('topology', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'])
def test_kernels_compile_forward_and_backward(compiled, topology):
  found = compiled(topology)
  # Forward, queries' gradient, keys' and values' gradient; with a window in
  # some layers, each of them twice.
  assert found['head size 64']['kernels'] == 3
  assert found['head size 128']['kernels'] == 3
  assert found['head size 256, window, soft cap']['kernels'] == 6


def test_update_of_a_policy_compiles_on_a_mesh(compiled):
  found = compiled('v5p:2x2x1')
  for kv_heads in (1, 2):
    splash = found[f'policy, {kv_heads} key heads']
    # The layer's forward pass runs again in the backward pass.
    assert splash['kernels'] == 8
    # Of 4 rows and 4 heads a device has 2 each.
    assert splash['shapes'] == ['2x2x2048x128']
    assert splash['bytes'] < found['policy, xla']['bytes']
  # Control: without the kernel there is none.
  assert found['policy, xla']['kernels'] == 0


# Below is the script.


def programs(topology):
  """What is compiled for a topology: its name, and the program lowered."""
  import dataclasses

  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.experimental import topologies
  from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

  from jax_rlvr import mesh as layouts
  from jax_rlvr import policy
  from jax_rlvr.policy import attention
  from jax_rlvr.records import Rows
  from jax_rlvr.token_stats import token_stats

  devices = topologies.get_topology_desc(topology, 'tpu').devices
  config = policy.PolicyConfig(
    vocab_size=512,
    layers=2,
    width=256,
    heads=4,
    kv_heads=2,
    head_size=128,
    feed_forward=256,
  )
  several = {'window': 300, 'local': (True, False), 'attention_softcap': 50.0}

  def one_device(backend, head_size, **changes):
    c = dataclasses.replace(config, head_size=head_size, **changes)
    one = SingleDeviceSharding(devices[0])

    def array(shape, dtype):
      return jax.ShapeDtypeStruct(shape, dtype, sharding=one)

    def vjp(query, key, value, pull, group, local):
      attend = backend.attend(c, attention.Layout(group, group, group))
      if c.window is None:
        local = False
      mixed, pullback = jax.vjp(
        lambda *args: attend(*args, local)[0], query, key, value
      )
      return mixed, pullback(pull)

    # No multiple of a tile.
    arrays = [
      array((2, 1100, n, head_size), jnp.bfloat16) for n in (4, 2, 2, 4)
    ]
    group, local = array((2, 1100), jnp.int32), array((), jnp.bool)
    return jax.jit(vjp).lower(*arrays, group, local)

  splash = attention.splash(None)
  yield 'head size 64', one_device(splash, 64)
  yield 'head size 128', one_device(splash, 128)
  yield (
    'head size 256, window, soft cap',
    one_device(splash, 256, **several),
  )
  if topology != 'v5p:2x2x1':
    return

  axes = ('slice', 'fsdp', 'tensor')
  kinds = (jax.sharding.AxisType.Auto,) * 3
  mesh = Mesh(np.array(devices).reshape(1, 2, 2), axes, axis_types=kinds)

  def whole_policy(backend, **changes):
    c = dataclasses.replace(config, **several, **changes)
    params = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
      policy.abstract_params(c),
    )
    params = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      params,
      layouts.shardings(mesh, params, layouts.TRAINING),
    )
    row = NamedSharding(mesh, layouts.ROWS)
    rows = Rows(*[jax.ShapeDtypeStruct((4, 2048), jnp.int32, sharding=row)] * 6)
    pull = jax.ShapeDtypeStruct((4, 2048), jnp.float32, sharding=row)

    def vjp(params, rows, pull):
      run = functools.partial(token_stats, c, rows=rows, backend=backend)
      stats, pullback = jax.vjp(lambda p: run(p)[:2], params)
      return stats, pullback((pull, pull))

    return jax.jit(vjp).lower(params, rows, pull)

  yield 'policy, 2 key heads', whole_policy(attention.splash(mesh))
  yield (
    'policy, 1 key heads',
    whole_policy(attention.splash(mesh), kv_heads=1),
  )
  yield 'policy, xla', whole_policy(attention.XLA)


def main(topology):
  found = {}
  for what, lowered in programs(topology):
    calls = re.findall(r'@tpu_custom_call.*', lowered.as_text())
    found[what] = {
      'kernels': len(calls),
      # The first array is the queries' [rows, heads, T, H].
      'shapes': sorted(
        {re.findall(r'tensor<(\w+)xbf16>', c)[0] for c in calls}
      ),
      'bytes': lowered.compile().memory_analysis().temp_size_in_bytes,
    }
  print(json.dumps(found))


if __name__ == '__main__':
  main(sys.argv[1])
