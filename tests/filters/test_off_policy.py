"""Corrections of an off-policy sampler: by hand, and as published."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_rlvr.filters import (
  clip_ratio,
  entropy_bonus,
  icepop,
  opsm,
  sequence_mask,
  sequence_mean_token_mean,
  tis,
  token_mean,
  tracked,
)
from jax_rlvr.policy_gradient import policy_gradient, token_gradients
from jax_rlvr.records import Tokens, TokenStats

MASK = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)


def _batch(gap, advantage=-1.0):
  """On policy at −1; old − sampled is the gap, advantage −1: gradients +1."""
  old = jnp.full(MASK.shape, -1.0)
  tokens = Tokens(
    jnp.array(MASK),
    jnp.broadcast_to(jnp.array(advantage, jnp.float32), MASK.shape),
    old,
    sampled_logprob=old - jnp.array(gap, jnp.float32),
  )
  return TokenStats(old, jnp.ones(MASK.shape)), tokens


def _weights(tx, gap, **kwargs):
  """What the filter multiplies both leaves by, and what it reports."""
  chain = optax.chain(entropy_bonus(1.0), tracked('it', tx))
  grads, (_, state) = token_gradients(chain, *_batch(gap, **kwargs))
  np.testing.assert_array_equal(grads.logprob, -grads.entropy)
  report = {name: float(x) for name, x in state.report.items()}
  return np.asarray(grads.logprob), report


# Ratios old / sampled; what lies outside the mask does not count.
RATIOS = np.array([[1.5, 4.0, 0.25, 9.0], [1.0, 0.5, 9.0, 9.0]])
GAP = np.log(RATIOS)


def test_tis_weighs_tokens_up_to_the_cap():
  weights, report = _weights(tis(2.0), GAP)
  expected = [[1.5, 2.0, 0.25, 0], [1.0, 0.5, 0, 0]]
  np.testing.assert_allclose(weights, expected, rtol=1e-6)
  # (1.5 + 2 + .25 + 1 + .5) / 5.
  assert report['it/weight'] == pytest.approx(1.05)


def test_tis_weighs_sequences_by_the_product_of_their_tokens():
  # 1.5 · 4 · .25 = 1.5 and 1 · .5.
  weights, report = _weights(tis(2.0, 'sequence'), GAP)
  expected = np.where(MASK, [[1.5], [0.5]], 0.0)
  np.testing.assert_allclose(weights, expected, rtol=1e-6)
  # (3 · 1.5 + 2 · .5) / 5.
  assert report['it/weight'] == pytest.approx(1.1)
  weights, _ = _weights(tis(1.2, 'sequence'), GAP)
  np.testing.assert_allclose(weights[0], [1.2, 1.2, 1.2, 0], rtol=1e-6)


def test_tis_without_a_cap_takes_the_ratio_to_the_sampler():
  # Current / old · old / sampled = current / sampled, whatever old is.
  stats, tokens = _batch(GAP)
  stats = stats._replace(logprob=stats.logprob - 0.3)
  grads, _ = token_gradients(tis(np.inf), stats, tokens)
  ratio = np.exp(stats.logprob - tokens.sampled_logprob)
  np.testing.assert_allclose(grads.logprob, np.where(MASK, ratio, 0), rtol=1e-6)


def test_icepop_drops_what_leaves_the_band():
  weights, report = _weights(icepop(0.4, 3.0), GAP)
  expected = [[1.5, 0, 0, 0], [1.0, 0.5, 0, 0]]
  np.testing.assert_allclose(weights, expected, rtol=1e-6)
  # (1.5 + 1 + .5) / 5: the dropped weigh nothing, and count.
  assert report['it/weight'] == pytest.approx(0.6)
  assert report['it/kept'] == pytest.approx(3 / 5)


def test_icepop_over_sequences_drops_whole_sequences():
  weights, _ = _weights(icepop(0.6, 2.0, 'sequence'), GAP)
  np.testing.assert_allclose(weights[0], [1.5, 1.5, 1.5, 0], rtol=1e-6)
  assert not weights[1].any()


def test_icepop_band_is_closed():
  gap = jnp.array(GAP, jnp.float32)
  low, high = map(float, jnp.exp(gap)[0, jnp.array([2, 1])])
  assert _weights(icepop(low, high), GAP)[0].astype(bool).sum() == 5
  tighter = np.nextafter(np.float32([low, high]), np.float32([1, 1]))
  weights, _ = _weights(icepop(*map(float, tighter)), GAP)
  np.testing.assert_array_equal(weights[0] != 0, [True, False, False, False])


def test_sequence_mask_drops_by_the_geometric_mean():
  # (1.5 · 4 · .25)^(1/3) = 1.1447, (1 · .5)^(1/2) = .7071.
  for band, rows in [
    ((0.7, 1.2), [1, 1]),
    ((0.8, 1.2), [1, 0]),
    ((0.7, 1.1), [0, 1]),
    ((0.999, 1.001), [0, 0]),
  ]:
    weights, report = _weights(sequence_mask(*band), GAP)
    np.testing.assert_array_equal(weights, MASK * np.transpose([rows]))
    # (3 · 1.1447 + 2 · .7071) / 5.
    assert report['it/ratio'] == pytest.approx(0.9696713)


def test_opsm_drops_bad_sequences_that_have_grown_unlikely():
  # On policy sampled − logprob is −gap: its means are −ln 1.5 / 3 = −.1352 and
  # ln 2 / 2 = .3466.
  for delta, advantage, rows in [
    (0.3, [[-1], [-1]], [1, 0]),
    (0.4, [[-1], [-1]], [1, 1]),
    (-0.2, [[-1], [-1]], [0, 0]),
    (-0.2, [[1], [-1]], [1, 0]),
    (-0.2, [[-1], [1]], [0, 1]),
  ]:
    stats, tokens = _batch(GAP, advantage)
    grads, _ = token_gradients(opsm(delta), stats, tokens)
    expected = -np.float32(advantage) * MASK * np.transpose([rows])
    np.testing.assert_array_equal(grads.logprob, expected)
  _, report = _weights(opsm(0.3), GAP)
  # (−ln 1.5 + ln 2) / 5.
  assert report['it/gap'] == pytest.approx(0.05753641)


def test_opsm_reads_the_current_policy():
  # The second sequence regains .1 nats a token: .3466 − .1 < .3.
  stats, tokens = _batch(GAP)
  stats = stats._replace(logprob=stats.logprob + 0.1)
  grads, _ = token_gradients(opsm(0.3), stats, tokens)
  np.testing.assert_array_equal(grads.logprob != 0, MASK)


FILTERS = {
  'tis': tis(),
  'tis sequence': tis(scope='sequence'),
  'icepop': icepop(),
  'icepop sequence': icepop(scope='sequence'),
  'sequence_mask': sequence_mask(),
  'opsm': opsm(),
}
each_filter = pytest.mark.parametrize('name', FILTERS)


@each_filter
def test_identity_where_the_sampler_is_the_policy(name):
  stats, tokens = _batch(np.zeros(MASK.shape))
  grads, _ = token_gradients(FILTERS[name], stats, tokens)
  jax.tree.map(
    np.testing.assert_array_equal, grads, policy_gradient(stats, tokens)
  )


@each_filter
def test_missing_sampled_logprobs_are_named(name):
  stats, tokens = _batch(GAP)
  what = f'{name.split()[0]} reads tokens.sampled_logprob'
  with pytest.raises(ValueError, match=what):
    token_gradients(FILTERS[name], stats, tokens._replace(sampled_logprob=None))


@pytest.mark.parametrize('factory', [tis, icepop])
def test_unknown_scope_is_refused(factory):
  with pytest.raises(ValueError, match="scope='group'.*'token' or 'sequence'"):
    factory(scope='group')


def test_what_is_dropped_stays_in_the_denominator():
  # Three of five tokens stay, each 1/5 of its weight; one of two sequences,
  # 1/2 · 1/3.
  chain = optax.chain(icepop(0.4, 3.0), token_mean())
  grads, _ = token_gradients(chain, *_batch(GAP))
  expected = [[0.3, 0, 0, 0], [0.2, 0.1, 0, 0]]
  np.testing.assert_allclose(grads.logprob, expected, rtol=1e-6)
  chain = optax.chain(sequence_mask(0.8, 1.2), sequence_mean_token_mean())
  grads, _ = token_gradients(chain, *_batch(GAP))
  expected = [[1 / 6, 1 / 6, 1 / 6, 0], [0, 0, 0, 0]]
  np.testing.assert_allclose(grads.logprob, expected, rtol=1e-6)


def test_products_over_long_sequences_stay_finite():
  # 50 nats a row are held to 20, as verl does.
  gap = np.full(MASK.shape, 17.0)
  for sign, expected in [(1, np.exp(20.0)), (-1, np.exp(-20.0))]:
    weights, _ = _weights(tis(np.inf, 'sequence'), sign * gap)
    np.testing.assert_allclose(weights, MASK * expected, rtol=1e-5)


# Reference


@functools.cache
def _random_batch():
  rng = np.random.default_rng(0)
  shape = 6, 8
  mask = rng.random(shape) < 0.7
  old, advantage = rng.normal(-2, 1, shape), rng.normal(size=(6, 1))
  arrays = (
    np.repeat(advantage, 8, 1),
    old,
    old + rng.normal(0, 0.4, shape),
    old + rng.normal(0, 0.2, shape),
  )
  advantage, old, sampled, logprob = map(jnp.float32, arrays)
  tokens = Tokens(jnp.array(mask), advantage, old, sampled_logprob=sampled)
  return TokenStats(logprob), tokens


def _ppo_loss(logprob, tokens, weight):
  """Mean of weight · PPO over tokens; the weight is of the rollout alone."""
  ratio = jnp.exp(logprob - tokens.old_logprob)
  gain = jnp.minimum(
    ratio * tokens.advantage, jnp.clip(ratio, 0.8, 1.2) * tokens.advantage
  )
  return -jnp.sum(weight * gain * tokens.mask) / jnp.sum(tokens.mask)


def _truncated(w, cap):
  return np.minimum(w, cap)


def _banded(w, lower, upper):
  return np.where((w >= lower) & (w <= upper), w, 0.0)


def _in_band(w, lower, upper):
  return np.float32((w >= lower) & (w <= upper))


@pytest.mark.parametrize(
  ('tx', 'reduce', 'weight', 'numbers'),
  [
    (tis(1.2), None, _truncated, (1.2,)),
    (tis(1.2, 'sequence'), 'product', _truncated, (1.2,)),
    (icepop(0.8, 1.3), None, _banded, (0.8, 1.3)),
    (icepop(0.5, 2.0, 'sequence'), 'product', _banded, (0.5, 2.0)),
    (sequence_mask(0.9, 1.1), 'mean', _in_band, (0.9, 1.1)),
  ],
)
def test_correction_equals_the_gradient_of_the_published_loss(
  tx, reduce, weight, numbers
):
  stats, tokens = _random_batch()
  mask = np.asarray(tokens.mask)
  gap = np.where(mask, tokens.old_logprob - tokens.sampled_logprob, 0.0)
  if reduce:
    gap = gap.sum(1, keepdims=True)
  if reduce == 'mean':
    gap = gap / mask.sum(1, keepdims=True)
  w = weight(np.exp(gap), *numbers) * np.ones(mask.shape)
  # Control: some tokens have another weight than their own ratio, some not 1.
  assert (w != np.exp(gap))[mask].any() and (w != 1)[mask].any() and w.any()
  expected = jax.grad(_ppo_loss)(stats.logprob, tokens, jnp.float32(w))
  chain = optax.chain(clip_ratio(), tx, token_mean())
  found, _ = token_gradients(chain, stats, tokens)
  np.testing.assert_allclose(found.logprob, expected, rtol=1e-5, atol=1e-7)
  plain = jax.grad(_ppo_loss)(stats.logprob, tokens, 1.0)
  assert np.abs(plain - expected).max() > 1e-3
