"""Aggregations: by hand, and as loops over sequences."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_rlvr.filters import (
  clip_ratio,
  entropy_bonus,
  sequence_mean_token_mean,
  sequence_mean_token_sum,
  token_mean,
  token_sum,
)
from jax_rlvr.policy_gradient import token_gradients
from jax_rlvr.records import Tokens, TokenStats

# Rows of three, no and one completion tokens.
MASK = np.array([[0, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], bool)


def _batch(mask):
  """On policy with advantage −1: every token gradient is +1."""
  zeros = jnp.zeros(mask.shape)
  tokens = Tokens(jnp.array(mask), zeros - 1.0, zeros)
  return TokenStats(zeros, zeros), tokens


@pytest.mark.parametrize(
  ('aggregate', 'first', 'last'),
  [
    # Four tokens.
    (token_mean(), 1 / 4, 1 / 4),
    # Two rows that exist: 1/2 · 1/3 and 1/2 · 1.
    (sequence_mean_token_mean(), 1 / 6, 1 / 2),
    # Two rows that exist, over the constant.
    (sequence_mean_token_sum(), 1 / 2, 1 / 2),
    (sequence_mean_token_sum(8), 1 / 16, 1 / 16),
    (sequence_mean_token_sum(8.0), 1 / 16, 1 / 16),
    # Over the constant alone.
    (token_sum(8), 1 / 8, 1 / 8),
  ],
)
def test_aggregation_weighs_tokens_and_ignores_empty_rows(
  aggregate, first, last
):
  chain = optax.chain(entropy_bonus(2.0), aggregate)
  grads, _ = token_gradients(chain, *_batch(MASK))
  weight = np.where(MASK, [[first], [0.0], [last]], 0.0)
  np.testing.assert_allclose(grads.logprob, weight, rtol=1e-6)
  np.testing.assert_allclose(grads.entropy, -2.0 * weight, rtol=1e-6)


AGGREGATES = {
  # Names as verl and TRL have them: rows of token losses → loss.
  'token_mean': (
    token_mean(),
    lambda rows: sum(map(sum, rows)) / sum(map(len, rows)),
  ),
  'sequence_mean_token_mean': (
    sequence_mean_token_mean(),
    lambda rows: np.mean([sum(row) / len(row) for row in rows]),
  ),
  'sequence_mean_token_sum': (
    sequence_mean_token_sum(7),
    lambda rows: np.mean([sum(row) / 7 for row in rows]),
  ),
  'token_sum': (token_sum(7), lambda rows: sum(map(sum, rows)) / 7),
}


@pytest.mark.parametrize('name', AGGREGATES)
def test_aggregation_equals_the_loop_over_sequences(name):
  aggregate, definition = AGGREGATES[name]
  rng = np.random.default_rng(1)
  mask = rng.random((6, 9)) < 0.5
  mask[2] = False
  stats, tokens = _batch(mask)
  advantage = rng.normal(size=mask.shape).astype(np.float32)
  tokens = tokens._replace(advantage=jnp.array(advantage))
  grads, _ = token_gradients(aggregate, stats, tokens)
  # The loss is linear in the token losses: −A on policy, so its value is the
  # sum of the token gradients.
  loss = definition(
    [
      -advantage[b, mask[b]].astype(np.float64)
      for b in range(6)
      if any(mask[b])
    ]
  )
  np.testing.assert_allclose(jnp.sum(grads.logprob), loss, rtol=1e-5)
  # Control: the other aggregations say otherwise.
  for other in AGGREGATES.keys() - {name}:
    grads, _ = token_gradients(AGGREGATES[other][0], stats, tokens)
    assert abs(float(jnp.sum(grads.logprob)) - loss) > 1e-2


@pytest.mark.parametrize('name', AGGREGATES)
def test_empty_rows_do_not_change_the_aggregation(name):
  aggregate, _ = AGGREGATES[name]
  grads, _ = token_gradients(aggregate, *_batch(MASK))
  kept = MASK.any(axis=1)
  alone, _ = token_gradients(aggregate, *_batch(MASK[kept]))
  np.testing.assert_array_equal(grads.logprob[kept], alone.logprob)


def test_token_mean_does_not_depend_on_what_was_clipped():
  # Ratio 2 is clipped; the survivor is still one of two tokens.
  mask = jnp.ones((1, 2), bool)
  stats = TokenStats(jnp.array([[np.log(2.0), 0.0]]), None)
  tokens = Tokens(mask, jnp.ones((1, 2)), jnp.zeros((1, 2)))
  chain = optax.chain(clip_ratio(), token_mean())
  grads, _ = token_gradients(chain, stats, tokens)
  np.testing.assert_array_equal(grads.logprob, [[0.0, -0.5]])


def test_only_token_sum_grows_with_the_batch():
  once, twice = _batch(MASK), _batch(np.concatenate([MASK, MASK]))
  for name, (aggregate, _) in AGGREGATES.items():
    small, large = (
      float(jnp.sum(token_gradients(aggregate, *batch)[0].logprob))
      for batch in (once, twice)
    )
    factor = 2 if name == 'token_sum' else 1
    assert large == pytest.approx(factor * small), name


@pytest.mark.parametrize('length', [2**20, 2.0**20])
def test_sequence_mean_token_sum_takes_long_budgets_of_many_rows(length):
  # 2²⁰ · 2¹² = 2³² would not fit into an integer.
  chain = sequence_mean_token_sum(length)
  grads, _ = token_gradients(chain, *_batch(np.ones((2**12, 1), bool)))
  np.testing.assert_array_equal(grads.logprob, np.full((2**12, 1), 2.0**-32))
