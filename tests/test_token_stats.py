"""Chunked statistics against a dense log-softmax and its autodiff."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rlvr import policy
from jax_rlvr.packing import padded
from jax_rlvr.token_stats import token_stats

# V is a prime that no other dimension is, to find it in compiled text.
V = 41
CONFIG = policy.PolicyConfig(
  vocab_size=V,
  layers=1,
  width=16,
  heads=2,
  kv_heads=1,
  head_size=8,
  feed_forward=16,
  tied_embeddings=False,
)
B, T = 3, 14
DRAW = np.random.default_rng(0)
IDS = DRAW.integers(0, V, (B, T)).astype(np.int32)
# Prompts of 1, 4 and 6 tokens, completions to 9, 14 and 7; one hole.
MASK = np.zeros((B, T), bool)
MASK[0, 1:9] = MASK[1, 4:14] = MASK[2, 6:7] = True
MASK[1, 8] = False
ROWS = padded(IDS, MASK)
PULL = DRAW.normal(size=(2, B, T)).astype(np.float32)


@pytest.fixture(scope='module')
def params():
  return policy.init(CONFIG, jax.random.key(0))


def dense(params, temperature):
  scores = policy.logits(params, policy.forward(CONFIG, params, ROWS.ids))
  logprobs = jax.nn.log_softmax(scores[:, :-1] / temperature)
  picked = jnp.take_along_axis(logprobs, IDS[:, 1:, None], axis=-1)[..., 0]
  entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
  shift = ((0, 0), (1, 0))
  return [
    jnp.where(MASK, jnp.pad(x, shift), 0.0) for x in (picked, entropy)
  ]  # fmt: skip


def chunked(params, temperature, chunk_tokens):
  return token_stats(
    CONFIG, params, ROWS, temperature=temperature, chunk_tokens=chunk_tokens
  )


def with_gradient(stats_of, **fixed):
  def loss(params, temperature):
    stats = list(stats_of(params, temperature, **fixed))
    return sum(jnp.sum(p * x) for p, x in zip(PULL, stats, strict=True)), stats

  return jax.jit(jax.grad(loss, has_aux=True))


@pytest.fixture(scope='module')
def expected(params):
  run = with_gradient(dense)
  return {t: run(params, t) for t in (1.0, 0.7)}


@pytest.mark.parametrize('chunk_tokens', [1, 12, 10_000])
def test_stats_and_gradients_equal_dense_ones(params, expected, chunk_tokens):
  run = with_gradient(chunked, chunk_tokens=chunk_tokens)
  for temperature, (want_grad, want) in expected.items():
    grad, stats = run(params, temperature)
    for a, b in zip(stats, want, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(
      jax.tree.leaves(grad), jax.tree.leaves(want_grad), strict=True
    ):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


def test_temperature_changes_the_stats(expected):
  warm, cool = expected[1.0][1], expected[0.7][1]
  assert np.abs(warm[0] - cool[0]).max() > 0.1
  # Cooler is surer.
  assert (np.asarray(warm[1] - cool[1])[MASK] > 0).all()


def test_unscored_tokens_are_zero(params):
  stats = token_stats(CONFIG, params, ROWS, chunk_tokens=12)
  for x in map(np.asarray, stats):
    assert (x[~MASK] == 0).all() and (x[MASK] != 0).all()
  nothing = padded(IDS, np.zeros_like(MASK))
  for x in token_stats(CONFIG, params, nothing):
    np.testing.assert_array_equal(x, np.zeros((B, T)))


def largest_logits(function, params):
  """Most positions of any array [..., V] or [V, ...] in the executable."""
  text = function.lower(params, 0.7).compile().as_text()
  shapes = {
    tuple(map(int, found.split(',')))
    for found in re.findall(r'f32\[([\d,]+)\]', text)
  }
  # The head's own shape, and its transpose, are parameters.
  with_vocabulary = [
    shape for shape in shapes if V in shape and sorted(shape) != [16, V]
  ]
  return max(int(np.prod(shape)) // V for shape in with_vocabulary)


def test_logits_of_a_whole_row_never_exist(params):
  # 2 columns of 3 rows at one time, of 14: forward and backward.
  chunks = with_gradient(chunked, chunk_tokens=6)
  assert largest_logits(chunks, params) <= 6
  control = with_gradient(dense)
  assert largest_logits(control, params) >= B * (T - 1)


def test_extreme_logits_stay_finite(params):
  extreme = params | {'head': params['head'] * 1e6}
  run = functools.partial(with_gradient(chunked, chunk_tokens=12), extreme)
  grad, (logprob, entropy) = run(0.7)
  assert np.isfinite(logprob).all() and np.asarray(logprob).min() < -1e5
  assert np.isfinite(entropy).all() and np.abs(entropy).max() < 1e-3
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grad))
