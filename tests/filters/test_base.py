"""What filters are made of, and the tools around them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_rlvr.filters import (
  clip_cov,
  clip_ratio,
  entropy_bonus,
  forking_tokens,
  kl_cov,
  per_microbatch,
  stateless,
  token_mean,
  tracked,
)
from jax_rlvr.filters.base import evidence, keep, reporting, scale
from jax_rlvr.policy_gradient import policy_gradient, token_gradients
from jax_rlvr.records import (
  Aggregated,
  Report,
  Rescaled,
  Tokens,
  TokenStats,
  Tracked,
)


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


def test_stateless_carries_its_mark_as_an_empty_state():
  stats, tokens = _batch()
  marked = stateless(lambda grads, stats, tokens, key: grads, Aggregated())
  grads = TokenStats(jnp.ones((2, 3)), None)
  state = marked.init(stats)
  _, after = marked.update(grads, state, stats, tokens=tokens)
  assert state == after == Aggregated()
  assert jax.tree.leaves(state) == []


def test_evidence_is_the_field_or_a_message():
  _, tokens = _batch()
  assert evidence(tokens, 'old_logprob', 'mine') is tokens.old_logprob
  with pytest.raises(ValueError, match='mine reads tokens.ref_logprob, but'):
    evidence(tokens, 'ref_logprob', 'mine')


# reporting


def _summing(name='sum', mark=()):
  """Doubles the gradients and reports their sum."""

  def body(grads, stats, tokens, key):
    return scale(grads, 2.0), {name: jnp.sum(grads.logprob)}

  return reporting(body, name, mark=mark)


def test_reporting_keeps_the_scalars_in_the_state():
  stats, tokens = _batch()
  tx = _summing(mark=Rescaled())
  fresh = tx.init(stats)
  assert isinstance(fresh, Report) and fresh.mark == Rescaled()
  assert fresh.scalars == {'sum': 0.0}
  grads, state = token_gradients(tx, stats, tokens, state=fresh)
  # 1 + 2 + 3 + 4 + 5.
  assert state.scalars == {'sum': 15.0} and state.mark == Rescaled()
  np.testing.assert_array_equal(grads.logprob, [[0, 2, 4], [6, 8, 10]])
  jax.tree.map(
    lambda a, b: np.testing.assert_equal(jax.typeof(a), jax.typeof(b)),
    state,
    fresh,
  )


# tracked


def test_tracked_takes_up_reports_wherever_they_sit():
  stats, tokens = _batch()
  nested = optax.chain(
    optax.inject_hyperparams(_summing, static_args='name')(name='first'),
    tracked('inner', _summing('second')),
    optax.conditionally_transform(
      optax.named_chain(('one', _summing('third'))), lambda step: step == 0
    ),
  )
  watched = tracked('outer', nested)
  own = {'outer/kept', 'outer/mass', 'outer/first', 'outer/third'}
  state = watched.init(stats)
  assert set(state.report) == own
  _, state = token_gradients(watched, stats, tokens, state=state)
  report = _report(state)
  # What is tracked on its own stays there.
  assert set(report) == own
  assert report['outer/first'] == 15.0 and report['outer/third'] == 60.0
  inner = _report(state.inner[1])
  assert inner == {'inner/kept': 1.0, 'inner/mass': 2.0, 'inner/second': 30.0}


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


# per_microbatch

ROWS, MICRO = 6, 2


@functools.cache
def _six_rows():
  rng = np.random.default_rng(0)
  shape = ROWS, 10
  mask = rng.random(shape) < 0.8
  old = -rng.gamma(1.0, 1.5, shape)
  advantage = np.repeat(rng.normal(size=(ROWS, 1)), 10, 1)
  logprob = old + rng.normal(0, 0.3, shape)
  # The later a row the higher its entropies, so that means and choices of
  # microbatches are not those of the batch.
  entropy = rng.gamma(1.0, 1.0, shape) + np.arange(ROWS)[:, None]
  advantage, old, logprob, entropy = map(
    jnp.float32, (advantage, old, logprob, entropy)
  )
  serial = jnp.array(rng.permutation(60).reshape(shape), jnp.uint32)
  tokens = Tokens(jnp.array(mask), advantage, old, serial)
  return TokenStats(logprob, entropy), tokens


def _by_hand(tx, stats, tokens, key):
  """The filter on every two rows, one key for each: gradients and states."""
  grads, found, states = policy_gradient(stats, tokens), [], []
  update = jax.jit(tx.update)
  for i, its_key in enumerate(jax.random.split(key, ROWS // MICRO)):

    def cut(tree, i=i):
      return jax.tree.map(lambda x: x[MICRO * i : MICRO * (i + 1)], tree)

    its, state = update(
      cut(grads), tx.init(stats), cut(stats), tokens=cut(tokens), key=its_key
    )
    found.append(its)
    states.append(state)
  return jax.tree.map(lambda *x: np.concatenate(x), *found), states


LOCAL = {
  'clip_cov': clip_cov(0.1, 0.0, 50.0),
  'kl_cov': kl_cov(0.2),
  'forking_tokens': forking_tokens(0.2),
}


@pytest.mark.parametrize('name', LOCAL)
def test_per_microbatch_equals_the_filter_on_each_slice(name):
  tx, (stats, tokens) = LOCAL[name], _six_rows()
  key = jax.random.key(3)

  @jax.jit
  def both(stats, tokens):
    found, state = token_gradients(
      per_microbatch(tx, MICRO), stats, tokens, key=key
    )
    whole, whole_state = token_gradients(tx, stats, tokens, key=key)
    return found, state, whole, whole_state

  found, state, whole, whole_state = both(stats, tokens)
  expected, states = _by_hand(tx, stats, tokens, key)
  np.testing.assert_allclose(found.logprob, expected.logprob, rtol=1e-5)
  np.testing.assert_array_equal(found.logprob == 0, expected.logprob == 0)
  # Reports are means over the microbatches.
  means = jax.tree.map(lambda *x: np.mean(x), *states)
  assert jax.tree.structure(state) == jax.tree.structure(means)
  assert jax.tree.leaves(means)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state, means
  )
  # Control: the whole batch chooses others, and reports other numbers.
  moved = np.abs(found.logprob - whole.logprob) > 1e-3
  assert moved.any()
  assert jax.tree.map(float, state) != jax.tree.map(float, whole_state)


def test_per_microbatch_has_the_quota_of_each_microbatch():
  # 60 tokens: ⌊.02 · 60⌋ = 1 in the whole; in three, ⌊.02 · 20⌋ = 0 is raised
  # to one each. verl's KL-Cov does the latter.
  stats, tokens = _six_rows()
  tokens = tokens._replace(mask=jnp.ones((ROWS, 10), bool))
  plain = policy_gradient(stats, tokens).logprob
  whole = kl_cov(0.02)
  for tx, penalised in [(whole, 1), (per_microbatch(whole, MICRO), 3)]:
    grads, _ = jax.jit(functools.partial(token_gradients, tx))(stats, tokens)
    assert int(jnp.sum(grads.logprob != plain)) == penalised


def test_per_microbatch_emulates_means_of_microbatch_means():
  # On policy with A = −1. Tokens of rows 1 and 2, then 3 and 4: 2 + 1 and
  # 3 + 2, so each weighs 1/2 · 1/3 and 1/2 · 1/5.
  mask = jnp.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 1, 1]], bool)
  zeros = jnp.zeros((4, 3))
  chain = optax.chain(per_microbatch(token_mean(), 2), optax.scale(2 / 4))
  grads, _ = token_gradients(
    chain, TokenStats(zeros), Tokens(mask, zeros - 1.0, zeros)
  )
  weight = np.array([[1 / 6], [1 / 6], [1 / 10], [1 / 10]])
  np.testing.assert_allclose(grads.logprob, mask * weight, rtol=1e-6)


@pytest.mark.parametrize('rows', [4, 5, 12])
def test_per_microbatch_refuses_rows_that_do_not_divide_the_batch(rows):
  message = f'rows={rows} does not divide the 6 sequences'
  with pytest.raises(ValueError, match=message):
    token_gradients(per_microbatch(clip_ratio(), rows), *_six_rows())


def test_per_microbatch_keeps_the_state_of_schedules():
  stats, tokens = _six_rows()
  tokens = tokens._replace(mask=jnp.ones((ROWS, 10), bool))
  tx = optax.inject_hyperparams(forking_tokens)(
    fraction=optax.piecewise_constant_schedule(1.0, {1: 0.5, 2: 0.2})
  )
  tx = per_microbatch(tx, MICRO)
  run = jax.jit(functools.partial(token_gradients, tx))
  first = state = tx.init(stats)
  # Of 20 tokens each: ⌈1 · 20⌉, ⌈.5 · 20⌉, ⌈.1 · 20⌉.
  for step, (fraction, kept) in enumerate([(1.0, 20), (0.5, 10), (0.1, 2)]):
    grads, state = run(stats, tokens, state=state)
    in_each = np.reshape(grads.logprob != 0, (3, 20)).sum(axis=1)
    np.testing.assert_array_equal(in_each, kept)
    assert int(state.count) == step + 1
    assert float(state.hyperparams['fraction']) == pytest.approx(fraction)
    jax.tree.map(
      lambda a, b: np.testing.assert_equal(jax.typeof(a), jax.typeof(b)),
      state,
      first,
    )


@pytest.mark.parametrize('inside', [True, False])
def test_tracked_microbatches_report_their_mean(inside):
  stats, tokens = _six_rows()
  # Of 1, 3 and 4 tokens a row: ⌈.2 · 2⌉ = 1, ⌈.2 · 6⌉ = 2, ⌈.2 · 8⌉ = 2.
  length = np.repeat([1, 3, 4], 2)[:, None]
  tokens = tokens._replace(mask=jnp.array(np.arange(10) < length))
  tx = forking_tokens(0.2, rescale=False)
  if inside:
    tx = per_microbatch(tracked('fork', tx), MICRO)
  else:
    tx = tracked('fork', per_microbatch(tx, MICRO))
  _, state = token_gradients(tx, stats, tokens)
  report = _report(state)
  # (1/2 + 2/6 + 2/8) / 3.
  assert report['fork/selected'] == pytest.approx(13 / 36)
  # From outside all of them are one batch: 5 of 16.
  kept = 13 / 36 if inside else 5 / 16
  assert report['fork/kept'] == pytest.approx(kept)


def test_tracked_refuses_two_reports_of_one_name():
  both = tracked('both', optax.chain(forking_tokens(), forking_tokens(0.5)))
  with pytest.raises(ValueError, match='two filters report both/selected'):
    both.init(_batch()[0])
