"""Advantage estimators against numbers by hand and NumPy loops."""

import numpy as np
import pytest

from jax_rlvr import advantages


def _group(*rewards, valid=None):
  rewards = np.array([rewards], np.float32)
  valid = np.ones(rewards.shape, bool) if valid is None else np.array([valid])
  return rewards, valid.astype(bool), np.full(rewards.shape, 5, np.int32)


def _batch():
  """Groups of eight with unscorable completions, whose rewards are NaN."""
  rng = np.random.default_rng(0)
  rewards = rng.normal(size=(6, 8)).astype(np.float32)
  valid = rng.random((6, 8)) < 0.7
  valid[0], valid[1], valid[2] = True, False, np.arange(8) == 3
  return np.where(valid, rewards, np.nan), valid, np.full((6, 8), 5)


def _reference(rewards, valid, estimate):
  """`estimate(reward, scorable rewards of the group)`, one by one, float64."""
  out = np.zeros(rewards.shape)
  for p, g in np.argwhere(valid):
    group = rewards[p, valid[p]].astype(np.float64)
    if len(group) > 1:
      out[p, g] = estimate(float(rewards[p, g]), group)
  return out


ESTIMATES = {
  'group_norm': lambda r, group: (
    (r - group.mean()) / (group.std(ddof=1) + 1e-6)
  ),
  'group_mean': lambda r, group: r - group.mean(),
  'leave_one_out': lambda r, group: r - (group.sum() - r) / (len(group) - 1),
}


@pytest.mark.parametrize(
  ('successes', 'right', 'wrong'),
  [
    # Mean 1/8, deviation √(1/8) = .35355339: .875/.35355439, −.125/.35355439.
    (1, 2.47486673, -0.35355239),
    # Mean 1/2, deviation √(2/7) = .53452248: ±.5/.53452348.
    (4, 0.9354126, -0.9354126),
  ],
)
def test_group_norm_equals_grpo(successes, right, wrong):
  rewards = [1.0] * successes + [0.0] * (8 - successes)
  found = advantages.group_norm(*_group(*rewards))
  expected = [[right] * successes + [wrong] * (8 - successes)]
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_group_mean_equals_dr_grpo():
  one = advantages.group_mean(*_group(1, 0, 0, 0, 0, 0, 0, 0))
  np.testing.assert_array_equal(one, [[0.875] + [-0.125] * 7])
  half = advantages.group_mean(*_group(1, 0, 1, 0))
  np.testing.assert_array_equal(half, [[0.5, -0.5, 0.5, -0.5]])


def test_leave_one_out_equals_rloo():
  # 1 − (0 + 2)/2, 0 − (1 + 2)/2, 2 − (1 + 0)/2.
  found = advantages.leave_one_out(*_group(1, 0, 2))
  np.testing.assert_allclose(found, [[0.0, -1.5, 1.5]], rtol=1e-6)


def test_unscorable_completions_are_outside_mean_and_deviation():
  group = _group(1, np.nan, 0, 1, valid=[True, False, True, True])
  # Mean 2/3; deviation √((2/9 + 4/9) / 2) = .57735027.
  np.testing.assert_allclose(
    advantages.group_norm(*group),
    [[0.57734927, 0.0, -1.15469854, 0.57734927]],
    rtol=1e-6,
  )
  np.testing.assert_allclose(
    advantages.group_mean(*group), [[1 / 3, 0, -2 / 3, 1 / 3]], rtol=1e-6
  )
  # 1 − (0 + 1)/2, 0 − (1 + 1)/2.
  np.testing.assert_allclose(
    advantages.leave_one_out(*group), [[0.5, 0, -1.0, 0.5]], rtol=1e-6
  )


def test_menu_is_what_the_tests_know():
  assert set(advantages.ALL) == set(ESTIMATES)


@pytest.mark.parametrize('name', advantages.ALL)
def test_estimator_equals_its_definition(name):
  rewards, valid, lengths = _batch()
  found = advantages.ALL[name](rewards, valid, lengths)
  expected = _reference(rewards, valid, ESTIMATES[name])
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  # Control: scoring the unscorable as 0 gives another answer.
  naive = advantages.ALL[name](np.nan_to_num(rewards), valid | True, lengths)
  assert np.abs(naive - expected)[valid].max() > 0.1


@pytest.mark.parametrize('name', advantages.ALL)
def test_advantages_are_finite_float32_of_the_same_shape(name):
  rewards, valid, lengths = _batch()
  found = advantages.ALL[name](rewards, valid, lengths)
  assert found.dtype == np.float32
  assert found.shape == rewards.shape
  assert np.isfinite(found).all()
  assert not found[~valid].any()


@pytest.mark.parametrize('name', advantages.ALL)
@pytest.mark.parametrize('reward', [0.0, 0.1, 1 / 3, -0.7, 1e6, 1e-6])
@pytest.mark.parametrize('size', [2, 3, 7, 16])
def test_equal_rewards_have_exactly_no_advantage(name, reward, size):
  group = _group(*[reward] * size)
  assert not advantages.ALL[name](*group).any()
  some = _group(*[reward] * size, -5.0, valid=[True] * size + [False])
  assert not advantages.ALL[name](*some).any()


@pytest.mark.parametrize('name', advantages.ALL)
def test_groups_of_one_or_none_have_no_advantage(name):
  alone = _group(3.0)
  assert not advantages.ALL[name](*alone).any()
  one_valid = _group(3.0, 1.0, 2.0, valid=[False, True, False])
  assert not advantages.ALL[name](*one_valid).any()
  none_valid = _group(np.nan, np.nan, valid=[False, False])
  assert not advantages.ALL[name](*none_valid).any()


@pytest.mark.parametrize('name', advantages.ALL)
def test_groups_do_not_see_each_other(name):
  rewards, valid, lengths = _batch()
  whole = advantages.ALL[name](rewards, valid, lengths)
  apart = [
    advantages.ALL[name](rewards[[p]], valid[[p]], lengths[[p]])
    for p in range(len(rewards))
  ]
  np.testing.assert_array_equal(whole, np.concatenate(apart))


@pytest.mark.parametrize('name', advantages.ALL)
def test_inputs_are_left_alone(name):
  rewards, valid, lengths = _batch()
  before = rewards.copy(), valid.copy()
  advantages.ALL[name](rewards, valid, lengths)
  np.testing.assert_array_equal(rewards, before[0])
  np.testing.assert_array_equal(valid, before[1])
