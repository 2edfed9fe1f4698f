"""The sampler says what the trainer says, whatever is sampled beside."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rlvr import mesh as layouts
from jax_rlvr import policy
from jax_rlvr.packing import padded
from jax_rlvr.rollout import sample_keys
from jax_rlvr.sampling import sample
from jax_rlvr.token_stats import token_stats

CONFIG = policy.PolicyConfig(
  vocab_size=14,
  layers=2,
  width=16,
  heads=4,
  kv_heads=2,
  head_size=8,
  feed_forward=24,
  tied_embeddings=False,
)
P, G, PROMPT, LIMIT = 8, 4, 6, 10
LENGTHS = np.array([3, 6, 1, 4, 2, 5, 6, 3], np.int32)
IDS = np.random.default_rng(0).integers(2, 14, (P, PROMPT)).astype(np.int32)
IDS = np.where(np.arange(PROMPT) < LENGTHS[:, None], IDS, 0)
KEYS = sample_keys(jax.random.key(7), range(P), G)
END = np.array([1, 5], np.int32)


@pytest.fixture(scope='module')
def params():
  # Twice the scale: a policy that is sure of some tokens and not of others.
  params = policy.init(CONFIG, jax.random.key(0))
  return params | {'head': params['head'] * 2}


def complete(
  params, ids=IDS, lengths=LENGTHS, keys=KEYS, temperature=1.0, end=END
):
  sampled = sample(
    CONFIG, params, ids, lengths, keys, np.float32(temperature), end,
    max_tokens=LIMIT,
  )  # fmt: skip
  return jax.device_get(sampled)


@pytest.fixture(scope='module')
def base(params):
  return complete(params)


def written(sampled):
  return np.arange(LIMIT) < sampled.lengths[..., None]


def same(a, b):
  """Equal tokens, lengths and endings; numbers to float32 rounding."""
  np.testing.assert_array_equal(a.lengths, b.lengths)
  np.testing.assert_array_equal(a.ended, b.ended)
  mask = written(a)
  np.testing.assert_array_equal(a.tokens.ids[mask], b.tokens.ids[mask])
  for x, y in zip(a.tokens[1:], b.tokens[1:], strict=True):
    np.testing.assert_allclose(x[mask], y[mask], atol=1e-5)


def take(sampled, index):
  return jax.tree.map(lambda x: x[index], sampled)


def as_batch(sampled):
  """Prompt and completion as [P · G, T], and where the completion is."""
  ids = np.zeros((P, G, PROMPT + LIMIT), np.int32)
  mask = np.zeros(ids.shape, bool)
  for p, g in np.ndindex(P, G):
    start, size = LENGTHS[p], sampled.lengths[p, g]
    ids[p, g, :start] = IDS[p, :start]
    ids[p, g, start : start + size] = sampled.tokens.ids[p, g, :size]
    mask[p, g, start : start + size] = True
  return ids.reshape(P * G, -1), mask.reshape(P * G, -1)


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_numbers_equal_the_trainers(params, temperature):
  sampled = complete(params, temperature=temperature)
  ids, mask = as_batch(sampled)
  stats = jax.jit(functools.partial(token_stats, CONFIG))(
    params, padded(ids, mask), temperature=temperature
  )
  # [B, T] and [P, G, Tc] list the same tokens in the same order.
  own = written(sampled)
  for mine, theirs in [
    (sampled.tokens.logprob, stats.logprob),
    (sampled.tokens.sampled_logprob, stats.logprob),
    (sampled.tokens.entropy, stats.entropy),
  ]:
    difference = np.abs(mine[own] - np.asarray(theirs)[mask])
    assert difference.mean() <= 1e-5 and difference.max() <= 1e-4
    assert np.abs(mine[own]).mean() > 0.1


def test_numbers_are_close_to_the_trainers_in_bfloat16(params):
  cast = policy.cast(params, jnp.bfloat16)
  sampled = complete(cast)
  ids, mask = as_batch(sampled)
  stats = jax.jit(functools.partial(token_stats, CONFIG))(
    cast, padded(ids, mask)
  )
  own = written(sampled)
  for mine, theirs in [
    (sampled.tokens.logprob, stats.logprob),
    (sampled.tokens.entropy, stats.entropy),
  ]:
    assert mine.dtype == np.float32
    assert np.abs(mine[own] - np.asarray(theirs)[mask]).mean() < 5e-3


def test_completion_stops_with_its_first_end_token(base):
  ids = base.tokens.ids
  for place in np.ndindex(P, G):
    size = base.lengths[place]
    is_end = np.isin(ids[place][:size], END)
    assert not is_end[:-1].any()
    assert is_end[-1] == base.ended[place]
    # Truncated only at the limit.
    assert base.ended[place] or size == LIMIT
  # All three cases occur: both ends and the limit.
  last = np.take_along_axis(ids, base.lengths[..., None] - 1, -1)[..., 0]
  assert set(last[base.ended]) == {1, 5} and not base.ended.all()


def test_end_ids_are_arguments_not_constants(params, base):
  before = sample._cache_size()
  other = complete(params, end=np.array([13, 13], np.int32))
  warmer = complete(params, temperature=1.3)
  assert sample._cache_size() == before
  assert (other.tokens.ids[written(other)] == 13).sum() == other.ended.sum() > 0
  # Until the first end of either the two are one sequence.
  for place in np.ndindex(P, G):
    size = min(base.lengths[place], other.lengths[place])
    np.testing.assert_array_equal(
      base.tokens.ids[place][:size], other.tokens.ids[place][:size]
    )
  assert (warmer.tokens.ids != base.tokens.ids).any()


def test_greedy_is_the_argmax_of_full_forward_passes(params):
  sampled = complete(params, temperature=0, end=np.array([-1, -1], np.int32))
  assert (sampled.lengths == LIMIT).all() and not sampled.ended.any()
  assert (sampled.tokens.sampled_logprob == 0).all()

  @jax.jit
  def logits(ids):
    return policy.logits(CONFIG, params, policy.forward(CONFIG, params, ids))

  ids = np.pad(IDS, ((0, 0), (0, LIMIT)))
  rows = np.arange(P)
  for step in range(LIMIT):
    scores = np.asarray(logits(ids))[rows, LENGTHS + step - 1]
    ids[rows, LENGTHS + step] = scores.argmax(-1)
    for g in range(G):
      np.testing.assert_array_equal(
        sampled.tokens.ids[:, g, step], scores.argmax(-1)
      )


def test_completion_is_the_same_in_another_order(params, base):
  order = np.array([5, 2, 7, 0, 1, 6, 4, 3])
  mixed = complete(params, IDS[order], LENGTHS[order], KEYS[order])
  same(mixed, take(base, order))


def test_completion_is_the_same_beside_other_prompts(params, base):
  # Only prompt 3 stays, with its keys.
  ids, lengths = np.roll(IDS, 2, axis=1), np.full(P, 2, np.int32)
  ids[3], lengths[3] = IDS[3], LENGTHS[3]
  keys = sample_keys(jax.random.key(8), range(P), G)
  keys = jnp.where((np.arange(P) == 3)[:, None], KEYS, keys)
  other = complete(params, ids, lengths, keys)
  same(take(other, 3), take(base, 3))
  assert (other.tokens.ids != base.tokens.ids).any()


def test_completion_is_the_same_alone_in_its_group(params, base):
  alone = complete(params, keys=KEYS[:, 2:3])
  same(alone, take(base, (slice(None), slice(2, 3))))


def test_completion_is_the_same_with_wider_prompts(params, base):
  # What pads is no matter either.
  wide = np.pad(IDS, ((0, 0), (0, 3)), constant_values=9)
  same(complete(params, ids=wide), base)


def test_eight_devices_sample_what_one_does(params, base):
  mesh = layouts.make()
  weights = layouts.place(mesh, params, layouts.SAMPLING)
  rows = layouts.place_rows(mesh, (IDS, LENGTHS, KEYS))
  same(complete(weights, *rows), base)


def test_group_and_tokens_draw_from_keys_of_their_own(base):
  ids = base.tokens.ids
  assert len({tuple(row) for row in ids[1]}) > 1
  assert len(set(ids[written(base)])) > 5
