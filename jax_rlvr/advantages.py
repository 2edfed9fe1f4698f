"""Advantage estimators: (rewards, valid, lengths) [P, G] → advantages [P, G].

`valid` is False where a completion could not be scored: it is outside its
group's mean and deviation, and its advantage is 0. `lengths` are completion
tokens. Host arrays in, host arrays out.
"""

from __future__ import annotations

import numpy as np


def group_norm(rewards, valid, lengths, *, eps: float = 1e-6):
  """GRPO: (reward − group mean) / (group deviation + eps).

  The deviation is the unbiased one, over the valid completions of the group;
  a group with fewer than two has advantage 0.

  Reference: Shao et al., `DeepSeekMath <https://arxiv.org/abs/2402.03300>`_,
  2024; unbiased deviation and eps as verl.
  """
  centred = group_mean(rewards, valid, lengths)
  n = valid.sum(axis=1, keepdims=True)
  variance = (centred**2).sum(axis=1, keepdims=True) / np.maximum(n - 1, 1)
  return (centred / (np.sqrt(variance) + eps)).astype(np.float32)


def group_mean(rewards, valid, lengths):
  """Dr. GRPO: reward − group mean.

  Reference: Liu et al., `Understanding R1-Zero-Like Training
  <https://arxiv.org/abs/2503.20783>`_, 2025.
  """
  del lengths
  rewards = np.where(valid, rewards, 0).astype(np.float32)
  n = np.maximum(valid.sum(axis=1, keepdims=True), 1)
  mean = rewards.sum(axis=1, keepdims=True) / n
  # Rounding of the mean must not give a group of equal rewards a gradient.
  low = np.where(valid, rewards, np.inf).min(axis=1, keepdims=True)
  high = np.where(valid, rewards, -np.inf).max(axis=1, keepdims=True)
  return np.where(valid & (low < high), rewards - mean, 0).astype(np.float32)


def leave_one_out(rewards, valid, lengths):
  """RLOO: reward − mean of the others of its group.

  A group with fewer than two valid completions has advantage 0.

  Reference: Ahmadian et al., `Back to Basics
  <https://arxiv.org/abs/2402.14740>`_, 2024.
  """
  n = valid.sum(axis=1, keepdims=True)
  factor = n / np.maximum(n - 1, 1)
  return (group_mean(rewards, valid, lengths) * factor).astype(np.float32)


ALL = {f.__name__: f for f in (group_norm, group_mean, leave_one_out)}
