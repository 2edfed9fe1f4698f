"""Advantage estimators: (rewards, valid, lengths) [P, G] → advantages [P, G].

`valid` is False where a completion could not be scored: it is outside every
mean and deviation, and its advantage is 0. `lengths` are completion tokens.
Host arrays in, float32 host arrays out. In a group of fewer than two valid
completions nothing can be compared: but for `batch_norm`, which has no groups,
its advantage is 0.
"""

from __future__ import annotations

import math

import numpy as np


def group_norm(rewards, valid, lengths, *, eps: float = 1e-6):
  """GRPO: (reward − group mean) / (group deviation + eps).

  The deviation is the unbiased one, over the valid completions of the group.

  Defaults: eps 1e-6, and the unbiased deviation: verl; the paper names neither.

  Reference: Shao et al., `DeepSeekMath <https://arxiv.org/abs/2402.03300>`_,
  2024.
  """
  centred = group_mean(rewards, valid, lengths)
  return (centred / (_deviation(centred, valid) + eps)).astype(np.float32)


def group_mean(rewards, valid, lengths):
  """Dr. GRPO: reward − group mean.

  Defaults: none.

  Reference: Liu et al., `Understanding R1-Zero-Like Training
  <https://arxiv.org/abs/2503.20783>`_, 2025.
  """
  del lengths
  return _centred(rewards, valid, valid.astype(np.float32))


def leave_one_out(rewards, valid, lengths):
  """RLOO: reward − mean of the others of its group.

  Defaults: none.

  Reference: Ahmadian et al., `Back to Basics
  <https://arxiv.org/abs/2402.14740>`_, 2024.
  """
  n = valid.sum(axis=1, keepdims=True)
  factor = n / np.maximum(n - 1, 1)
  return (group_mean(rewards, valid, lengths) * factor).astype(np.float32)


def length_weighted(rewards, valid, lengths):
  """OPO: reward − mean of the group's rewards weighed by completion length.

  The baseline of least variance, if the squared gradient of a completion is
  as its length. Made for strictly on-policy updates.

  Defaults: none.

  Reference: Hao et al., `On-Policy RL with Optimal Reward Baseline
  <https://arxiv.org/abs/2505.23585>`_, 2025.
  """
  return _centred(rewards, valid, np.where(valid, lengths, 0).astype(float))


def batch_norm(rewards, valid, lengths, *, eps: float = 1e-8):
  """REINFORCE++: rewards whitened over all completion tokens of the batch.

  (reward − mean) / √(variance + eps), mean and unbiased variance over tokens:
  a completion counts as often as it is long. Without groups: prompts that all
  completions solve keep a positive advantage.

  Defaults: eps 1e-8: verl.

  Reference: Hu et al., `REINFORCE++ <https://arxiv.org/abs/2501.03262>`_, 2025.
  """
  return _whitened(np.where(valid, rewards, 0), valid, lengths, eps)


def group_mean_batch_norm(rewards, valid, lengths, *, eps: float = 1e-8):
  """REINFORCE++-baseline: reward − group mean, whitened over all tokens.

  Whitening takes a mean over tokens off once more, so that a group of equal
  rewards may keep a small advantage, the same for all of it.

  Defaults: eps 1e-8: verl.

  Reference: Hu et al., `REINFORCE++ <https://arxiv.org/abs/2501.03262>`_, 2025.
  """
  compared = valid & (valid.sum(axis=1, keepdims=True) > 1)
  centred = group_mean(rewards, valid, lengths)
  return _whitened(centred, compared, lengths, eps)


def group_mean_batch_std(rewards, valid, lengths, *, eps: float = 1e-4):
  """Lite PPO: (reward − group mean) / (deviation of the batch's rewards + eps).

  The unbiased deviation over all valid completions of the batch.

  Defaults: eps 1e-4: TRL, `scale_rewards="batch"`.

  Reference: Liu et al., `Tricks or Traps?
  <https://arxiv.org/abs/2508.08221>`_, 2025.
  """
  centred = group_mean(rewards, valid, lengths)
  scored = np.asarray(rewards)[valid].astype(np.float64)
  deviation = scored.std(ddof=1) if scored.size > 1 else 0.0
  return (centred / (deviation + eps)).astype(np.float32)


def pass_at_k(
  rewards, valid, lengths, *, k: int | None = None, eps: float = 1e-6
):
  """Pass@k: what a completion adds to the best of k, over group deviation.

  The mean, over the subsets of k valid completions that hold this one, of
  their best reward minus the best without it. With k = G only a single best
  completion has an advantage: its distance to the second best.

  Args:
    rewards, valid, lengths: [P, G].
    k: 2 or more; the valid completions of the group if None or greater.
    eps: added to the unbiased deviation of the group.

  Defaults: k None, eps 1e-6: verl's `grpo_passk`.

  Reference: Tang et al., `Optimizing Language Models for Inference Time
  Objectives <https://arxiv.org/abs/2503.19595>`_, 2025.

  Raises:
    ValueError: k is below 2.
  """
  if k is not None and k < 2:
    raise ValueError(f'{k=} must be 2 or more completions')
  added = np.zeros(rewards.shape)
  for p, among in enumerate(valid):
    of_group = np.asarray(rewards)[p, among].astype(np.float64)
    n = of_group.size
    if n < 2:
      continue
    size = min(k or n, n)
    order = np.argsort(of_group, kind='stable')
    ranked = of_group[order]
    # The second best of the subset is rank j: its other k − 2 are below j.
    ways = np.array([math.comb(j, size - 2) for j in range(n)], float)
    gains = ranked[:, None] - ranked[None, :]
    below = np.tril(gains, -1) @ (ways / math.comb(n - 1, size - 1))
    added[p, np.flatnonzero(among)[order]] = below
  deviation = _deviation(group_mean(rewards, valid, lengths), valid)
  return (added / (deviation + eps)).astype(np.float32)


def _centred(rewards, valid, weights):
  """Reward − weighted mean of the group; exactly 0 where all are equal."""
  rewards = np.where(valid, rewards, 0).astype(np.float64)
  total = weights.sum(axis=1, keepdims=True)
  mean = (weights * rewards).sum(axis=1, keepdims=True) / np.maximum(total, 1)
  # Rounding of the mean must not give a group of equal rewards a gradient.
  low = np.where(valid, rewards, np.inf).min(axis=1, keepdims=True)
  high = np.where(valid, rewards, -np.inf).max(axis=1, keepdims=True)
  return np.where(valid & (low < high), rewards - mean, 0).astype(np.float32)


def _deviation(centred, valid):
  """Unbiased deviation of each group, [P, 1]; of centred rewards."""
  n = valid.sum(axis=1, keepdims=True)
  variance = (centred**2).sum(axis=1, keepdims=True) / np.maximum(n - 1, 1)
  return np.sqrt(variance)


def _whitened(x, valid, lengths, eps):
  """(x − mean) / √(variance + eps) over tokens: each x counts lengths times."""
  weights = np.where(valid, lengths, 0).astype(np.float64)
  n = weights.sum()
  mean = (weights * x).sum() / max(n, 1)
  variance = (weights * (x - mean) ** 2).sum() / max(n - 1, 1)
  counted = x[weights > 0]
  varied = counted.size > 0 and counted.min() < counted.max()
  white = (x - mean) / np.sqrt(variance + eps)
  return np.where(valid & varied, white, 0).astype(np.float32)


ALL = {
  f.__name__: f
  for f in (
    group_norm,
    group_mean,
    leave_one_out,
    length_weighted,
    batch_norm,
    group_mean_batch_norm,
    group_mean_batch_std,
    pass_at_k,
  )
}
