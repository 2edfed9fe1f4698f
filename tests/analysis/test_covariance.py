"""Covariances by hand, by loops, and against what they are to predict."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jax_rlvr import evidence
from jax_rlvr.analysis import covariance
from jax_rlvr.records import Completion, Prompt, Rollout, Tokens, TokenStats


def entropy_of(logits):
  p = np.exp(logits) / np.exp(logits).sum()
  return -np.sum(p * np.log(p))


@pytest.mark.parametrize(
  'natural, golden, change',
  [(False, 0.0894233558, -8.946066e-5), (True, 0.3201119198, -3.203354e-4)],
)
def test_theorems_predict_the_change_of_entropy(natural, golden, change):
  z, a = np.array([1, 0.5, -0.2, -1]), np.array([1, -0.5, 0.3, -1.2])
  p = np.exp(z) / np.exp(z).sum()
  a = a - p @ a
  assert entropy_of(z) == pytest.approx(1.17227618, abs=1e-8)
  predicted = covariance.tabular(z, a, natural=natural)
  assert predicted == pytest.approx(golden, abs=1e-10)
  errors = []
  for lr in (1e-3, 1e-4):
    step = z + lr * (a if natural else p * a)
    moved = entropy_of(step) - entropy_of(z)
    if lr == 1e-3:
      assert moved == pytest.approx(change, rel=1e-6)
    errors.append(abs(moved / (-lr * predicted) - 1))
  assert errors[1] == pytest.approx(errors[0] / 10, rel=0.1)


def test_tabular_takes_many_distributions():
  rng = np.random.default_rng(0)
  z, a = rng.normal(size=(2, 3, 5, 7))
  found = covariance.tabular(z, a)
  assert found.shape == (3, 5)
  p = np.exp(z[2, 4]) / np.exp(z[2, 4]).sum()
  expected = sum(
    p[i] * (np.log(p[i]) - p @ np.log(p)) * (a[2, 4, i] - p @ a[2, 4])
    for i in range(7)
  )
  assert found[2, 4] == pytest.approx(expected)


# The golden batch of KL-Cov.
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)
STATS = TokenStats(
  jnp.array([[-0.8, -1.2, -0.6, -1.1], [-1.1, -0.9, -1.4, -0.7]])
)
TOKENS = Tokens(
  mask=jnp.array(MASK),
  advantage=jnp.array([[1.5, -0.5, 2, 0.8], [0.5, 1, -1.5, 1.2]]),
  old_logprob=jnp.full((2, 4), -1.0),
)
GOLDEN = [
  0.20510204, 0.19367347, 0.60367347, -0.02204082, 0.00367347, 0.0522449,
  0.78795918,
]  # fmt: skip


def test_tokenwise_covariance_is_the_golden_one():
  found = covariance.tokenwise(STATS, TOKENS)
  np.testing.assert_allclose(found, GOLDEN, atol=1e-7)


def test_table_has_the_means_of_the_highest():
  found = covariance.table(GOLDEN, (2e-4, 0.2, 0.5, 1.0))
  # ⌊0.2 · 7⌋ = 1 and ⌊0.5 · 7⌋ = 3; of 2e-4 there is one at the least.
  expected = {
    2e-4: 0.78795918,
    0.2: 0.78795918,
    0.5: (0.78795918 + 0.60367347 + 0.20510204) / 3,
    1.0: sum(GOLDEN) / 7,
  }
  assert found == pytest.approx(expected)


def test_table_is_what_training_logs():
  rng = np.random.default_rng(0)
  mask = rng.random((40, 300)) < 0.7
  logprob, advantage = rng.normal(size=(2, 40, 300)).astype(np.float32)
  stats = TokenStats(jnp.array(logprob))
  tokens = Tokens(jnp.array(mask), jnp.array(advantage), stats.logprob)
  logged = evidence.summary(stats, tokens)
  found = covariance.table(covariance.tokenwise(stats, tokens))
  for share in covariance.SHARES[:-1]:
    assert found[share] == pytest.approx(
      float(logged[f'covariance/top_{share:g}']), rel=1e-5
    )
  assert found[1.0] == pytest.approx(
    float(logged['covariance/mean']), rel=1e-4, abs=1e-6
  )


def test_table_leaves_out_what_is_not_finite():
  found = covariance.table([1.0, -np.inf, np.nan, 3.0], (0.5, 1.0))
  # ⌊0.5 · 4⌋ = 2 tokens, and two are finite.
  assert found == {0.5: 2.0, 1.0: 2.0}


def test_prompt_of_two_by_hand():
  found = covariance.promptwise([[math.log(0.5), math.log(0.25)]], [[1, -1]])
  # log π is ±(ln 2)/2 about its mean, π·A = 0.5 and −0.25 is ±0.375.
  np.testing.assert_allclose(found, [0.375 * math.log(2) / 2])


def test_promptwise_is_that_of_a_loop():
  rng = np.random.default_rng(0)
  logprob = -rng.exponential(size=(5, 8))
  advantage = rng.normal(size=(5, 8))
  valid = rng.random((5, 8)) < 0.6
  valid[3] = np.arange(8) == 2
  valid[4] = False
  found = covariance.promptwise(logprob, advantage, valid)
  for p in range(3):
    chosen = [k for k in range(8) if valid[p, k]]
    log = [logprob[p, k] for k in chosen]
    pushed = [math.exp(logprob[p, k]) * advantage[p, k] for k in chosen]
    expected = np.mean(
      [
        (x - np.mean(log)) * (y - np.mean(pushed))
        for x, y in zip(log, pushed, strict=True)
      ]
    )
    assert found[p] == pytest.approx(expected)
  assert np.isnan(found[3:]).all()


def test_sequences_are_length_normalised_and_know_who_is_missing():
  stats = TokenStats(np.array([[0, -1.0, -3.0], [9, -2.0, 9], [0, 0, 0]]))
  mask = np.array([[0, 1, 1], [0, 1, 0], [0, 0, 0]], bool)
  tokens = Tokens(mask, np.array([[0, 2.0, 2], [0, -2, 0], [5, 5, 5]]), mask)
  found = covariance.sequences(stats, tokens, group_size=3)
  assert found.logprob.tolist() == [[-2.0, -2.0, 0.0]]
  assert found.advantage.tolist() == [[2.0, -2.0, 0.0]]
  assert found.valid.tolist() == [[True, True, False]]


def test_difficulty_is_told_by_the_edges():
  values = [1.0, 2, 3, 4, 5, math.nan]
  accuracy = [0.0, 0.25, 1 / 3, 0.5, 1.0, 0.9]
  found = covariance.by_difficulty(values, accuracy)
  np.testing.assert_allclose(found, [1.5, 3.5, 5.0])
  # Each accuracy of four completions by itself.
  found = covariance.by_difficulty(values, accuracy, (0.2, 0.45, 0.7))
  np.testing.assert_allclose(found, [1.0, 2.5, 4.0, 5.0])
  assert np.isnan(covariance.by_difficulty([1.0], [0.9])[0])


def rollout(probability, reward, length=2):
  ids = np.zeros(length, np.int32)
  logprob = np.full(length, math.log(probability), np.float32)
  return Rollout(
    prompt=Prompt(messages=(), answer=''),
    prompt_ids=ids, ids=ids, logprob=logprob, sampled_logprob=logprob,
    entropy=logprob, versions=ids, completion=Completion(text=''),
    reward=reward, outcome=reward,
  )  # fmt: skip


def test_rollouts_of_a_step_are_summed_up():
  rollouts = [
    # One of four right; the third has no score.
    rollout(0.5, 1.0), rollout(0.25, 0.0, 5), rollout(0.1, None),
    rollout(0.25, 0.0),
    # All right: nothing to learn.
    rollout(0.5, 1.0), rollout(0.25, 1.0), rollout(0.1, 1.0), rollout(0.2, 1.0),
  ]  # fmt: skip
  advantages = np.array([[2, -1, 0, -1], [0, 0, 0, 0]], np.float32)
  found = covariance.of_rollouts(rollouts, advantages)
  # Of 0.5, 0.25, 0.25: log π is ln 2 · (2, −1, −1)/3 about its mean; π·A is
  # 1, −0.25, −0.25, so (5, −2.5, −2.5)/6 about its own; the mean product is
  # ln 2 · (10 + 2.5 + 2.5)/18/3.
  first = math.log(2) * 15 / 54
  # A third of those with a score is right: at the edge.
  assert found == pytest.approx(
    {'covariance/prompts': first / 2, 'covariance/prompts/middle': first}
  )
  assert covariance.of_rollouts([], np.zeros(0)) == {}


def test_changes_set_a_step_beside_the_entropy_after_it():
  rows = [
    {'step': 1, 'covariance/mean': 0.3, 'entropy/sequence_mean': 1.0},
    {'step': 2, 'covariance/mean': 0.2, 'entropy/sequence_mean': 0.7},
    {'step': 3, 'covariance/mean': 0.1, 'entropy/sequence_mean': 0.6},
    {'step': 5, 'covariance/mean': 0.1, 'entropy/sequence_mean': 0.2},
    {'step': 6, 'entropy/sequence_mean': 0.1},
    {'step': 7, 'covariance/mean': 0.9, 'entropy/sequence_mean': 0.1},
  ]
  found = covariance.changes(rows, 'covariance/mean')
  assert found.step.tolist() == [1, 2, 5]
  assert found.covariance.tolist() == [0.3, 0.2, 0.1]
  np.testing.assert_allclose(found.fall, [0.3, 0.1, 0.1])
  expected = np.corrcoef([0.3, 0.2, 0.1], [0.3, 0.1, 0.1])[0, 1]
  assert found.correlation == pytest.approx(expected)
  assert covariance.changes(rows).step.size == 0
  assert math.isnan(covariance.changes(rows).correlation)


def test_changes_of_a_policy_that_follows_the_theory_have_its_learning_rate():
  rng = np.random.default_rng(0)
  z, rows = rng.normal(size=(50, 6)), []
  advantage = rng.normal(size=(50, 6))
  for step in range(1, 41):
    rows.append(
      {
        'step': step,
        'entropy/sequence_mean': np.mean([entropy_of(x) for x in z]),
        'covariance/prompts': covariance.tabular(z, advantage).mean(),
      }
    )
    z = z + 0.01 * advantage
  found = covariance.changes(rows)
  assert found.step.size == 39
  assert found.correlation > 0.999
  assert found.line.slope == pytest.approx(0.01, rel=0.02)
