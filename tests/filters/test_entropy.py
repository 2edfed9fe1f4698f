"""Forking tokens and the entropy bonus."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_rlvr import masked
from jax_rlvr.filters import (
  clip_ratio,
  entropy_bonus,
  forking_tokens,
  token_mean,
)
from jax_rlvr.policy_gradient import policy_gradient, token_gradients
from jax_rlvr.records import Tokens, TokenStats


@functools.partial(jax.jit, static_argnames=('keep', 'rescale'))
def _forking(stats, tokens, fraction, keep='top', rescale=True):
  """Token gradients before aggregation; the fraction is traced."""
  filters = forking_tokens(fraction, keep, rescale)
  return token_gradients(filters, stats, tokens)[0]


def _with_entropy(entropy, mask):
  """On policy with advantage −1: every token gradient is +1."""
  entropy, mask = jnp.array(entropy, jnp.float32), jnp.array(mask, bool)
  zeros = jnp.zeros(entropy.shape)
  return TokenStats(zeros, entropy), Tokens(mask, zeros - 1.0, zeros)


def _kept(entropy, mask, fraction, **kwargs):
  grads = _forking(*_with_entropy(entropy, mask), fraction, **kwargs)
  return np.asarray(grads.logprob != 0).astype(int).tolist()


def _batch(seed=0):
  rng = np.random.default_rng(seed)
  shape = (5, 11)
  mask = rng.random(shape) < 0.7
  old = rng.normal(-1, 0.5, shape).astype(np.float32)
  stats = TokenStats(
    jnp.array(old + rng.normal(0, 0.3, shape).astype(np.float32)),
    jnp.array(rng.gamma(0.5, 1.0, shape).astype(np.float32)),
  )
  advantage = np.repeat(rng.normal(size=(5, 1)), 11, 1).astype(np.float32)
  return stats, Tokens(jnp.array(mask), jnp.array(advantage), jnp.array(old))


# The mask cases of TRL; its threshold is 1 − fraction.
E = [[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.7, 0.8, 0.9, 1.0, 1.1, 1.2]]
E1 = [[0.1, 0.2, 0.3, 1.4, 0.5, 0.14], [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]]
VALID = [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
VALID1 = [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]]
NONE = [[0] * 6, [0] * 6]


@pytest.mark.parametrize(
  ('entropy', 'mask', 'fraction', 'kept'),
  [
    (E, VALID, 0.2, [[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0]]),
    (E1, VALID1, 0.2, [[0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0]]),
    (E, VALID, 0.5, [[0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 0, 0]]),
    (E, VALID, 1.0, VALID),
    (E, VALID, 0.0, [[0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]]),
    (E, NONE, 0.2, NONE),
  ],
)
@pytest.mark.parametrize('rescale', [True, False])
def test_forking_tokens_keeps_what_trl_keeps(
  entropy, mask, fraction, kept, rescale
):
  assert _kept(entropy, mask, fraction, rescale=rescale) == kept


def test_forking_tokens_keeps_the_exact_number_among_ties():
  # 10 distinct entropies and 90 zeros, as a collapsed policy has.
  rng = np.random.default_rng(0)
  entropy = rng.permutation(np.r_[np.linspace(0.1, 1.0, 10), np.zeros(90)])
  entropy = entropy.reshape(4, 25).astype(np.float32)
  mask = np.ones((4, 25), bool)
  kept = np.array(_kept(entropy, mask, 0.2), bool)
  assert kept.sum() == 20
  assert kept[entropy > 0].all()
  # The ten zeros are the first: serials are places here.
  first = np.flatnonzero(entropy.ravel() == 0)[:10]
  assert kept.ravel()[first].all()
  # Control: the quantile rule would keep everything.
  threshold = masked.quantile(jnp.array(entropy), jnp.array(mask), 0.8)
  assert int(np.sum(entropy >= threshold)) == 100


def test_forking_tokens_count_is_rounded_up():
  # ⌈.2 · 6⌉ = 2, ⌈.2 · 5⌉ = 1, and ⌈.3 · 50⌉ = 15, not 16.
  for fraction, n, expected in [(0.2, 6, 2), (0.2, 5, 1), (0.3, 50, 15)]:
    entropy = np.arange(50)[None] / 10
    mask = np.arange(50)[None] < n
    kept = np.array(_kept(entropy, mask, fraction))
    assert kept.sum() == expected
    assert kept[0, n - expected : n].all()


def test_bottom_keeps_the_lowest_entropies():
  for fraction, kept in [
    (0.2, [[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]),
    (0.8, [[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]),
  ]:
    assert _kept(E, VALID, fraction, keep='bottom') == kept


def test_both_denominators_by_hand():
  # 10 tokens, 2 kept. Version 2 divides by 2, version 1 by 10.
  batch = _with_entropy(E, VALID)
  where = np.array([[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0]])
  for rescale, weight in [(True, 1 / 2), (False, 1 / 10)]:
    filters = optax.chain(forking_tokens(0.2, 'top', rescale), token_mean())
    grads, _ = token_gradients(filters, *batch)
    np.testing.assert_allclose(grads.logprob, where * weight, rtol=1e-6)


def _forking_reference(stats, tokens, fraction, low, high, selected_only):
  """Eq. 6 of either version, as gradients by a float64 loop over tokens."""
  mask, advantage, old = map(np.asarray, tokens[:3])
  logprob, entropy = map(np.asarray, stats)
  entropies = sorted(entropy[mask], reverse=True)
  count = len(entropies)
  selected = max(1, int(np.ceil(fraction * count - 1e-9)))
  threshold = entropies[selected - 1]
  grads = np.zeros(mask.shape)
  for b, t in np.argwhere(mask):
    if entropy[b, t] < threshold:
      continue
    a = float(advantage[b, t])
    ratio = np.exp(float(logprob[b, t]) - float(old[b, t]))
    flat = ratio > 1 + high if a > 0 else ratio < 1 - low
    grads[b, t] = 0.0 if flat else -a * ratio
  return grads / (selected if selected_only else count)


@functools.partial(jax.jit, static_argnames='rescale')
def _clipped_forking(stats, tokens, fraction, rescale):
  filters = optax.chain(
    clip_ratio(0.2, 0.28), forking_tokens(fraction, rescale=rescale),
    token_mean(),
  )  # fmt: skip
  return token_gradients(filters, stats, tokens)[0]


@pytest.mark.parametrize('fraction', [0.1, 0.2, 0.5])
@pytest.mark.parametrize('rescale', [True, False])
def test_forking_tokens_equals_the_equation(fraction, rescale):
  stats, tokens = _batch()
  grads = _clipped_forking(stats, tokens, fraction, rescale)
  expected = _forking_reference(stats, tokens, fraction, 0.2, 0.28, rescale)
  np.testing.assert_allclose(grads.logprob, expected, rtol=1e-5, atol=1e-7)
  # Control: neither the plain chain nor the other denominator says this.
  plain, _ = token_gradients(
    optax.chain(clip_ratio(0.2, 0.28), token_mean()), stats, tokens
  )
  other = _forking_reference(stats, tokens, fraction, 0.2, 0.28, not rescale)
  assert np.abs(plain.logprob - expected).max() > 1e-2
  assert np.abs(other - expected).max() > 1e-2


def test_rescale_leaves_a_penalty_written_later_its_size():
  batch = _with_entropy(E, VALID)
  after = optax.chain(forking_tokens(0.2), entropy_bonus(0.5), token_mean())
  grads, _ = token_gradients(after, *batch)
  # All ten tokens: .5 / 10.
  np.testing.assert_allclose(grads.entropy, -0.05 * np.array(VALID), rtol=1e-6)
  before = optax.chain(entropy_bonus(0.5), forking_tokens(0.2), token_mean())
  grads, _ = token_gradients(before, *batch)
  # The two kept: .5 / 2.
  expected = np.zeros((2, 6))
  expected[1, 2:4] = -0.25
  np.testing.assert_allclose(grads.entropy, expected, rtol=1e-6)


def test_forking_tokens_follows_a_schedule():
  filters = optax.inject_hyperparams(forking_tokens)(
    fraction=optax.piecewise_constant_schedule(1.0, {1: 0.5, 2: 0.2})
  )
  batch, state = _with_entropy(E, VALID), None
  # ⌈1 · 10⌉, ⌈.5 · 10⌉, ⌈.1 · 10⌉.
  for kept in (10, 5, 1):
    grads, state = token_gradients(filters, *batch, state=state)
    assert int(jnp.sum(grads.logprob != 0)) == kept


def test_forking_tokens_refuses_an_unknown_side():
  with pytest.raises(ValueError, match="keep='middle'.*'top' or 'bottom'"):
    forking_tokens(keep='middle')


def test_entropy_bonus_pushes_every_completion_token():
  stats, tokens = _with_entropy(E, VALID)
  grads, _ = token_gradients(entropy_bonus(0.25), stats, tokens)
  np.testing.assert_array_equal(grads.entropy, -0.25 * np.array(VALID))
  np.testing.assert_array_equal(
    grads.logprob, policy_gradient(stats, tokens).logprob
  )


@pytest.mark.parametrize('filters', [forking_tokens(), entropy_bonus()])
def test_filters_that_read_the_entropy_say_that_it_is_missing(filters):
  stats, tokens = _with_entropy(E, VALID)
  with pytest.raises(ValueError, match='stats.entropy is None'):
    token_gradients(filters, stats._replace(entropy=None), tokens)
