"""A line, its numbers by hand, and how often its bands hold the truth."""

import numpy as np
import pytest

from jax_rlvr.analysis import least_squares


def test_three_points_by_hand():
  line = least_squares.fit([1, 2, 3], [1, 2, 2])
  # Means 2 and 5/3; Σdx² = 2, Σdx·dy = 1; residuals −1/6, 1/3, −1/6.
  assert line.slope == pytest.approx(0.5)
  assert line.intercept == pytest.approx(2 / 3)
  assert line.freedom == 1
  assert line.noise**2 == pytest.approx(1 / 6)
  assert line.r2 == pytest.approx(1 - (1 / 6) / (2 / 3))
  # noise² · (1/3 + 2²/2), −noise² · 2/2, noise² / 2
  np.testing.assert_allclose(
    line.covariance, [[7 / 18, -1 / 6], [-1 / 6, 1 / 12]]
  )
  # Student's t of one degree of freedom at 97.5 %: 12.7062.
  half = 12.706204736 * np.sqrt(1 / 12)
  assert line.slope_band() == pytest.approx((0.5 - half, 0.5 + half))
  low, high = line.band(2.0)
  half = 12.706204736 * np.sqrt(1 / 18)
  assert (low, high) == pytest.approx((5 / 3 - half, 5 / 3 + half))
  low, high = line.band([2.0], new=True)
  half = 12.706204736 * np.sqrt(1 / 18 + 1 / 6)
  assert (low[0], high[0]) == pytest.approx((5 / 3 - half, 5 / 3 + half))


def test_weights_are_those_of_the_normal_equations():
  rng = np.random.default_rng(0)
  x, y, w = rng.normal(size=(3, 20))
  w = np.exp(w)
  design = np.stack([np.ones_like(x), x], 1)
  matrix = design.T * w @ design
  expected = np.linalg.solve(matrix, design.T @ (w * y))
  residual = y - design @ expected
  covariance = np.sum(w * residual**2) / 18 * np.linalg.inv(matrix)
  line = least_squares.fit(x, y, w)
  np.testing.assert_allclose([line.intercept, line.slope], expected)
  np.testing.assert_allclose(line.covariance, covariance)
  plain = least_squares.fit(x, y)
  assert abs(plain.slope - line.slope) > 1e-3
  # A common factor changes nothing but the unit of the noise.
  more = least_squares.fit(x, y, 100 * w)
  np.testing.assert_allclose(more.band(0.3), line.band(0.3))
  assert more.noise == pytest.approx(10 * line.noise)


def test_points_without_weight_do_not_count():
  x, y = [0, 1, 2, 3, 9], [1, 3, 2, 5, -70]
  line = least_squares.fit(x, y, [1, 1, 1, 1, 0])
  expected = least_squares.fit(x[:4], y[:4])
  assert line.slope == expected.slope and line.freedom == expected.freedom == 2


@pytest.mark.parametrize('level', [0.8, 0.95])
def test_bands_hold_the_truth_as_often_as_they_say(level):
  rng = np.random.default_rng(1)
  x = np.array([1.0, 1.1, 1.2, 1.5, 1.9])
  trials = 3000
  line_held = new_held = narrow = 0
  for _ in range(trials):
    line = least_squares.fit(x, 0.6 - 0.2 * x + 0.01 * rng.normal(size=5))
    low, high = line.band(2.5, level)
    line_held += low <= 0.1 <= high
    # As a normal quantile would have it, with three degrees of freedom.
    middle = (low + high) / 2
    half = {0.8: 1.2816, 0.95: 1.96}[level] * (high - middle)
    half /= line._quantile(level)
    narrow += abs(middle - 0.1) <= half
    low, high = line.band(2.5, level, new=True)
    new_held += low <= 0.1 + 0.01 * rng.normal() <= high
  # Four standard errors of a share: 0.016 and 0.029.
  error = 4 * np.sqrt(level * (1 - level) / trials)
  assert abs(line_held / trials - level) < error
  assert abs(new_held / trials - level) < error
  assert narrow / trials < level - error


@pytest.mark.parametrize(
  'x, y, weights, words',
  [
    ([1, 2], [1, 2], None, '2 points; a line needs 3'),
    ([1, 2, 3], [1, 2, 3], [1, 1, 0], '2 points'),
    ([2, 2, 2], [1, 2, 3], None, 'all 3 points are at x=2'),
    ([1, 2, 3], [1, np.nan, 3], None, 'finite'),
    ([1, 2, 3], [1, 2, 3], [1, 1, -1], 'weights ≥ 0'),
    ([1, 2, 3], [1, 2], None, r'give \[N\]'),
  ],
)
def test_what_is_no_line_is_refused(x, y, weights, words):
  with pytest.raises(ValueError, match=words):
    least_squares.fit(x, y, weights)


def test_points_far_from_the_origin_lose_no_digits():
  x = np.arange(5.0) + 1e8
  line = least_squares.fit(x, [0.0, 1, 2, 3, 4])
  assert line.slope == pytest.approx(1.0, abs=1e-12)
  assert line.noise < 1e-12
