"""Advantage estimators against numbers by hand and their definitions."""

import itertools

import numpy as np
import pytest

from jax_rlvr import advantages


def _group(*rewards, valid=None, lengths=None):
  rewards = np.array([rewards], np.float32)
  valid = np.ones(rewards.shape, bool) if valid is None else np.array([valid])
  lengths = np.full(rewards.shape, 5) if lengths is None else [lengths]
  return rewards, valid.astype(bool), np.array(lengths, np.int32)


def _batch(seed=0):
  """Groups of eight with unscorable completions, whose rewards are NaN."""
  rng = np.random.default_rng(seed)
  rewards = rng.normal(size=(6, 8)).astype(np.float32)
  valid = rng.random((6, 8)) < 0.7
  valid[0], valid[1], valid[2] = True, False, np.arange(8) == 3
  # A tie for the best, and a group that solves everything.
  rewards[4, :2], valid[4, :2] = 3.0, True
  rewards[5] = 1.0
  lengths = rng.integers(1, 40, (6, 8)).astype(np.int32)
  return np.where(valid, rewards, np.nan), valid, lengths


# The published definitions, float64, one completion at a time. These three
# take the scorable completions of one group: which one, rewards, lengths.


def _group_norm(i, rewards, lengths):
  # verl's grpo: (R − mean) / (torch.std + 1e-6), and torch.std is unbiased.
  del lengths
  return (rewards[i] - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)


def _length_weighted(i, rewards, lengths):
  # OPO: R − Σ length · R / Σ length.
  return rewards[i] - (lengths * rewards).sum() / lengths.sum()


def _pass_at_k(i, rewards, lengths, k=None):
  # max over a subset of k − the same without this one, over all subsets.
  del lengths
  n = len(rewards)
  others = [j for j in range(n) if j != i]
  added = [
    max(0.0, rewards[i] - rewards[list(rest)].max())
    for rest in itertools.combinations(others, min(k or n, n) - 1)
  ]
  return np.mean(added) / (rewards.std(ddof=1) + 1e-6)


OF_GROUP = {
  'group_norm': _group_norm,
  'group_mean': lambda i, r, n: r[i] - r.mean(),
  'leave_one_out': lambda i, r, n: r[i] - np.delete(r, i).mean(),
  'length_weighted': _length_weighted,
  'pass_at_k': _pass_at_k,
}


def _each_group(rewards, valid, lengths, estimate):
  """Groups one by one; 0 where fewer than two can be scored."""
  out = np.zeros(rewards.shape)
  for p, scorable in enumerate(valid):
    places = np.flatnonzero(scorable)
    its_rewards = rewards[p, places].astype(np.float64)
    for i, g in enumerate(places if len(places) > 1 else ()):
      out[p, g] = estimate(i, its_rewards, lengths[p, places])
  return out


# These take the whole batch.


def _whitened(x, counted, lengths):
  """verl's masked_whiten of every token: each x stands at all of its tokens."""
  places = np.argwhere(counted)
  tokens = [x[p, g] for p, g in places for _ in range(lengths[p, g])]
  mean = sum(tokens) / len(tokens)
  variance = sum((a - mean) ** 2 for a in tokens) / (len(tokens) - 1)
  out = np.zeros(x.shape)
  for p, g in places:
    out[p, g] = (x[p, g] - mean) / np.sqrt(variance + 1e-8)
  return out


def _batch_norm(rewards, valid, lengths):
  return _whitened(rewards.astype(np.float64), valid, lengths)


def _group_mean_batch_norm(rewards, valid, lengths):
  centred = _each_group(rewards, valid, lengths, OF_GROUP['group_mean'])
  compared = valid & (valid.sum(1)[:, None] > 1)
  return _whitened(centred, compared, lengths)


def _group_mean_batch_std(rewards, valid, lengths):
  # TRL's scale_rewards="batch": group mean, rewards.std() of the batch + 1e-4.
  scorable = [float(rewards[p, g]) for p, g in np.argwhere(valid)]
  centred = _each_group(rewards, valid, lengths, OF_GROUP['group_mean'])
  return centred / (np.std(scorable, ddof=1) + 1e-4)


OF_BATCH = {
  'batch_norm': _batch_norm,
  'group_mean_batch_norm': _group_mean_batch_norm,
  'group_mean_batch_std': _group_mean_batch_std,
}
ESTIMATES = OF_BATCH | {
  name: lambda *batch, estimate=estimate: _each_group(*batch, estimate)
  for name, estimate in OF_GROUP.items()
}
# Those that weigh a completion by its length.
OF_LENGTHS = 'length_weighted', 'batch_norm', 'group_mean_batch_norm'

each_estimator = pytest.mark.parametrize('name', advantages.ALL)


# Numbers by hand


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


def test_length_weighted_equals_opo():
  # Baseline (10·1 + 20·0 + 70·0)/100 = .1.
  found = advantages.length_weighted(*_group(1, 0, 0, lengths=[10, 20, 70]))
  np.testing.assert_allclose(found, [[0.9, -0.1, -0.1]], rtol=1e-6)
  # Baseline (70·1)/100 = .7.
  found = advantages.length_weighted(*_group(0, 0, 1, lengths=[10, 20, 70]))
  np.testing.assert_allclose(found, [[-0.7, -0.7, 0.3]], rtol=1e-6)


# Two prompts; the second is solved by both of its completions. Eight tokens.
TWO_PROMPTS = (
  np.float32([[1, 0], [1, 1]]),
  np.ones((2, 2), bool),
  np.int32([[1, 2], [3, 2]]),
)


def test_batch_norm_equals_reinforce_plus_plus():
  # Tokens 1 00 111 11: mean 6/8, variance (6/16 + 2·9/16)/7 = 3/14, deviation
  # .46291005: .25/.46291005, −.75/.46291005.
  found = advantages.batch_norm(*TWO_PROMPTS)
  right, wrong = 0.54006172, -1.62018517
  np.testing.assert_allclose(found, [[right, wrong], [right, right]], rtol=1e-6)


def test_group_mean_batch_norm_equals_reinforce_plus_plus_baseline():
  # Tokens .5, −.5 −.5, 0 ×5: mean −1/16, variance (3/4 − 8/256)/7 = 23/224,
  # deviation .32043497: .5625/d, −.4375/d, and .0625/d for the solved prompt,
  # whose completions verl does not leave at 0 either.
  found = advantages.group_mean_batch_norm(*TWO_PROMPTS)
  solved = 0.19504738
  np.testing.assert_allclose(
    found, [[1.75542638, -1.36533163], [solved, solved]], rtol=1e-6
  )


def test_whitening_adds_eps_to_the_variance():
  # As above, variance 3/14 + 1/28 = 1/4: .25/.5 and −.75/.5.
  found = advantages.batch_norm(*TWO_PROMPTS, eps=1 / 28)
  np.testing.assert_allclose(found, [[0.5, -1.5], [0.5, 0.5]], rtol=1e-6)
  # 23/224 + 33/224 = 1/4.
  found = advantages.group_mean_batch_norm(*TWO_PROMPTS, eps=33 / 224)
  expected = [[1.125, -0.875], [0.125, 0.125]]
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_group_mean_batch_std_equals_lite_ppo():
  # Rewards 1 0 1 1: variance (3/16 + 9/16)/3 = 1/4. ±.5/(.5 + 1e-4).
  found = advantages.group_mean_batch_std(*TWO_PROMPTS)
  np.testing.assert_allclose(
    found, [[0.99980004, -0.99980004], [0, 0]], rtol=1e-6
  )


def test_pass_at_k_by_hand():
  # Pairs 3 1, 3 0, 1 0 add 2 and 3 to 3, nothing and 1 to 1: means 5/2, 1/2.
  # Deviation √((25 + 1 + 16)/9/2) = √(7/3) = 1.52752523.
  three = _group(3, 1, 0)
  found = advantages.pass_at_k(*three, k=2)
  np.testing.assert_allclose(found, [[1.63663314, 0.32732663, 0]], rtol=1e-6)
  # All three at once: only 3, by 3 − 1.
  found = advantages.pass_at_k(*three)
  np.testing.assert_allclose(found, [[1.30930651, 0, 0]], rtol=1e-6)
  # Two of eight right, k = 4: of the C(7, 3) = 35 choices of the three others
  # C(6, 3) = 20 hold no right one. (4/7)/(√(3/14) + 1e-6).
  found = advantages.pass_at_k(*_group(1, 0, 0, 1, 0, 0, 0, 0), k=4)
  expected = [[1.23442413, 0, 0, 1.23442413, 0, 0, 0, 0]]
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_unscorable_completions_are_outside_mean_and_deviation():
  group = _group(
    1, np.nan, 0, 1, valid=[True, False, True, True], lengths=[4, 9, 1, 3]
  )
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
  # Baseline (4 + 3)/8 = 7/8.
  np.testing.assert_allclose(
    advantages.length_weighted(*group), [[0.125, 0, -0.875, 0.125]], rtol=1e-6
  )
  # Tokens 1 ×7, 0: mean 7/8, deviation √((7/64 + 49/64)/7) = .35355339.
  np.testing.assert_allclose(
    advantages.batch_norm(*group),
    [[0.35355337, 0, -2.47487359, 0.35355337]],
    rtol=1e-6,
  )
  # (1/3)/(.57735027 + 1e-4).
  np.testing.assert_allclose(
    advantages.group_mean_batch_std(*group),
    [[0.57725028, 0, -1.15450057, 0.57725028]],
    rtol=1e-6,
  )
  # Pairs: 1 adds 1 to 0 and nothing to 1. (1/2)/(.57735027 + 1e-6).
  np.testing.assert_allclose(
    advantages.pass_at_k(*group, k=2),
    [[0.8660239, 0, 0, 0.8660239]],
    rtol=1e-6,
  )


# Definitions


def test_menu_is_what_the_tests_know():
  assert set(advantages.ALL) == set(ESTIMATES)


@pytest.mark.parametrize('seed', range(3))
@each_estimator
def test_estimator_equals_its_definition(name, seed):
  rewards, valid, lengths = _batch(seed)
  found = advantages.ALL[name](rewards, valid, lengths)
  expected = ESTIMATES[name](rewards, valid, lengths)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  # Control: scoring the unscorable as 0 gives another answer.
  naive = advantages.ALL[name](np.nan_to_num(rewards), valid | True, lengths)
  assert np.abs(naive - expected)[valid].max() > 0.03


@each_estimator
def test_lengths_count_only_where_the_definition_weighs_by_them(name):
  rewards, valid, lengths = _batch()
  found = advantages.ALL[name](rewards, valid, lengths)
  blind = advantages.ALL[name](rewards, valid, np.ones_like(lengths))
  if name in OF_LENGTHS:
    assert np.abs(found - blind)[valid].max() > 0.01
    # Equal lengths are as good as none, but for the count in the variance.
    equal = advantages.ALL[name](rewards, valid, np.full_like(lengths, 1000))
    n = valid.sum()
    slack = 0 if name == 'length_weighted' else 1 / n
    np.testing.assert_allclose(equal, blind, rtol=1e-6 + slack, atol=1e-6)
  else:
    np.testing.assert_array_equal(found, blind)


@pytest.mark.parametrize('k', [None, 2, 3, 4, 5, 6, 7, 8, 50])
@pytest.mark.parametrize('seed', range(3))
def test_pass_at_k_equals_every_subset(k, seed):
  # Real rewards with ties; two to seven of eight are valid, k may be more.
  rng = np.random.default_rng(seed)
  rewards = np.round(rng.normal(size=(6, 8)), 1).astype(np.float32)
  rewards[:, 3] = rewards[:, 5]
  valid = rng.permuted(np.arange(8) < np.arange(2, 8)[:, None], axis=1)
  found = advantages.pass_at_k(rewards, valid, None, k=k)
  expected = _each_group(
    rewards,
    valid,
    np.ones((6, 8)),
    lambda i, r, n: _pass_at_k(i, r, n, k),
  )
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  if k and k < 5:
    # Control: the whole group is another number.
    whole = advantages.pass_at_k(rewards, valid, None)
    assert np.abs(whole - expected).max() > 0.1


def test_pass_at_k_of_the_group_equals_verls_grpo_passk():
  rewards, valid, lengths = _batch()
  expected = np.zeros(rewards.shape)
  for p in range(len(rewards)):
    if valid[p].sum() > 1:
      group = rewards[p, valid[p]].astype(np.float64)
      second, best = np.sort(group)[-2:]
      its_place = np.nanargmax(rewards[p])
      expected[p, its_place] = (best - second) / (group.std(ddof=1) + 1e-6)
  found = advantages.pass_at_k(rewards, valid, lengths)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  assert (found != 0).sum(1).max() == 1
  # Two are best in group 4: neither adds anything.
  assert valid[4, :2].all() and not found[4].any()


def test_pass_at_k_survives_large_groups():
  # C(1023, 511) is about 2¹⁰¹⁹: beyond int64, within float64.
  rewards = np.arange(1024.0)[None]
  found = advantages.pass_at_k(rewards, rewards >= 0, None, k=512)
  assert np.isfinite(found).all() and found[0, -1] > 0


@pytest.mark.parametrize('k', [1, 0, -2])
def test_pass_at_k_refuses_fewer_than_two(k):
  with pytest.raises(ValueError, match=f'k={k} must be 2 or more completions'):
    advantages.pass_at_k(*_group(1, 0), k=k)


@pytest.mark.parametrize('name', ['group_norm', 'pass_at_k', *OF_BATCH])
def test_eps_bounds_what_is_divided_by(name):
  # A reward apart by 1e-6: with an eps of 1 hardly anything is left.
  group = _group(1e-6, 0, 0)
  plain = advantages.ALL[name](*group, eps=1e-30)
  held = advantages.ALL[name](*group, eps=1.0)
  assert np.abs(plain).max() > 0.5
  assert 0 < np.abs(held).max() < 2e-6


# What all promise


@each_estimator
def test_advantages_are_finite_float32_of_the_same_shape(name):
  rewards, valid, lengths = _batch()
  for dtype in (np.float32, np.float64):
    found = advantages.ALL[name](rewards.astype(dtype), valid, lengths)
    assert found.dtype == np.float32
    assert found.shape == rewards.shape
    assert np.isfinite(found).all()
    assert not found[~valid].any()
    assert found.any()


@each_estimator
def test_integer_rewards_are_numbers_too(name):
  rewards, valid, lengths = _group(1, 0, 0, 3, lengths=[1, 2, 3, 4])
  expected = advantages.ALL[name](rewards, valid, lengths)
  found = advantages.ALL[name](rewards.astype(int), valid, lengths)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


@each_estimator
@pytest.mark.parametrize('reward', [0.0, 0.1, 1 / 3, -0.7, 1e6, 1e-6])
@pytest.mark.parametrize('size', [2, 3, 7, 16])
def test_equal_rewards_have_exactly_no_advantage(name, reward, size):
  lengths = np.arange(1, size + 1)
  group = _group(*[reward] * size, lengths=lengths)
  assert not advantages.ALL[name](*group).any()
  # In float64 the mean of three rewards of .1 is not .1.
  exact = np.full((1, size), reward)
  assert not advantages.ALL[name](exact, *group[1:]).any()
  some = _group(
    *[reward] * size,
    -5.0,
    valid=[True] * size + [False],
    lengths=[*lengths, 7],
  )
  assert not advantages.ALL[name](*some).any()


@pytest.mark.parametrize('name', sorted(set(advantages.ALL) - {'batch_norm'}))
def test_groups_apart_but_equal_within_have_exactly_no_advantage(name):
  rewards = np.float32([[0.1, 0.1, 0.1], [1 / 3, 1 / 3, 1 / 3]])
  valid, lengths = rewards > 0, np.int32([[1, 2, 3], [9, 8, 7]])
  assert not advantages.ALL[name](rewards, valid, lengths).any()
  # Control: without groups they are apart.
  assert advantages.batch_norm(rewards, valid, lengths).all()


@each_estimator
def test_groups_of_one_or_none_have_no_advantage(name):
  alone = _group(3.0)
  assert not advantages.ALL[name](*alone).any()
  one_valid = _group(3.0, 1.0, 2.0, valid=[False, True, False])
  assert not advantages.ALL[name](*one_valid).any()
  none_valid = _group(np.nan, np.nan, valid=[False, False])
  assert not advantages.ALL[name](*none_valid).any()
  # Nor beside a group that has one.
  rewards, valid, lengths = _batch()
  found = advantages.ALL[name](rewards, valid, lengths)
  assert not found[1].any()
  assert valid[2].sum() == 1 and found[2].any() == (name == 'batch_norm')


@each_estimator
def test_order_of_completions_and_prompts_does_not_matter(name):
  rewards, valid, lengths = _batch()
  rng = np.random.default_rng(1)
  p, g = rng.permutation(6), rng.permutation(8)
  found = advantages.ALL[name](*(x[p][:, g] for x in (rewards, valid, lengths)))
  expected = advantages.ALL[name](rewards, valid, lengths)[p][:, g]
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def _apart(name, rewards, valid, lengths):
  return np.concatenate(
    [
      advantages.ALL[name](rewards[[p]], valid[[p]], lengths[[p]])
      for p in range(len(rewards))
    ]
  )


@pytest.mark.parametrize('name', OF_GROUP)
def test_groups_do_not_see_each_other(name):
  batch = _batch()
  whole = advantages.ALL[name](*batch)
  np.testing.assert_array_equal(whole, _apart(name, *batch))


@pytest.mark.parametrize('name', OF_BATCH)
def test_estimators_of_the_batch_do_see_other_groups(name):
  batch = _batch()
  whole = advantages.ALL[name](*batch)
  assert np.abs(whole - _apart(name, *batch)).max() > 0.1


@each_estimator
def test_inputs_are_left_alone(name):
  inputs = _batch()
  before = [x.copy() for x in inputs]
  advantages.ALL[name](*inputs)
  for now, then in zip(inputs, before, strict=True):
    np.testing.assert_array_equal(now, then)
