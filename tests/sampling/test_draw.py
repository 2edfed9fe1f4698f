"""Drawing one token: the right distribution, and the right numbers of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rlvr import sampling
from jax_rlvr.sampling import inverse_cdf

draw = jax.jit(sampling.draw)
N = 100_000
DRAW = np.random.default_rng(0)
# 50 entries: no whole number of blocks of 7. The ends are among the zeros.
WEIGHTS = DRAW.gamma(0.5, size=50).astype(np.float32)
WEIGHTS[[0, 1, 7, 13, 14, 20, 49]] = 0
LIVE = WEIGHTS > 0


def counts(uniform):
  weights = jnp.broadcast_to(WEIGHTS, (len(uniform), 50))
  return np.bincount(inverse_cdf(weights, uniform), minlength=50)


def test_draws_follow_the_weights():
  seen = counts(jax.random.uniform(jax.random.key(0), (N,)))
  expected = N * WEIGHTS / WEIGHTS.sum(dtype=np.float64)
  assert (seen[~LIVE] == 0).all()
  big = expected > 5
  chi_square = ((seen - expected)[big] ** 2 / expected[big]).sum()
  # Mean k and variance 2k of a chi-square with k degrees of freedom.
  k = big.sum()
  assert chi_square < k + 5 * np.sqrt(2 * k)


def test_even_uniforms_divide_in_proportion():
  seen = counts((jnp.arange(N) + 0.5) / N)
  expected = N * WEIGHTS / WEIGHTS.sum(dtype=np.float64)
  # Two edges an entry, and float32 sums good to about 1e-6 · N.
  np.testing.assert_allclose(seen, expected, atol=2)


@pytest.mark.parametrize('size', [1, 2, 3, 10, 49, 50, 1000])
def test_edges_of_the_uniform_never_reach_a_zero(size):
  first, last = size // 3, size - 1 - size // 3
  weights = np.zeros(size, np.float32)
  weights[first : last + 1] = 0.1
  edges = jnp.array([0.0, 1 - 2**-24, 1.0], jnp.float32)
  ids = inverse_cdf(jnp.broadcast_to(weights, (3, size)), edges)
  np.testing.assert_array_equal(ids, [first, last, last])


def test_uniform_picks_by_running_sum():
  # Running sums 1, 1, 4, 8: u · 8 falls in [0, 1), [1, 4) or [4, 8).
  weights = jnp.broadcast_to(jnp.array([1.0, 0.0, 3.0, 4.0]), (5, 4))
  uniform = jnp.array([0.0, 0.12, 0.125, 0.49, 0.5])
  np.testing.assert_array_equal(inverse_cdf(weights, uniform), [0, 0, 2, 2, 3])


LOGITS = (3 * DRAW.normal(size=(4, 3, 23))).astype(np.float32)
KEYS = jax.random.split(jax.random.key(1), (4, 3))


def log_softmax(x):
  x = x.astype(np.float64)
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize('temperature', [1.0, 0.5, 0.0])
def test_drawn_numbers_are_of_the_scaled_softmax(temperature):
  drawn = draw(KEYS, LOGITS, jnp.float32(temperature))
  logprobs = log_softmax(LOGITS / (temperature or 1.0))
  entropy = -(np.exp(logprobs) * logprobs).sum(-1)
  picked = np.take_along_axis(logprobs, np.asarray(drawn.ids)[..., None], -1)
  np.testing.assert_allclose(drawn.logprob, picked[..., 0], 1e-4, 1e-6)
  np.testing.assert_allclose(drawn.entropy, entropy, 1e-4, 1e-6)
  if temperature == 0:
    np.testing.assert_array_equal(drawn.ids, LOGITS.argmax(-1))
    np.testing.assert_array_equal(drawn.sampled_logprob, np.zeros((4, 3)))
  else:
    np.testing.assert_array_equal(drawn.sampled_logprob, drawn.logprob)


def test_draw_depends_on_the_key_of_its_row():
  drawn = draw(KEYS, LOGITS, 1.0)
  alone = draw(KEYS[2:3, 1:2], LOGITS[2:3, 1:2], 1.0)
  assert drawn.ids[2, 1] == alone.ids[0, 0]
  keys = jax.random.split(jax.random.key(2), (2000,))
  ids = draw(keys, jnp.broadcast_to(LOGITS[0, 0], (2000, 23)), 1.0).ids
  share = np.bincount(ids, minlength=23) / 2000
  # Standard error of a share at most √(0.25 / 2000) = 0.011.
  expected = np.exp(log_softmax(LOGITS[0, 0]))
  np.testing.assert_allclose(share, expected, atol=0.045)
