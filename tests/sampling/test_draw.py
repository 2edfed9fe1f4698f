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
# 300 entries: no whole number of blocks. The ends are among the zeros.
WEIGHTS = DRAW.gamma(0.5, size=300).astype(np.float32)
WEIGHTS[[0, 1, 7, 127, 128, 129, 299]] = 0
TOTAL = WEIGHTS.sum(dtype=np.float64)


def counts(share):
  weights = jnp.broadcast_to(WEIGHTS, (len(share), len(WEIGHTS)))
  mass = share * jnp.float32(TOTAL)
  return np.bincount(inverse_cdf(weights, mass), minlength=len(WEIGHTS))


def test_draws_follow_the_weights():
  seen = counts(jax.random.uniform(jax.random.key(0), (N,)))
  expected = N * WEIGHTS / TOTAL
  assert (seen[WEIGHTS == 0] == 0).all()
  big = expected > 5
  chi_square = ((seen - expected)[big] ** 2 / expected[big]).sum()
  # Mean k and variance 2k of a chi-square with k degrees of freedom.
  k = big.sum()
  assert chi_square < k + 5 * np.sqrt(2 * k)


def test_even_shares_divide_in_proportion():
  seen = counts((jnp.arange(N) + 0.5) / N)
  # Two edges an entry, and float32 sums good to about 1e-6 · N.
  np.testing.assert_allclose(seen, N * WEIGHTS / TOTAL, atol=2)


def test_mass_picks_the_entry_that_reaches_it():
  # Running sums 1, 1, 4, 8; what lies outside (0, 8] goes to the ends.
  mass = jnp.array([-1.0, 0.0, 0.5, 1.0, 1.01, 4.0, 4.01, 8.0, 9.0])
  weights = jnp.broadcast_to(jnp.array([1.0, 0.0, 3.0, 4.0]), (9, 4))
  np.testing.assert_array_equal(
    inverse_cdf(weights, mass), [0, 0, 0, 0, 2, 2, 3, 3, 3]
  )


@pytest.mark.parametrize('size', [1, 2, 3, 10, 49, 128, 129, 1000])
def test_ends_of_the_mass_never_reach_a_zero(size):
  first, last = size // 3, size - 1 - size // 3
  weights = np.zeros(size, np.float32)
  weights[first : last + 1] = 0.1
  total = weights.sum(dtype=np.float64)
  mass = jnp.array([0.0, 1e-30, total, total * (1 + 1e-5)], jnp.float32)
  ids = inverse_cdf(jnp.broadcast_to(weights, (4, size)), mass)
  np.testing.assert_array_equal(ids, [first, first, last, last])


def test_rounding_of_the_sums_never_reaches_a_zero():
  # Nine in ten are 0; the mass is one of the running sums, or next to it.
  size = 3000
  weights = DRAW.gamma(0.5, size=size).astype(np.float32)
  weights[DRAW.random(size) < 0.9] = 0
  sums = np.unique(np.asarray(jnp.cumsum(weights)))
  mass = np.concatenate(
    [
      np.nextafter(sums, np.float32(0)),
      sums,
      np.nextafter(sums, np.float32(9e9)),
    ]
  )
  ids = inverse_cdf(jnp.broadcast_to(weights, (len(mass), size)), mass)
  assert (weights[ids] > 0).all()


LOGITS = (3 * DRAW.normal(size=(4, 3, 300))).astype(np.float32)
KEYS = jax.random.split(jax.random.key(1), (4, 3))


def log_softmax(x):
  x = x.astype(np.float64)
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize('offset', [0.0, 40.0])
@pytest.mark.parametrize('temperature', [1.0, 0.7, 0.0])
def test_drawn_numbers_are_of_the_scaled_softmax(temperature, offset):
  logits = LOGITS + np.float32(offset)
  drawn = draw(KEYS, logits, jnp.float32(temperature))
  scale = np.float64(np.float32(temperature or 1.0))
  logprobs = log_softmax(logits / scale)
  entropy = -(np.exp(logprobs) * logprobs).sum(-1)
  picked = np.take_along_axis(logprobs, np.asarray(drawn.ids)[..., None], -1)
  np.testing.assert_allclose(drawn.logprob, picked[..., 0], 1e-6, 1e-6)
  np.testing.assert_allclose(drawn.entropy, entropy, 1e-6, 1e-6)
  assert drawn.finite.all()
  if temperature == 0:
    np.testing.assert_array_equal(drawn.ids, logits.argmax(-1))
    np.testing.assert_array_equal(drawn.sampled_logprob, np.zeros((4, 3)))
  else:
    np.testing.assert_array_equal(drawn.sampled_logprob, drawn.logprob)


def test_temperature_zero_takes_the_first_of_equal_logits():
  logits = jnp.zeros((1, 300)).at[0, jnp.array([200, 130, 299])].set(5.0)
  # A number that is no array.
  drawn = jax.jit(lambda *rows: sampling.draw(*rows, 0.0))(KEYS[0, :1], logits)
  np.testing.assert_array_equal(drawn.ids, [130])


@pytest.mark.parametrize('temperature', [1.0, 0.0])
def test_row_that_is_not_finite_is_flagged_and_zero(temperature):
  logits = LOGITS[:, 0].copy()
  logits[0, 5] = np.nan
  logits[1, 5] = np.inf
  logits[2] = -np.inf
  keys = KEYS[:, 0]
  drawn = draw(keys, logits, temperature)
  np.testing.assert_array_equal(drawn.finite, [False, False, False, True])
  whole = draw(keys, LOGITS[:, 0], temperature)
  for x, unharmed in zip(drawn, whole, strict=True):
    np.testing.assert_array_equal(x[:3], np.zeros(3))
    np.testing.assert_array_equal(x[3:], unharmed[3:])


def test_draw_depends_on_the_key_of_its_row():
  drawn = draw(KEYS, LOGITS, 1.0)
  alone = draw(KEYS[2:3, 1:2], LOGITS[2:3, 1:2], 1.0)
  assert drawn.ids[2, 1] == alone.ids[0, 0]
  keys = jax.random.split(jax.random.key(2), (2000,))
  ids = draw(keys, jnp.broadcast_to(LOGITS[0, 0], (2000, 300)), 1.0).ids
  share = np.bincount(ids, minlength=300) / 2000
  # Standard error of a share at most √(0.25 / 2000) = 0.011.
  expected = np.exp(log_softmax(LOGITS[0, 0]))
  np.testing.assert_allclose(share, expected, atol=0.045)
