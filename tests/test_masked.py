"""Masked statistics: exact integers, exact choices, the same on any cut."""

import fractions
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_rlvr import masked
from jax_rlvr.records import Tokens

SHAPE = (8, 16)
MASK = np.random.default_rng(0).random(SHAPE) < 0.7
# Distinct numbers in no order: ties are not settled by place.
SERIAL = np.random.default_rng(1).permutation(128).astype(np.uint32)
SERIAL = SERIAL.reshape(SHAPE) * np.uint32(31_000_000)

largest = jax.jit(masked.largest, static_argnames='axis')
quantile = jax.jit(masked.quantile, static_argnames='axis')
top_mean = jax.jit(masked.top_mean)


def _largest_reference(score, mask, count, serial):
  """The first `count` by (score descending, serial ascending); no NaN."""
  mask = mask & ~np.isnan(score)
  places = np.flatnonzero(mask)
  order = np.lexsort((serial.flat[places], -score.flat[places]))
  chosen = np.zeros(mask.size, bool)
  chosen[places[order[:count]]] = True
  return chosen.reshape(mask.shape)


def _largest_of_rows_reference(score, mask, counts, serial):
  rows = zip(score, mask, counts.ravel(), serial, strict=True)
  return np.stack([_largest_reference(*row) for row in rows])


def _scores(seed):
  """Float32 scores with many ties, both zeros, infinities and NaN."""
  rng = np.random.default_rng(seed)
  some = [-np.inf, -3e38, -2.5, -1.0, -0.0, 0.0, 1e-30, 1.0, 1.0, 7.25, np.inf]
  ties = rng.choice(np.float32(some + [np.nan]), SHAPE)
  return np.where(rng.random(SHAPE) < 0.5, ties, rng.normal(size=SHAPE)).astype(
    np.float32
  )


def _on_eight_devices(*arrays):
  mesh = Mesh(np.array(jax.devices()[:8]), ('rows',))
  sharding = NamedSharding(mesh, PartitionSpec('rows'))
  return [jax.device_put(x, sharding) for x in arrays]


# share


@pytest.mark.parametrize('up', [False, True])
def test_share_equals_the_fraction_exactly(up):
  rng = np.random.default_rng(2)
  edges = [0, 1, 2, 5, 50, 999, 1000, 1001, 10**6 - 1, 10**6, 10**6 + 1]
  edges += [2**24 - 1, 2**24 + 1, 2**31 - 2, 2**31 - 1]
  parts = [0, 1, 2, 200, 2000, 200_000, 300_000, 333_333, 999_999, 10**6]
  parts += rng.integers(0, 10**6, 30).tolist()
  ns = edges + rng.integers(0, 2**31, 30).tolist()
  ns += rng.integers(0, 10**5, 30).tolist()
  millionths, n = (x.ravel() for x in np.meshgrid(parts, ns))
  found = masked.share(
    jnp.float32(millionths / 1e6), jnp.array(n, jnp.int32), up=up
  )
  rounded = math.ceil if up else math.floor
  expected = [
    rounded(fractions.Fraction(int(m), 10**6) * int(k))
    for m, k in zip(millionths, n, strict=True)
  ]
  assert found.dtype == jnp.int32
  np.testing.assert_array_equal(found, expected)


def test_share_of_fifty_rounds_up_to_fifteen_where_float32_says_sixteen():
  # ⌈0.3 · 50⌉ = ⌈15⌉.
  assert int(masked.share(0.3, 50, up=True)) == 15
  assert math.ceil(float(jnp.float32(0.3)) * 50) == 16


def test_every_millionth_is_read_as_such():
  # Of a million, the share is the number of millionths.
  millionths = np.arange(10**6 + 1)
  found = masked.share(jnp.float32(millionths / 1e6), 10**6)
  np.testing.assert_array_equal(found, millionths)


def test_product_is_exact_where_float32_is_not():
  rng = np.random.default_rng(6)
  n = np.r_[2**24 + 1, 2**31 - 1, rng.integers(2**24, 2**31, 500)]
  parts = np.r_[10**6, 999_999, rng.integers(0, 10**6 + 1, 500)]
  whole, millionths = masked._product(
    jnp.float32(parts / 1e6), jnp.array(n, jnp.int32)
  )
  exact = parts * n  # int64: below 2⁵¹
  np.testing.assert_array_equal(whole, exact // 10**6)
  np.testing.assert_array_equal(millionths, exact % 10**6)
  # Control: the last of 2²⁴ + 2 tokens has rank 2²⁴ + 1.
  assert int(whole[0]) == 2**24 + 1
  assert int(jnp.float32(1.0) * jnp.float32(2**24 + 1)) == 2**24


def test_share_is_traceable():
  share = jax.jit(lambda fraction, n: masked.share(fraction, n, up=True))
  # ⌈0.2 · 11⌉ = ⌈2.2⌉ and ⌈0.000201 · (2³¹ − 1)⌉ = ⌈431644.22…⌉.
  assert int(share(jnp.float32(0.2), jnp.int32(11))) == 3
  assert int(share(jnp.float32(201e-6), jnp.int32(2**31 - 1))) == 431_645


# largest


def test_largest_takes_the_highest_and_breaks_ties_by_serial():
  score = jnp.array([[3.0, 5.0, 3.0], [3.0, 9.0, -1.0]])
  mask = jnp.array([[True, True, True], [True, False, True]])
  serial = jnp.array([[7, 6, 0], [2, 1, 3]], jnp.uint32)
  # 9 is outside the mask. 5 is first; of the three 3s, serials 0 and 2 precede
  # 7.
  np.testing.assert_array_equal(
    largest(score, mask, 3, serial), [[0, 1, 1], [1, 0, 0]]
  )


@pytest.mark.parametrize('seed', range(8))
def test_largest_equals_a_sort_for_every_count(seed):
  score = _scores(seed)
  eligible = int(np.sum(MASK & ~np.isnan(score)))
  for count in [0, 1, 2, 3, 9, 20, eligible - 1, eligible, eligible + 1, 500]:
    chosen = largest(score, MASK, count, SERIAL)
    np.testing.assert_array_equal(
      chosen, _largest_reference(score, MASK, count, SERIAL), f'{count=}'
    )
    assert int(chosen.sum()) == min(count, eligible)


def test_largest_counts_negative_zero_as_zero():
  score = jnp.array([[0.0, -0.0, 0.0, -0.0]])
  serial = jnp.array([[3, 2, 1, 0]], jnp.uint32)
  # All four tie, so the lowest serials are the last two.
  np.testing.assert_array_equal(
    largest(score, jnp.ones((1, 4), bool), 2, serial), [[0, 0, 1, 1]]
  )


def test_largest_never_takes_nan_and_takes_infinities_in_order():
  negative_nan = np.uint32(0xFFFFFFFF).view(np.float32)
  score = jnp.array([[np.nan, -np.inf, np.inf, negative_nan, 0.0]])
  serial = jnp.arange(5, dtype=jnp.uint32).reshape(1, 5)
  mask = jnp.ones((1, 5), bool)
  for count, expected in [
    (1, [0, 0, 1, 0, 0]),
    (2, [0, 0, 1, 0, 1]),
    (3, [0, 1, 1, 0, 1]),
    (5, [0, 1, 1, 0, 1]),
  ]:
    np.testing.assert_array_equal(
      largest(score, mask, count, serial), [expected]
    )


def test_largest_divides_ties_over_the_whole_range_of_serials():
  serial = jnp.array([[2**32 - 1, 0, 2**31, 2**31 - 1]], jnp.uint32)
  mask = jnp.ones((1, 4), bool)
  for count, expected in [
    (1, [0, 1, 0, 0]),
    (2, [0, 1, 0, 1]),
    (3, [0, 1, 1, 1]),
    (4, [1, 1, 1, 1]),
  ]:
    np.testing.assert_array_equal(
      largest(jnp.zeros((1, 4)), mask, count, serial), [expected]
    )


def test_largest_of_an_empty_mask_is_nothing():
  empty = jnp.zeros(SHAPE, bool)
  assert not largest(jnp.ones(SHAPE), empty, 3, SERIAL).any()


def test_largest_takes_a_traced_count_without_compiling_again():
  traces = []

  @jax.jit
  def choose(score, count):
    traces.append(1)
    return masked.largest(score, jnp.array(MASK), count, jnp.array(SERIAL))

  for count in (0, 3, 17):
    assert int(choose(jnp.ones(SHAPE), jnp.int32(count)).sum()) == count
  assert len(traces) == 1


@pytest.mark.parametrize('seed', range(4))
def test_largest_of_each_row_equals_a_sort_of_each_row(seed):
  score, rng = _scores(seed), np.random.default_rng(seed)
  # The first row is empty; counts from 0 to beyond a row.
  mask = MASK & (np.arange(8) > 0)[:, None]
  for counts in (rng.permutation(8), rng.integers(0, 20, 8), np.full(8, 99)):
    counts = counts[:, None].astype(np.int32)
    chosen = largest(score, mask, counts, SERIAL, axis=-1)
    expected = _largest_of_rows_reference(score, mask, counts, SERIAL)
    np.testing.assert_array_equal(chosen, expected)
  # Control: as many from the whole batch are others.
  three = np.full((8, 1), 3, np.int32)
  of_rows = largest(score, mask, three, SERIAL, axis=-1)
  of_batch = largest(score, mask, of_rows.sum(), SERIAL)
  assert (of_rows != of_batch).any()


def test_largest_of_a_row_breaks_ties_by_serial():
  score = jnp.array([[1.0, 1.0, 1.0], [0.0, -0.0, 2.0]])
  serial = jnp.array([[5, 4, 3], [2, 1, 0]], jnp.uint32)
  mask, counts = jnp.ones((2, 3), bool), jnp.array([[2], [2]])
  # Serials 3 and 4; then 2 and, of the equal zeros, serial 1.
  np.testing.assert_array_equal(
    largest(score, mask, counts, serial, axis=-1), [[0, 1, 1], [0, 1, 1]]
  )


def _all_reduced(compiled) -> set[str]:
  """Types of what the program reduces over devices; no other collective."""
  text = compiled.as_text()
  for costly in ('all-gather', 'all-to-all', 'collective-permute', ' sort('):
    assert costly not in text, costly
  return set(re.findall(r'= (\S+) all-reduce', text))


def _assert_scalars_only(compiled):
  assert _all_reduced(compiled) == {'s32[]'}


def test_sharded_largest_equals_single_with_scalar_all_reduces_only():
  score = _scores(9)
  arguments = _on_eight_devices(score, MASK, SERIAL)
  choose = jax.jit(lambda x, m, s, n: masked.largest(x, m, n, s))
  compiled = choose.lower(*arguments, jnp.int32(5)).compile()
  _assert_scalars_only(compiled)
  for count in (0, 5, 40, 500):
    chosen = compiled(*arguments, jnp.int32(count))
    np.testing.assert_array_equal(
      chosen, _largest_reference(score, MASK, count, SERIAL)
    )


def test_sharded_largest_of_each_row_needs_no_other_device():
  score, counts = _scores(9), np.arange(8, dtype=np.int32)[:, None]
  arguments = _on_eight_devices(score, MASK, counts, SERIAL)
  compiled = largest.lower(*arguments, axis=-1).compile()
  assert not _all_reduced(compiled)
  np.testing.assert_array_equal(
    compiled(*arguments),
    _largest_of_rows_reference(score, MASK, counts, SERIAL),
  )


def test_a_sort_of_the_same_batch_would_be_seen():
  # Control of the tests that read the compiled program.
  (score,) = _on_eight_devices(_scores(9))
  sort = jax.jit(lambda x: jnp.sort(x.reshape(-1))[:5])
  text = sort.lower(score).compile().as_text()
  assert 'all-gather' in text and ' sort(' in text
  by_row = jax.jit(lambda x: jnp.sum(x, axis=0)).lower(score).compile()
  assert _all_reduced(by_row) == {'f32[16]{0}'}


# quantile


@pytest.mark.parametrize('seed', range(4))
def test_quantile_equals_numpy(seed):
  rng = np.random.default_rng(seed)
  x = np.round(rng.normal(size=SHAPE), 1 + seed).astype(np.float32)
  # q is read to a millionth.
  for q in [0.0, 0.1, 0.25, 0.5, 0.8, 0.95, 1.0, *rng.random(10).round(6)]:
    expected = np.quantile(x[MASK], q)
    np.testing.assert_allclose(
      quantile(x, MASK, q), expected, rtol=1e-5, atol=1e-6
    )
  # Control: what is outside the mask would change the answer.
  assert abs(np.quantile(x, 0.1) - np.quantile(x[MASK], 0.1)) > 1e-3


@pytest.mark.parametrize('axis', [None, -1])
@pytest.mark.parametrize('seed', range(3))
def test_quantile_equals_nanquantile(seed, axis):
  rng = np.random.default_rng(seed)
  x = np.round(rng.normal(size=SHAPE), 1 + seed).astype(np.float32)
  negative_nan = np.uint32(0xFFFFFFFF).view(np.float32)
  x[rng.random(SHAPE) < 0.2], x[rng.random(SHAPE) < 0.1] = np.nan, negative_nan
  counted = np.where(MASK, x, np.nan)
  for q in [0.0, 0.2, 0.5, 0.95, 1.0, *rng.random(5).round(6)]:
    found = quantile(x, MASK, q, axis=axis)
    expected = np.nanquantile(counted, q, axis=axis, keepdims=axis is not None)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  # Control: as zeros the NaN would change the answer.
  naive = np.quantile(np.nan_to_num(x)[MASK], 0.2)
  assert abs(naive - np.nanquantile(counted, 0.2)) > 0.03


def test_quantile_of_each_row_is_nan_only_for_empty_rows():
  x = jnp.array(
    [[5.0, 1.0, 3.0], [np.nan, 7.0, np.nan], [1, 2, 3], [np.nan] * 3]
  )
  mask = jnp.array([[1, 1, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1]], bool)
  # 1 3 5 at rank .25 · 2: halfway from 1 to 3; 7 alone; none; none that counts.
  np.testing.assert_allclose(
    quantile(x, mask, 0.25, axis=-1), [[2.0], [7.0], [np.nan], [np.nan]]
  )


def test_quantile_of_zeros_of_both_signs_is_zero():
  x = jnp.array([[-0.0, 0.0, -0.0, 1.0]])
  found = quantile(x, jnp.array([[True, True, True, False]]), 0.4)
  assert float(found) == 0.0


def test_quantile_at_a_rank_beyond_a_millionth_is_the_neighbour():
  # Rank 1/3 · 3 is read as .333333 · 3 = .999999.
  x = jnp.array([[1.0, 2.0, 3.0, 4.0]])
  found = quantile(x, jnp.ones((1, 4), bool), 1 / 3)
  np.testing.assert_allclose(found, 1.999999, rtol=1e-7)


def test_quantile_interpolates_between_neighbours():
  x = jnp.array([[1.0, 99.0, 3.0], [np.nan, 7.0, 4.0]])
  mask = jnp.array([[True, False, True], [False, True, True]])
  # 1 3 4 7, rank 0.8 · 3 = 2.4: 4 + 0.4 · 3 = 5.2.
  np.testing.assert_allclose(quantile(x, mask, 0.8), 5.2, rtol=1e-6)


def test_quantile_of_one_is_that_one_and_of_none_is_nan():
  x = jnp.array([[-2.5, np.nan]])
  one, none = jnp.array([[True, False]]), jnp.zeros((1, 2), bool)
  for q in (0.0, 0.3, 1.0):
    assert float(quantile(x, one, q)) == -2.5
    assert math.isnan(float(quantile(x, none, q)))


def test_quantile_with_infinities_is_nan_only_between_opposite_ones():
  infinity = np.inf
  mask = jnp.ones((1, 4), bool)
  for values, q, expected in [
    # Ranks q · 3: on an entry, or between two that pull one way.
    ([-infinity, 1.0, 2.0, infinity], 0.0, -infinity),
    ([-infinity, 1.0, 2.0, infinity], 0.5, 1.5),
    ([-infinity, 1.0, 2.0, infinity], 1.0, infinity),
    ([-infinity, 1.0, 2.0, infinity], 0.9, infinity),
    ([-infinity, 1.0, 2.0, infinity], 0.1, -infinity),
    ([-infinity, 1.0, 2.0, infinity], 0.3, -infinity),
    ([-infinity, -infinity, 1.0, 2.0], 0.2, -infinity),
    ([1.0, 2.0, infinity, infinity], 0.9, infinity),
    ([1.0, infinity, infinity, infinity], 0.0, 1.0),
    ([-infinity, -infinity, infinity, infinity], 0.5, np.nan),
  ]:
    found = float(quantile(jnp.array([values]), mask, q))
    np.testing.assert_equal(found, expected, f'{values} {q}')


def test_sharded_quantile_equals_single_with_scalar_all_reduces_only():
  x = np.random.default_rng(3).normal(size=SHAPE).astype(np.float32)
  arguments = _on_eight_devices(x, MASK)
  compiled = quantile.lower(*arguments, jnp.float32(0.8)).compile()
  _assert_scalars_only(compiled)
  assert float(compiled(*arguments, jnp.float32(0.8))) == float(
    quantile(x, MASK, 0.8)
  )


def test_sharded_quantile_of_each_row_needs_no_other_device():
  x = np.random.default_rng(3).normal(size=SHAPE).astype(np.float32)
  arguments = _on_eight_devices(x, MASK)
  compiled = quantile.lower(*arguments, jnp.float32(0.8), axis=-1).compile()
  assert not _all_reduced(compiled)
  np.testing.assert_array_equal(
    compiled(*arguments, jnp.float32(0.8)), quantile(x, MASK, 0.8, axis=-1)
  )


# top_mean


@pytest.mark.parametrize('seed', range(4))
def test_top_mean_equals_a_sort_for_every_count(seed):
  rng = np.random.default_rng(seed)
  # In steps of a tenth, so that there are ties to divide; some NaN.
  x = np.round(rng.normal(size=SHAPE) - 2 * MASK, 1).astype(np.float32)
  x[rng.random(SHAPE) < 0.1] = np.nan
  ranked = np.sort(x[MASK & ~np.isnan(x)].astype(np.float64))[::-1]
  for count in [1, 2, 3, 7, 30, len(ranked) - 1, len(ranked)]:
    found = top_mean(x, MASK, count)
    expected = ranked[:count].mean()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  # All, where more are asked for.
  np.testing.assert_allclose(
    top_mean(x, MASK, 500), ranked.mean(), rtol=1e-5, atol=1e-6
  )
  # Control: what lies outside the mask would be among the largest.
  everything = np.sort(x[~np.isnan(x)])[::-1]
  assert abs(everything[:3].mean() - ranked[:3].mean()) > 0.1


def test_top_mean_by_hand():
  x = jnp.array([[3.0, 5.0, 3.0], [3.0, 9.0, np.nan], [-0.0, 0.0, -1.0]])
  mask = jnp.ones((3, 3), bool).at[1, 1].set(False)
  for count, expected in [
    (0, 0.0),
    (1, 5.0),
    (2, 4.0),  # (5 + 3)/2: one of three ties
    (4, 3.5),  # (5 + 3 · 3)/4
    (6, 14 / 6),
    (7, 13 / 7),
    (8, 13 / 7),  # seven count
  ]:
    found = float(top_mean(x, mask, count))
    assert found == pytest.approx(expected, rel=1e-6), count


def test_top_mean_of_nothing_is_zero():
  x, none = jnp.full(SHAPE, np.nan), jnp.zeros(SHAPE, bool)
  for count in (0, 1, 500):
    assert float(top_mean(jnp.ones(SHAPE), none, count)) == 0.0
    assert float(top_mean(x, ~none, count)) == 0.0


def test_top_mean_reaches_infinities_only_where_they_rank():
  infinity = np.inf
  x = jnp.array([[-infinity, 2.0, -infinity, 1.0]])
  mask = jnp.ones((1, 4), bool)
  for count, expected in [(1, 2.0), (2, 1.5), (3, -infinity), (4, -infinity)]:
    assert float(top_mean(x, mask, count)) == expected
  x = x.at[0, 0].set(infinity)
  for count, expected in [(1, infinity), (3, infinity), (4, np.nan)]:
    np.testing.assert_equal(float(top_mean(x, mask, count)), expected)


def test_sharded_top_mean_reduces_scalars_only():
  x = np.random.default_rng(4).normal(size=SHAPE).astype(np.float32)
  arguments = _on_eight_devices(x, MASK)
  compiled = top_mean.lower(*arguments, jnp.int32(7)).compile()
  assert _all_reduced(compiled) == {'s32[]', 'f32[]'}
  np.testing.assert_allclose(
    compiled(*arguments, jnp.int32(7)), top_mean(x, MASK, 7), rtol=1e-6
  )


# meshes of either kind


# On scores, mask, serials and a count a row, [B, 1].
CALLS = {
  'largest': lambda x, m, s, n: masked.largest(x, m, 20, s),
  'largest of rows': lambda x, m, s, n: masked.largest(x, m, n, s, axis=-1),
  'quantile': lambda x, m, s, n: masked.quantile(x, m, 0.8),
  'quantile of rows': lambda x, m, s, n: masked.quantile(x, m, 0.8, axis=-1),
  'top_mean': lambda x, m, s, n: masked.top_mean(x, m, 20),
}


@pytest.mark.parametrize(
  ('kind', 'shape', 'jit'),
  [
    (AxisType.Explicit, (8,), False),
    (AxisType.Explicit, (8,), True),
    (AxisType.Explicit, (4, 2), True),
    (AxisType.Auto, (8,), True),
    (AxisType.Auto, (4, 2), True),
  ],
)
@pytest.mark.parametrize('name', CALLS)
def test_mesh_of_either_kind_gives_the_answer_of_one_device(
  name, kind, shape, jit
):
  x = np.random.default_rng(5).normal(size=SHAPE).astype(np.float32)
  x[2, 3], x[4, 4] = np.nan, -0.0
  counts = np.arange(8, dtype=np.int32)[:, None]
  names = ('rows', 'columns')[: len(shape)]
  call = jax.jit(CALLS[name]) if jit else CALLS[name]
  expected = call(x, MASK, SERIAL, counts)

  mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))
  with jax.set_mesh(mesh):
    whole = NamedSharding(mesh, PartitionSpec(*names))
    placed = [jax.device_put(a, whole) for a in (x, MASK, SERIAL)]
    by_row = NamedSharding(mesh, PartitionSpec('rows'))
    found = call(*placed, jax.device_put(counts, by_row))
    assert len(placed[0].addressable_shards) == 8
    if kind is AxisType.Explicit and found.ndim:
      assert jax.typeof(found).sharding.spec[0] == 'rows'
  # A mean may add up in another order; a choice and a rank may not differ.
  rtol = 1e-6 if name == 'top_mean' else 0
  np.testing.assert_allclose(found, expected, rtol=rtol)
  assert np.asarray(found).any()


# sums and means


def test_means_ignore_what_lies_outside_the_mask():
  bad = np.nan
  x = jnp.array([[1.0, 2.0, bad], [bad, np.inf, bad], [6.0, bad, -np.inf]])
  mask = jnp.array([[1, 1, 0], [0, 0, 0], [1, 0, 0]], bool)
  # (1 + 2 + 6) / 3; rows (1 + 2) / 2, none, 6 / 1.
  assert float(masked.total(x, mask)) == 9.0
  assert float(masked.mean(x, mask)) == 3.0
  np.testing.assert_array_equal(masked.row_mean(x, mask), [1.5, 0.0, 6.0])
  assert float(masked.largest_value(x, mask)) == 6.0
  assert int(masked.count(mask)) == 3
  assert int(masked.rows(mask)) == 2


def test_largest_value_may_be_negative():
  x = jnp.array([[-3.0, -2.0, 5.0]])
  assert float(masked.largest_value(x, x < 0)) == -2.0


def test_an_empty_mask_gives_zeros():
  x, mask = jnp.full((2, 3), np.nan), jnp.zeros((2, 3), bool)
  for f in (masked.total, masked.mean, masked.largest_value):
    assert float(f(x, mask)) == 0.0, f
  np.testing.assert_array_equal(masked.row_mean(x, mask), [0.0, 0.0])
  assert int(masked.count(mask)) == int(masked.rows(mask)) == 0


def test_counts_are_exact_integers_where_float32_is_not():
  # 2²⁴ + 1 rows of one token: float32 would say 2²⁴.
  mask = jnp.ones((2**24 + 1, 1), bool)
  count = jax.jit(masked.count)(mask)
  assert count.dtype == jnp.int32
  assert int(count) == 2**24 + 1 != int(jnp.float32(2**24 + 1))


# serial


def test_serial_is_the_place_unless_it_was_given():
  mask = jnp.ones((2, 3), bool)
  tokens = Tokens(mask, jnp.zeros((2, 3)), jnp.zeros((2, 3)))
  place = masked.serial(tokens)
  assert place.dtype == jnp.uint32
  np.testing.assert_array_equal(place, [[0, 1, 2], [3, 4, 5]])
  given = jnp.array([[9, 8, 7], [6, 5, 4]], jnp.uint32)
  assert masked.serial(tokens._replace(serial=given)) is given
