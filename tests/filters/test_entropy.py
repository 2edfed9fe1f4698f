"""Forking tokens in their variants, and the entropy bonus."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_rlvr.filters import (
  clip_ratio,
  entropy_above,
  entropy_bonus,
  forking_tokens,
  token_mean,
  tracked,
)
from jax_rlvr.policy_gradient import policy_gradient, token_gradients
from jax_rlvr.records import Tokens, TokenStats

VARIANT = ('keep', 'rescale', 'rule', 'scope')


@functools.partial(jax.jit, static_argnames=VARIANT)
def _forking(stats, tokens, fraction, **variant):
  """Token gradients before aggregation; the fraction is traced."""
  filters = tracked('it', forking_tokens(fraction, **variant))
  return token_gradients(filters, stats, tokens)


def _above(stats, tokens, threshold, **variant):
  filters = tracked('it', entropy_above(threshold, **variant))
  return token_gradients(filters, stats, tokens)


def _with_entropy(entropy, mask):
  """On policy with advantage −1: every token gradient is +1."""
  entropy, mask = jnp.array(entropy, jnp.float32), jnp.array(mask, bool)
  zeros = jnp.zeros(entropy.shape)
  return TokenStats(zeros, entropy), Tokens(mask, zeros - 1.0, zeros)


def _kept(entropy, mask, number, run=_forking, **kwargs):
  grads, _ = run(*_with_entropy(entropy, mask), number, **kwargs)
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
@pytest.mark.parametrize(
  'variant', [{}, {'rescale': False}, {'rule': 'quantile'}], ids=str
)
def test_forking_tokens_keeps_what_trl_keeps(
  entropy, mask, fraction, kept, variant
):
  assert _kept(entropy, mask, fraction, **variant) == kept


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
  # What reaches the quantile, which is 0, is everything.
  kept = np.array(_kept(entropy, mask, 0.2, rule='quantile'))
  assert kept.sum() == 100
  kept = np.array(_kept(entropy, mask, 0.2, rule='quantile', scope='sequence'))
  quantile = np.quantile(entropy, 0.8, axis=1, keepdims=True)
  np.testing.assert_array_equal(kept, entropy >= quantile)


def test_both_rules_keep_the_same_number_of_distinct_entropies():
  entropy = np.random.default_rng(0).permutation(100).reshape(4, 25) / 10
  for n in range(1, 51):
    mask = np.arange(100).reshape(4, 25) < n
    exact = _kept(entropy, mask, 0.2)
    assert np.sum(exact) == -(-n // 5)
    assert _kept(entropy, mask, 0.2, rule='quantile') == exact


def test_forking_tokens_count_is_rounded_up():
  # ⌈.2 · 6⌉ = 2, ⌈.2 · 5⌉ = 1, and ⌈.3 · 50⌉ = 15, not 16.
  place = np.arange(100).reshape(4, 25)
  for fraction, n, expected in [(0.2, 6, 2), (0.2, 5, 1), (0.3, 50, 15)]:
    kept = np.array(_kept(place / 10, place < n, fraction))
    assert kept.sum() == expected
    assert kept.ravel()[n - expected : n].all()


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


# Within each sequence


@pytest.mark.parametrize('rule', [{}, {'rule': 'quantile'}], ids=str)
def test_sequence_scope_chooses_within_each_row(rule):
  # ⌈.2 · 6⌉ = 2 and ⌈.2 · 4⌉ = 1; the quantiles are .5 and .94.
  in_rows = [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0]]
  assert _kept(E, VALID, 0.2, scope='sequence', **rule) == in_rows
  # Control: of the batch, the highest are all in the second row.
  in_batch = [[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0]]
  assert _kept(E, VALID, 0.2, **rule) == in_batch


def test_sequence_scope_keeps_one_of_each_row_that_exists():
  row = [0, 0, 0, 0, 0, 1]
  assert _kept(E, VALID, 0.0, scope='sequence') == [row, [0, 0, 0, 1, 0, 0]]
  assert _kept(E, [[1] * 6, [0] * 6], 0.0, scope='sequence') == [row, [0] * 6]


def test_sequence_scope_equals_the_example_of_lightrft():
  # ⌈.4 · 5⌉ = 2 and ⌈.4 · 4⌉ = 2, as its docstring says; its code keeps
  # ⌊.4 · 4⌋ = 1 in the second row.
  entropy = [[1, 5, 2, 6, 3, 9], [2, 4, 1, 5, 0, 9]]
  mask = [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]
  kept = _kept(entropy, mask, 0.4, scope='sequence')
  assert kept == [[0, 1, 0, 1, 0, 0], [0, 1, 0, 1, 0, 0]]


def test_sequence_scope_never_spends_its_choice_on_padding():
  # All entropies 0: ⌈.5 · 2⌉ = 1 and ⌈.5 · 3⌉ = 2, the first by serial.
  mask = [[0, 0, 0, 0, 1, 1], [0, 1, 1, 0, 1, 0]]
  zeros = np.zeros((2, 6))
  kept = _kept(zeros, mask, 0.5, scope='sequence')
  assert kept == [[0, 0, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0]]


def test_sequence_scope_keeps_the_lowest_of_each_row_under_bottom():
  kept = _kept(E, VALID, 0.2, keep='bottom', scope='sequence')
  assert kept == [[1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]


# A fixed threshold


@pytest.mark.parametrize(
  ('threshold', 'keep', 'kept'),
  [
    (0.75, 'top', [[0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0]]),
    # It may be reached, from either side.
    (0.5, 'top', [[0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0]]),
    (0.5, 'bottom', [[1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]]),
    (2.0, 'top', NONE),
    (0.0, 'bottom', NONE),
  ],
)
def test_entropy_above_keeps_what_reaches_the_threshold(threshold, keep, kept):
  assert _kept(E, VALID, threshold, _above, keep=keep) == kept


# What they divide by, and report


@pytest.mark.parametrize(
  ('run', 'number', 'variant', 'selected', 'threshold'),
  [
    (_forking, 0.2, {}, 2, 0.9),
    (_forking, 0.2, {'keep': 'bottom'}, 2, 0.2),
    (_forking, 0.25, {'rule': 'quantile'}, 3, 0.8),
    (_forking, 0.2, {'scope': 'sequence'}, 3, 0.5),
    (_above, 0.75, {}, 3, 0.8),
    (_above, 0.35, {'keep': 'bottom'}, 3, 0.3),
  ],
)
def test_rescale_and_reports_follow_what_was_selected(
  run, number, variant, selected, threshold
):
  # Of ten tokens with gradient 1.
  for rescale, weight in [({}, 10 / selected), ({'rescale': False}, 1.0)]:
    grads, state = run(*_with_entropy(E, VALID), number, **variant, **rescale)
    kept = grads.logprob != 0
    assert int(kept.sum()) == selected
    np.testing.assert_allclose(grads.logprob, kept * weight, rtol=1e-6)
    report = {name: float(x) for name, x in state.report.items()}
    assert report['it/selected'] == pytest.approx(selected / 10)
    # The lowest, under 'bottom' the highest, entropy that was selected.
    assert report['it/threshold'] == pytest.approx(threshold)


def test_rescale_of_ties_follows_what_was_selected():
  # Equal entropies: by the quantile all ten, in exact numbers two.
  batch = _with_entropy(np.ones((2, 6)), VALID)
  for rule, weight in [({'rule': 'quantile'}, 1.0), ({}, 5.0)]:
    grads, _ = _forking(*batch, 0.2, **rule)
    assert float(grads.logprob.max()) == weight


@pytest.mark.parametrize('run', [_forking, _above])
def test_nothing_to_select_from_reports_zero(run):
  grads, state = run(*_with_entropy(E, NONE), 0.5)
  assert not grads.logprob.any()
  assert float(state.report['it/selected']) == 0.0
  assert float(state.report['it/threshold']) == 0.0


def test_the_entropy_is_that_of_the_current_policy():
  stats, tokens = _with_entropy(E, VALID)
  tokens = tokens._replace(old_entropy=-stats.entropy)
  for run, number in [(_forking, 0.2), (_above, 0.85)]:
    grads, _ = run(stats, tokens, number)
    kept = [[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0]]
    np.testing.assert_array_equal(grads.logprob != 0, kept)


# Reference


def _chosen_reference(stats, tokens, rule, number):
  """By sorting the entropies of the mask."""
  entropy, mask = np.asarray(stats.entropy), np.asarray(tokens.mask)

  def exact(entropies):
    selected = max(1, int(np.ceil(number * len(entropies) - 1e-9)))
    return sorted(entropies, reverse=True)[selected - 1]

  def quantile(entropies):
    return np.quantile(entropies, 1 - number, method='linear')

  if rule == 'above':
    return mask & (entropy >= number)
  find = quantile if 'quantile' in rule else exact
  if 'sequence' not in rule:
    return mask & (entropy >= find(entropy[mask]))
  rows = [
    find(x[m]) if m.any() else 0 for x, m in zip(entropy, mask, strict=True)
  ]
  return mask & (entropy >= np.array(rows)[:, None])


def _forking_reference(stats, tokens, chosen, low, high, selected_only):
  """Eq. 6 of either version, as gradients by a float64 loop over tokens."""
  mask, advantage, old = map(np.asarray, tokens[:3])
  logprob = np.asarray(stats.logprob)
  grads = np.zeros(mask.shape)
  for b, t in np.argwhere(chosen):
    a = float(advantage[b, t])
    ratio = np.exp(float(logprob[b, t]) - float(old[b, t]))
    flat = ratio > 1 + high if a > 0 else ratio < 1 - low
    grads[b, t] = 0.0 if flat else -a * ratio
  return grads / (chosen.sum() if selected_only else mask.sum())


RULES = {
  'exact': forking_tokens,
  'quantile': functools.partial(forking_tokens, rule='quantile'),
  'sequence': functools.partial(forking_tokens, scope='sequence'),
  'sequence quantile': functools.partial(
    forking_tokens, rule='quantile', scope='sequence'
  ),
  'above': entropy_above,
}


@functools.partial(jax.jit, static_argnames=('rule', 'rescale'))
def _clipped_forking(stats, tokens, number, rule, rescale):
  filters = optax.chain(
    clip_ratio(0.2, 0.28), RULES[rule](number, rescale=rescale), token_mean()
  )
  return token_gradients(filters, stats, tokens)[0]


@pytest.mark.parametrize(
  ('rule', 'number'),
  [('exact', 0.1), ('exact', 0.2), ('exact', 0.5)]
  + [(rule, 0.3) for rule in RULES if rule != 'exact'],
)
@pytest.mark.parametrize('rescale', [True, False])
def test_forking_tokens_equals_the_equation(rule, number, rescale):
  stats, tokens = _batch()
  grads = _clipped_forking(stats, tokens, number, rule, rescale)
  chosen = _chosen_reference(stats, tokens, rule, number)
  expected = _forking_reference(stats, tokens, chosen, 0.2, 0.28, rescale)
  np.testing.assert_allclose(grads.logprob, expected, rtol=1e-5, atol=1e-7)
  # Control: neither the plain chain nor the other denominator says this.
  everything = np.asarray(tokens.mask)
  plain = _forking_reference(stats, tokens, everything, 0.2, 0.28, rescale)
  other = _forking_reference(stats, tokens, chosen, 0.2, 0.28, not rescale)
  assert np.abs(plain - expected).max() > 1e-2
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


@pytest.mark.parametrize('factory', [forking_tokens, entropy_above])
def test_an_unknown_side_is_refused(factory):
  with pytest.raises(ValueError, match="keep='middle'.*'top' or 'bottom'"):
    factory(keep='middle')


def test_an_unknown_rule_or_scope_is_refused():
  with pytest.raises(ValueError, match="rule='top_k'.*'exact' or 'quantile'"):
    forking_tokens(rule='top_k')
  with pytest.raises(ValueError, match="scope='group'.*'batch' or 'sequence'"):
    forking_tokens(scope='group')


def test_entropy_bonus_pushes_every_completion_token():
  stats, tokens = _with_entropy(E, VALID)
  grads, _ = token_gradients(entropy_bonus(0.25), stats, tokens)
  np.testing.assert_array_equal(grads.entropy, -0.25 * np.array(VALID))
  np.testing.assert_array_equal(
    grads.logprob, policy_gradient(stats, tokens).logprob
  )


@pytest.mark.parametrize(
  'filters', [forking_tokens(), entropy_above(), entropy_bonus()]
)
def test_filters_that_read_the_entropy_say_that_it_is_missing(filters):
  stats, tokens = _with_entropy(E, VALID)
  with pytest.raises(ValueError, match='stats.entropy is None'):
    token_gradients(filters, stats._replace(entropy=None), tokens)
