"""Chunked statistics against a dense log-softmax and its autodiff."""

import dataclasses
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
  hidden = policy.forward(CONFIG, params, ROWS.ids)
  return facts(policy.logits(CONFIG, params, hidden), temperature)


def facts(scores, temperature):
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
    stats = list(stats_of(params, temperature, **fixed))[:2]
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
  for x in map(np.asarray, jax.tree.leaves(stats)):
    assert (x[~MASK] == 0).all() and (x[MASK] != 0).all()
  nothing = padded(IDS, np.zeros_like(MASK))
  for x in jax.tree.leaves(token_stats(CONFIG, params, nothing)):
    np.testing.assert_array_equal(x, np.zeros((B, T)))


def largest_logits(function, params):
  """Most positions of any array [..., V] or [V, ...] in the executable."""
  text = function.lower(params, 0.7).compile().as_text()
  shapes = {
    tuple(map(int, found.split(',')))
    for found in re.findall(r'f32\[([\d,]+)\]', text)
  }
  # The head's own shape, and its transpose, are parameters; the gradient has
  # an axis for the shards.
  with_vocabulary = [
    shape
    for shape in shapes
    if V in shape and sorted(n for n in shape if n > 1) != [16, V]
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


def test_extras_are_dense_reductions_and_cost_nothing_unasked(params):
  names = ('p2', 'p2_logp', 'logit', 'confidence')
  stats = token_stats(
    CONFIG, params, ROWS, temperature=0.7, chunk_tokens=6, extras=names
  )
  hidden = policy.forward(CONFIG, params, ROWS.ids)
  scores = policy.logits(CONFIG, params, hidden)[:, :-1] / 0.7
  p = jax.nn.softmax(scores)
  expected = {
    'p2': jnp.sum(p**2, -1),
    'p2_logp': jnp.sum(p**2 * jnp.log(p), -1),
    'logit': jnp.take_along_axis(scores, IDS[:, 1:, None], axis=-1)[..., 0],
    'confidence': jax.nn.logsumexp(scores, -1) - jnp.mean(scores, -1),
  }
  for name, want in expected.items():
    want = np.where(MASK, np.pad(want, ((0, 0), (1, 0))), 0)
    np.testing.assert_allclose(
      getattr(stats, name), want, rtol=1e-5, atol=1e-6, err_msg=name
    )
  plain = token_stats(CONFIG, params, ROWS, temperature=0.7, chunk_tokens=6)
  np.testing.assert_array_equal(plain.entropy, stats.entropy)
  assert plain.p2 is plain.p2_logp is plain.logit is plain.confidence is None


def test_soft_capped_logits_have_their_slope():
  config = dataclasses.replace(CONFIG, logit_softcap=3.0)
  params = policy.init(config, jax.random.key(1))
  params['head'] *= 5.0  # Far into the cap.

  def loss(stats_of):
    def run(params):
      stats = list(stats_of(params))[:2]
      return sum(jnp.sum(p * x) for p, x in zip(PULL, stats, strict=True))

    return jax.jit(jax.value_and_grad(run))(params)

  def capped(params):
    scores = policy.logits(
      config, params, policy.forward(config, params, ROWS.ids)
    )
    assert config.logit_softcap
    return facts(scores, 1.0)

  value, grads = loss(lambda p: token_stats(config, p, ROWS, chunk_tokens=12))
  want_value, want = loss(capped)
  np.testing.assert_allclose(value, want_value, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
  # Control: without the cap the value is another.
  assert abs(value - loss(lambda p: token_stats(CONFIG, p, ROWS))[0]) > 0.1


def cosine(a, b):
  a, b = (
    np.concatenate(
      [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    )
    for tree in (a, b)
  )
  return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize('tied', [False, True])
def test_bfloat16_is_close_to_float32(tied):
  config = dataclasses.replace(
    CONFIG, tied_embeddings=tied, qkv_bias=True, qk_norm=True
  )
  params = policy.init(config, jax.random.key(0))

  def loss(params, dtype):
    stats = token_stats(config, policy.cast(params, dtype), ROWS)
    return jnp.sum(PULL * jnp.stack([stats.logprob, stats.entropy])), stats

  run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
  exact, wanted = run(params, jnp.float32)
  grads, stats = run(params, jnp.bfloat16)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((grads, stats)))
  assert cosine(grads, exact) > 0.99
  for name, grad in grads['blocks'].items():
    assert cosine(grad, exact['blocks'][name]) > 0.99, name
  difference = np.abs(stats.logprob - wanted.logprob)[MASK]
  # Control: it is not float32 under another name.
  assert 1e-5 < difference.mean() < 2e-2


def test_norms_and_biases_keep_their_type():
  config = dataclasses.replace(CONFIG, qkv_bias=True, qk_norm=True)
  cast = policy.cast(policy.abstract_params(config), jnp.float32)
  cast = jax.eval_shape(lambda p: policy.cast(p, jnp.bfloat16), cast)
  blocks = {name for name, x in cast['blocks'].items() if x.dtype == 'float32'}
  assert blocks == {
    'attention_norm', 'feed_forward_norm', 'query_norm', 'key_norm',
    'query_bias', 'key_bias', 'value_bias',
  }  # fmt: skip
  assert cast['norm'].dtype == 'float32'
  assert cast['embed'].dtype == cast['head'].dtype == 'bfloat16'


@pytest.mark.parametrize('name', ['head', 'embed'])
def test_many_small_gradients_add_up_in_bfloat16(name):
  """2,048 equal shares: a bfloat16 sum would stop at 256 of them."""
  count = 2048
  ids = np.full((1, count + 1), 3, np.int32)
  mask = np.ones(ids.shape, bool)
  mask[0, 0] = False
  rows = padded(ids, mask)

  @functools.partial(jax.jit, static_argnums=1)
  def gradient(params, dtype):
    # Chunks of 8 tokens; the mean of hidden states is what all of them see.
    return jax.grad(
      lambda p: jnp.sum(token_stats(CONFIG, p, rows, chunk_tokens=8).logprob)
    )(jax.tree.map(lambda x: x.astype(dtype), params))[name]

  params = policy.init(CONFIG, jax.random.key(0))
  exact = np.asarray(gradient(params, jnp.float32))
  found = np.asarray(gradient(params, jnp.bfloat16), np.float32)
  assert np.linalg.norm(found - exact) < 0.05 * np.linalg.norm(exact)
