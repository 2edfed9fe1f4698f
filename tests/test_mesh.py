"""Where arrays lie."""

import dataclasses

import jax
import numpy as np
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
