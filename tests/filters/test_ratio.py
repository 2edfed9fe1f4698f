"""PPO's clip and the heads: by hand, and against their published losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_rlvr.filters import (
  cispo,
  clip_ratio,
  entropy_bonus,
  gmpo,
  gspo,
  sequence_mean_token_mean,
  token_mean,
)
from jax_rlvr.policy_gradient import policy_gradient, token_gradients
from jax_rlvr.records import Tokens, TokenStats


def _row(log_ratios, advantages):
  """One row of tokens with old_logprob 0: logprob is the log ratio."""
  x = jnp.array([log_ratios], jnp.float32)
  tokens = Tokens(
    mask=jnp.ones(x.shape, bool),
    advantage=jnp.array([advantages], jnp.float32),
    old_logprob=jnp.zeros(x.shape),
  )
  return TokenStats(x, jnp.ones(x.shape)), tokens


def _kept(filters, stats, tokens):
  grads, _ = token_gradients(filters, stats, tokens)
  return (np.asarray(grads.logprob[0]) != 0).tolist()


def _golden_a():
  stats = TokenStats(
    jnp.array([[-0.8, -1.2, -0.6, -1.1], [-1.1, -0.9, -1.4, -0.7]]), None
  )
  tokens = Tokens(
    mask=jnp.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool),
    advantage=jnp.array([[1.5, -0.5, 2.0, 0.8], [0.5, 1.0, -1.5, 1.2]]),
    old_logprob=jnp.full((2, 4), -1.0),
  )
  return stats, tokens


def test_clip_ratio_equals_vanilla_ppo():
  # Golden numbers of verl's vanilla loss at ε = .2.
  filters = optax.chain(clip_ratio(0.2, 0.2), token_mean())
  grads, _ = token_gradients(filters, *_golden_a())
  expected = [[0, 0.05848077, 0, -0.10340999], [-0.06463124, -0.15788156, 0, 0]]
  np.testing.assert_allclose(grads.logprob, expected, atol=1e-6)
  # The reference below has the golden value too.
  stats, tokens = _golden_a()
  x, advantage = stats.logprob - tokens.old_logprob, tokens.advantage
  losses = [
    _dual_clip_loss(float(x[place]), float(advantage[place]), 0.2, 0.2, None)
    for place in np.ndindex(2, 4)
    if tokens.mask[place]
  ]
  assert np.mean(losses) == pytest.approx(-0.6960134550, abs=1e-6)


def test_clip_ratio_drops_only_where_the_surrogate_is_flat():
  # Ratios 1.3, .7 for each sign of the advantage.
  x = np.log([1.3, 0.7, 1.3, 0.7]).tolist()
  kept = _kept(clip_ratio(0.2, 0.2), *_row(x, [1, 1, -1, -1]))
  assert kept == [False, True, True, False]


def test_clip_ratio_takes_low_before_high():
  x = np.log([1.15, 1.25, 0.95, 0.85]).tolist()
  kept = _kept(clip_ratio(0.1, 0.2), *_row(x, [1, 1, -1, -1]))
  assert kept == [True, False, True, False]


def test_ratio_exactly_at_the_bound_keeps_its_gradient():
  x = np.array([0.5, -0.5, 0.5, -0.5], np.float32)
  ratio = np.asarray(jnp.exp(jnp.array([x])))[0].astype(np.float64)
  # In float64 1 + high is the ratio itself, to the last bit.
  high, low = float(ratio[0] - 1.0), float(1.0 - ratio[1])
  stats, tokens = _row(x, [1, -1, 1, -1])
  assert _kept(clip_ratio(low, high), stats, tokens) == [True] * 4
  tighter_high = float(np.nextafter(np.float32(ratio[0]), np.float32(0))) - 1
  tighter_low = 1 - float(np.nextafter(np.float32(ratio[1]), np.float32(1)))
  kept = _kept(clip_ratio(tighter_low, tighter_high), stats, tokens)
  assert kept == [False] * 4
  # On policy a clip of width 0 keeps everything.
  on_policy = _row([0.0, 0.0], [1, -1])
  assert _kept(clip_ratio(0.0, 0.0), *on_policy) == [True, True]


def test_dual_clip_drops_large_ratios_of_negative_advantage_only():
  x = np.log([2.9, 3.1, 2.9, 3.1]).tolist()
  stats, tokens = _row(x, [-1, -1, 1, 1])
  wide = clip_ratio(0.2, 10.0)
  assert _kept(wide, stats, tokens) == [True] * 4
  dual = clip_ratio(0.2, 10.0, dual=3.0)
  assert _kept(dual, stats, tokens) == [True, False, True, True]


def _dual_clip_loss(x, advantage, low, high, dual):
  """Ye et al., as verl writes it: one token, float64."""
  ratio = np.exp(x)
  clipped = min(max(ratio, 1 - low), 1 + high)
  loss = max(-advantage * ratio, -advantage * clipped)
  if dual is not None and advantage < 0:
    loss = min(loss, -advantage * dual)
  return loss


@pytest.mark.parametrize(
  ('low', 'high', 'dual'),
  [(0.2, 0.2, None), (0.2, 0.28, 3.0), (1.0, 1.0, None), (0.1, 0.5, 1.2)],
)
def test_clip_ratio_equals_the_slope_of_the_published_loss(low, high, dual):
  rng = np.random.default_rng(0)
  x = rng.normal(0, 0.7, 200).astype(np.float32)
  advantage = rng.normal(size=200).astype(np.float32)
  stats, tokens = _row(x, advantage)
  grads, _ = token_gradients(clip_ratio(low, high, dual), stats, tokens)
  h = 1e-6
  slope = [
    _dual_clip_loss(float(a) + h, float(b), low, high, dual)
    - _dual_clip_loss(float(a) - h, float(b), low, high, dual)
    for a, b in zip(x, advantage, strict=True)
  ]
  np.testing.assert_allclose(
    grads.logprob[0], np.array(slope) / (2 * h), rtol=1e-5, atol=1e-6
  )
  # Control: without the clip many slopes differ.
  raw = policy_gradient(stats, tokens).logprob
  assert int(jnp.sum(raw != grads.logprob)) > 5


def test_clip_ratio_silences_the_entropy_written_before_it_only():
  stats, tokens = _row(np.log([1.5, 1.0]).tolist(), [1, 1])
  before = optax.chain(entropy_bonus(0.5), clip_ratio())
  after = optax.chain(clip_ratio(), entropy_bonus(0.5))
  grads, _ = token_gradients(before, stats, tokens)
  np.testing.assert_array_equal(grads.entropy, [[0.0, -0.5]])
  grads, _ = token_gradients(after, stats, tokens)
  np.testing.assert_array_equal(grads.entropy, [[-0.5, -0.5]])


def test_zero_advantage_is_never_clipped():
  stats, tokens = _row([5.0, -5.0], [0, 0])
  filters = optax.chain(entropy_bonus(1.0), clip_ratio())
  grads, _ = token_gradients(filters, stats, tokens)
  np.testing.assert_array_equal(grads.entropy, [[-1.0, -1.0]])


def test_infinite_bounds_keep_every_ratio():
  stats, tokens = _row([19.0, -19.0, 19.0, -19.0], [1, 1, -1, -1])
  grads, _ = token_gradients(clip_ratio(np.inf, np.inf), stats, tokens)
  jax.tree.map(
    np.testing.assert_array_equal, grads, policy_gradient(stats, tokens)
  )


# Heads


def _rows(log_ratios, advantages, mask):
  """Rows of tokens with old_logprob −1."""
  x = jnp.array(log_ratios, jnp.float32)
  advantage = jnp.broadcast_to(jnp.array(advantages, jnp.float32), x.shape)
  tokens = Tokens(jnp.array(mask, bool), advantage, jnp.full(x.shape, -1.0))
  return TokenStats(x - 1.0, jnp.ones(x.shape)), tokens


@functools.cache
def _batch():
  """Six rows of one advantage each, the fourth without any token."""
  rng = np.random.default_rng(0)
  mask = rng.random((6, 8)) < 0.7
  mask[3] = False
  advantage = np.float32([[1.2], [-0.7], [0.4], [1.0], [-1.5], [0.0]])
  # Both signs have moved either way.
  x = rng.normal(0, 0.5, (6, 8)) + np.array([[-0.5, 0, 0.5, 0, 0.5, 0]]).T
  return _rows(x, advantage, mask)


each_head = pytest.mark.parametrize(
  'head',
  [gspo(), gmpo(), cispo(0.1, 0.1)],
  ids=['gspo', 'gmpo', 'cispo'],
)


@each_head
def test_heads_on_policy_are_the_policy_gradient(head):
  stats, tokens = _batch()
  stats = stats._replace(logprob=tokens.old_logprob)
  grads, _ = token_gradients(head, stats, tokens)
  jax.tree.map(
    np.testing.assert_array_equal, grads, policy_gradient(stats, tokens)
  )
  # −A, and nothing outside the mask.
  expected = np.where(tokens.mask, -np.asarray(tokens.advantage), 0.0)
  np.testing.assert_array_equal(grads.logprob, expected)


@each_head
def test_heads_overwrite_both_leaves_of_what_has_come(head):
  stats, tokens = _batch()
  alone, _ = token_gradients(head, stats, tokens)
  late = optax.chain(entropy_bonus(0.5), optax.scale(3.0), head)
  grads, _ = token_gradients(late, stats, tokens)
  jax.tree.map(np.testing.assert_array_equal, grads, alone)
  assert alone.logprob.any() and not alone.entropy.any()
  # Control: off policy they are not the policy gradient.
  plain = policy_gradient(stats, tokens).logprob
  assert jnp.abs(alone.logprob - plain).max() > 0.01


@each_head
def test_heads_give_nothing_to_a_logprob_of_minus_infinity(head):
  stats, tokens = _batch()
  spoiled = tokens.mask & (jnp.arange(8) == 1)[None]
  logprob = jnp.where(spoiled, -jnp.inf, stats.logprob)
  grads, _ = token_gradients(head, stats._replace(logprob=logprob), tokens)
  assert np.isfinite(grads.logprob).all() and grads.logprob.any()
  assert spoiled.any() and not grads.logprob[:, 1].any()


# GSPO


def test_gspo_clips_and_weighs_whole_sequences():
  x = [[0.1, 0.3, 9], [0.1, 0.5, 9], [-0.1, -0.3, 9], [-0.1, -0.5, 9]]
  mask = [[1, 1, 0]] * 4
  # Means .2, .3, −.2, −.3 without the masked 9; against ln 1.3 = .262 and
  # ln .8 = −.223.
  s = np.exp([[0.2], [0.3], [-0.2], [-0.3]])
  for advantage, kept in [(1.0, [1, 0, 1, 1]), (-2.0, [1, 1, 1, 0])]:
    stats, tokens = _rows(x, advantage, mask)
    grads, _ = token_gradients(gspo(0.2, 0.3), stats, tokens)
    expected = -advantage * s * np.transpose([kept]) * np.array(mask)
    np.testing.assert_allclose(grads.logprob, expected, rtol=1e-6)
  # Control: PPO's clip drops the token of ratio e^.3 = 1.35 in the first row,
  # and no other there.
  stats, tokens = _rows(x, 1.0, mask)
  grads, _ = token_gradients(clip_ratio(0.2, 0.3), stats, tokens)
  np.testing.assert_array_equal(grads.logprob[0] != 0, [True, False, False])


def _objective(logprob, tokens, gains):
  """−mean of gains over the rows that exist; old_logprob −1 throughout."""
  length = jnp.sum(tokens.mask, 1)
  x = jnp.where(tokens.mask, logprob + 1.0, 0.0)
  gain = gains(x, tokens.advantage[:, 0], jnp.maximum(length, 1))
  return -jnp.sum(jnp.where(length > 0, gain, 0.0)) / jnp.sum(length > 0)


def _gspo_gains(low, high, x, advantage, length):
  s = jnp.exp(jnp.sum(x, 1) / length)
  clipped = jnp.clip(s, 1 - low, 1 + high)
  return jnp.minimum(s * advantage, clipped * advantage)


def _gmpo_gains(low, high, x, advantage, length):
  # As verl's geo_mean: the worse of both, in log space.
  sign = jnp.sign(advantage)[:, None]
  held = sign * jnp.minimum(sign * x, sign * jnp.clip(x, -low, high))
  return advantage * jnp.exp(jnp.sum(held, 1) / length)


@pytest.mark.parametrize(
  ('head', 'gains', 'low', 'high'),
  [
    (gspo, _gspo_gains, 0.05, 0.1),
    (gspo, _gspo_gains, 3e-4, 4e-4),
    (gmpo, _gmpo_gains, 0.4, 0.4),
    (gmpo, _gmpo_gains, 0.1, 0.6),
  ],
)
def test_head_equals_the_gradient_of_the_published_loss(head, gains, low, high):
  stats, tokens = _batch()
  chain = optax.chain(head(low, high), sequence_mean_token_mean())
  found, _ = token_gradients(chain, stats, tokens)
  expected = jax.grad(_objective)(
    stats.logprob, tokens, functools.partial(gains, low, high)
  )
  np.testing.assert_allclose(found.logprob, expected, rtol=1e-5, atol=1e-7)
  np.testing.assert_array_equal(found.logprob == 0, expected == 0)
  # Controls: some tokens are silent, others not; PPO's clip says otherwise.
  alive = np.asarray(tokens.mask & (tokens.advantage != 0))
  silent = np.asarray(found.logprob == 0)
  assert silent[alive].any() and not silent[alive].all()
  ppo = optax.chain(clip_ratio(low, high), sequence_mean_token_mean())
  grads, _ = token_gradients(ppo, stats, tokens)
  assert np.abs(grads.logprob - expected).max() > 1e-2


# GMPO


def test_gmpo_holds_log_ratios_where_they_help():
  # Advantage 1: 1.0 is held to .4, −.5 is not: e^((.4 − .5 + .4) / 3) = e^.1.
  # The last, at the bound, is not held either.
  for x, advantage, mean, kept in [
    ([1.0, -0.5, 0.4], 1.0, 0.1, [0, 1, 1]),
    # −(.4) holds −1: e^((.6 − .4 − .4) / 3).
    ([0.6, -1.0, -0.4], -2.0, -0.2 / 3, [1, 0, 1]),
  ]:
    # Of old 0, so that .4 is .4 to the last bit.
    stats, tokens = _row(x, [advantage] * 3)
    grads, _ = token_gradients(gmpo(0.4, 0.4), stats, tokens)
    expected = -advantage * np.exp(mean) * np.array([kept])
    np.testing.assert_allclose(grads.logprob, expected, rtol=1e-6)


# CISPO


def test_cispo_weighs_by_the_clipped_ratio_and_silences_nobody():
  # Ratios .01, .5, 1, 4, 6.
  x = np.log([0.01, 0.5, 1.0, 4.0, 6.0]).tolist()
  for low, high, weight in [
    # Distances: 1 + 4 = 5 is what TRL calls epsilon_high = 5.
    (1.0, 4.0, [0.01, 0.5, 1.0, 4.0, 5.0]),
    (0.2, 0.3, [0.8, 0.8, 1.0, 1.3, 1.3]),
  ]:
    for advantage in (1.0, -2.0):
      stats, tokens = _row(x, [advantage] * 5)
      grads, _ = token_gradients(cispo(low, high), stats, tokens)
      expected = [-advantage * np.array(weight)]
      np.testing.assert_allclose(grads.logprob, expected, rtol=1e-5)
  # Control: under PPO's clip the upper two fall silent.
  kept = _kept(clip_ratio(1.0, 0.3), *_row(x, [1.0] * 5))
  assert kept == [True, True, True, False, False]


@pytest.mark.parametrize(('low', 'high'), [(1.0, 0.5), (0.2, 0.3)])
def test_cispo_equals_the_gradient_of_the_published_loss(low, high):
  stats, tokens = _batch()

  def loss(logprob, stop=jax.lax.stop_gradient):
    weight = stop(jnp.clip(jnp.exp(logprob + 1.0), 1 - low, 1 + high))
    gain = weight * tokens.advantage * logprob
    return -jnp.sum(jnp.where(tokens.mask, gain, 0.0)) / jnp.sum(tokens.mask)

  chain = optax.chain(cispo(low, high), token_mean())
  found, _ = token_gradients(chain, stats, tokens)
  expected = jax.grad(loss)(stats.logprob)
  np.testing.assert_allclose(found.logprob, expected, rtol=1e-5, atol=1e-7)
  # Controls: neither the ratio as it is, nor a weight that is differentiated.
  plain, _ = token_gradients(token_mean(), stats, tokens)
  differentiated = jax.grad(loss)(stats.logprob, lambda x: x)
  for other in (plain.logprob, differentiated):
    assert np.abs(other - expected).max() > 1e-2
