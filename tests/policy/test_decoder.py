"""The decoder against a transcription in NumPy float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rlvr import policy

TIED = policy.PolicyConfig(
  vocab_size=11,
  layers=2,
  width=12,
  heads=4,
  kv_heads=2,
  head_size=6,
  feed_forward=10,
  rope_theta=100.0,
  norm_eps=1e-3,
)
forward = jax.jit(policy.forward, static_argnums=0)
UNTIED = dataclasses.replace(TIED, tied_embeddings=False)
IDS = np.random.default_rng(0).integers(0, 11, (2, 7)).astype(np.int32)


def weights(config):
  """Random ones, norms included, so that each of them matters."""
  leaves, tree = jax.tree.flatten(policy.init(config, jax.random.key(0)))
  draw = np.random.default_rng(1)
  noisy = [x * draw.uniform(0.5, 2.0, x.shape).astype('f') for x in leaves]
  return tree.unflatten(noisy)


def norm(x, weight, eps):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rope(head, theta):
  """Rotates entry i with entry i + H/2 of [T, H] by t · theta^(−2i/H)."""
  out = head.copy()
  size = head.shape[1]
  for t in range(len(head)):
    for i in range(size // 2):
      angle = t * theta ** (-2 * i / size)
      a, b = head[t, i], head[t, i + size // 2]
      out[t, i] = a * np.cos(angle) - b * np.sin(angle)
      out[t, i + size // 2] = b * np.cos(angle) + a * np.sin(angle)
  return out


def reference(c, params, ids):
  """Logits [T, V] of one sequence, heads and positions in loops."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  x = params['embed'][ids]
  for layer in range(c.layers):
    w = {name: x[layer] for name, x in params['blocks'].items()}
    h = norm(x, w['attention_norm'], c.norm_eps)
    mixed = np.zeros((len(ids), c.heads, c.head_size))
    for n in range(c.heads):
      shared = n // (c.heads // c.kv_heads)
      query = rope(h @ w['query'][:, n], c.rope_theta)
      key = rope(h @ w['key'][:, shared], c.rope_theta)
      value = h @ w['value'][:, shared]
      for t in range(len(ids)):
        score = np.exp(key[: t + 1] @ query[t] / np.sqrt(c.head_size))
        mixed[t, n] = score / score.sum() @ value[: t + 1]
    x = x + np.einsum('tnh,nhd->td', mixed, w['output'])
    h = norm(x, w['feed_forward_norm'], c.norm_eps)
    gate = h @ w['gate']
    x = x + (gate / (1 + np.exp(-gate)) * (h @ w['up'])) @ w['down']
  head = params['head'] if 'head' in params else params['embed'].T
  return norm(x, params['norm'], c.norm_eps) @ head


@pytest.mark.parametrize('config', [TIED, UNTIED], ids=['tied', 'untied'])
def test_logits_equal_a_numpy_decoder(config):
  params = weights(config)
  logits = policy.logits(config, params, forward(config, params, IDS))
  expected = np.stack([reference(config, params, ids) for ids in IDS])
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_later_token_leaves_earlier_hidden_states():
  params = weights(TIED)
  changed = IDS.copy()
  changed[:, 4] = (IDS[:, 4] + 1) % 11
  before = np.asarray(forward(TIED, params, IDS))
  after = np.asarray(forward(TIED, params, changed))
  np.testing.assert_array_equal(before[:, :4], after[:, :4])
  assert (np.abs(before[:, 4:] - after[:, 4:]).max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize('remat', ['dots', 'attention', 'full'])
def test_remat_changes_neither_value_nor_gradient(remat):
  params = weights(TIED)

  def loss(remat):
    def of(params):
      return jnp.sum(policy.forward(TIED, params, IDS, remat=remat) ** 3)

    return jax.jit(jax.value_and_grad(of))(params)

  (with_remat, grad), (without, straight) = loss(remat), loss('none')
  np.testing.assert_allclose(with_remat, without, rtol=1e-6)
  for a, b in zip(
    jax.tree.leaves(grad), jax.tree.leaves(straight), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('config', [TIED, UNTIED], ids=['tied', 'untied'])
def test_parameters_are_a_plain_dict_of_known_shapes(config):
  # L, D, N, K, H, F, V = 2, 12, 4, 2, 6, 10, 11
  expected = {
    'embed': (11, 12),
    'norm': (12,),
    'blocks': {
      'attention_norm': (2, 12),
      'query': (2, 12, 4, 6),
      'key': (2, 12, 2, 6),
      'value': (2, 12, 2, 6),
      'output': (2, 4, 6, 12),
      'feed_forward_norm': (2, 12),
      'gate': (2, 12, 10),
      'up': (2, 12, 10),
      'down': (2, 10, 12),
    },
  }
  if not config.tied_embeddings:
    expected['head'] = (12, 11)
  abstract = policy.abstract_params(config)
  assert jax.tree.map(lambda x: x.shape, abstract) == expected
  real = policy.init(config, jax.random.key(3))
  assert jax.tree.map(lambda x: x.shape, real) == expected
  assert {x.dtype for x in jax.tree.leaves(real)} == {jnp.dtype('float32')}


def test_layers_start_from_different_weights():
  query = policy.init(TIED, jax.random.key(0))['blocks']['query']
  assert np.abs(query[0] - query[1]).max() > 0.1


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'kv_heads': 3}, '4 query heads do not divide into 3 key/value heads'),
    ({'head_size': 5}, 'head_size=5 is odd'),
  ],
)
def test_impossible_shape_is_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    dataclasses.replace(TIED, **changes)
