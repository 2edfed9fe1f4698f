"""A checksum notices what a disk can do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_rlvr.checksum import checksums

DRAW = np.random.default_rng(0)


def array(dtype, shape=(16, 24)):
  return jnp.asarray(DRAW.normal(size=shape) * 10, dtype)


@pytest.mark.parametrize(
  'dtype', ['float32', 'bfloat16', 'float16', 'int32', 'uint32', 'int8']
)
def test_any_flipped_bit_is_noticed(dtype):
  x = array(dtype)
  before = checksums({'x': x})['x']
  raw = np.array(x)
  bits = raw.view(np.uint8).reshape(-1)
  for _ in range(50):
    place, bit = DRAW.integers(bits.size), 1 << DRAW.integers(8)
    bits[place] ^= bit
    assert checksums({'x': jnp.asarray(raw)})['x'] != before
    bits[place] ^= bit
  assert checksums({'x': jnp.asarray(raw)})['x'] == before


def test_values_that_change_places_are_noticed():
  x = array('float32')
  before = checksums([x])
  assert checksums([x[::-1]]) != before
  assert checksums([x.at[0, 0].set(x[0, 1]).at[0, 1].set(x[0, 0])]) != before
  # All zeros are not nothing: a longer array has another checksum.
  assert checksums([jnp.zeros(8)]) != checksums([jnp.zeros(9)])


def test_minus_zero_and_nans_are_what_they_are():
  one, other = jnp.float32(0.0), jnp.float32(-0.0)
  assert checksums([one]) != checksums([other])
  nan = np.array([np.nan], np.float32)
  assert checksums([nan]) == checksums([nan.copy()])


def test_layout_does_not_matter():
  mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ('a', 'b'))
  x = array('float32')
  expected = checksums([x])
  for spec in (P('a'), P(None, 'b'), P('b', 'a'), P()):
    assert checksums([jax.device_put(x, NamedSharding(mesh, spec))]) == expected


def test_names_are_paths():
  tree = {'blocks': {'query': jnp.ones(3)}, 'step': np.int32(4)}
  assert list(checksums(tree)) == ['blocks/query', 'step']
