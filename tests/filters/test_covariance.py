"""Clip-Cov and KL-Cov: golden numbers, the paper's equations, its theory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_rlvr import advantages, masked
from jax_rlvr.evidence import covariance, log_ratio
from jax_rlvr.filters import (
  clip_cov,
  clip_ratio,
  entropy_bonus,
  kl_cov,
  token_mean,
  tracked,
)
from jax_rlvr.policy_gradient import as_loss, token_gradients
from jax_rlvr.records import Tokens, TokenStats

SHAPE = (4, 16)


@functools.partial(jax.jit, static_argnames=('penalty', 'at_least_one'))
def _kl_cov(
  stats, tokens, fraction, coef=1.0, penalty='abs', at_least_one=True
):
  """Token gradients of the paper's chain; its numbers are traced."""
  filters = optax.chain(
    entropy_bonus(1.0),
    kl_cov(fraction, coef, penalty, at_least_one),
    token_mean(),
  )
  return token_gradients(filters, stats, tokens)[0]


@functools.partial(jax.jit, static_argnames='at_least_one')
def _clip_cov(
  stats, tokens, key, fraction, lower, upper, ppo=np.inf, at_least_one=True
):
  """Token gradients after PPO's clip, Clip-Cov and the mean.

  A bonus marks the entropy leaf of every completion token, so that what is
  dropped shows also where the advantage is 0.
  """
  filters = optax.chain(
    clip_ratio(ppo, ppo),
    entropy_bonus(1.0),
    clip_cov(fraction, lower, upper, at_least_one),
    token_mean(),
  )
  return token_gradients(filters, stats, tokens, key=key)[0]


@jax.jit
def _plain(stats, tokens, ppo=np.inf):
  filters = optax.chain(clip_ratio(ppo, ppo), token_mean())
  return token_gradients(filters, stats, tokens)[0]


def _golden_a():
  """Input of the golden numbers; its last token is masked."""
  stats = TokenStats(
    jnp.array([[-0.8, -1.2, -0.6, -1.1], [-1.1, -0.9, -1.4, -0.7]]),
    jnp.ones((2, 4)),
  )
  tokens = Tokens(
    mask=jnp.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool),
    advantage=jnp.array([[1.5, -0.5, 2.0, 0.8], [0.5, 1.0, -1.5, 1.2]]),
    old_logprob=jnp.full((2, 4), -1.0),
  )
  return stats, tokens


def _batch(seed=0, spread=0.5):
  """Rows of one advantage each, the last of 0; about three quarters count."""
  rng = np.random.default_rng(seed)
  mask = rng.random(SHAPE) < 0.75
  old = -rng.gamma(1.0, 1.5, SHAPE).astype(np.float32)
  change = rng.normal(0, spread, SHAPE).astype(np.float32)
  serial = rng.permutation(64).astype(np.uint32).reshape(SHAPE)
  advantage = np.repeat(np.float32([[1.4], [-1.6], [-1.4], [0.0]]), 16, 1)
  stats = TokenStats(jnp.array(old + change), jnp.ones(SHAPE))
  return stats, Tokens(
    jnp.array(mask), jnp.array(advantage), jnp.array(old), jnp.array(serial)
  )


def _covariance_reference(logprob, advantage, mask):
  """Eq. 10, token by token, float64; −inf outside the mask."""
  logprob, advantage = np.float64(logprob), np.float64(advantage)
  places = np.argwhere(mask)
  mean_l = sum(logprob[b, t] for b, t in places) / len(places)
  mean_a = sum(advantage[b, t] for b, t in places) / len(places)
  cov = np.full(mask.shape, -np.inf)
  for b, t in places:
    cov[b, t] = (logprob[b, t] - mean_l) * (advantage[b, t] - mean_a)
  return cov


def test_covariance_equals_the_golden_numbers():
  cov = covariance(*_golden_a())
  expected = [
    [0.20510204, 0.19367347, 0.60367347, -0.02204082],
    [0.00367347, 0.0522449, 0.78795918, 0.0],
  ]
  np.testing.assert_allclose(cov, expected, atol=1e-6)


def test_means_equal_the_golden_numbers():
  stats, tokens = _golden_a()
  x = jnp.abs(log_ratio(stats, tokens))
  for found, expected in [
    (tokens.advantage, 0.5428571429),
    (stats.logprob, -1.0142857143),
    (x, 0.2142857140),
  ]:
    mean = masked.mean(found, tokens.mask)
    np.testing.assert_allclose(mean, expected, atol=1e-6)


def test_covariance_equals_the_equation_and_ignores_nan_outside_the_mask():
  stats, tokens = _batch()
  mask = np.asarray(tokens.mask)
  nan = jnp.where(tokens.mask, 0.0, jnp.nan)
  cov = covariance(
    TokenStats(stats.logprob + nan),
    tokens._replace(advantage=tokens.advantage + nan),
  )
  expected = _covariance_reference(stats.logprob, tokens.advantage, mask)
  np.testing.assert_allclose(
    cov, np.where(mask, expected, 0.0), rtol=1e-5, atol=1e-6
  )
  # Control: means over everything would not do.
  everything = _covariance_reference(
    stats.logprob, tokens.advantage, np.ones(SHAPE, bool)
  )
  assert np.abs(everything - expected)[mask].max() > 1e-2


# KL-Cov

PENALTIES = {
  'abs': abs,
  'k2': lambda x: x**2 / 2,
  'k3': lambda x: np.exp(x) - 1 - x,
}


def _kl_cov_loss(logprob, tokens, fraction, coef, penalty):
  """Eq. 13 and 14 with a floor of one, float64, mean over tokens."""
  mask, advantage, old = map(np.asarray, tokens[:3])
  cov = _covariance_reference(logprob, advantage, mask)
  count = int(mask.sum())
  chosen = np.argsort(-cov, axis=None)[: max(1, int(fraction * count))]
  total = 0.0
  for b, t in np.argwhere(mask):
    x = float(logprob[b, t]) - float(old[b, t])
    total += -np.exp(x) * float(advantage[b, t])
    if b * mask.shape[1] + t in chosen:
      total += coef * PENALTIES[penalty](x)
  return total / count


def _slope(loss, logprob, h=1e-6):
  """Central differences of a loss of float64 logprobs."""
  slope = np.zeros(logprob.shape)
  for place in np.ndindex(*logprob.shape):
    up, down = logprob.copy(), logprob.copy()
    up[place] += h
    down[place] -= h
    slope[place] = (loss(up) - loss(down)) / (2 * h)
  return slope


GOLDEN = {
  # (fraction, coef): loss, dL/dlogprob.
  (0.5, 1.0): (
    -0.6689096641,
    [
      [-0.11887202, 0.05848077, -0.28337849, -0.10340999],
      [-0.06463124, -0.15788156, 0.00078287, 0],
    ],
  ),
  (0.5, 0.1): (
    -0.7974810926,
    [
      [-0.24744345, 0.05848077, -0.41194991, -0.10340999],
      [-0.06463124, -0.15788156, 0.1293543, 0],
    ],
  ),
  # ⌊.2 · 7⌋ = 1, and ⌊1e-4 · 7⌋ = 0 is raised to one.
  (0.2, 1.0): (
    -0.7546239498,
    [
      [-0.26172916, 0.05848077, -0.42623563, -0.10340999],
      [-0.06463124, -0.15788156, 0.00078287, 0],
    ],
  ),
}
GOLDEN[1e-4, 1.0] = GOLDEN[0.2, 1.0]


@pytest.mark.parametrize(('fraction', 'coef'), GOLDEN)
def test_kl_cov_equals_the_golden_numbers(fraction, coef):
  stats, tokens = _golden_a()
  loss, expected = GOLDEN[fraction, coef]
  grads = _kl_cov(stats, tokens, fraction, coef)
  np.testing.assert_allclose(grads.logprob, expected, atol=1e-6)
  # The reference below has the golden value too.
  value = _kl_cov_loss(np.asarray(stats.logprob), tokens, fraction, coef, 'abs')
  assert value == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize('penalty', PENALTIES)
@pytest.mark.parametrize('fraction', [0.02, 0.3, 1.0])
def test_kl_cov_equals_the_slope_of_the_equation(penalty, fraction):
  stats, tokens = _batch(seed=3)
  grads = _kl_cov(stats, tokens, fraction, 0.7, penalty)
  expected = _slope(
    lambda x: _kl_cov_loss(x, tokens, fraction, 0.7, penalty),
    np.asarray(stats.logprob, np.float64),
  )
  np.testing.assert_allclose(grads.logprob, expected, rtol=1e-4, atol=1e-6)
  # Control: without the penalty the answer differs.
  plain = _plain(stats, tokens)
  assert np.abs(plain.logprob - expected).max() > 1e-4


@pytest.mark.parametrize('penalty', PENALTIES)
def test_kl_cov_on_policy_is_exactly_the_policy_gradient(penalty):
  # grad(jnp.abs)(0) is +1 in JAX: it would add β/N to every token here.
  stats, tokens = _golden_a()
  stats = stats._replace(logprob=tokens.old_logprob)
  grads = _kl_cov(stats, tokens, 1.0, 1.0, penalty)
  expected = np.where(tokens.mask, -np.asarray(tokens.advantage) / 7, 0.0)
  np.testing.assert_allclose(grads.logprob, expected, rtol=1e-6)
  plain = _plain(stats, tokens)
  np.testing.assert_array_equal(grads.logprob, plain.logprob)
  # The loss has the golden value: −mean A.
  value = _kl_cov_loss(stats.logprob, tokens, 0.5, 1.0, penalty)
  assert value == pytest.approx(-0.5428571429, abs=1e-6)


def test_kl_cov_penalties_by_hand():
  stats, tokens = _golden_a()
  # Two tokens without advantage; x = .5 and −1.
  mask = jnp.array([[1, 1, 0, 0], [0, 0, 0, 0]], bool)
  logprob = jnp.where(mask, jnp.array([[-0.5, -2.0, 0, 0]]), stats.logprob)
  stats = stats._replace(logprob=logprob)
  tokens = tokens._replace(mask=mask, advantage=jnp.zeros((2, 4)))
  for penalty, expected in [
    # Sign, x, eˣ − 1; times 2 over two tokens.
    ('abs', [1.0, -1.0]),
    ('k2', [0.5, -1.0]),
    ('k3', [0.6487213, -0.6321206]),
  ]:
    grads = _kl_cov(stats, tokens, 1.0, 2.0, penalty)
    np.testing.assert_allclose(grads.logprob[0, :2], expected, rtol=1e-6)


def test_kl_cov_leaves_the_entropy_leaf_alone():
  stats, tokens = _golden_a()
  grads = _kl_cov(stats, tokens, 0.5)
  expected = np.where(tokens.mask, -1 / 7, 0.0)
  np.testing.assert_allclose(grads.entropy, expected, rtol=1e-6)


def _penalised(stats, tokens, *args, **kwargs):
  grads = _kl_cov(stats, tokens, *args, **kwargs)
  return np.asarray(grads.logprob != _plain(stats, tokens).logprob)


def test_kl_cov_divides_ties_by_serial():
  # Equal advantages: every covariance is 0. ⌊.3 · 10⌋ = 3 lowest serials.
  shape = (2, 5)
  serial = jnp.array([[9, 0, 8, 7, 6], [5, 1, 4, 3, 2]], jnp.uint32)
  tokens = Tokens(
    jnp.ones(shape, bool), jnp.ones(shape), jnp.zeros(shape), serial
  )
  stats = TokenStats(jnp.full(shape, -0.1), jnp.ones(shape))
  np.testing.assert_array_equal(
    _penalised(stats, tokens, 0.3), [[0, 1, 0, 0, 0], [0, 1, 0, 0, 1]]
  )


def test_kl_cov_floor_of_one_applies_where_asked_and_fraction_is_positive():
  batch = _golden_a()
  assert _penalised(*batch, 1e-4).sum() == 1
  assert _penalised(*batch, 0.0).sum() == 0
  assert _penalised(*batch, 1e-4, at_least_one=False).sum() == 0
  assert _penalised(*batch, 0.3, at_least_one=False).sum() == 2


def test_kl_cov_refuses_an_unknown_penalty():
  with pytest.raises(ValueError, match="penalty='k4'.*'abs', 'k2', 'k3'"):
    kl_cov(penalty='k4')


# Clip-Cov


def _clip_cov_reference(stats, tokens, low, high, lower, upper):
  """Candidates as the authors find them, float64 token by token."""
  mask, advantage, old = map(np.asarray, tokens[:3])
  logprob = np.asarray(stats.logprob)
  cov = _covariance_reference(logprob, advantage, mask)
  candidates = np.zeros(mask.shape, bool)
  for b, t in np.argwhere(mask):
    a = float(advantage[b, t])
    ratio = np.exp(float(logprob[b, t]) - float(old[b, t]))
    clipped = min(max(ratio, 1 - low), 1 + high)
    by_ppo = -a * clipped > -a * ratio
    candidates[b, t] = lower < cov[b, t] < upper and not by_ppo
  return candidates


@pytest.mark.parametrize(
  ('fraction', 'lower', 'upper'),
  [
    (2e-4, 0.3, 5.0),  # the floor of one
    (0.1, 0.3, 5.0),
    (0.15, 0.5, 2.0),
    (0.9, 0.3, 5.0),  # more than the band holds
    (0.1, 50.0, 90.0),  # an empty band
    (0.4, -1.0, 5.0),  # a band around 0, where masked tokens would be
  ],
)
def test_clip_cov_draws_its_exact_number_from_the_candidates(
  fraction, lower, upper
):
  stats, tokens = _batch(seed=2)
  count = int(tokens.mask.sum())
  plain = np.asarray(_plain(stats, tokens, 0.5).logprob)
  candidates = _clip_cov_reference(stats, tokens, 0.5, 0.5, lower, upper)
  expected = min(max(int(fraction * count), 1), int(candidates.sum()))
  for seed in range(5):
    key = jax.random.key(seed)
    grads = _clip_cov(stats, tokens, key, fraction, lower, upper, 0.5)
    dropped = np.asarray((grads.entropy == 0) & tokens.mask)
    assert dropped.sum() == expected
    assert not (dropped & ~candidates).any()
    # The rest is untouched, and of the dropped nothing is left.
    logprob = np.asarray(grads.logprob)
    np.testing.assert_allclose(
      logprob, np.where(dropped, 0.0, plain), rtol=1e-6
    )
    assert (logprob[~dropped] == 0).sum() == (plain[~dropped] == 0).sum()


def test_the_batch_of_clip_cov_holds_every_kind_of_token():
  # Control of the test above: each rule excludes or admits some token.
  stats, tokens = _batch(seed=2)
  candidates = _clip_cov_reference(stats, tokens, 0.5, 0.5, 0.3, 5.0)
  unclipped = _clip_cov_reference(stats, tokens, np.inf, np.inf, 0.3, 5.0)
  everywhere = tokens._replace(mask=jnp.ones(SHAPE, bool))
  unmasked = _clip_cov_reference(stats, everywhere, 0.5, 0.5, 0.3, 5.0)
  cov = _covariance_reference(stats.logprob, tokens.advantage, tokens.mask)
  assert (unclipped & ~candidates).any()
  assert (unmasked & ~np.asarray(tokens.mask)).any()
  assert (candidates & np.asarray(tokens.advantage == 0)).any()
  assert (cov > 2.0).any() and (cov < -0.3).any()


@pytest.mark.parametrize('fraction', [0.05, 0.99])
def test_clip_cov_takes_zero_advantage_tokens_into_the_draw(fraction):
  # Only the row of zero advantage is in the band: nothing else is silenced.
  advantage = jnp.array([[1.0, 1.0], [0.0, 0.0]])
  logprob = jnp.array([[-0.5, -0.5], [-4.5, -0.5]])
  tokens = Tokens(jnp.ones((2, 2), bool), advantage, logprob)
  stats = TokenStats(logprob, jnp.ones((2, 2)))
  # ℓ̄ = −1.5, Ā = .5: cov is .5 .5 / 1.5 −.5.
  np.testing.assert_allclose(
    covariance(stats, tokens), [[0.5, 0.5], [1.5, -0.5]]
  )
  grads = _clip_cov(stats, tokens, jax.random.key(0), fraction, 1.0, 5.0)
  # Over the four tokens of the batch.
  np.testing.assert_array_equal(grads.entropy, [[-0.25, -0.25], [0, -0.25]])
  np.testing.assert_array_equal(grads.logprob, [[-0.25, -0.25], [0, 0]])


def test_clip_cov_leaves_the_denominator_alone():
  # Four tokens, of which the rare token of the bad response is dropped.
  logprob = jnp.array([[-1.0, -1.0], [-5.0, -1.0]])
  advantage = jnp.array([[1.0, 1.0], [-1.0, -1.0]])
  tokens = Tokens(jnp.ones((2, 2), bool), advantage, logprob)
  stats = TokenStats(logprob, jnp.ones((2, 2)))
  # ℓ̄ = −2, Ā = 0: cov is 1 1 / 3 −1, and 1 is not inside the open band.
  grads = _clip_cov(stats, tokens, jax.random.key(0), 2e-4, 1.0, 5.0)
  np.testing.assert_array_equal(grads.logprob, [[-0.25, -0.25], [0, 0.25]])


def test_clip_cov_band_is_open():
  # Deviations ±1 of both: every covariance is exactly 1.
  logprob = jnp.array([[-1.0, -3.0], [-1.0, -3.0]])
  advantage = jnp.array([[1.0, -1.0], [1.0, -1.0]])
  tokens = Tokens(jnp.ones((2, 2), bool), advantage, logprob)
  stats = TokenStats(logprob, jnp.ones((2, 2)))
  for lower, upper, dropped in [
    (1.0, 5.0, 0), (0.0, 1.0, 0), (0.999, 5.0, 4), (0.0, 1.001, 4),
  ]:  # fmt: skip
    key = jax.random.key(0)
    grads = _clip_cov(stats, tokens, key, 1.0, lower, upper)
    assert int(jnp.sum(grads.entropy == 0)) == dropped


def test_clip_cov_draws_every_candidate_equally_often():
  stats, tokens = _batch(seed=2)
  candidates = _clip_cov_reference(stats, tokens, 0.5, 0.5, 0.5, 5.0)
  keys = jax.random.split(jax.random.key(1), 400)
  draw = jax.vmap(lambda k: _clip_cov(stats, tokens, k, 0.05, 0.5, 5.0, 0.5))
  times = np.asarray(jnp.sum(draw(keys).entropy == 0, axis=0))[candidates]
  drawn = int(0.05 * int(tokens.mask.sum()))
  mean = 400 * drawn / candidates.sum()
  assert drawn == 2 and candidates.sum() >= 5
  # Five standard deviations of a binomial.
  assert np.abs(times - mean).max() < 5 * np.sqrt(mean)
  assert times.sum() == 400 * drawn


def test_clip_cov_draw_belongs_to_the_key_and_the_serial():
  stats, tokens = _batch(seed=2)

  def draw(seed, shift=0):
    its_tokens = tokens._replace(serial=tokens.serial + jnp.uint32(shift))
    key = jax.random.key(seed)
    return _clip_cov(stats, its_tokens, key, 0.1, 0.3, 5.0, 0.5).entropy

  np.testing.assert_array_equal(draw(0), draw(0))
  assert (draw(1) != draw(0)).any()
  assert (draw(0, 64) != draw(0)).any()


def test_clip_cov_floor_of_one_applies_where_asked_and_fraction_is_positive():
  stats, tokens = _batch(seed=2)
  for fraction, at_least_one, expected in [
    (1e-4, True, 1), (1e-4, False, 0), (0.0, True, 0), (0.0, False, 0),
  ]:  # fmt: skip
    grads = _clip_cov(
      stats, tokens, jax.random.key(0), fraction, 0.3, 5.0, 0.5,
      at_least_one=at_least_one,
    )  # fmt: skip
    assert int(jnp.sum((grads.entropy == 0) & tokens.mask)) == expected


def test_clip_cov_needs_a_key():
  with pytest.raises(ValueError, match='pass key='):
    token_gradients(clip_cov(), *_batch())


# Reports, and tokens that cannot be


@functools.partial(jax.jit, static_argnames='factory')
def _watched(factory, stats, tokens, *numbers):
  """Token gradients of the filter alone, and what it reports."""
  chain = optax.chain(entropy_bonus(1.0), tracked('it', factory(*numbers)))
  grads, state = token_gradients(chain, stats, tokens, key=jax.random.key(0))
  return grads, state[1].report


def _report(*args):
  _, report = _watched(*args)
  return {name: float(report[f'it/{name}']) for name in REPORTED}


REPORTED = 'selected', 'below_mean', 'probability'


def test_kl_cov_reports_who_was_selected():
  # ⌊.5 · 7⌋ = 3 of covariance .788, .604, .205: advantages −1.5, 2, 1.5
  # against a mean of .54, and (e^−1.4 + e^−.6 + e^−.8) / 3.
  found = _report(kl_cov, *_golden_a(), 0.5)
  expected = {'selected': 3 / 7, 'below_mean': 1 / 3, 'probability': 0.4149125}
  assert found == pytest.approx(expected)


def test_clip_cov_reports_who_was_selected():
  # One token is in the band: e^−1.4.
  found = _report(clip_cov, *_golden_a(), 0.5, 0.7, 0.8)
  expected = {'selected': 1 / 7, 'below_mean': 1.0, 'probability': 0.2465970}
  assert found == pytest.approx(expected)
  # Two are: A = .5 < .54 and 1, (e^−1.1 + e^−.9) / 2.
  found = _report(clip_cov, *_golden_a(), 0.5, 0.001, 0.1)
  expected = {'selected': 2 / 7, 'below_mean': 1 / 2, 'probability': 0.3697204}
  assert found == pytest.approx(expected)


@pytest.mark.parametrize(
  ('factory', 'numbers'), [(kl_cov, (0.0,)), (clip_cov, (0.5, 7.0, 8.0))]
)
def test_nobody_selected_is_reported_as_zero(factory, numbers):
  assert _report(factory, *_golden_a(), *numbers) == dict.fromkeys(REPORTED, 0)


IMPOSSIBLE = {
  'good': ([[-1, -1, -1, -np.inf], [-5, -2, -1, -1]], (0, 3)),
  'bad': ([[-1, -1, -1, -1], [-5, -2, -1, -np.inf]], (1, 3)),
}


def _impossible(response):
  """A token of logprob −inf in the good, or the bad, of two responses."""
  logprob, place = IMPOSSIBLE[response]
  logprob = jnp.array(logprob, jnp.float32)
  tokens = Tokens(
    jnp.ones((2, 4), bool),
    jnp.array([[1.0] * 4, [-1.0] * 4]),
    # Each log ratio is .5, so that a penalty shows.
    jnp.where(jnp.isfinite(logprob), logprob - 0.5, -1.0),
  )
  return TokenStats(logprob, jnp.ones((2, 4))), tokens, place


@pytest.mark.parametrize('response', IMPOSSIBLE)
def test_a_logprob_of_minus_infinity_is_outside_the_means(response):
  stats, tokens, place = _impossible(response)
  # Seven finite ones: ℓ̄ = −12/7 and Ā = 0.
  expected = (np.array(stats.logprob) + 12 / 7) * tokens.advantage
  cov = covariance(stats, tokens)
  np.testing.assert_allclose(cov, expected, rtol=1e-6)
  # It is as unlikely as can be: −∞ · 1 or −∞ · −1.
  assert cov[place] == (-np.inf if response == 'good' else np.inf)


@pytest.mark.parametrize('response', IMPOSSIBLE)
def test_clip_cov_keeps_its_band_beside_a_logprob_of_minus_infinity(response):
  # Covariances .71, and 3.29, .29, −.71: only the first of the bad response
  # is between 1 and 5.
  stats, tokens, _ = _impossible(response)
  grads, report = _watched(clip_cov, stats, tokens, 1.0, 1.0, 5.0)
  dropped = np.asarray(grads.entropy == 0)
  np.testing.assert_array_equal(np.argwhere(dropped), [[1, 0]])
  # One of eight, e^−5.
  assert float(report['it/selected']) == pytest.approx(1 / 8)
  assert float(report['it/probability']) == pytest.approx(0.0067379, rel=1e-4)


def test_kl_cov_chooses_beside_a_logprob_of_minus_infinity():
  # ⌊.25 · 8⌋ = 2: 3.29 and the first of the .71.
  stats, tokens, _ = _impossible('good')
  grads, _ = _watched(kl_cov, stats, tokens, 0.25)
  plain, _ = _watched(kl_cov, stats, tokens, 0.0)
  pulled = np.asarray(grads.logprob - plain.logprob)
  expected = [[1.0, 0, 0, 0], [1.0, 0, 0, 0]]
  np.testing.assert_allclose(pulled, expected, rtol=1e-6)


@pytest.mark.parametrize('response', IMPOSSIBLE)
def test_kl_cov_of_a_logprob_of_minus_infinity_is_finite(response):
  stats, tokens, place = _impossible(response)
  grads, report = _watched(kl_cov, stats, tokens, 1.0)
  assert np.isfinite(grads.logprob).all()
  # Its chain has no other gradient there; the pull is never more than coef.
  assert abs(float(grads.logprob[place])) <= 1.0
  # What cannot be has probability 0.
  p = np.exp(np.asarray(stats.logprob)).mean()
  assert float(report['it/probability']) == pytest.approx(p)


# Theory


def test_at_low_entropy_the_band_holds_rare_tokens_of_bad_responses_only():
  # One success of eight; tokens mostly sure, a few very rare ones everywhere.
  rng = np.random.default_rng(4)
  shape = (8, 64)
  probability = np.where(rng.random(shape) < 0.05, 0.005, 0.95)
  logprob = jnp.array(np.log(probability), jnp.float32)
  rewards = np.float32([[1, 0, 0, 0, 0, 0, 0, 0]])
  advantage = advantages.group_norm(rewards, rewards == rewards, None)
  advantage = np.repeat(advantage.reshape(8, 1), 64, 1)
  tokens = Tokens(jnp.ones(shape, bool), jnp.array(advantage), logprob)
  stats = TokenStats(logprob, jnp.ones(shape))
  grads, report = _watched(clip_cov, stats, tokens, 1.0, 1.0, 5.0)
  dropped = np.asarray(grads.logprob == 0)
  assert float(-jnp.mean(logprob)) < 0.4
  assert dropped.sum() > 5
  assert (advantage[dropped] < 0).all()
  assert (probability[dropped] < 0.01).all()
  # It says so.
  assert float(report['it/below_mean']) == 1.0
  assert float(report['it/probability']) == pytest.approx(0.005)
  # Control: rare tokens of the success exist, and are not in the band.
  assert ((probability < 0.01) & (advantage > 0)).any()


def _entropy(logits):
  logits = logits - logits.max()
  p = np.exp(logits) / np.exp(logits).sum()
  return -np.sum(p * np.log(p))


def _weighted_covariance(p, x, y):
  return np.sum(p * (x - np.sum(p * x)) * (y - np.sum(p * y)))


def _tabular():
  """One state, four actions; the golden logits and centred advantages."""
  z = np.array([1.0, 0.5, -0.2, -1.0])
  p = np.exp(z) / np.exp(z).sum()
  a = np.array([1.0, -0.5, 0.3, -1.2])
  return z, p, a - np.sum(p * a)


def test_entropy_after_a_policy_gradient_step_follows_the_covariance():
  z, p, a = _tabular()
  # The expectation over actions: each action once, weighed by its probability.
  tokens = Tokens(
    jnp.ones((1, 4), bool), jnp.array([p * a], jnp.float32),
    jnp.array([np.log(p)], jnp.float32),
  )  # fmt: skip
  loss = as_loss(optax.identity())
  grads, _ = jax.grad(
    lambda z: loss(TokenStats(jax.nn.log_softmax(z)[None], None), tokens),
    has_aux=True,
  )(jnp.array(z, jnp.float32))
  slope = _weighted_covariance(p, np.log(p), p * a)
  assert _entropy(z) == pytest.approx(1.17227618, abs=1e-8)
  assert slope == pytest.approx(0.0894233558, abs=1e-9)
  # Gradient ascent on the expected advantage, in float64.
  step = -np.asarray(grads, np.float64)
  errors = []
  for eta in (1e-1, 1e-2, 1e-3):
    change = _entropy(z + eta * step) - _entropy(z)
    errors.append(abs(change / (-eta * slope) - 1))
  assert change == pytest.approx(-8.946066e-5, rel=1e-6)
  # First order: ten times smaller steps, ten times smaller errors.
  assert errors[0] == pytest.approx(10 * errors[1], rel=0.1)
  assert errors[1] == pytest.approx(10 * errors[2], rel=0.1)
  assert errors[2] < 1e-3


def test_entropy_after_a_natural_gradient_step_follows_the_covariance():
  z, p, a = _tabular()
  slope = _weighted_covariance(p, np.log(p), a)
  assert slope == pytest.approx(0.3201119198, abs=1e-9)
  errors = []
  for eta in (1e-1, 1e-2, 1e-3):
    change = _entropy(z + eta * a) - _entropy(z)
    errors.append(abs(change / (-eta * slope) - 1))
  assert change == pytest.approx(-3.203354e-4, rel=1e-6)
  assert errors[0] == pytest.approx(10 * errors[1], rel=0.1)
  assert errors[1] == pytest.approx(10 * errors[2], rel=0.1)


def test_mean_token_covariance_predicts_the_entropy_change():
  # Eight tokens as often as their probabilities 1/2, 1/4, 1/8, 1/8 say, so
  # that the mean over the batch is the expectation under the policy.
  actions = np.array([[0, 0, 0, 0, 1, 1, 2, 3]])
  p = np.array([1 / 2, 1 / 4, 1 / 8, 1 / 8])
  for a in ([1.0, -0.5, 0.3, -1.2], [-1.0, 0.2, 0.7, 2.0]):
    a = np.array(a)
    tokens = Tokens(
      jnp.ones((1, 8), bool), jnp.array(a[actions], jnp.float32), None
    )
    stats = TokenStats(jnp.array(np.log(p[actions]), jnp.float32), None)
    slope = float(jnp.mean(covariance(stats, tokens)))
    eta = 1e-4
    change = _entropy(np.log(p) + eta * a) - _entropy(np.log(p))
    assert abs(slope) > 0.1
    assert change == pytest.approx(-eta * slope, rel=2e-3)
