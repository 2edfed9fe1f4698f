"""Token gradients: where chains start, how they run, and the way back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_rlvr.evidence import log_ratio
from jax_rlvr.filters import (
  clip_ratio,
  entropy_above,
  entropy_bonus,
  forking_tokens,
  kl_cov,
  per_microbatch,
  sequence_mean_token_mean,
  sequence_mean_token_sum,
  stateless,
  token_mean,
  token_sum,
  tracked,
)
from jax_rlvr.policy_gradient import (
  as_loss,
  policy_gradient,
  token_gradients,
  tracked_names,
  watched_gradients,
)
from jax_rlvr.records import Tokens, TokenStats, Tracked

SHAPE = (4, 6)


def _batch(seed=0):
  rng = np.random.default_rng(seed)
  mask = rng.random(SHAPE) < 0.7
  old = -rng.gamma(1.0, 1.0, SHAPE).astype(np.float32)
  stats = TokenStats(
    jnp.array(old + rng.normal(0, 0.4, SHAPE).astype(np.float32)),
    jnp.array(rng.gamma(1.0, 1.0, SHAPE).astype(np.float32)),
  )
  advantage = np.repeat(rng.normal(size=(4, 1)), 6, 1).astype(np.float32)
  return stats, Tokens(jnp.array(mask), jnp.array(advantage), jnp.array(old))


def _one(logprob, advantage, old=-1.0):
  """A batch of one completion token."""
  one = jnp.ones((1, 1))
  stats = TokenStats(logprob * one, 0.5 * one)
  return stats, Tokens(one.astype(bool), advantage * one, old * one)


# policy_gradient


def test_policy_gradient_is_minus_ratio_times_advantage():
  stats = TokenStats(jnp.array([[-1.0, -0.5, -2.0]]), None)
  tokens = Tokens(
    mask=jnp.array([[True, True, True]]),
    advantage=jnp.array([[2.0, -1.0, 0.0]]),
    old_logprob=jnp.array([[-1.0, -1.0, -1.0]]),
  )
  grads = policy_gradient(stats, tokens)
  # −e⁰·2, −e^.5·(−1), −e⁻¹·0.
  np.testing.assert_allclose(grads.logprob, [[-2.0, 1.6487213, 0.0]], rtol=1e-6)
  assert grads.entropy is None


def test_policy_gradient_is_that_of_the_surrogate():
  stats, tokens = _batch()

  def surrogate(logprob):
    ratio = jnp.exp(logprob - tokens.old_logprob)
    return -jnp.sum(ratio * tokens.advantage * tokens.mask)

  grads = policy_gradient(stats, tokens)
  np.testing.assert_allclose(
    grads.logprob, jax.grad(surrogate)(stats.logprob), rtol=1e-6
  )
  assert not grads.entropy.any()


@pytest.mark.parametrize('advantage', [1.0, -1.0])
def test_policy_gradient_is_zero_beyond_twenty_nats(advantage):
  for x, alive in [
    (20.0, True), (-20.0, True), (20.001, False), (-20.001, False),
    (100.0, False), (-100.0, False), (np.inf, False), (-np.inf, False),
  ]:  # fmt: skip
    (grad,) = policy_gradient(*_one(x, advantage, old=0.0)).logprob
    assert np.isfinite(grad).all()
    assert bool(grad[0] != 0) == alive, x


def test_policy_gradient_survives_logprobs_of_minus_infinity():
  # Both −inf: the log ratio is NaN.
  stats, tokens = _one(-np.inf, 1.0, old=-np.inf)
  assert float(policy_gradient(stats, tokens).logprob[0, 0]) == 0.0


def test_policy_gradient_is_silent_outside_the_mask_even_over_nan():
  stats, tokens = _batch()
  hole = ~np.asarray(tokens.mask)
  nan = jnp.where(hole, jnp.nan, 0.0)
  poisoned = policy_gradient(
    TokenStats(stats.logprob + nan, stats.entropy + nan),
    tokens._replace(
      advantage=tokens.advantage + nan, old_logprob=tokens.old_logprob + nan
    ),
  )
  clean = policy_gradient(stats, tokens)
  jax.tree.map(np.testing.assert_array_equal, poisoned, clean)
  assert not np.asarray(poisoned.logprob)[hole].any()
  assert np.asarray(poisoned.logprob)[~hole].all()


def test_log_ratio_is_zero_outside_the_mask():
  stats, tokens = _batch()
  x = np.asarray(log_ratio(stats, tokens))
  mask = np.asarray(tokens.mask)
  difference = np.asarray(stats.logprob) - np.asarray(tokens.old_logprob)
  np.testing.assert_array_equal(x, np.where(mask, difference, 0.0))


# token_gradients


def _counter():
  """Scales by the number of calls so far."""

  def update_fn(updates, state, params=None):
    del params
    return jax.tree.map(lambda g: g * state, updates), state + 1.0

  return optax.GradientTransformation(lambda _: jnp.zeros(()), update_fn)


def test_token_gradients_start_from_the_policy_gradient():
  stats, tokens = _batch()
  grads, state = token_gradients(optax.identity(), stats, tokens)
  jax.tree.map(
    np.testing.assert_array_equal, grads, policy_gradient(stats, tokens)
  )
  assert state == optax.EmptyState()


def test_token_gradients_keep_state_across_calls():
  stats, tokens = _batch()
  plain = policy_gradient(stats, tokens).logprob
  filters = optax.chain(_counter())
  state = None
  for calls in range(3):
    grads, state = token_gradients(filters, stats, tokens, state=state)
    np.testing.assert_allclose(grads.logprob, plain * calls, rtol=1e-6)
  # A fresh state counts from the beginning.
  grads, _ = token_gradients(filters, stats, tokens)
  assert not grads.logprob.any()


def test_token_gradients_follow_a_schedule():
  stats, tokens = _batch()
  filters = optax.inject_hyperparams(entropy_bonus)(
    coef=optax.linear_schedule(0.0, 1.0, 4)
  )
  state = None
  for coef in (0.0, 0.25, 0.5):
    grads, state = token_gradients(filters, stats, tokens, state=state)
    np.testing.assert_array_equal(grads.entropy, -coef * tokens.mask)


def test_token_gradients_hand_evidence_key_and_stats_to_each_filter():
  stats, tokens = _batch()
  seen = []

  def body(grads, stats, tokens, key):
    seen.append((stats, tokens, key))
    return grads

  key = jax.random.key(3)
  filters = optax.chain(stateless(body), _counter(), stateless(body))
  token_gradients(filters, stats, tokens, key=key)
  for its_stats, its_tokens, its_key in seen:
    assert its_tokens is tokens and its_key is key
    jax.tree.map(np.testing.assert_array_equal, its_stats, stats)
  assert len(seen) == 2


def test_token_gradients_cannot_be_differentiated_through():
  stats, tokens = _batch()

  def total(logprob):
    grads, _ = token_gradients(
      optax.identity(), TokenStats(logprob, stats.entropy), tokens
    )
    return jnp.sum(grads.logprob)

  assert not jax.grad(total)(stats.logprob).any()


# Denominators that contradict each other


def _traced(chain):
  """Runs the chain as far as shapes go."""
  run = functools.partial(token_gradients, chain)
  return jax.eval_shape(run, *_batch())


def _as_loss(chain):
  return jax.eval_shape(as_loss(chain), *_batch())


def _with_state(chain):
  # As a trainer does, whose state is of an earlier step.
  stats, tokens = _batch()
  state = chain.init(stats)
  return jax.eval_shape(
    functools.partial(token_gradients, chain), stats, tokens, state=state
  )


SELECTIONS = {'forking_tokens': forking_tokens, 'entropy_above': entropy_above}
OTHERS = {
  'sequence_mean_token_mean': sequence_mean_token_mean(),
  'sequence_mean_token_sum': sequence_mean_token_sum(8),
  'token_sum': token_sum(8),
}
DRESSED = {
  'bare': lambda factory, **kwargs: factory(**kwargs),
  'injected': lambda factory, **kwargs: optax.inject_hyperparams(factory)(
    **kwargs
  ),
  'tracked': lambda factory, **kwargs: tracked('it', factory(**kwargs)),
  'nested': lambda factory, **kwargs: optax.chain(
    clip_ratio(), optax.chain(tracked('it', factory(**kwargs)))
  ),
  'sometimes': lambda factory, **kwargs: optax.conditionally_transform(
    factory(**kwargs), lambda step: step > 3
  ),
  'per_microbatch': lambda factory, **kwargs: per_microbatch(
    factory(**kwargs), 2
  ),
}
COMPOSED = {
  'chain': optax.chain,
  'named_chain': lambda *steps: optax.named_chain(
    *((f'step {i}', step) for i, step in enumerate(steps))
  ),
}


@pytest.mark.parametrize('dressed', DRESSED)
@pytest.mark.parametrize('composed', COMPOSED)
@pytest.mark.parametrize('run', [_traced, _as_loss, _with_state])
def test_rescale_is_refused_before_another_aggregation(dressed, composed, run):
  compose, dress = COMPOSED[composed], DRESSED[dressed]
  with pytest.raises(ValueError, match='end the chain with it or give rescale'):
    run(compose(dress(forking_tokens), sequence_mean_token_mean()))
  # Neither without, nor before a mean over tokens.
  plain = dress(forking_tokens, rescale=False)
  run(compose(plain, sequence_mean_token_mean()))
  run(compose(dress(forking_tokens), token_mean()))


@pytest.mark.parametrize('selection', SELECTIONS)
@pytest.mark.parametrize('other', OTHERS)
def test_rescale_goes_with_token_mean_only(selection, other):
  factory, aggregate = SELECTIONS[selection], OTHERS[other]
  message = r'rescale=True divides .* only token_mean\(\)'
  for end in (aggregate, tracked('mean', optax.chain(aggregate))):
    with pytest.raises(ValueError, match=message):
      _traced(optax.chain(factory(), end))
    _traced(optax.chain(factory(rescale=False), end))
  _traced(optax.chain(factory(), token_mean()))
  # A trainer's own aggregation is its own affair.
  _traced(optax.chain(factory(), optax.scale(0.1)))


# as_loss


CHAINS = {
  'ppo': optax.chain(clip_ratio(), token_mean()),
  'forking': optax.chain(
    clip_ratio(0.2, 0.28), forking_tokens(0.3), entropy_bonus(), token_mean()
  ),
  'kl_cov': optax.chain(kl_cov(0.2), token_mean()),
}


@pytest.mark.parametrize('name', CHAINS)
def test_as_loss_has_the_token_gradients_as_gradient(name):
  stats, tokens = _batch()
  expected, _ = token_gradients(CHAINS[name], stats, tokens)
  loss = as_loss(CHAINS[name])
  found, _ = jax.grad(loss, has_aux=True)(stats, tokens)
  assert expected.logprob.any()
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_as_loss_hands_on_the_state():
  stats, tokens = _batch()
  loss = as_loss(optax.chain(_counter(), token_mean()))
  state = None
  for calls in range(3):
    grads, state = jax.grad(loss, has_aux=True)(stats, tokens, None, state)
    assert bool(grads.logprob.any()) == (calls > 0)
  assert float(state[0]) == 3.0


def test_as_loss_survives_minus_infinity_and_nan_outside_the_mask():
  stats, tokens = _batch()
  row, column = np.argwhere(np.asarray(tokens.mask))[0]
  logprob = jnp.where(tokens.mask, stats.logprob, jnp.nan)
  stats = stats._replace(logprob=logprob.at[row, column].set(-jnp.inf))
  loss = as_loss(CHAINS['ppo'])
  (value, _), grads = jax.value_and_grad(loss, has_aux=True)(stats, tokens)
  assert np.isfinite(value)
  assert np.isfinite(grads.logprob).all()


def _stats(weights, features, ids):
  """Stats of a linear policy: everything differentiable."""
  logprobs = jax.nn.log_softmax(features @ weights)
  entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, -1)
  logprob = jnp.take_along_axis(logprobs, ids[..., None], -1)[..., 0]
  return TokenStats(logprob, entropy)


def _linear_policy():
  rng = np.random.default_rng(5)
  features = jnp.array(rng.normal(size=SHAPE + (3,)).astype(np.float32))
  ids = jnp.array(rng.integers(0, 5, SHAPE))
  weights = jnp.array(rng.normal(size=(3, 5)).astype(np.float32))
  old = _stats(weights, features, ids).logprob
  step = jnp.array(rng.normal(0, 0.1, (3, 5)).astype(np.float32))
  _, tokens = _batch()
  return weights + step, features, ids, tokens._replace(old_logprob=old)


def test_as_loss_does_not_differentiate_the_evidence():
  # On policy as one writes it: the old logprobs are the live ones.
  stats, tokens = _batch()
  loss = as_loss(CHAINS['ppo'])
  grads, _ = jax.grad(
    lambda s: loss(s, tokens._replace(old_logprob=s.logprob)), has_aux=True
  )(stats)
  mask = np.asarray(tokens.mask)
  expected = np.where(mask, -np.asarray(tokens.advantage) / mask.sum(), 0.0)
  np.testing.assert_allclose(grads.logprob, expected, rtol=1e-6)


@pytest.mark.parametrize('name', CHAINS)
def test_as_loss_and_vjp_carry_the_same_gradient_to_the_weights(name):
  weights, features, ids, tokens = _linear_policy()
  filters = CHAINS[name]

  @jax.jit
  def both(weights):
    stats, pullback = jax.vjp(lambda w: _stats(w, features, ids), weights)
    grads, _ = token_gradients(filters, stats, tokens)
    loss = as_loss(filters)
    found, _ = jax.grad(
      lambda w: loss(_stats(w, features, ids), tokens), has_aux=True
    )(weights)
    return pullback(grads)[0], found

  expected, found = both(weights)
  assert np.abs(expected).max() > 1e-2
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_chain_equals_ppo_with_an_entropy_bonus_as_one_writes_it():
  weights, features, ids, tokens = _linear_policy()

  def ppo(weights, low, high):
    stats = _stats(weights, features, ids)
    ratio = jnp.exp(stats.logprob - tokens.old_logprob)
    clipped = jnp.clip(ratio, 1 - low, 1 + high)
    gain = jnp.minimum(ratio * tokens.advantage, clipped * tokens.advantage)
    gain = gain + 0.1 * stats.entropy
    return -jnp.sum(gain * tokens.mask) / jnp.sum(tokens.mask)

  filters = optax.chain(clip_ratio(0.1, 0.15), entropy_bonus(0.1), token_mean())
  loss = as_loss(filters)
  found, _ = jax.grad(
    lambda w: loss(_stats(w, features, ids), tokens), has_aux=True
  )(weights)
  expected = jax.grad(ppo)(weights, 0.1, 0.15)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
  # Control: here the clip does act.
  unclipped = jax.grad(ppo)(weights, np.inf, np.inf)
  assert np.abs(unclipped - expected).max() > 1e-2


def test_evidence_of_another_shape_is_refused():
  tokens = Tokens(
    mask=jnp.ones((2, 3), bool),
    advantage=jnp.ones((2, 1)),
    old_logprob=jnp.zeros((2, 3)),
  )
  stats = TokenStats(jnp.zeros((2, 3)), jnp.zeros((2, 3)))
  with pytest.raises(AssertionError, match='shape'):
    token_gradients(optax.identity(), stats, tokens)


# watched_gradients


def double():
  return stateless(lambda grads, *_: jax.tree.map(lambda g: 2 * g, grads))


def test_watched_gradients_tell_what_each_filter_did():
  stats = TokenStats(jnp.array([[-1.0, -0.5, -2.0]]), None)
  tokens = Tokens(
    mask=jnp.array([[True, True, True]]),
    advantage=jnp.array([[1.0, 1.0, 2.0]]),
    old_logprob=jnp.array([[-1.0, -1.0, -1.0]]),
  )
  chain = optax.chain(
    tracked('clip', clip_ratio()), tracked('double', double()), token_mean()
  )
  grads, state, links = watched_gradients(chain, stats, tokens)
  # Ratios 1, e^.5 > 1.2 and e⁻¹; the last advantage is 2.
  assert tracked_names(state) == ['clip', 'double']
  (came, clipped), (again, doubled) = links
  np.testing.assert_allclose(came, [[-1.0, -1.6487213, -0.7357589]], rtol=1e-6)
  np.testing.assert_allclose(clipped, [[-1.0, 0.0, -0.7357589]], rtol=1e-6)
  np.testing.assert_array_equal(again, clipped)
  np.testing.assert_array_equal(doubled, 2 * clipped)
  np.testing.assert_allclose(grads.logprob, doubled / 3, rtol=1e-6)


def every_second(tx):
  return optax.conditionally_transform(
    tx, lambda step, **_: step % 2 == 0, forward_extra_args=True
  )


WATCHED = {
  'nested': lambda: tracked('all', optax.chain(tracked('clip', clip_ratio()))),
  'sometimes': lambda: every_second(tracked('clip', clip_ratio())),
  'microbatches': lambda: per_microbatch(tracked('clip', clip_ratio()), 2),
  'both': lambda: per_microbatch(
    every_second(tracked('clip', clip_ratio())), rows=2
  ),
  'injected': lambda: tracked(
    'clip', optax.inject_hyperparams(clip_ratio)(low=0.1, high=0.1)
  ),
}


@pytest.mark.parametrize('name', WATCHED)
def test_watching_changes_neither_gradients_nor_states(name):
  chain = optax.chain(WATCHED[name](), token_mean())
  batch = _batch()

  @jax.jit
  def both(state):
    seen = watched_gradients(chain, *batch, state=state)
    return token_gradients(chain, *batch, state=state), seen

  state = chain.init(batch[0])
  for call in range(2):
    (grads, after), (same, state, links) = both(state)
    jax.tree.map(np.testing.assert_array_equal, (same, state), (grads, after))
    start = policy_gradient(*batch).logprob
    # Where a filter does not run, it does nothing.
    idle = name in ('sometimes', 'both') and call == 1
    for came, left in links:
      np.testing.assert_allclose(came, 0 * start if idle else start, rtol=1e-6)
      assert (np.asarray(left) != came).any() == (not idle)
  assert tracked_names(state) == (
    ['all', 'clip'] if name == 'nested' else ['clip']
  )


def test_a_state_that_only_looks_tracked_is_left_alone():
  # Of a filter of one's own: it has no `…/kept`.
  def update_fn(grads, state, stats, *, tokens, **_):
    return grads, state._replace(report={'mean': jnp.mean(stats.logprob)})

  own = optax.GradientTransformationExtraArgs(
    lambda _: Tracked((), {'mean': jnp.zeros(())}), update_fn
  )
  _, state, links = watched_gradients(own, *_batch())
  assert links == () and tracked_names(state) == []
  assert state.report['mean'] < 0
