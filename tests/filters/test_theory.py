"""What token gradients do to entropy: exact identities of a tabular softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_rlvr.filters import clip_cov, kl_cov, token_sum
from jax_rlvr.policy_gradient import as_loss
from jax_rlvr.records import Tokens, TokenStats

STATES, ACTIONS = 16, 12


def _states(seed=0):
  """One token in each of many states: logits, what was sampled, advantages."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(0, 1.5, (STATES, ACTIONS))
  action = rng.integers(0, ACTIONS, STATES)
  advantage = rng.normal(0, 1, STATES)
  return logits, action, advantage


def _log_softmax(logits):
  logits = logits - logits.max(axis=-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def _entropy(logits):
  log_p = _log_softmax(logits)
  return -(np.exp(log_p) * log_p).sum(axis=-1)


def _step(filters, logits, action, advantage):
  """What a chain's gradient adds to the logits at rate 1, float64."""
  logits = jnp.array(logits, jnp.float32)
  taken = jnp.array(action)[:, None]

  def logprob(logits):
    return jnp.take_along_axis(jax.nn.log_softmax(logits), taken, axis=1)

  tokens = Tokens(
    jnp.ones((STATES, 1), bool),
    jnp.array(advantage, jnp.float32)[:, None],
    logprob(logits),
  )
  loss = as_loss(filters)
  grads, _ = jax.grad(
    lambda z: loss(TokenStats(logprob(z)), tokens, jax.random.key(0)),
    has_aux=True,
  )(logits)
  return -np.asarray(grads, np.float64)


def _predicted(logits, action, advantage):
  """dH per unit of rate: −A [p (lp + H) − (S2L + H · S2)] in each state."""
  log_p, h = _log_softmax(logits), _entropy(logits)
  p = np.exp(log_p)
  taken = np.arange(STATES), action
  s2, s2l = (p**2).sum(axis=-1), (p**2 * log_p).sum(axis=-1)
  return -advantage * (p[taken] * (log_p[taken] + h) - (s2l + h * s2))


def test_entropy_change_of_a_token_is_the_exact_identity():
  logits, action, advantage = _states()
  step = _step(token_sum(1.0), logits, action, advantage)
  slope = _predicted(logits, action, advantage)
  errors = []
  for eta in (1e-1, 1e-2, 1e-3):
    change = _entropy(logits + eta * step) - _entropy(logits)
    errors.append(np.abs(change / eta - slope).max())
  # First order: ten times smaller steps, ten times smaller errors.
  assert errors[0] == pytest.approx(10 * errors[1], rel=0.25)
  assert errors[1] == pytest.approx(10 * errors[2], rel=0.25)
  assert errors[2] < 0.01 * np.abs(slope).max()


def test_the_short_form_of_the_identity_is_another_number():
  # Control: −A p (lp + H), as often quoted, misses a state by more than half.
  logits, action, advantage = _states()
  log_p, h = _log_softmax(logits), _entropy(logits)
  taken = np.arange(STATES), action
  short = -advantage * np.exp(log_p[taken]) * (log_p[taken] + h)
  slope = _predicted(logits, action, advantage)
  assert np.abs(short / slope - 1).max() > 0.5


def test_the_identity_means_the_covariance():
  # Weighed by their probabilities, the identities of a state's actions add up
  # to Theorem 1: −Cov(log π, π · A), A centred.
  logits = _states()[0][:1]
  log_p = _log_softmax(logits)[0]
  p = np.exp(log_p)
  advantage = np.random.default_rng(1).normal(size=ACTIONS)
  advantage -= (p * advantage).sum()
  h, s2, s2l = -(p * log_p).sum(), (p**2).sum(), (p**2 * log_p).sum()
  identity = -advantage * (p * (log_p + h) - (s2l + h * s2))
  x, y = log_p, p * advantage
  covariance = (p * (x - (p * x).sum()) * (y - (p * y).sum())).sum()
  assert (p * identity).sum() == pytest.approx(-covariance, rel=1e-9)


def test_on_policy_kl_cov_is_exactly_the_policy_gradient():
  plain = _step(token_sum(1.0), *_states())
  held = _step(optax.chain(kl_cov(0.5), token_sum(1.0)), *_states())
  np.testing.assert_array_equal(held, plain)
  # Control: Clip-Cov acts on policy too.
  dropped = _step(
    optax.chain(clip_cov(0.5, 0.0, np.inf), token_sum(1.0)), *_states()
  )
  assert (dropped != plain).any()
