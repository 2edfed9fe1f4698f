"""Packed rows say the same as padded ones, fill up, and balance."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_rlvr import mesh as layouts
from jax_rlvr import policy, update
from jax_rlvr.packing import pack, padded, rows_needed
from jax_rlvr.records import Tokens, TokenStats
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


def of_lengths(prompts, completions, live=None) -> Tokens:
  """Groups of given lengths, [P] and [P, G]; `live` [P] have an advantage."""
  prompts, completions = np.asarray(prompts), np.asarray(completions)
  count, samples = completions.shape
  starts = np.repeat(prompts, samples)
  stops = starts + completions.ravel()
  columns = np.arange(max(stops))
  draw = np.random.default_rng(0)
  text = draw.integers(0, 2**20, (count, max(prompts)), dtype=np.int32)
  ids = draw.integers(0, 2**20, (len(stops), len(columns)), dtype=np.int32)
  mask = (starts[:, None] <= columns) & (columns < stops[:, None])
  for b, start in enumerate(starts):
    ids[b, :start] = text[b // samples, :start]
  advantage = np.zeros(mask.shape, np.float32)
  if live is not None:
    advantage += np.repeat(live, samples)[:, None] & mask
  return Tokens(
    mask, advantage, 0 * advantage, ids=ids, lengths=stops.astype(np.int32)
  )


@functools.cache
def lognormal(prompts=512, samples=8, longest=1024) -> tuple[Tokens, int]:
  """Completions of median longest / 8, prompts of 1 to 6 % of longest.

  Sigma is 1: the mean is a fifth of the longest, and 2 % are cut there. Half
  the groups have no advantage. With the batch, the longest that a sequence can
  be.
  """
  draw = np.random.default_rng(0)
  sizes = draw.integers(longest // 100, longest * 6 // 100, prompts)
  lengths = draw.lognormal(np.log(longest / 8), 1.0, (prompts, samples))
  lengths = np.clip(np.round(lengths), 1, longest).astype(np.int32)
  assert 0.18 < lengths.mean() / longest < 0.22
  assert 0.01 < np.mean(lengths == longest) < 0.03
  tokens = of_lengths(sizes, lengths, np.arange(prompts) % 2 == 0)
  return tokens, longest + longest * 6 // 100 - 1


def filled(rows):
  return (rows.group >= 0).any(axis=-1)


def moved(rows, tokens):
  """Where tokens with an advantage lie."""
  return (rows.place >= 0) & (tokens.advantage.ravel()[rows.place] != 0)


def test_pack_of_two_completions_shares_their_prompt():
  ids = np.array([[5, 6, 7, 0], [5, 6, 8, 9], [5, 6, 1, 0]], np.int32)
  mask = np.array([[0, 0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]], bool)
  zeros = np.zeros(ids.shape, np.float32)
  lengths = np.array([3, 4, 3], np.int32)
  rows = pack(Tokens(mask, zeros, zeros, ids=ids, lengths=lengths), 6, rows=2)
  # prompt 5 6, then 8 9, then 7; the third sequence has no mask: no place.
  np.testing.assert_array_equal(rows.ids[0], [5, 6, 8, 9, 7, 0])
  np.testing.assert_array_equal(rows.positions[0], [0, 1, 2, 3, 2, 0])
  np.testing.assert_array_equal(rows.group[0], [0, 0, 0, 0, 0, -1])
  np.testing.assert_array_equal(rows.segment[0], [0, 0, 1, 1, 2, 0])
  # 8 and 7 are both scored from the prompt's last token, in column 1.
  np.testing.assert_array_equal(rows.before[0, 2:5], [1, 2, 1])
  np.testing.assert_array_equal(rows.place[0], [-1, -1, 6, 7, 2, -1])
  assert (rows.place[1] == -1).all()


def test_pack_without_sharing_is_told_by_groups_alone():
  ids = np.array([[5, 6, 7, 0], [5, 6, 8, 9]], np.int32)
  mask = np.array([[0, 0, 1, 0], [0, 0, 1, 1]], bool)
  zeros = np.zeros(ids.shape, np.float32)
  tokens = Tokens(mask, zeros, zeros, ids=ids, lengths=np.array([3, 4]))
  rows = pack(tokens, 8, rows=1, share_prompts=False)
  np.testing.assert_array_equal(rows.ids[0], [5, 6, 8, 9, 5, 6, 7, 0])
  np.testing.assert_array_equal(rows.positions[0], [0, 1, 2, 3, 0, 1, 2, 0])
  np.testing.assert_array_equal(rows.group[0], [0, 0, 0, 0, 1, 1, 1, -1])
  np.testing.assert_array_equal(rows.segment[0], 0 * rows.ids[0])
  np.testing.assert_array_equal(rows.before[0, [2, 3, 6]], [1, 2, 5])
  np.testing.assert_array_equal(rows.place[0], [-1, -1, 6, 7, -1, -1, 2, -1])


@functools.cache
def scorer():
  """rows → logprob and entropy [2, B, T] of `batch()`, and a gradient."""
  tokens = batch()
  params = policy.init(CONFIG, jax.random.key(0))
  pull = np.random.default_rng(1).normal(size=(2, *tokens.ids.shape))
  pull = jnp.asarray(pull * tokens.mask, jnp.float32)

  def loss(params, rows):
    stats = token_stats(CONFIG, params, rows, temperature=0.7, chunk_tokens=20)
    stats = TokenStats(stats.logprob, stats.entropy)
    stats = jnp.stack(update._unpacked(stats, rows, tokens.ids.shape)[:2])
    return jnp.sum(stats * pull), stats

  value = jax.jit(jax.value_and_grad(loss, has_aux=True))

  def score(rows):
    (_, stats), gradient = value(params, rows)
    return stats, np.concatenate([x.ravel() for x in jax.tree.leaves(gradient)])

  return score


@functools.cache
def padded_scores():
  tokens = batch()
  return scorer()(padded(tokens.ids, tokens.mask))


@pytest.mark.parametrize('row_tokens', [16, 21, 40, 200])
def test_packed_stats_and_gradients_equal_padded_ones(row_tokens):
  stats, gradient = padded_scores()
  for shards, share in ((1, True), (4, True), (1, False)):
    packed = pack(batch(), row_tokens, 12, shards, share)
    found, other = scorer()(packed)
    np.testing.assert_allclose(found, stats, rtol=1e-5, atol=1e-5)
    distance = np.linalg.norm(other - gradient)
    assert distance <= 1e-5 * np.linalg.norm(gradient)


def assert_says(rows, tokens):
  """Each scored token has one place, where it sees its own past in order."""
  places = rows.place[rows.place >= 0]
  np.testing.assert_array_equal(np.sort(places), np.flatnonzero(tokens.mask))
  for row, column in np.argwhere(rows.place >= 0):
    fields = rows.positions, rows.group, rows.segment
    here = policy.Layout(*(x[row] for x in fields))
    b, t = divmod(rows.place[row, column], tokens.ids.shape[1])
    seen = (
      (here.group == here.group[column])
      & ((here.segment == here.segment[column]) | (here.segment == 0))
      & (here.positions <= here.positions[column])
    )
    columns = np.flatnonzero(seen)
    np.testing.assert_array_equal(here.positions[columns], np.arange(t + 1))
    np.testing.assert_array_equal(
      rows.ids[row, columns], tokens.ids[b, : t + 1]
    )
    assert columns[-1] == column and columns[-2] == rows.before[row, column]


@st.composite
def limited(draw):
  """A batch within limits, and rows to pack it in: what `rows_needed` asks."""
  prompts, samples = draw(st.integers(1, 8)), draw(st.integers(1, 6))
  longest = draw(st.integers(1, 9)), draw(st.integers(1, 12))
  # Lengths just above a half or a third of a row are the hardest to place.
  room = sum(longest) + draw(st.integers(0, 60))
  prompt = st.integers(1, longest[0])
  hard = [min(room // k + e, longest[1]) for k in (2, 3, 4) for e in (0, 1)]
  completion = st.integers(0, longest[1]) | st.sampled_from(hard)

  def array(elements, *shape):
    size = int(np.prod(shape))
    drawn = draw(st.lists(elements, min_size=size, max_size=size))
    return np.array(drawn).reshape(shape)

  lengths = array(prompt, prompts), array(completion, prompts, samples)
  live = array(st.booleans(), prompts)
  asked = prompts, samples, *longest, room
  cut = draw(st.integers(1, 4)), draw(st.booleans())
  return of_lengths(*lengths, live), asked, cut, draw(st.booleans())


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(limited())
def test_pack_keeps_every_promise_within_the_rows_needed(limits):
  tokens, asked, cut, twice = limits
  if twice:
    # The same prompts come again at the other end of the batch.
    asked = 2 * asked[0], *asked[1:]
    tokens = jax.tree.map(lambda x: np.concatenate([x, x[::-1]]), tokens)
  needed = rows_needed(*asked, *cut)
  assert needed % cut[0] == 0
  rows = pack(tokens, asked[-1], needed, *cut)
  assert_says(rows, tokens)
  # Each block: rows with advantages, others, empty ones; blocks within 1.
  for kind in (moved(rows, tokens).any(axis=1), filled(rows)):
    blocks = kind.reshape(cut[0], -1)
    counts = blocks.sum(axis=1)
    np.testing.assert_array_equal(
      blocks, np.arange(blocks.shape[1]) < counts[:, None]
    )
    assert np.ptp(counts) <= 1


@pytest.mark.parametrize(
  'row_tokens, shared, apart',
  # Of 3 prompts of 7 tokens with 4 completions of 9 each: 16, 25, 34 or 43
  # tokens with 1, 2, 3 or all of them.
  [(16, 12, 12), (25, 6, 12), (34, 6, 6), (43, 3, 6), (100, 2, 2)],
)
def test_rows_needed_is_enough_and_reached(row_tokens, shared, apart):
  assert rows_needed(3, 4, 7, 9, row_tokens) == shared
  assert rows_needed(3, 4, 7, 9, row_tokens, share_prompts=False) == apart
  full = of_lengths(np.full(3, 7), np.full((3, 4), 9))
  for share, needed in ((True, shared), (False, apart)):
    rows = pack(full, row_tokens, needed, share_prompts=share)
    # 34 hold two groups of one completion, or one group of three.
    reached = 5 if share and row_tokens == 34 else needed
    assert filled(rows).sum() == reached


@pytest.mark.parametrize('times', [1, 2, 4])
def test_padding_of_lognormal_lengths_is_below_8_percent(times):
  tokens, longest = lognormal()
  row_tokens = times * longest
  rows = pack(tokens, row_tokens, 4096 // times)
  room = filled(rows).sum() * row_tokens
  # Without repeated prompts there would be this much.
  starts = tokens.mask.argmax(axis=1)
  least = tokens.mask.sum() + starts[::8].sum()
  assert 1 - (rows.group >= 0).sum() / room < 0.02 + 1 / filled(rows).sum()
  assert 1 - least / room < 0.08
  apart = pack(tokens, row_tokens, 4096 // times, share_prompts=False)
  room = filled(apart).sum() * row_tokens
  assert 1 - tokens.lengths.sum() / room < 0.02


def test_groups_without_advantage_take_no_rows_from_others():
  tokens, longest = lognormal()
  rows = pack(tokens, longest, 4096)
  others = tokens._replace(
    mask=tokens.mask & (tokens.advantage != 0).any(axis=1, keepdims=True)
  )
  alone = pack(others, longest, 4096)
  live = moved(rows, tokens).any(axis=1).sum()
  assert 0 < live <= filled(alone).sum() + 1


def test_shards_have_the_same_work():
  tokens, longest = lognormal()
  rows = pack(tokens, longest, 4096, shards=8)
  rows = jax.tree.map(lambda x: x.reshape(8, -1, longest), rows)
  # Pairs in attention: a token sees all positions up to its own.
  pairs = np.where(rows.group >= 0, rows.positions + 1, 0).sum(axis=2)
  live = moved(rows, tokens)
  for work in (rows.place >= 0, rows.group >= 0, live, pairs):
    work = work.reshape(8, -1).sum(axis=1)
    assert np.ptp(work) < 0.03 * work.mean()
  # Row i of every shard goes through with row i of the others.
  turns = pairs[:, : filled(rows).sum(axis=1).min()]
  assert np.mean(turns.mean(axis=0) / turns.max(axis=0)) > 0.97


def test_rows_do_not_depend_on_the_order_of_the_batch():
  tokens = batch(prompts=(3, 7, 1, 3), longest=5)
  serial = np.arange(tokens.ids.size, dtype=np.uint32)
  tokens = tokens._replace(serial=serial.reshape(tokens.ids.shape))
  order = np.random.default_rng(0).permutation(len(tokens.ids))
  shuffled = jax.tree.map(lambda x: x[order], tokens)
  for share in (True, False):
    rows = pack(tokens, 21, 16, 2, share)
    other = pack(shuffled, 21, 16, 2, share)
    b, t = np.divmod(other.place, tokens.ids.shape[1])
    place = order[b] * tokens.ids.shape[1] + t
    other = other._replace(place=np.where(other.place < 0, -1, place))
    jax.tree.map(np.testing.assert_array_equal, rows, other)


def test_host_makes_the_rows_of_its_own_shards_alone():
  whole = pack(batch(), 40, rows=12, shards=4)
  for own in ([0], [1, 3]):
    made = pack(batch(), 40, rows=12, shards=4, own=own)
    for x, everything in zip(made, whole, strict=True):
      blocks = everything.reshape(4, 3, 40)[own]
      np.testing.assert_array_equal(x, blocks.reshape(-1, 40))


def test_what_cannot_be_packed_is_refused():
  with pytest.raises(ValueError, match='more than a row of 5'):
    pack(batch(), 5, rows=12)
  with pytest.raises(ValueError, match='rows=12 is no multiple of shards=8'):
    pack(batch(), 40, rows=12, shards=8)
  with pytest.raises(ValueError, match='does not fit in 1 rows'):
    pack(batch(), 40, rows=1)


# The update's microbatches of such rows.


def counted(p, rows):
  """Stats of which each scored token's gradient in the norm is 10^id."""
  return TokenStats(p['norm'] * jnp.where(rows.place < 0, 0.0, 10.0**rows.ids))


def norm(value):
  """Params that are one number."""
  return {'norm': jnp.float32(value)}


def in_columns(count):
  """Rows 0, 1, … of one token each."""
  ids = np.arange(count, dtype=np.int32)[:, None]
  return padded(ids, np.ones(ids.shape, bool))


def test_each_microbatch_takes_as_many_rows_of_every_shard():
  # 2 shards of 3 rows in twos, of which some are wanted: rows 1 and 2 of the
  # first shard and all of the second, hence three times; 3 stands for none.
  wanted = jnp.array([[0, 1, 1], [1, 1, 1]], bool)[..., None]
  trips, chosen = update._microbatches(wanted, 2)
  assert trips == 3
  np.testing.assert_array_equal(chosen(0), [[1], [0]])
  np.testing.assert_array_equal(chosen(1), [[2], [1]])
  np.testing.assert_array_equal(chosen(2), [[3], [2]])
  rows = update._rows(update._by_shard(in_columns(6), 2), chosen(2))
  np.testing.assert_array_equal(rows.ids, [[0], [5]])
  np.testing.assert_array_equal(rows.place, [[-1], [5]])


@pytest.mark.parametrize('microbatch_rows', [1, 5])
def test_every_wanted_row_of_every_shard_is_counted_once(microbatch_rows):
  rows = in_columns(6)
  gradient = jnp.array([0, 1, 2, 0, 0, 3], jnp.float32)[:, None]
  for shards in (1, 2, 6):
    total, gap = update._pull_by_microbatch(
      counted, norm(0), rows, microbatch_rows, TokenStats(gradient),
      gradient, shards=shards,
    )  # fmt: skip
    assert gap.count == 3
    assert total == norm(300210)
    stats = update._stats_by_microbatch(
      counted, norm(1), rows, (6, 1), microbatch_rows, shards
    )
    np.testing.assert_array_equal(stats.logprob[:, 0], 10.0 ** np.arange(6))


def test_no_row_moves_between_devices_for_a_microbatch():
  mesh = layouts.make()
  rows = jax.tree.map(lambda x: np.tile(x, (1, 5)), in_columns(24))
  rows, gradient = layouts.place_rows(
    mesh, (rows, np.ones((24, 5), np.float32))
  )

  def both(p, rows, gradient):
    pulled = update._pull_by_microbatch(
      counted, p, rows, 8, TokenStats(gradient), gradient, shards=8
    )
    stats = update._stats_by_microbatch(counted, p, rows, (24, 5), 8, 8)
    return pulled, stats

  text = jax.jit(both).lower(norm(1), rows, gradient).compile().as_text()
  moves = 'all-gather', 'all-to-all', 'collective-permute', 'all-reduce'
  looped = [
    line
    for line in text.splitlines()
    if 'while/body' in line and any(f' {move}' in line for move in moves)
  ]
  # The gradient of p, a scalar, and the scalars of the mismatch are all that
  # is summed over devices.
  scalars = re.compile(r'= (\(?[fs]32\[\](, )?)+\)? all-reduce\(')
  assert looped and all(scalars.search(line) for line in looped)
