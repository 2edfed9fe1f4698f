"""The penalty that holds a policy near its reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_rlvr.filters import (
  clip_ratio,
  entropy_bonus,
  forking_tokens,
  kl_penalty,
  sequence_mean_token_mean,
  token_mean,
  tracked,
)
from jax_rlvr.policy_gradient import as_loss, policy_gradient, token_gradients
from jax_rlvr.records import Tokens, TokenStats

KINDS = ['k1', 'k2', 'k3']


def _row(x, advantage=0.0):
  """On policy, x nats above the reference; the last token is masked."""
  mask = jnp.array([[True] * (len(x) - 1) + [False]])
  logprob = jnp.array([x], jnp.float32) - 1.0
  tokens = Tokens(
    mask,
    jnp.full(mask.shape, advantage),
    logprob,
    ref_logprob=jnp.full(mask.shape, -1.0),
  )
  return TokenStats(logprob, jnp.ones(mask.shape)), tokens


X = [0.5, -1.0, 0.0, 7.0]


@pytest.mark.parametrize(
  ('kind', 'gradient', 'value'),
  [
    # (.5 − 1 + 0) / 3.
    ('k1', [1.0, 1.0, 1.0], -1 / 6),
    # (.125 + .5 + 0) / 3.
    ('k2', [0.5, -1.0, 0.0], 0.625 / 3),
    # 1 − e⁻ˣ; (e^−.5 − 1 + .5 + e − 1 − 1 + 0) / 3.
    ('k3', [0.3934693, -1.7182818, 0.0], 0.2749375),
  ],
)
def test_kl_penalty_by_hand(kind, gradient, value):
  penalty = kl_penalty(2.0, value=kind, gradient=kind)
  grads, state = token_gradients(tracked('it', penalty), *_row(X))
  expected = [[*(2.0 * np.array(gradient)), 0.0]]
  np.testing.assert_allclose(grads.logprob, expected, rtol=1e-6, atol=1e-7)
  assert float(state.report['it/kl']) == pytest.approx(value, rel=1e-5)


def test_value_and_gradient_are_chosen_apart():
  # verl's k3+: reported as k3, differentiated as k2.
  for value, gradient in [('k3', 'k2'), ('k1', 'k3'), ('k2', 'k1')]:
    both = {
      kind: token_gradients(
        tracked('it', kl_penalty(0.1, kind, kind)), *_row(X)
      )
      for kind in (value, gradient)
    }
    penalty = tracked('it', kl_penalty(0.1, value=value, gradient=gradient))
    grads, state = token_gradients(penalty, *_row(X))
    np.testing.assert_array_equal(grads.logprob, both[gradient][0].logprob)
    assert state.report['it/kl'] == both[value][1].report['it/kl']
    # Control: the other is another number.
    assert (grads.logprob != both[value][0].logprob).any()
    assert state.report['it/kl'] != both[gradient][1].report['it/kl']


def test_kl_penalty_adds_to_what_came_and_leaves_the_entropy_alone():
  stats, tokens = _row(X, advantage=3.0)
  chain = optax.chain(entropy_bonus(0.5), kl_penalty(2.0, gradient='k2'))
  grads, _ = token_gradients(chain, stats, tokens)
  # −3 + 2x.
  np.testing.assert_allclose(grads.logprob, [[-2.0, -5.0, -3.0, 0.0]])
  np.testing.assert_array_equal(grads.entropy, [[-0.5, -0.5, -0.5, 0.0]])


def test_kl_penalty_at_the_reference_is_silent_but_for_k1():
  # The gradient of k1 is 0 only in the mean over what a policy samples.
  stats, tokens = _row([0.0, 0.0, 0.0, 0.0], advantage=1.0)
  for kind, added in [('k1', 0.5), ('k2', 0.0), ('k3', 0.0)]:
    grads, state = token_gradients(
      tracked('it', kl_penalty(0.5, kind, kind)), stats, tokens
    )
    expected = policy_gradient(stats, tokens).logprob + added * tokens.mask
    np.testing.assert_array_equal(grads.logprob, expected)
    assert float(state.report['it/kl']) == 0.0


def test_kl_penalty_written_after_a_mask_is_on_every_token():
  # As TRL's. The two highest entropies of three keep −A = 1, times 3/2.
  stats, tokens = _row(X, advantage=-1.0)
  stats = stats._replace(entropy=jnp.array([[3.0, 1.0, 2.0, 9.0]]))
  fork, penalty = forking_tokens(0.5), kl_penalty(0.5, gradient='k2')
  grads, _ = token_gradients(optax.chain(fork, penalty), stats, tokens)
  np.testing.assert_allclose(grads.logprob, [[1.75, -0.5, 1.5, 0.0]])
  # Before it, it is masked and rescaled like the rest.
  grads, _ = token_gradients(optax.chain(penalty, fork), stats, tokens)
  np.testing.assert_allclose(grads.logprob, [[1.875, 0.0, 1.5, 0.0]])


@pytest.mark.parametrize('argument', ['value', 'gradient'])
def test_unknown_estimator_is_refused(argument):
  with pytest.raises(ValueError, match=f"{argument}='k4'.*'k1', 'k2', 'k3'"):
    kl_penalty(**{argument: 'k4'})


def test_missing_reference_is_named():
  stats, tokens = _row(X)
  with pytest.raises(ValueError, match='kl_penalty reads tokens.ref_logprob'):
    token_gradients(kl_penalty(), stats, tokens._replace(ref_logprob=None))


# References


@functools.cache
def _batch():
  rng = np.random.default_rng(0)
  mask = rng.random((5, 7)) < 0.7
  old, advantage = rng.normal(-2, 1, (5, 7)), rng.normal(size=(5, 1))
  arrays = (
    np.repeat(advantage, 7, 1),
    old,
    old + rng.normal(0, 0.8, (5, 7)),
    old + rng.normal(0, 0.3, (5, 7)),
  )
  advantage, old, ref, logprob = map(jnp.float32, arrays)
  return TokenStats(logprob), Tokens(
    jnp.array(mask), advantage, old, ref_logprob=ref
  )


def _estimate(kind, logprob, ref):
  """As verl's kl_penalty writes them."""
  if kind == 'k1':
    return logprob - ref
  if kind == 'k2':
    return 0.5 * jnp.square(logprob - ref)
  return jnp.exp(ref - logprob) - (ref - logprob) - 1


def _grpo(logprob, tokens, coef, kind):
  """DeepSeekMath's objective, as a loss."""
  mask, advantage, old = tokens[:3]
  ratio = jnp.exp(logprob - old)
  gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
  gain -= coef * _estimate(kind, logprob, tokens.ref_logprob)
  rows = jnp.sum(gain * mask, 1) / jnp.sum(mask, 1)
  return -jnp.mean(rows)


@functools.cache
def _slopes():
  """Of GRPO without a penalty, and with each."""
  stats, tokens = _batch()
  slope = jax.jit(jax.grad(_grpo), static_argnames='kind')
  with_each = {k: slope(stats.logprob, tokens, 0.3, kind=k) for k in KINDS}
  return {'none': slope(stats.logprob, tokens, 0.0, kind='k1')} | with_each


@pytest.mark.parametrize('kind', KINDS)
def test_grpo_with_a_penalty_is_the_gradient_of_the_published_loss(kind):
  stats, tokens = _batch()
  assert tokens.mask.any(axis=1).all()
  penalty = tracked('it', kl_penalty(0.3, kind, kind))
  chain = optax.chain(clip_ratio(), penalty, sequence_mean_token_mean())
  found, state = token_gradients(chain, stats, tokens)
  slopes = dict(_slopes())
  expected = slopes.pop(kind)
  np.testing.assert_allclose(found.logprob, expected, rtol=1e-4, atol=1e-7)
  # Control: no other penalty, and none, says this.
  for other in slopes.values():
    assert np.abs(other - expected).max() > 1e-3
  values = np.asarray(_estimate(kind, stats.logprob, tokens.ref_logprob))
  kl = values[np.asarray(tokens.mask)].mean()
  assert float(state[1].report['it/kl']) == pytest.approx(kl, rel=1e-4)


# Theory


@pytest.mark.parametrize('kind', KINDS)
def test_mean_gradient_of_each_estimator_is_that_of_its_divergence(kind):
  # Eight tokens as often as their probabilities 1/2, 1/4, 1/8, 1/8 say, so
  # that the mean over the batch is the expectation under the policy.
  actions = jnp.array([[0, 0, 0, 0, 1, 1, 2, 3]])
  logits = jnp.log(jnp.array([1 / 2, 1 / 4, 1 / 8, 1 / 8]))
  ref = jax.nn.log_softmax(jnp.array([0.3, -0.8, 0.5, 0.1]))
  tokens = Tokens(
    jnp.ones((1, 8), bool),
    jnp.zeros((1, 8)),
    logits[actions],
    ref_logprob=ref[actions],
  )
  penalty = tracked('it', kl_penalty(1.0, kind, kind))
  loss = as_loss(optax.chain(penalty, token_mean()))

  def sampled(z):
    return loss(TokenStats(jax.nn.log_softmax(z)[actions]), tokens)

  def reverse(z):
    logp = jax.nn.log_softmax(z)
    return jnp.sum(jnp.exp(logp) * (logp - ref))

  def forward(z):
    return jnp.sum(jnp.exp(ref) * (ref - jax.nn.log_softmax(z)))

  found, state = jax.grad(sampled, has_aux=True)(logits)
  # KL(current ‖ reference) and KL(reference ‖ current).
  expected = {
    'k1': jnp.zeros(4), 'k2': jax.grad(reverse)(logits),
    'k3': jax.grad(forward)(logits),
  }  # fmt: skip
  np.testing.assert_allclose(found, expected.pop(kind), atol=1e-6)
  for other in expected.values():
    assert np.abs(found - other).max() > 1e-2
  # As a value k1 and k3 are the divergence itself, k2 is not.
  kl = float(state[0].report['it/kl'])
  assert (kl == pytest.approx(float(reverse(logits)), abs=1e-6)) == (
    kind != 'k2'
  )


def test_tokens_beyond_twenty_nats_are_not_pulled():
  far = jnp.array([[19.0, 21.0, jnp.inf]])
  stats = TokenStats(jnp.array([[-1.0, -1.0, -1.0]]) - far)
  tokens = Tokens(
    jnp.ones((1, 3), bool),
    jnp.zeros((1, 3)),
    stats.logprob,
    ref_logprob=jnp.full((1, 3), -1.0),
  )
  grads, _ = token_gradients(kl_penalty(0.5, gradient='k2'), stats, tokens)
  np.testing.assert_allclose(grads.logprob, [[-9.5, 0.0, 0.0]])
