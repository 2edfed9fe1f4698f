"""PPO's clip against numbers by hand and its own definition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_rlvr.filters import clip_ratio, entropy_bonus, token_mean
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
