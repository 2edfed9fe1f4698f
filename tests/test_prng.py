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
