"""The cache in pages against rings, its kernel interpreted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import literals
from jax.experimental.pallas import tpu as pltpu

from jax_rlvr import mesh as layouts
from jax_rlvr import policy
from jax_rlvr.policy import Rings, pages
from jax_rlvr.policy.pages import Pages

# The kernel needs heads of 128.
CONFIG = policy.PolicyConfig(
  vocab_size=11,
  layers=1,
  width=16,
  heads=4,
  kv_heads=2,
  head_size=128,
  feed_forward=16,
)


def configured(**changes):
  return dataclasses.replace(CONFIG, **changes)


CASES = {
  'grouped': CONFIG,
  'one key head': configured(kv_heads=1, query_scale=0.3),
  'as many key heads': configured(kv_heads=4),
  'window': configured(window=9),
  'window of some layers, soft cap': configured(
    layers=2, window=11, local=(True, False), attention_softcap=0.7
  ),
  'window never reached': configured(window=100),
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  """Kernels as XLA programs, and a few tokens a page."""
  # The interpreter asks all indices for a shape, and the kernel has constants.
  monkeypatch.setattr(literals.TypedInt, 'shape', (), raising=False)
  for name, value in {'PAGE': 8, 'PAGES': 2, 'QUERIES': 3}.items():
    monkeypatch.setattr(pages, name, value)
  with pltpu.force_tpu_interpret_mode(True):
    yield


def by_shard(f, shards, cache, *others):
  """f within each shard, as the sampler does it."""
  parts = jax.tree.map(
    lambda x: x.reshape(shards, -1, *x.shape[1:]), (cache, *others)
  )
  done = jax.vmap(f)(*parts)
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), done)


def hidden_states(
  config, empty, columns=(40, 40), shards=1, dtype=jnp.float32, poison=False
):
  """Of 28 steps, the hidden states of the slots that are live.

  A shard has four slots. Two of them begin, one that was idle begins in the
  middle, when another has ended, and the last two of them go on alone.
  """
  draw = np.random.default_rng(0)
  params = policy.cast(policy.init(config, jax.random.key(0)), dtype)
  params = policy.unstack(params)

  @jax.jit
  def begun(cache, slots, sources, lengths, column):
    ids = draw.integers(0, 11, (shards * 3, 22))
    prompts = policy.prefill(config, params, jnp.asarray(ids))
    return by_shard(
      lambda cache, *rest: cache.admit(*rest, column),
      shards, cache, prompts, slots, sources, lengths,
    )  # fmt: skip

  @jax.jit
  def repacked(cache, slots, column):
    return by_shard(
      lambda cache, slots: cache.repack(config, slots, column, columns[1]),
      shards, cache, slots,
    )  # fmt: skip

  step = jax.jit(functools.partial(policy.decode, config))

  def tiled(*numbers):
    return jnp.tile(jnp.array(numbers, jnp.int32), shards)

  def decoded(cache, lengths, live, steps):
    nonlocal column
    for _ in range(steps):
      ids = jnp.asarray(draw.integers(0, 11, lengths.size))
      hidden, cache = step(params, cache, ids, lengths, column)
      found.append(np.asarray(hidden, np.float32)[live])
      lengths += live
      column += 1
    return cache, lengths

  found, column = [], jnp.int32(3)
  cache = empty(config, 4 * shards, columns[0], dtype)
  if poison:
    cache = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache)
  # Number 4 is nobody's.
  cache = begun(cache, tiled(2, 4, 0), tiled(1, 0, 2), tiled(5, 9, 16), column)
  lengths = tiled(16, 39, 5, 0)
  live = np.tile([True, False, True, False], shards)
  cache, lengths = decoded(cache, lengths, live, 12)
  cache = begun(cache, tiled(3), tiled(0), tiled(22), column)
  lengths = lengths.reshape(shards, 4).at[:, 3].set(22).reshape(-1)
  live = np.tile([False, False, True, True], shards)
  cache, lengths = decoded(cache, lengths, live, 10)
  cache = repacked(cache, tiled(3, 2), column)
  lengths = lengths.reshape(shards, 4)[:, [3, 2]].reshape(-1)
  live = np.tile([True, True], shards)
  decoded(cache, lengths, live, 6)
  return np.concatenate(found)


@pytest.mark.parametrize('config', CASES.values(), ids=CASES.keys())
def test_pages_equal_rings_token_by_token(config):
  expected = hidden_states(config, Rings.empty)
  found = hidden_states(config, Pages.empty)
  np.testing.assert_allclose(found, expected, atol=2e-5, rtol=2e-5)


def test_rings_tell_windows_and_caps_apart():
  states = [hidden_states(config, Rings.empty) for config in CASES.values()]
  assert all(len(x) == 2 * (12 + 10 + 6) for x in states)
  plain, one_head, many_heads, window, both, unreached = states
  np.testing.assert_array_equal(unreached, plain)
  for other in (one_head, many_heads, window, both):
    assert np.abs(other - plain).max() > 1e-2


def test_pages_of_their_real_size_equal_rings(monkeypatch):
  monkeypatch.undo()
  monkeypatch.setattr(literals.TypedInt, 'shape', (), raising=False)
  assert pages.PAGE == 128
  config = CASES['window of some layers, soft cap']
  expected, found = (
    hidden_states(config, kind.empty, (1000, 1000)) for kind in (Rings, Pages)
  )
  np.testing.assert_allclose(found, expected, atol=2e-5, rtol=2e-5)


def test_pages_of_bfloat16_equal_rings():
  expected, found = (
    hidden_states(CASES['window'], kind.empty, dtype=jnp.bfloat16)
    for kind in (Rings, Pages)
  )
  # Of numbers up to 4, two units in the last place.
  np.testing.assert_allclose(found, expected, atol=2**-5)


@pytest.mark.parametrize(
  'columns, window', [((40, 60), 9), ((60, 40), 50), ((40, 60), None)]
)
def test_repacking_changes_the_room(columns, window):
  expected, found = (
    hidden_states(configured(window=window), kind.empty, columns)
    for kind in (Rings, Pages)
  )
  np.testing.assert_allclose(found, expected, atol=2e-5, rtol=2e-5)


def test_what_was_not_written_is_not_read():
  clean = hidden_states(CASES['window'], Pages.empty)
  poisoned = hidden_states(CASES['window'], Pages.empty, poison=True)
  np.testing.assert_array_equal(poisoned, clean)


def test_an_idle_slot_of_any_length_is_finite_and_leaves_others_alone():
  params = policy.unstack(policy.init(CONFIG, jax.random.key(0)))

  @jax.jit
  def decoded(length):
    cache = Pages.empty(CONFIG, 3, 40, jnp.float32)
    lengths = jnp.stack([4, length, 7])
    return policy.decode(
      CONFIG, params, cache, jnp.arange(3), lengths, jnp.int32(0)
    )

  usual, _ = decoded(1)
  for length in (0, 39, 40, 10_000):
    hidden, cache = decoded(length)
    np.testing.assert_array_equal(hidden[::2], usual[::2])
    assert np.isfinite(hidden).all()
    # One row each, in its own pages.
    written = np.abs(cache.pages[0]).sum(axis=(2, 3)) > 0
    assert written.sum(axis=1).tolist() == [1, 1, 1]
    assert np.argmax(written, axis=1).tolist() == [4, length % 40, 7]


@pytest.mark.parametrize('heads, kv_heads, tensor', [(4, 2, 2), (8, 2, 4)])
def test_pages_on_a_mesh_equal_rings_on_one_device(heads, kv_heads, tensor):
  config = configured(heads=heads, kv_heads=kv_heads, window=9)
  mesh = layouts.make(slices=2, tensor=tensor)
  shards = layouts.row_shards(mesh)

  def empty(*args):
    cache = Pages.empty(*args, mesh)
    places = layouts.fitted(mesh, cache, cache.spec)
    # Keys and values of a head lie on the same device.
    row = jax.tree.leaves(places)[0].shard_shape(cache.pages[0].shape)[2]
    assert row == 2
    return jax.device_put(cache, places)

  found = hidden_states(config, empty, shards=shards)
  expected = hidden_states(config, Rings.empty, shards=shards)
  np.testing.assert_allclose(found, expected, atol=2e-5, rtol=2e-5)


def test_a_layer_with_a_window_keeps_no_more():
  config = configured(layers=2, window=20, local=(True, False))
  cache = Pages.empty(config, 3, 50, jnp.float32)
  assert [x.shape for x in cache.pages] == [(3, 24, 4, 128), (3, 56, 4, 128)]
  assert cache.widths == (20, 50)


@pytest.mark.parametrize(
  'changes, dtype, tensor, words',
  [
    ({'head_size': 64}, 'bfloat16', 1, 'heads of 128.*here are 2 of 64'),
    ({'head_size': 256}, 'bfloat16', 1, 'heads of 128.*here are 2 of 256'),
    ({'head_size': 256, 'kv_heads': 1}, 'float32', 1, 'here are 1 of 256'),
    ({'head_size': 256}, 'bfloat16', 2, None),
    ({'head_size': 256, 'kv_heads': 1}, 'bfloat16', 1, None),
    ({'heads': 6, 'kv_heads': 3}, 'bfloat16', 1, 'of 8 key heads.*are 3'),
    ({'heads': 6, 'kv_heads': 3}, 'bfloat16', 2, 'of 8 key heads.*are 3'),
    ({'heads': 12, 'kv_heads': 12}, 'bfloat16', 1, 'of 8 key heads.*are 12'),
    ({'heads': 24, 'kv_heads': 12}, 'float32', 1, None),
    ({'heads': 32, 'kv_heads': 8}, 'bfloat16', 1, None),
    (
      {'heads': 3, 'kv_heads': 1},
      'bfloat16',
      2,
      '3 query heads.*tensor=2 parts',
    ),
  ],
)
def test_what_the_kernel_cannot_read_is_refused(changes, dtype, tensor, words):
  config, mesh = configured(**changes), layouts.make(tensor=tensor)
  make = functools.partial(Pages.empty, config, 8, 40, dtype, mesh)
  if words is None:
    make()
    return
  with pytest.raises(ValueError, match=f'pages .*{words}; use Rings'):
    make()
