"""Keys are functions of seed, stream and step."""

import itertools

import jax
import numpy as np

from jax_rlvr import prng
from jax_rlvr.prng import Stream


def data(*arguments):
  return tuple(np.asarray(jax.random.key_data(prng.key(*arguments))).tolist())


def test_seeds_streams_and_steps_give_distinct_keys():
  places = list(itertools.product((0, 1, 2), Stream, (0, 1, 2, 3, 10**6)))
  assert len({data(*place) for place in places}) == len(places) == 90


def test_keys_are_the_same_again_and_under_jit():
  jitted = jax.jit(lambda step: prng.key(3, Stream.STEP, step))
  for step in (0, 5):
    traced = tuple(np.asarray(jax.random.key_data(jitted(step))).tolist())
    assert traced == data(3, Stream.STEP, step) == data(3, Stream.STEP, step)


def test_streams_keep_their_numbers():
  # They are part of every run: append only.
  assert [(s.name, int(s)) for s in Stream] == [
    ('INIT', 0),
    ('ORDER', 1),
    ('SAMPLE', 2),
    ('STEP', 3),
    ('WARM_UP', 4),
    ('EVALUATE', 5),
  ]


def test_sample_keys_depend_on_position_and_sample_only():
  def data(positions, samples, seed=0):
    keys = prng.sample_keys(jax.random.key(seed), positions, samples)
    return np.asarray(jax.random.key_data(keys))

  keys = data([3, 5, 2**31], 4)
  np.testing.assert_array_equal(keys[1:2, :2], data([5], 2))
  assert len({tuple(k) for k in keys.reshape(12, -1)}) == 12
  assert (keys != data([3, 5, 2**31], 4, seed=1)).any()
