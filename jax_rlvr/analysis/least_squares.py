"""A line through points, in closed form, and how sure it is."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from scipy import special

if TYPE_CHECKING:
  from jaxtyping import Float
  from numpy.typing import ArrayLike

# With fewer points nothing is left to tell the noise by.
LEAST_POINTS = 3


@dataclasses.dataclass(frozen=True)
class Line:
  """y = intercept + slope · x.

  Attributes:
    intercept, slope: by weighted least squares.
    covariance: [2, 2], of intercept and slope.
    noise: standard deviation of a point of weight 1 about the line.
    freedom: points − 2.
    r2: share of the variance of y that the line explains; NaN where y does not
      vary.
  """

  intercept: float
  slope: float
  covariance: Float[np.ndarray, '2 2'] = dataclasses.field(repr=False)
  noise: float
  freedom: int
  r2: float

  def at(self, x: ArrayLike) -> np.ndarray:
    """y on the line."""
    return self.intercept + self.slope * np.asarray(x, float)

  def band(
    self, x: ArrayLike, level: float = 0.95, *, new: bool = False
  ) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper edge at each x, by Student's t.

    Args:
      x: any shape.
      level: chance that the band at one x holds what it is of, where noise is
        normal and independent; not the chance that it does at all x.
      new: a band of a new point of weight 1, not of the line.
    """
    x = np.asarray(x, float)
    design = np.stack([np.ones_like(x), x], -1)
    variance = np.einsum('...i,ij,...j->...', design, self.covariance, design)
    variance = np.maximum(variance, 0) + (self.noise**2 if new else 0.0)
    half = self._quantile(level) * np.sqrt(variance)
    return self.at(x) - half, self.at(x) + half

  def slope_band(self, level: float = 0.95) -> tuple[float, float]:
    """Lower and upper edge of the slope."""
    half = self._quantile(level) * float(np.sqrt(self.covariance[1, 1]))
    return self.slope - half, self.slope + half

  def _quantile(self, level: float) -> float:
    return float(special.stdtrit(self.freedom, (1 + level) / 2))


def fit(x: ArrayLike, y: ArrayLike, weights: ArrayLike | None = None) -> Line:
  """The line of least Σ weight · (y − line)².

  Args:
    x, y: [N].
    weights: [N], ≥ 0, inverse variances of y up to a common factor; all 1 if
      None. Points of weight 0 do not count.

  Raises:
    ValueError: there are fewer than three points, x does not vary, or a number
      is not finite or a weight negative.
  """
  x, y = np.asarray(x, float), np.asarray(y, float)
  w = np.ones_like(x) if weights is None else np.asarray(weights, float)
  if x.ndim != 1 or not x.shape == y.shape == w.shape:
    raise ValueError(f'x {x.shape}, y {y.shape}, weights {w.shape}; give [N]')
  if not np.isfinite([x, y, w]).all() or (w < 0).any():
    raise ValueError('a line needs finite numbers, and weights ≥ 0')
  x, y, w = x[w > 0], y[w > 0], w[w > 0]
  if len(x) < LEAST_POINTS:
    raise ValueError(f'{len(x)} points; a line needs {LEAST_POINTS}')
  if np.ptp(x) == 0:
    raise ValueError(f'all {len(x)} points are at x={x[0]:g}; give others')
  # About their means, so that nothing large cancels.
  mean_x, mean_y = np.average(x, weights=w), np.average(y, weights=w)
  dx, dy = x - mean_x, y - mean_y
  sxx = float(np.sum(w * dx**2))
  slope = float(np.sum(w * dx * dy)) / sxx
  squares, total = np.sum(w * (dy - slope * dx) ** 2), np.sum(w * dy**2)
  freedom = len(x) - 2
  variance = float(squares) / freedom
  of_slope, of_mean = variance / sxx, variance / np.sum(w)
  return Line(
    intercept=float(mean_y - slope * mean_x),
    slope=slope,
    covariance=np.array(
      [
        [of_mean + mean_x**2 * of_slope, -mean_x * of_slope],
        [-mean_x * of_slope, of_slope],
      ]
    ),
    noise=float(np.sqrt(variance)),
    freedom=freedom,
    r2=float(1 - squares / total) if total > 0 else float('nan'),
  )
