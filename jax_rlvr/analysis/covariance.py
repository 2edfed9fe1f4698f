"""Covariance of log-probability and advantage, which drives the entropy.

To first order a step changes the entropy by −η times this covariance: what is
both likely and better than average lowers it.

Reference: Cui et al., `The Entropy Mechanism of Reinforcement Learning for
Reasoning Language Models <https://arxiv.org/abs/2505.22617>`_, 2025, §3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jax_rlvr import evidence, masked
from jax_rlvr.analysis import least_squares
from jax_rlvr.analysis.entropy_law import ENTROPY
from jax_rlvr.analysis.least_squares import Line
from jax_rlvr.records import Rollout, Tokens, TokenStats
from jax_rlvr.scores import is_right

if TYPE_CHECKING:
  from jaxtyping import Bool, Float
  from numpy.typing import ArrayLike

# Of Table 1.
SHARES = (2e-4, 2e-3, 2e-2, 0.2, 0.5, 1.0)


def tabular(
  logits: ArrayLike, advantage: ArrayLike, *, natural: bool = True
) -> np.ndarray:
  """Cov of log π and A over the tokens of each distribution, exactly.

  A step of learning rate η on the logits changes the entropy by −η times this,
  to first order.

  Args:
    logits: [*B, V].
    advantage: [*B, V], of each token; its mean under π does not count.
    natural: of a natural policy gradient, Cov(log π, A): Theorem 2. Else of the
      vanilla one, Cov(log π, π·A): Theorem 1, where A is to have mean 0 under
      π.

  Returns:
    [*B], nats × advantage.
  """
  logits, advantage = np.asarray(logits, float), np.asarray(advantage, float)
  shifted = logits - logits.max(-1, keepdims=True)
  logprob = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  prob = np.exp(logprob)
  pushed = advantage if natural else prob * advantage

  def mean(x):
    return np.sum(prob * x, -1, keepdims=True)

  return mean((logprob - mean(logprob)) * (pushed - mean(pushed)))[..., 0]


def tokenwise(stats: TokenStats, tokens: Tokens) -> Float[np.ndarray, ' N']:
  """Eq. 10 of each completion token: those of `evidence.covariance`, in order.

  Their mean is the covariance of Theorem 2 over the batch.
  """
  covariance = np.asarray(evidence.covariance(stats, tokens), float)
  return covariance[np.asarray(tokens.mask)]


def table(
  covariance: ArrayLike, shares: Sequence[float] = SHARES
) -> dict[float, float]:
  """Mean covariance of the tokens where it is highest, by their share: Table 1.

  Args:
    covariance: [N], of tokens; what is not finite is left out of the means.
    shares: in (0, 1]; ⌊share · N⌋ tokens, one at the least.
  """
  covariance = np.asarray(covariance, float)
  descending = np.sort(covariance[np.isfinite(covariance)])[::-1]
  counts = {s: max(int(masked.share(s, covariance.size)), 1) for s in shares}
  return {s: _mean(descending[:count]) for s, count in counts.items()}


class Sequences(NamedTuple):
  """Completions as single actions, [P, G] each.

  Attributes:
    logprob: mean over the completion's tokens, nats: log of their geometric
      mean probability.
    advantage: mean over its tokens.
    valid: False where there is no completion.
  """

  logprob: Float[np.ndarray, 'P G']
  advantage: Float[np.ndarray, 'P G']
  valid: Bool[np.ndarray, 'P G']


def sequences(stats: TokenStats, tokens: Tokens, group_size: int) -> Sequences:
  """The rows of a batch, in groups of completions of one prompt."""
  mask = np.asarray(tokens.mask)
  count = mask.sum(-1)

  def mean(x):
    total = np.where(mask, np.asarray(x, float), 0.0).sum(-1)
    return (total / np.maximum(count, 1)).reshape(-1, group_size)

  return Sequences(
    mean(stats.logprob),
    mean(tokens.advantage),
    (count > 0).reshape(-1, group_size),
  )


def promptwise(
  logprob: ArrayLike, advantage: ArrayLike, valid: ArrayLike | None = None
) -> Float[np.ndarray, ' P']:
  """Eq. 8–9: Cov(log π, π·A) over the completions of each prompt.

  π is a completion's geometric mean probability, exp of its length-normalised
  log-probability. The paper normalises the latter and does not say what π in
  π·A is; with that of the whole sequence the product would be about 0, and the
  values it plots are not. Means divide by the number of completions, as Eq. 10
  does.

  Args:
    logprob: [P, G], mean over tokens, nats.
    advantage: [P, G].
    valid: [P, G], what counts; all if None.

  Returns:
    [P], nats × advantage; NaN where fewer than two completions count.
  """
  logprob, advantage = np.asarray(logprob, float), np.asarray(advantage, float)
  valid = np.ones_like(logprob, bool) if valid is None else np.asarray(valid)
  count = valid.sum(-1, keepdims=True)

  def mean(x):
    return np.where(valid, x, 0.0).sum(-1, keepdims=True) / np.maximum(count, 1)

  pushed = np.exp(logprob) * advantage
  of_each = mean((logprob - mean(logprob)) * (pushed - mean(pushed)))
  return np.where(count > 1, of_each, np.nan)[:, 0]


def by_difficulty(
  covariance: ArrayLike,
  accuracy: ArrayLike,
  edges: Sequence[float] = (1 / 3, 2 / 3),
) -> Float[np.ndarray, ' bins']:
  """Mean covariance of the prompts between two edges of accuracy, Fig. 8.

  Args:
    covariance: [P]; NaN does not count.
    accuracy: [P], share of a prompt's completions that are right.
    edges: ascending; a prompt at an edge counts above it.

  Returns:
    One more than there are edges, hardest first; NaN where there is no prompt.
  """
  covariance = np.asarray(covariance, float)
  place = np.digitize(np.asarray(accuracy, float), edges)
  kept = np.isfinite(covariance)
  return np.array(
    [_mean(covariance[kept & (place == i)]) for i in range(len(edges) + 1)]
  )


def of_rollouts(
  rollouts: Sequence[Rollout], advantages: ArrayLike
) -> dict[str, float]:
  """Prompt-wise covariance of a step, under the weights that sampled.

  `covariance/prompts` is the mean over all groups: those of equal advantages
  have 0, and do nothing to the entropy. `…/hard`, `…/middle` and `…/easy` are
  means of the others, by thirds of their accuracy. Names without a group are
  left out.

  Args:
    rollouts: completions, grouped by prompt; one without reward does not count.
    advantages: [P, G].
  """
  advantages = np.asarray(advantages, float)
  shape = advantages.shape
  if not rollouts:
    return {}
  scored = [r.reward is not None and len(r.ids) > 0 for r in rollouts]
  valid = np.reshape(scored, shape)
  logprob = np.reshape(
    [
      r.logprob.mean() if ok else 0.0
      for r, ok in zip(rollouts, scored, strict=True)
    ],
    shape,
  )
  right = np.reshape([is_right(r) for r in rollouts], shape)
  count = np.maximum(valid.sum(-1), 1)
  accuracy = np.where(valid, right, False).sum(-1) / count
  each = promptwise(logprob, advantages, valid)
  alive = np.where(valid, advantages, 0.0).any(-1)
  hard, middle, easy = by_difficulty(np.where(alive, each, np.nan), accuracy)
  found = {
    'covariance/prompts': _mean(each[np.isfinite(each)]),
    'covariance/prompts/hard': hard,
    'covariance/prompts/middle': middle,
    'covariance/prompts/easy': easy,
  }
  return {name: float(x) for name, x in found.items() if np.isfinite(x)}


class Changes(NamedTuple):
  """Entropy change by step, predicted and measured, [N] each.

  Attributes:
    step: that changed the entropy.
    covariance: of its batch; −η times this is predicted.
    fall: entropy of the rollouts of this step less that of the next, nats.
  """

  step: np.ndarray
  covariance: np.ndarray
  fall: np.ndarray

  @property
  def correlation(self) -> float:
    """Pearson's; NaN where either does not vary."""
    if len(self.step) < 2 or 0 in (np.ptp(self.covariance), np.ptp(self.fall)):
      return math.nan
    return float(np.corrcoef(self.covariance, self.fall)[0, 1])

  @property
  def line(self) -> Line:
    """Fall on covariance; its slope is the η that the run acts as with.

    Raises:
      ValueError: fewer than three steps, or the covariance does not vary.
    """
    return least_squares.fit(self.covariance, self.fall)


def changes(
  rows: Sequence[Mapping[str, Any]],
  covariance: str = 'covariance/prompts',
  entropy: str = ENTROPY,
) -> Changes:
  """Sets each step's covariance beside what became of the entropy, Fig. 8.

  Row s has both of the weights before update s; row s + 1 has the entropy after
  it. The two batches ask different prompts, so the fall is noisy: one of 256
  completions whose mean entropies scatter by 0.3 nats has an error of 0.03.
  The theory is of one strictly on-policy update a batch.

  Args:
    rows: of metrics.jsonl.
    covariance: 'covariance/prompts' as in the figure, or 'covariance/mean' for
      the token-wise one, a mean over inner steps.
    entropy: which of the two means.

  Returns:
    Steps whose next one is there too, finite numbers only.
  """
  after = {row['step'] - 1: row.get(entropy, math.nan) for row in rows}
  found = [
    (
      row['step'],
      row.get(covariance, math.nan),
      row.get(entropy, math.nan) - after.get(row['step'], math.nan),
    )
    for row in rows
  ]
  each = np.array(found, float).reshape(-1, 3)
  return Changes(*each[np.isfinite(each).all(axis=1)].T)


def _mean(x: np.ndarray) -> float:
  return float(x.mean()) if x.size else math.nan
