"""Packed rows say the same as padded ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rlvr import policy
from jax_rlvr.packing import pack, padded, rows_needed
from jax_rlvr.records import Tokens
from jax_rlvr.token_stats import token_stats

CONFIG = policy.PolicyConfig(
  vocab_size=40,
  layers=2,
  width=32,
  heads=4,
  kv_heads=2,
  head_size=8,
  feed_forward=48,
)


def batch(prompts=(3, 7, 1), samples=4, longest=9, seed=0) -> Tokens:
  """Groups with a common prompt and completions of any length."""
  draw = np.random.default_rng(seed)
  length = max(prompts) + longest
  ids = np.zeros((len(prompts) * samples, length), np.int32)
  mask = np.zeros(ids.shape, bool)
  lengths = np.zeros(len(ids), np.int32)
  for p, size in enumerate(prompts):
    prompt = draw.integers(0, 40, size)
    for b in range(p * samples, (p + 1) * samples):
      lengths[b] = size + draw.integers(1, longest + 1)
      ids[b, :size] = prompt
      ids[b, size : lengths[b]] = draw.integers(0, 40, lengths[b] - size)
      mask[b, size : lengths[b]] = True
  zeros = np.zeros(ids.shape, np.float32)
  return Tokens(mask, zeros, zeros, ids=ids, lengths=lengths)


def test_pack_of_two_completions_shares_their_prompt():
  ids = np.array([[5, 6, 7, 0], [5, 6, 8, 9], [5, 6, 1, 0]], np.int32)
  mask = np.array([[0, 0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]], bool)
  zeros = np.zeros(ids.shape, np.float32)
  lengths = np.array([3, 4, 3], np.int32)
  rows = pack(Tokens(mask, zeros, zeros, ids=ids, lengths=lengths), 6, rows=2)
  # prompt 5 6, then 7, then 8 9; the third sequence has no mask: no place.
  np.testing.assert_array_equal(rows.ids[0], [5, 6, 7, 8, 9, 0])
  np.testing.assert_array_equal(rows.positions[0], [0, 1, 2, 2, 3, 0])
  np.testing.assert_array_equal(rows.group[0], [0, 0, 0, 0, 0, -1])
  np.testing.assert_array_equal(rows.segment[0], [0, 0, 1, 2, 2, 0])
  # 7 and 8 are both scored from the prompt's last token, in column 1.
  np.testing.assert_array_equal(rows.before[0, 2:5], [1, 1, 3])
  np.testing.assert_array_equal(rows.place[0], [-1, -1, 2, 6, 7, -1])
  assert (rows.place[1] == -1).all()


@pytest.mark.parametrize('row_tokens', [16, 21, 40, 200])
def test_packed_stats_and_gradients_equal_padded_ones(row_tokens):
  tokens = batch()
  params = policy.init(CONFIG, jax.random.key(0))
  packed = pack(tokens, row_tokens, rows=12)
  straight = padded(tokens.ids, tokens.mask)
  pull = np.random.default_rng(1).normal(size=(2, *tokens.ids.shape))
  pull = pull.astype(np.float32) * tokens.mask[None]

  def loss(params, rows):
    stats = token_stats(CONFIG, params, rows, temperature=0.7, chunk_tokens=20)
    index = jnp.maximum(rows.place, 0)
    scored = rows.place >= 0
    parts = [
      jnp.sum(jnp.where(scored, x * jnp.asarray(w).reshape(-1)[index], 0.0))
      for x, w in zip(stats, pull, strict=True)
    ]
    return sum(parts)

  value = jax.jit(jax.value_and_grad(loss))
  (a, grad_a), (b, grad_b) = value(params, packed), value(params, straight)
  np.testing.assert_allclose(a, b, rtol=1e-5)
  difference = jax.tree.map(lambda x, y: jnp.sum((x - y) ** 2), grad_a, grad_b)
  size = sum(jnp.sum(x**2) for x in jax.tree.leaves(grad_b))
  assert sum(jax.tree.leaves(difference)) <= 1e-10 * size
  # Every scored token of the batch has exactly one place.
  places = np.sort(packed.place[packed.place >= 0])
  np.testing.assert_array_equal(places, np.flatnonzero(tokens.mask))


@pytest.mark.parametrize('row_tokens', [16, 25, 34, 43, 100])
def test_rows_needed_is_enough_and_reached(row_tokens):
  needed = rows_needed(3, 4, 7, 9, row_tokens)
  for seed in range(20):
    pack(batch(seed=seed), row_tokens, needed)
  full = batch(prompts=(7, 7, 7))
  full = full._replace(
    mask=np.arange(16)[None] >= 7, lengths=np.full(12, 16, np.int32)
  )
  full = full._replace(mask=np.broadcast_to(full.mask, full.ids.shape))
  pack(full, row_tokens, needed)
  if needed > 3:
    with pytest.raises(ValueError, match='does not fit'):
      pack(full, row_tokens, 2)


def test_sequence_longer_than_a_row_is_refused():
  with pytest.raises(ValueError, match='more than a row of 5'):
    pack(batch(), 5, rows=12)
