"""What filters are made of: stateless, keep, scale, tracked."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_rlvr.filters import (
  clip_ratio,
  entropy_bonus,
  forking_tokens,
  stateless,
  token_mean,
  tracked,
)
from jax_rlvr.filters.base import keep, scale
from jax_rlvr.policy_gradient import token_gradients
from jax_rlvr.records import Tokens, TokenStats, Tracked


def _batch():
  """Six tokens of which five count; token gradients −A = 1 … 5."""
  mask = jnp.array([[False, True, True], [True, True, True]])
  advantage = -jnp.array([[9.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
  zeros = jnp.zeros((2, 3))
  entropy = jnp.array([[9.0, 0.1, 0.2], [0.3, 0.4, 0.5]])
  return TokenStats(zeros, entropy), Tokens(mask, advantage, zeros)


def _report(state):
  return {name: float(value) for name, value in state.report.items()}


# stateless


def test_stateless_lifts_a_function_of_grads_stats_tokens_key():
  stats, tokens = _batch()
  key = jax.random.key(0)

  def body(grads, its_stats, its_tokens, its_key):
    assert its_stats is stats and its_tokens is tokens and its_key is key
    return jax.tree.map(lambda g: 2 * g, grads)

  double = stateless(body)
  grads = TokenStats(jnp.ones((2, 3)), None)
  state = double.init(stats)
  new, state = double.update(grads, state, stats, tokens=tokens, key=key)
  assert state == optax.EmptyState()
  np.testing.assert_array_equal(new.logprob, np.full((2, 3), 2.0))


def test_stateless_needs_tokens_but_no_key_and_ignores_the_rest():
  stats, tokens = _batch()
  passing = stateless(lambda grads, stats, tokens, key: grads)
  grads = TokenStats(jnp.ones((2, 3)), None)
  new, _ = passing.update(
    grads, passing.init(stats), stats, tokens=tokens, loss=1.0, step=3
  )
  assert new is grads
  with pytest.raises(TypeError, match='tokens'):
    passing.update(grads, passing.init(stats), stats)


def test_keep_and_scale_act_on_both_leaves():
  grads = TokenStats(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]]))
  kept = keep(grads, jnp.array([[True, False]]))
  np.testing.assert_array_equal(kept.logprob, [[1.0, 0.0]])
  np.testing.assert_array_equal(kept.entropy, [[3.0, 0.0]])
  scaled = scale(grads, jnp.float32(0.5))
  np.testing.assert_array_equal(scaled.logprob, [[0.5, 1.0]])
  np.testing.assert_array_equal(scaled.entropy, [[1.5, 2.0]])


def test_keep_silences_nan():
  grads = TokenStats(jnp.array([[np.nan, 2.0]]), None)
  kept = keep(grads, jnp.array([[False, True]]))
  np.testing.assert_array_equal(kept.logprob, [[0.0, 2.0]])
  assert kept.entropy is None


# tracked


def test_tracked_reports_kept_share_and_mass():
  # ⌈.4 · 5⌉ = 2 highest entropies: gradients 4 and 5 of 1 + 2 + 3 + 4 + 5.
  watched = tracked('fork', forking_tokens(0.4, rescale=False))
  _, state = token_gradients(watched, *_batch())
  assert _report(state) == pytest.approx(
    {
      'fork/kept': 2 / 5,
      'fork/mass': 9 / 15,
      # What the filter reports: the lower of .4 and .5.
      'fork/selected': 2 / 5,
      'fork/threshold': 0.4,
    }
  )


def test_tracked_mass_may_exceed_one():
  # Times 5/2: 9 · 2.5 / 15.
  watched = tracked('fork', forking_tokens(0.4))
  _, state = token_gradients(watched, *_batch())
  report = _report(state)
  assert report['fork/kept'] == pytest.approx(2 / 5)
  assert report['fork/mass'] == pytest.approx(1.5)


def test_tracked_counts_only_what_came():
  # The first filter leaves 4 and 5; the second keeps the 5.
  chain = optax.chain(
    forking_tokens(0.4, rescale=False),
    tracked('second', forking_tokens(0.2, rescale=False)),
  )
  _, state = token_gradients(chain, *_batch())
  report = _report(state[1])
  assert report['second/kept'] == pytest.approx(1 / 2)
  assert report['second/mass'] == pytest.approx(5 / 9)


def test_tracked_does_not_count_new_gradients_as_kept():
  # Only the 5 came; all leave with one.
  def add_one(grads, stats, tokens, key):
    ones = jnp.where(tokens.mask, 1.0, 0.0)
    return grads._replace(logprob=grads.logprob + ones)

  chain = optax.chain(
    forking_tokens(0.2, rescale=False), tracked('add', stateless(add_one))
  )
  _, state = token_gradients(chain, *_batch())
  # (1 · 4 + 6) / 5.
  assert _report(state[1]) == pytest.approx({'add/kept': 1.0, 'add/mass': 2.0})


def test_tracked_says_one_before_the_first_call_and_where_nothing_came():
  stats, tokens = _batch()
  watched = tracked('clip', clip_ratio())
  fresh = watched.init(stats)
  assert isinstance(fresh, Tracked)
  assert _report(fresh) == {'clip/kept': 1.0, 'clip/mass': 1.0}
  nothing = tokens._replace(advantage=jnp.zeros((2, 3)))
  _, state = token_gradients(watched, stats, nothing, state=fresh)
  assert _report(state) == {'clip/kept': 1.0, 'clip/mass': 1.0}


def test_tracked_changes_no_gradient():
  plain = optax.chain(entropy_bonus(0.3), forking_tokens(0.4), token_mean())
  watched = optax.chain(
    tracked('bonus', entropy_bonus(0.3)),
    tracked('rest', optax.chain(forking_tokens(0.4), token_mean())),
  )
  expected, _ = token_gradients(plain, *_batch())
  found, _ = token_gradients(watched, *_batch())
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_tracked_watches_plain_optax_and_keeps_its_state():
  watched = tracked('ema', optax.trace(0.5))
  stats, tokens = _batch()
  state = None
  for mass in (1.0, 1.5, 1.75):
    _, state = token_gradients(watched, stats, tokens, state=state)
    assert _report(state)['ema/mass'] == pytest.approx(mass)


def test_tracked_state_keeps_its_types():
  watched = tracked('clip', clip_ratio())
  stats, tokens = _batch()
  fresh = watched.init(stats)
  _, state = token_gradients(watched, stats, tokens, state=fresh)
  jax.tree.map(
    lambda a, b: np.testing.assert_equal(jax.typeof(a), jax.typeof(b)),
    state,
    fresh,
  )
