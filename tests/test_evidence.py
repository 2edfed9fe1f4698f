"""What is read off a batch: ratios, covariances, and a summary of them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_rlvr.evidence import bounded, covariance, log_ratio, summary
from jax_rlvr.records import Tokens, TokenStats

summarised = jax.jit(summary)


def _batch(shape, seed=0):
  """Rows of one advantage each; entropies have ties, as real ones do."""
  rng = np.random.default_rng(seed)
  mask = rng.random(shape) < 0.7
  old = -rng.gamma(1.0, 1.0, shape).astype(np.float32)
  logprob = old + rng.normal(0, 0.2, shape).astype(np.float32)
  entropy = rng.gamma(0.3, 1.0, shape).astype(np.float32).round(2)
  advantage = np.repeat(rng.normal(size=(shape[0], 1)), shape[1], 1)
  tokens = Tokens(mask, advantage.astype(np.float32), old)
  return TokenStats(logprob, entropy), tokens


def _poisoned(stats, tokens):
  """The same batch with NaN wherever nothing may be read."""

  def poison(x):
    return np.where(tokens.mask, x, np.nan)

  return jax.tree.map(poison, stats), tokens._replace(
    advantage=poison(tokens.advantage), old_logprob=poison(tokens.old_logprob)
  )


def _row(logprob, old=0.0, advantage=0.0, mask=True):
  """A batch of one row from lists or scalars."""
  logprob = jnp.array([logprob])
  shape = logprob.shape
  old, advantage, mask = (
    jnp.broadcast_to(jnp.array([x]).reshape(1, -1), shape)
    for x in (old, advantage, mask)
  )
  return TokenStats(logprob, jnp.ones(shape)), Tokens(mask, advantage, old)


# log_ratio


def test_log_ratio_is_the_difference_held_to_twenty_nats():
  infinity = np.inf
  logprob = [-1.0, -1.0, -19.0, -21.0, -30.0, -infinity, -1.0, -infinity]
  old = [-1.5, -0.25, 1.0, -0.5, -0.5, -1.0, -infinity, -infinity]
  # The last is ∞ − ∞: neither knows the token.
  expected = [0.5, -0.75, -20.0, -20.0, -20.0, -20.0, 20.0, 0.0]
  found = log_ratio(*_row(logprob, old))
  np.testing.assert_array_equal(found, [expected])
  assert np.isfinite(jnp.exp(found)).all()


def test_log_ratio_is_zero_outside_the_mask_whatever_lies_there():
  stats, tokens = _batch((4, 8))
  expected = np.where(tokens.mask, stats.logprob - tokens.old_logprob, 0.0)
  for batch in ((stats, tokens), _poisoned(stats, tokens)):
    np.testing.assert_array_equal(log_ratio(*batch), expected)
  assert expected[tokens.mask].all()


def test_bounded_holds_to_twenty_and_makes_zero_of_nan():
  x = jnp.array([[3.0, -20.0, 20.5, -jnp.inf, jnp.inf, jnp.nan, 7.0, jnp.nan]])
  mask = jnp.array([[1, 1, 1, 1, 1, 1, 0, 0]], bool)
  np.testing.assert_array_equal(
    bounded(x, mask), [[3.0, -20.0, 20.0, -20.0, 20.0, 0.0, 0.0, 0.0]]
  )


# covariance


def test_covariance_equals_the_golden_numbers():
  stats = TokenStats(
    np.float32([[-0.8, -1.2, -0.6, -1.1], [-1.1, -0.9, -1.4, -0.7]])
  )
  tokens = Tokens(
    mask=np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool),
    advantage=np.float32([[1.5, -0.5, 2.0, 0.8], [0.5, 1.0, -1.5, 1.2]]),
    old_logprob=np.full((2, 4), -1.0, np.float32),
  )
  # Ā = .5428571429, ℓ̄ = −1.0142857143.
  expected = [
    [0.20510204, 0.19367347, 0.60367347, -0.02204082],
    [0.00367347, 0.0522449, 0.78795918, 0.0],
  ]
  np.testing.assert_allclose(covariance(stats, tokens), expected, atol=1e-6)


def _covariance_reference(logprob, advantage, mask):
  """Eq. 10, token by token, float64; 0 outside the mask."""
  places = np.argwhere(mask)
  mean_l = sum(float(logprob[b, t]) for b, t in places) / len(places)
  mean_a = sum(float(advantage[b, t]) for b, t in places) / len(places)
  cov = np.zeros(mask.shape)
  for b, t in places:
    cov[b, t] = (float(logprob[b, t]) - mean_l) * (
      float(advantage[b, t]) - mean_a
    )
  return cov


def test_covariance_equals_the_equation_whatever_lies_outside_the_mask():
  stats, tokens = _batch((4, 8))
  arguments = stats.logprob, tokens.advantage
  expected = _covariance_reference(*arguments, tokens.mask)
  for batch in ((stats, tokens), _poisoned(stats, tokens)):
    np.testing.assert_allclose(
      covariance(*batch), expected, rtol=1e-5, atol=1e-6
    )
  # Control: means over everything would not do.
  everything = _covariance_reference(*arguments, tokens.mask | True)
  assert np.abs(everything - expected)[tokens.mask].max() > 1e-2


def test_covariance_of_minus_infinity_leaves_the_others_finite():
  infinity = np.inf
  # ℓ̄ = −2 over the finite ones; Ā = (1 + 1 − 4 + 2)/4 = 0 over all.
  batch = _row([-1.0, -3.0, -infinity, -2.0], advantage=[1.0, 1.0, -4.0, 2.0])
  np.testing.assert_array_equal(
    covariance(*batch), [[1.0, -1.0, infinity, 0.0]]
  )
  # Where no advantage differs nothing covaries: 0, and not 0 · ∞.
  batch = _row([-1.0, -3.0, -infinity], advantage=0.5)
  np.testing.assert_array_equal(covariance(*batch), [[0.0, 0.0, 0.0]])


# summary

SHARES = 2e-4, 2e-3, 2e-2, 0.2, 0.5
PERCENTS = 1, 5, 25, 50, 75, 95, 99
NAMES = {
  *(f'covariance/p{percent:02}' for percent in PERCENTS),
  'ratio/max',
  'kl/old',
  'covariance/mean',
  'covariance/top_0.0002',
  'covariance/top_0.002',
  'covariance/top_0.02',
  'covariance/top_0.2',
  'covariance/top_0.5',
  'entropy/p50',
  'entropy/p80',
  'entropy/p95',
}


def test_summary_by_hand():
  # The third token is outside the mask.
  stats, tokens = _row(
    [-1.0, -3.0, -0.1],
    old=[-1.5, -2.0, -9.0],
    advantage=[1.0, -1.0, 5.0],
    mask=[True, True, False],
  )
  stats = stats._replace(entropy=np.float32([[1.0, 3.0, 99.0]]))
  found = summarised(stats, tokens)
  expected = {
    # x = .5, −1.
    'ratio/max': 1.6487213,  # e^.5
    # eˣ − 1 − x: .1487213 and .3678794.
    'kl/old': 0.2583003,
    # Deviations (1, 1) and (−1, −1): both 1. Each share is at least a token.
    'covariance/mean': 1.0,
    **{f'covariance/top_{share:g}': 1.0 for share in SHARES},
    **{f'covariance/p{percent:02}': 1.0 for percent in PERCENTS},
    # 1 + 2p.
    'entropy/p50': 2.0,
    'entropy/p80': 2.6,
    'entropy/p95': 2.9,
  }
  assert set(found) == set(expected) == NAMES
  for name, value in expected.items():
    assert float(found[name]) == pytest.approx(value, rel=1e-6), name


def test_summary_equals_a_sort_of_thousands_of_tokens():
  stats, tokens = _batch((64, 128))
  found = summarised(*_poisoned(stats, tokens))
  mask = tokens.mask
  assert mask.sum() > 5_000
  cov = _covariance_reference(stats.logprob, tokens.advantage, mask)
  ranked = np.sort(cov[mask])[::-1]
  x = (stats.logprob - tokens.old_logprob)[mask].astype(np.float64)
  expected = {
    'ratio/max': np.exp(x.max()),
    'kl/old': np.mean(np.exp(x) - 1 - x),
    'covariance/mean': ranked.mean(),
  }
  for share in SHARES:
    top = ranked[: max(int(share * mask.sum()), 1)]
    expected[f'covariance/top_{share:g}'] = top.mean()
  for percent in PERCENTS:
    expected[f'covariance/p{percent:02}'] = np.quantile(ranked, percent / 100)
  for percent in (50, 80, 95):
    expected[f'entropy/p{percent}'] = np.quantile(
      stats.entropy[mask], percent / 100
    )
  assert set(expected) == NAMES
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=2e-5, err_msg=name)
    assert found[name].shape == () and found[name].dtype == jnp.float32
  # Control: each share is another number, and so is each percentile.
  assert len({round(float(value), 3) for value in found.values()}) == 18


def test_summary_of_an_unmoved_policy_has_ratio_one_and_no_kl():
  stats, tokens = _batch((4, 8))
  found = summarised(stats, tokens._replace(old_logprob=stats.logprob))
  assert float(found['ratio/max']) == 1.0
  assert float(found['kl/old']) == 0.0


def test_summary_of_no_tokens_is_zeros():
  stats, tokens = _batch((4, 8))
  nothing = tokens._replace(mask=np.zeros((4, 8), bool))
  found = summarised(*_poisoned(stats, nothing))
  assert set(found) == NAMES
  assert {name: float(value) for name, value in found.items()} == (
    dict.fromkeys(NAMES, 0.0)
  )


def test_summary_skips_entropies_that_are_not_there():
  stats, tokens = _batch((4, 8))
  found = summarised(stats._replace(entropy=None), tokens)
  assert set(found) == {name for name in NAMES if 'entropy' not in name}
  whole = summarised(stats, tokens)
  for name, value in found.items():
    assert float(value) == pytest.approx(float(whole[name]), rel=1e-6), name


@pytest.mark.parametrize('kind', [AxisType.Explicit, AxisType.Auto])
def test_summary_on_eight_devices_equals_one_and_gathers_nothing(kind):
  batch = _batch((8, 64))
  expected = summarised(*batch)
  mesh = jax.make_mesh((8,), ('rows',), axis_types=(kind,))
  with jax.set_mesh(mesh):
    by_row = NamedSharding(mesh, PartitionSpec('rows'))
    placed = jax.tree.map(lambda x: jax.device_put(x, by_row), batch)
    assert len(placed[0].logprob.addressable_shards) == 8
    compiled = summarised.lower(*placed).compile()
    found = compiled(*placed)
  for name in NAMES:
    np.testing.assert_allclose(
      found[name], expected[name], rtol=1e-5, atol=1e-7, err_msg=name
    )
  # Nothing larger than a number for each share.
  text = compiled.as_text()
  for costly in ('all-gather', 'all-to-all', 'collective-permute', ' sort('):
    assert costly not in text, costly
  reduced = re.findall(r'= (\S+) all-reduce', text)
  sizes = {int(n or 1) for n in re.findall(r'\[(\d*)\]', ' '.join(reduced))}
  assert reduced and sizes <= {1, 3, 5, 7}


def test_summary_stays_finite_where_a_logprob_is_minus_infinity():
  stats = TokenStats(jnp.array([[-1.0, -jnp.inf, -2.0, -0.5]]))
  tokens = Tokens(
    jnp.ones((1, 4), bool),
    jnp.array([[1.0, -1.0, 0.5, -0.5]]),
    jnp.full((1, 4), -1.0),
  )
  for name, value in summary(stats, tokens).items():
    assert np.isfinite(value), name
