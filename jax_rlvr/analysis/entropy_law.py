"""The entropy law R = −a·e^H + b: its fit, its bands, and what it predicts.

R is the mean accuracy on held-out prompts, H the policy's entropy in nats:
the mean over training completions of each one's mean over tokens. At H = 0
stands the ceiling −a + b. The law was seen in training without interventions
on the entropy; what keeps entropy up may leave it.

Reference: Cui et al., `The Entropy Mechanism of Reinforcement Learning for
Reasoning Language Models <https://arxiv.org/abs/2505.22617>`_, 2025, §2, Eq. 6.
It names no way of fitting; linear in e^H, the law has least squares in closed
form.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jax_rlvr.analysis import least_squares
from jax_rlvr.analysis.least_squares import LEAST_POINTS, Line

if TYPE_CHECKING:
  from numpy.typing import ArrayLike

# The paper's definition; `entropy/token_mean` weighs long completions more.
ENTROPY = 'entropy/sequence_mean'
# Nats, where logarithms of entropies are taken: a collapsed policy has 0.
_LEAST_ENTROPY = 1e-6


@dataclasses.dataclass(frozen=True)
class Law:
  """R = −a·e^H + b.

  Attributes:
    line: of the score on e^H.
  """

  line: Line

  @property
  def a(self) -> float:
    """Score per e^nat; the slope in H is −a·e^H."""
    return -self.line.slope

  @property
  def b(self) -> float:
    return self.line.intercept

  @property
  def ceiling(self) -> float:
    """Score at entropy 0."""
    return self.b - self.a

  def score(self, entropy: ArrayLike) -> np.ndarray:
    """Predicted at an entropy in nats."""
    return self.line.at(np.exp(np.asarray(entropy, float)))

  def band(
    self, entropy: ArrayLike, level: float = 0.95, *, new: bool = False
  ) -> tuple[np.ndarray, np.ndarray]:
    """Edges of a confidence band at entropies in nats; see `Line.band`.

    Args:
      entropy: any shape; 0 for the ceiling's.
      level: of confidence, at each entropy by itself.
      new: a band of a further evaluation, not of the law.
    """
    x = np.exp(np.asarray(entropy, float))
    return self.line.band(x, level, new=new)


def fit(
  entropy: ArrayLike, score: ArrayLike, weights: ArrayLike | None = None
) -> Law:
  """The law of least squares.

  Args:
    entropy: [N], nats.
    score: [N].
    weights: [N], inverse variances of the scores up to a common factor.

  Raises:
    ValueError: as `least_squares.fit` does.
  """
  x = np.exp(np.asarray(entropy, float))
  return Law(least_squares.fit(x, score, weights))


class Forecast(NamedTuple):
  """What the beginning of a run says of its rest.

  Attributes:
    law: of the beginning.
    fitted: points it was fitted to.
    rmse: of the predicted scores of all other points.
    final_error: |predicted − measured| of the last point.
  """

  law: Law
  fitted: int
  rmse: float
  final_error: float


def forecast(
  step: ArrayLike,
  entropy: ArrayLike,
  score: ArrayLike,
  share: float = 0.15,
  weights: ArrayLike | None = None,
) -> Forecast:
  """Fits the law to the first steps and predicts the scores of the others.

  Their entropies are given, as in the paper: it is the law that is put to the
  test, not a guess of entropies.

  Args:
    step: [N], ascending.
    entropy, score, weights: as in `fit`.
    share: of the last step; points up to there are fitted.

  Raises:
    ValueError: no point is left to predict, or as `fit` does.

  Defaults: share 0.15: 36 of 240 steps, Fig. 5, where the RMSE is 0.009 on math
  and 0.012 on code, the final error 0.005 and 0.019.
  """
  step, entropy = np.asarray(step, float), np.asarray(entropy, float)
  score = np.asarray(score, float)
  # 0.15 · 240 is a little less than 36.
  early = step <= share * step[-1] * (1 + 1e-12)
  if early.all():
    raise ValueError(f'{share=} of the steps leaves none to predict')
  if weights is not None:
    weights = np.asarray(weights, float)[early]
  law = fit(entropy[early], score[early], weights)
  error = law.score(entropy[~early]) - score[~early]
  return Forecast(
    law=law,
    fitted=int(early.sum()),
    rmse=float(np.sqrt(np.mean(error**2))),
    final_error=float(abs(error[-1])),
  )


def by_size(parameters: ArrayLike, laws: Sequence[Law]) -> tuple[Line, Line]:
  """a and b as lines in ln(parameters), Fig. 7.

  Args:
    parameters: [N], of each law's policy, embeddings aside, in any one unit.
    laws: N of them, of one family, data and score.
  """
  x = np.log(np.asarray(parameters, float))
  return (
    least_squares.fit(x, [law.a for law in laws]),
    least_squares.fit(x, [law.b for law in laws]),
  )


class Pairs(NamedTuple):
  """Points of the law, [N] each.

  Attributes:
    step: after which a policy was evaluated.
    entropy: of that policy, nats.
    score: its mean accuracy.
  """

  step: np.ndarray
  entropy: np.ndarray
  score: np.ndarray


def pairs(
  rows: Sequence[Mapping[str, Any]],
  evaluations: Sequence[Mapping[str, Any]],
  *,
  held_out: bool = False,
) -> Pairs:
  """Pairs each score with the entropy of the very weights that earned it.

  An evaluation of step s is of the weights after s steps. They drew the
  rollouts of step s + 1, so it is that row's entropy that belongs to it; row s
  is of the weights before. The last evaluation of a run has no such row, and
  makes no pair.

  Args:
    rows: of metrics.jsonl.
    evaluations: of eval.jsonl.
    held_out: take the entropy of the evaluation's own completions instead, on
      held-out prompts and at the evaluation's temperature: no evaluation is
      left out, but it is not the paper's H.

  Returns:
    The pairs whose numbers are finite. The score is the mean of `eval/…/avg@n`
    over the evaluations.
  """
  entropies = {row['step'] - 1: row.get(ENTROPY, math.nan) for row in rows}
  found = []
  for each in evaluations:
    entropy = entropies.get(each['step'], math.nan)
    if held_out:
      entropy = _mean(each, r'eval/.*/entropy')
    found.append((each['step'], entropy, _mean(each, r'eval/.*/avg@\d+')))
  table = np.array(found, float).reshape(-1, 3)
  return Pairs(*table[np.isfinite(table).all(axis=1)].T)


def _mean(row: Mapping[str, Any], pattern: str) -> float:
  values = [x for name, x in row.items() if re.fullmatch(pattern, name)]
  return sum(values) / len(values) if values else math.nan


def entropies(rows: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, ...]:
  """Steps of metrics.jsonl, and the finite entropies of their rollouts."""
  found = [(row['step'], row.get(ENTROPY, math.nan)) for row in rows]
  table = np.array(found, float).reshape(-1, 2)
  step, entropy = table[np.isfinite(table).all(axis=1)].T
  return step, entropy


@dataclasses.dataclass(frozen=True)
class Trend:
  """Where the entropy is going: a power of the step, by its latter half.

  Entropy falls fast at first and then ever more slowly. In five runs of the
  quickstart and of SmolLM2, seen up to 30, 50 or 75 % of their steps, a power
  of the step came within a factor of 3 of the last entropy, mostly of 1.5; an
  exponential ended up to 35 times too low.

  Attributes:
    line: of ln entropy on ln step.
    now: the last step seen.
  """

  line: Line
  now: float

  @property
  def falls(self) -> bool:
    return self.line.slope < 0

  def at(self, step: float) -> float:
    """Entropy at a step to come, in nats; its present level where it rises.

    A rise is not continued: e^H would run away with it.
    """
    step = max(step, self.now) if self.falls else self.now
    return float(np.exp(self.line.at(np.log(step))))

  def steps_until(self, entropy: float) -> float:
    """Steps from now until it has fallen to that; ∞ if it never will."""
    if self.at(self.now) <= entropy:
      return 0.0
    if not self.falls:
      return math.inf
    log_step = (math.log(entropy) - self.line.intercept) / self.line.slope
    # Beyond what a float has, it is never.
    return math.exp(log_step) - self.now if log_step < 700 else math.inf


def trend(step: ArrayLike, entropy: ArrayLike) -> Trend:
  """The trend of the latter half of the steps, of three at the least.

  Args:
    step: [N], ascending, from 1.
    entropy: [N], nats.

  Raises:
    ValueError: there are fewer than three.
  """
  step, entropy = np.asarray(step, float), np.asarray(entropy, float)
  latter = slice(-max(len(step) - len(step) // 2, LEAST_POINTS), None)
  logs = np.log(np.maximum(entropy[latter], _LEAST_ENTROPY))
  line = least_squares.fit(np.log(step[latter]), logs)
  return Trend(line, float(step[-1]))


def steps_to_ceiling(law: Law, trend: Trend, margin: float = 0.01) -> float:
  """Steps until the law has no more than a margin of score left to gain.

  Args:
    law: of the run.
    trend: of its entropy.
    margin: of score below the ceiling.

  Returns:
    0 where it is there already; ∞ where entropy does not go there, or where
    score does not rise as entropy falls.
  """
  if law.a <= 0:
    return math.inf
  # a (e^H − 1) = margin
  return trend.steps_until(math.log1p(margin / law.a))


def streamed(
  rows: Sequence[Mapping[str, Any]],
  evaluations: Sequence[Mapping[str, Any]],
  steps: int,
) -> dict[str, float]:
  """`law/…` scalars of a run so far; none before there are three pairs.

  `law/predicted_final` is the score of the weights after the last step. What
  entropy they will have is not known; it is read off its trend. That at H = 0
  would be the ceiling again, and that at the present entropy the present score.

  Args:
    rows: of metrics.jsonl so far.
    evaluations: of eval.jsonl so far.
    steps: of the whole run.
  """
  step, entropy, score = pairs(rows, evaluations)
  if len(step) < LEAST_POINTS or np.ptp(entropy) == 0:
    return {}
  law = fit(entropy, score)
  # The weights after the last step would draw the rollouts of the one after.
  final = trend(*entropies(rows)).at(steps + 1)
  return {
    'law/a': law.a,
    'law/b': law.b,
    'law/ceiling': law.ceiling,
    'law/predicted_final': float(law.score(final)),
  }
