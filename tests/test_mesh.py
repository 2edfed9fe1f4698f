"""Where arrays lie."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jax_rlvr import mesh as layouts
from jax_rlvr import policy

TIED = policy.PolicyConfig(
  vocab_size=16,
  layers=2,
  width=8,
  heads=4,
  kv_heads=2,
  head_size=6,
  feed_forward=12,
)
UNTIED = dataclasses.replace(TIED, tied_embeddings=False)


def specs(mesh, config, table):
  tree = policy.abstract_params(config)
  return jax.tree.map(lambda s: s.spec, layouts.shardings(mesh, tree, table))


def test_training_table_cuts_every_parameter_of_a_policy():
  found = specs(layouts.make(fsdp=4, tensor=2), UNTIED, layouts.TRAINING)
  assert found == {
    'embed': P('tensor', 'fsdp'),
    'head': P('fsdp', 'tensor'),
    'norm': P(),
    'blocks': {
      'attention_norm': P(),
      'feed_forward_norm': P(),
      'query': P(None, 'fsdp', 'tensor'),
      'key': P(None, 'fsdp', 'tensor'),
      'value': P(None, 'fsdp', 'tensor'),
      'output': P(None, 'tensor', None, 'fsdp'),
      'gate': P(None, 'fsdp', 'tensor'),
      'up': P(None, 'fsdp', 'tensor'),
      'down': P(None, 'tensor', 'fsdp'),
    },
  }


@pytest.mark.parametrize('config', [TIED, UNTIED], ids=['tied', 'untied'])
def test_sampling_table_covers_the_policy_without_fsdp(config):
  found = specs(layouts.make(fsdp=4, tensor=2), config, layouts.SAMPLING)
  flat = jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, P))
  assert len(flat) == len(jax.tree.leaves(policy.abstract_params(config)))
  assert all('fsdp' not in spec for spec in flat)
  assert found['embed'][0] == 'tensor'
  assert not any('fsdp' in spec for _, spec in layouts.SAMPLING)


def test_heads_that_do_not_divide_are_refused_with_the_numbers():
  mesh = layouts.make(tensor=8)
  layouts.check_heads(mesh, 16)
  with pytest.raises(ValueError) as caught:
    layouts.check_heads(mesh, 28)
  assert str(caught.value) == (
    '28 query heads do not divide by tensor=8; give one of 1, 2, 4, 7, 14, 28'
  )


def test_what_does_not_divide_is_held_whole_and_told():
  mesh = layouts.make(fsdp=2, tensor=4)
  params = policy.abstract_params(UNTIED)
  found = layouts.uncut(mesh, params, layouts.TRAINING)
  # Two heads of keys and of values over four devices; all else divides.
  assert found == [
    'blocks/key: 2 over tensor=4',
    'blocks/value: 2 over tensor=4',
  ]
  spec = specs(mesh, UNTIED, layouts.TRAINING)['blocks']['key']
  assert spec == P(None, 'fsdp', None)


def test_moments_lie_as_their_parameters():
  mesh = layouts.make(fsdp=4, tensor=2)
  params = policy.init(UNTIED, jax.random.key(0))
  params = layouts.place(mesh, params, layouts.TRAINING)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  adam = layouts.init_optimizer(optimizer, params)[1][0]
  for moments in (adam.mu, adam.nu):
    jax.tree.map(
      lambda x, p: x.sharding.is_equivalent_to(p.sharding, p.ndim) or 1 / 0,
      moments,
      params,
    )
  assert adam.count.sharding.is_fully_replicated
  assert not adam.mu['embed'].sharding.is_fully_replicated


def test_rows_of_own_shards_come_back():
  mesh = layouts.make(fsdp=4, tensor=2)
  assert layouts.own_shards(mesh) == [0, 1, 2, 3]
  assert layouts.crew(mesh) == [0]
  rows = np.arange(24).reshape(8, 3)
  placed = layouts.place_own_rows(mesh, {'x': rows})
  assert placed['x'].sharding.spec == layouts.ROWS
  np.testing.assert_array_equal(layouts.own_rows(placed)['x'], rows)


class Chip:
  """A device of a slice and a host."""

  platform = device_kind = 'a'

  def __init__(self, number, slice_index, process_index):
    self.id, self.slice_index = number, slice_index
    self.process_index = process_index


def test_slices_are_the_outermost_axis():
  chips = [Chip(i, slice_index=i % 2, process_index=i % 2) for i in range(8)]
  mesh = layouts.make(slices=2, tensor=2, devices=chips)
  assert mesh.shape == {'slice': 2, 'fsdp': 2, 'tensor': 2}
  found = [[chip.slice_index for chip in part.flat] for part in mesh.devices]
  assert found in ([[0] * 4, [1] * 4], [[1] * 4, [0] * 4])
  with pytest.raises(ValueError, match='lie in 2 slices, and slices=1'):
    layouts.make(tensor=2, devices=chips)


def test_folded_mesh_has_the_devices_in_their_order():
  mesh = layouts.make(fsdp=4, tensor=2)
  other = layouts.folded(mesh, 4)
  assert other.shape == {'slice': 1, 'fsdp': 2, 'tensor': 4}
  assert list(other.devices.flat) == list(mesh.devices.flat)
  numbers = np.arange(64).reshape(8, 8)
  x = jax.device_put(numbers, jax.NamedSharding(mesh, P('fsdp', 'tensor')))
  place = jax.NamedSharding(other, P('fsdp', 'tensor'))
  moved = jax.jit(lambda x: x + 1, out_shardings=place)(x)
  np.testing.assert_array_equal(moved, numbers + 1)
  assert moved.addressable_shards[0].data.shape == (4, 2)
  with pytest.raises(ValueError, match='8 devices of a slice do not divide by'):
    layouts.folded(mesh, 3)


def test_folded_mesh_keeps_slices_apart():
  chips = [Chip(i, slice_index=i % 2, process_index=i % 2) for i in range(8)]
  mesh = layouts.folded(layouts.make(slices=2, devices=chips), 2)
  assert mesh.shape == {'slice': 2, 'fsdp': 2, 'tensor': 2}
  for part in mesh.devices:
    assert len({chip.slice_index for chip in part.flat}) == 1


def test_hosts_that_share_rows_share_all_of_theirs():
  def hosts(*numbers):
    return [Chip(i, 0, number) for i, number in enumerate(numbers)]

  # Both hosts have a device of either part of the rows.
  mesh = layouts.make(tensor=2, devices=hosts(0, 1, 0, 1))
  assert layouts.own_shards(mesh) == [0, 1]
  assert layouts.crew(mesh) == [0, 1]
  # The second shares one part with each of the others.
  with pytest.raises(ValueError, match='spreads rows over parts of hosts'):
    layouts.make(tensor=2, devices=hosts(0, 1, 1, 2))


def test_parameter_without_a_rule_is_named():
  tree = {'blocks': {'router': np.zeros(3)}}
  with pytest.raises(ValueError, match="matches 'blocks/router'"):
    layouts.shardings(layouts.make(), tree, layouts.TRAINING)


def test_dimension_that_does_not_divide_is_replicated():
  # tensor = 4: two key heads and 6 rows of embedding stay whole, 4 query
  # heads do not.
  tree = {
    'embed': np.zeros((6, 8)),
    'blocks': {'key': np.zeros((1, 8, 2, 6)), 'query': np.zeros((1, 8, 4, 6))},
  }
  mesh = layouts.make(fsdp=2, tensor=4)
  found = layouts.shardings(mesh, tree, layouts.TRAINING)
  assert found['embed'].spec == P(None, 'fsdp')
  assert found['blocks']['key'].spec == P(None, 'fsdp', None)
  assert found['blocks']['query'].spec == P(None, 'fsdp', 'tensor')


def test_place_cuts_and_keeps_the_values():
  mesh = layouts.make(fsdp=4, tensor=2)
  embed = np.arange(128, dtype=np.float32).reshape(16, 8)
  placed = layouts.place(mesh, {'embed': embed}, layouts.TRAINING)['embed']
  # 16 over tensor = 2, 8 over fsdp = 4.
  assert {s.data.shape for s in placed.addressable_shards} == {(8, 2)}
  np.testing.assert_array_equal(placed, embed)


def test_abstract_arrays_know_their_places():
  mesh = layouts.make(fsdp=4, tensor=2)
  tree = policy.abstract_params(TIED)
  found = layouts.abstract(mesh, tree, layouts.TRAINING)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(
    lambda x: (x.shape, x.dtype), tree
  )
  wanted = layouts.shardings(mesh, tree, layouts.TRAINING)
  assert jax.tree.map(lambda x: x.sharding, found) == wanted


def test_optimizer_state_lies_as_its_parameters():
  mesh = layouts.make(fsdp=4, tensor=2)
  params = policy.abstract_params(UNTIED)
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(optax.constant_schedule(1e-3)),
  )
  state = jax.eval_shape(optimizer.init, params)
  found = layouts.state_shardings(mesh, state, layouts.TRAINING)
  adam, count = found[1][0], found[1][2].count
  wanted = layouts.shardings(mesh, params, layouts.TRAINING)
  assert adam.mu == adam.nu == wanted
  assert adam.count.spec == count.spec == P()


def laid_inside(x, spec, **settings):
  """The layout that a program gives an array."""
  return jax.jit(lambda x: layouts.laid(x, spec), **settings)(x).sharding


def test_array_within_a_program_is_laid_out_on_the_mesh_of_its_type():
  mesh = layouts.make(fsdp=4, tensor=2)
  x = jax.device_put(np.zeros((8, 6)), jax.NamedSharding(mesh, P()))
  spec = P('fsdp', 'tensor')
  assert laid_inside(x, spec).spec == spec
  # 6 columns do not divide by fsdp.
  assert laid_inside(x, P(None, 'fsdp')).is_fully_replicated
  parts = jax.eval_shape(lambda x: jnp.zeros(layouts.parts(x, spec)), x)
  assert parts.shape == (4, 2)


def test_array_on_no_mesh_stays_as_it_is():
  spec = P('fsdp', 'tensor')
  assert laid_inside(jnp.zeros((8, 6)), spec) == jnp.zeros(1).sharding
  assert layouts.parts(jnp.zeros((8, 6)), spec) == (1, 1)
  other = jax.make_mesh((8,), ('fsdp',))
  x = jax.device_put(np.zeros((8, 6)), jax.NamedSharding(other, P()))
  assert laid_inside(x, spec).is_fully_replicated


def test_rows_are_cut_over_slices_and_fsdp():
  mesh = layouts.make(slices=2, tensor=2)
  assert dict(mesh.shape) == {'slice': 2, 'fsdp': 2, 'tensor': 2}
  assert layouts.row_shards(mesh) == 4
  rows = layouts.place_rows(mesh, np.arange(24).reshape(8, 3))
  assert {s.data.shape for s in rows.addressable_shards} == {(2, 3)}
  np.testing.assert_array_equal(rows, np.arange(24).reshape(8, 3))


@pytest.mark.parametrize(
  'axes, words',
  [
    (dict(slices=3, fsdp=2, tensor=1), 'mesh 3 × 2 × 1 .* not the 8 devices'),
    (dict(tensor=3), 'mesh 1 × 2 × 3 .* not the 8 devices'),
    (dict(tensor=16), 'mesh 1 × 1 × 16 .* not the 8 devices'),
  ],
)
def test_mesh_of_another_size_is_refused(axes, words):
  with pytest.raises(ValueError, match=words):
    layouts.make(**axes)
