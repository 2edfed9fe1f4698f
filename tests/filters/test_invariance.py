"""The weight gradient is one, however the batch was cut and wherever it lies.

Random batches go under random chains through the production update: once whole
(every sequence a row of its own, all rows at once, one device), and then in
other cuts. A chain is data here, so that no example compiles anything.
"""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jax_rlvr import filters as f
from jax_rlvr import mesh as layouts
from jax_rlvr import policy, update
from jax_rlvr.packing import pack, padded
from jax_rlvr.policy_gradient import token_gradients
from jax_rlvr.records import Tokens, TokenStats, TrainState
from jax_rlvr.token_stats import token_stats
from tests.test_packing import CONFIG

TOLERANCE = 1e-5
TEMPERATURE = 0.7
# An inner step sees 8 sequences of at most 16 tokens. The first of the two is
# on-policy, the second is not.
STEPS, B, T = 2, 8, 16
PROMPT, COMPLETION = 7, 9
KEY = jax.random.key(9)
PARAMS = jax.device_get(policy.init(CONFIG, jax.random.key(0)))


@pytest.fixture(scope='module', autouse=True)
def quick_compiles():
  """These programs are large and their arrays tiny."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


# Chains


class Kind(NamedTuple):
  """A filter of up to three numbers, and the intervals they are drawn from."""

  build: Callable[..., optax.GradientTransformation]
  ranges: tuple[tuple[float, float], ...] = ()


FRACTION, COEF, ENTROPY = (0.02, 0.9), (0.05, 1.0), (2.3, 3.1)
HEADS = {
  'gspo': Kind(f.gspo, ((0.001, 0.3), (0.001, 0.3))),
  'gmpo': Kind(f.gmpo, ((0.05, 0.6), (0.05, 0.6))),
  'cispo': Kind(f.cispo, ((0.1, 1.0), (0.1, 4.0))),
}
MIDDLE = {
  'clip_ratio': Kind(f.clip_ratio, ((0.01, 1.0), (0.01, 1.0), (1.1, 4.0))),
  'clip_cov': Kind(f.clip_cov, (FRACTION, (-2.0, 0.5), (0.5, 6.0))),
  'kl_cov': Kind(f.kl_cov, (FRACTION, COEF)),
  'forking_tokens, per sequence': Kind(
    lambda q: f.forking_tokens(q, rescale=False, scope='sequence'), (FRACTION,)
  ),
  'forking_tokens, by quantile': Kind(
    lambda q: f.forking_tokens(q, rescale=False, rule='quantile'), (FRACTION,)
  ),
  'entropy_above': Kind(
    lambda x: f.entropy_above(x, 'bottom', rescale=False), (ENTROPY,)
  ),
  'entropy_bonus': Kind(f.entropy_bonus, (COEF,)),
  'kl_penalty': Kind(f.kl_penalty, (COEF,)),
  'tis': Kind(f.tis, ((0.5, 2.0),)),
  'icepop': Kind(
    lambda low, high: f.icepop(low, high, 'sequence'), ((0.1, 0.9), (1.1, 9.0))
  ),
  'sequence_mask': Kind(f.sequence_mask, ((0.5, 0.95), (1.05, 2.0))),
  'opsm': Kind(f.opsm, ((0.01, 0.5),)),
}
# They go with token_mean alone.
RESCALED = {
  'forking_tokens': Kind(f.forking_tokens, (FRACTION,)),
  'entropy_above, rescaled': Kind(f.entropy_above, (ENTROPY,)),
}
AGGREGATIONS = {
  'token_mean': Kind(f.token_mean),
  'sequence_mean_token_mean': Kind(f.sequence_mean_token_mean),
  'sequence_mean_token_sum': Kind(f.sequence_mean_token_sum, ((1.0, 50.0),)),
  'token_sum': Kind(f.token_sum, ((1.0, 50.0),)),
}
MENU = HEADS | MIDDLE | RESCALED | AGGREGATIONS
SLOTS, NUMBERS = 6, 3


class Script(NamedTuple):
  """A chain as data: the place of each filter in the menu, −1 for none."""

  kinds: np.ndarray
  numbers: np.ndarray


def script(steps, menu=MENU):
  """From the name of each filter, followed by its numbers."""
  kinds = np.full(SLOTS, -1, np.int32)
  numbers = np.zeros((SLOTS, NUMBERS), np.float32)
  for i, (name, *values) in enumerate(steps):
    kinds[i] = list(menu).index(name)
    numbers[i, : len(values)] = values
  return Script(kinds, numbers)


def scripted(menu=MENU):
  """The chain that its state, a Script, says."""

  def apply(kind, numbers, grads, stats, tokens, key):
    tx = optax.with_extra_args_support(kind.build(*numbers[: len(kind.ranges)]))
    return tx.update(grads, tx.init(stats), stats, tokens=tokens, key=key)[0]

  # Traced once for the programs of all cuts.
  @jax.jit
  def run(chain, grads, *evidence):
    branches = [lambda numbers, grads: grads]
    branches += [
      lambda numbers, grads, kind=kind: apply(kind, numbers, grads, *evidence)
      for kind in menu.values()
    ]

    def slot(i, grads):
      kind, numbers = chain.kinds[i], chain.numbers[i]
      return jax.lax.switch(kind + 1, branches, numbers, grads)

    return jax.lax.fori_loop(0, SLOTS, slot, grads)

  def update_fn(grads, chain, stats=None, *, tokens, key=None, **extra):
    del extra
    return run(chain, grads, stats, tokens, key), chain

  return optax.GradientTransformationExtraArgs(lambda _: script([]), update_fn)


def recorder():
  """Keeps what its last two calls were given, the latest last."""

  def init(params):
    return jax.tree.map(jnp.zeros_like, (params, params))

  def update_fn(updates, state, params=None, **extra):
    del params, extra
    return updates, (state[1], updates)

  return optax.GradientTransformationExtraArgs(init, update_fn)


CHAIN = optax.chain(scripted(), recorder())
# Weights stand still: both inner steps have the same ones, to the last bit.
STILL = optax.chain(recorder(), optax.set_to_zero())


def fresh(chain):
  one = np.zeros((B, T), np.float32)
  return chain, recorder().init(TokenStats(one, one))


@st.composite
def chains(draw):
  """A head or none, one to four filters in any order, an aggregation."""

  def one_of(kinds):
    name = draw(st.sampled_from(list(kinds)))
    return name, *(draw(st.floats(*ends)) for ends in kinds[name].ranges)

  steps = [one_of(HEADS)] if draw(st.integers(0, 3)) == 3 else []
  filters = draw(st.integers(1, 4))
  steps += [one_of(MIDDLE | RESCALED) for _ in range(filters)]
  if any(name in RESCALED for name, *_ in steps):
    return *steps, ('token_mean',)
  return *steps, one_of(AGGREGATIONS)


# Batches


@st.composite
def batches(draw):
  """Arguments of `contents`. Completions of length 0 are rows without mask."""
  sequences = STEPS * B
  group = st.tuples(
    st.integers(0, 3), st.integers(1, PROMPT), st.integers(0, 3)
  )
  groups = []
  while len(groups) < sequences:
    groups += draw(st.sampled_from([1, 2, 4, 8])) * [draw(group)]
  lengths = st.integers(0, COMPLETION)
  return {
    'groups': groups[:sequences],
    'lengths': draw(st.lists(lengths, min_size=sequences, max_size=sequences)),
    'seed': draw(st.integers(0, 2**16)),
    'holes': draw(st.booleans()),
    'ties': draw(st.booleans()),
    'drift': draw(st.sampled_from([0.05, 0.3, 1.0])),
    'mismatch': draw(st.sampled_from([0.0, 0.3])),
  }


def contents(groups, lengths, *, seed, holes, ties, drift, mismatch):
  """Tokens of random contents.

  Args:
    groups: of each sequence: which prompt, its length, and 0 where its
      advantages are.
    lengths: of each completion.
    seed: of the rest.
    holes: leave a fifth of the completion tokens out of the mask.
    ties: round the numbers of the rollout, which are the first step's stats.
    drift: between those and what the policy says now, nats.
    mismatch: between sampled_logprob and old_logprob, nats.
  """
  rng = np.random.default_rng(seed)
  shape = len(groups), T
  prompts = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, T))
  ids = rng.integers(0, CONFIG.vocab_size, shape)
  advantage = rng.normal(size=(shape[0], 1))
  for b, (prompt, size, flat) in enumerate(groups):
    ids[b, :size] = prompts[prompt, :size]
    advantage[b] *= flat > 0
  start = np.array([size for _, size, _ in groups])
  stop = start + lengths
  columns = np.arange(T)
  mask = (start[:, None] <= columns) & (columns < stop[:, None])
  if holes:
    mask &= rng.random(shape) < 0.8
  ids = np.where(columns < stop[:, None], ids, 0).astype(np.int32)
  now = jax.device_get(scored(PARAMS, padded(ids, mask)))
  old = now.logprob + drift * rng.normal(size=shape)
  entropy = np.abs(now.entropy + drift * rng.normal(size=shape))
  if ties:
    old, entropy = np.round(2 * old) / 2, np.round(2 * entropy) / 2

  def floats(x):
    return np.where(mask, x, 0.0).astype(np.float32)

  return Tokens(
    mask=mask,
    advantage=floats(advantage),
    old_logprob=floats(old),
    serial=rng.permutation(mask.size).astype(np.uint32).reshape(shape),
    sampled_logprob=floats(old + mismatch * rng.normal(size=shape)),
    old_entropy=floats(entropy),
    ref_logprob=floats(old + 0.5 * rng.normal(size=shape)),
    ids=ids,
    lengths=stop.astype(np.int32),
  )


def rows(tree, index):
  return jax.tree.map(lambda x: x[index], tree)


@jax.jit
def scored(params, packed):
  return token_stats(CONFIG, params, packed, temperature=TEMPERATURE)


# The production update


class Cut(NamedTuple):
  """How the sequences of an inner step go through the policy.

  Attributes:
    microbatch_rows: that go through a vjp at one time.
    row_tokens: of a packed row; None gives each sequence a row of its own.
    mesh: slice × fsdp × tensor; None is one device without a mesh.
  """

  microbatch_rows: int
  row_tokens: int | None = None
  mesh: tuple[int, int, int] | None = None


WHOLE = Cut(8)
CUTS = {
  'microbatches of 1': Cut(1),
  'microbatches of 2, packed': Cut(2, row_tokens=40),
  'microbatches of 4': Cut(4),
}
MESHES = {
  '2 devices, packed': Cut(2, row_tokens=40, mesh=(1, 2, 1)),
  '4 devices': Cut(4, mesh=(1, 2, 2)),
  '8 devices': Cut(8, mesh=(1, 8, 1)),
}


class Outcome(NamedTuple):
  """Weight and token gradients of each inner step, and which had none."""

  weights: tuple[np.ndarray, ...]
  tokens: tuple[TokenStats, ...]
  skipped: tuple[int, ...]


@functools.cache
def runner(cut, filters=CHAIN):
  """Tokens and a script → Outcome."""
  place = put = jax.device_put
  shards = 1
  if cut.mesh is not None:
    mesh = jax.make_mesh(
      cut.mesh,
      ('slice', 'fsdp', 'tensor'),
      axis_types=(jax.sharding.AxisType.Auto,) * 3,
      devices=jax.devices()[: np.prod(cut.mesh)],
    )
    put = functools.partial(layouts.place, mesh, table=layouts.TRAINING)
    place = functools.partial(layouts.place_rows, mesh)
    shards = layouts.row_shards(mesh)
  run = update.make_update(
    CONFIG,
    filters,
    STILL,
    inner_steps=STEPS,
    row_tokens=cut.row_tokens or T,
    rows=B,
    microbatch_rows=cut.microbatch_rows,
    temperature=TEMPERATURE,
    shards=shards,
    place=place,
  )

  def outcome(tokens, chain):
    params = put(PARAMS)
    zero = np.int32(0)
    state = TrainState(zero, zero, params, STILL.init(params), fresh(chain))
    packing = pack if cut.row_tokens else alone
    with mock.patch.object(update, 'pack', packing):
      state, measured, _ = run(state, tokens, KEY)
    weights, _ = jax.device_get(state.optimizer)
    _, grads = jax.device_get(state.filters)
    return Outcome(
      tuple(map(flat, weights)),
      grads,
      tuple(int(scalars['update/skipped']) for scalars in measured),
    )

  return outcome


def alone(tokens, row_tokens, rows, *_):
  """In place of `pack`, which shares a row wherever two sequences fit."""
  assert tokens.ids.shape == (rows, row_tokens)
  return padded(tokens.ids, tokens.mask)


def flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def distance(a, b):
  norm = np.linalg.norm
  return norm(a - b) / norm(b) if norm(b) else norm(a)


def assert_same(found, whole):
  """One weight gradient, and silent at the same tokens."""
  assert found.skipped == whole.skipped
  for mine, theirs in zip(found.tokens, whole.tokens, strict=True):
    pairs = zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True)
    for a, b in pairs:
      np.testing.assert_array_equal(a != 0, b != 0)
  for mine, theirs in zip(found.weights, whole.weights, strict=True):
    assert distance(mine, theirs) <= TOLERANCE


# Choices that hang by a rounding error

NOISE, DRAWS = 1e-5, 8


def is_steady(tokens, chain):
  """Whether noise well above float32's hardly moves the token gradients.

  Where it does, two scores at a border are one to float32, or a ratio lies on
  the edge of a clip, and the example proves nothing: stats that are computed
  again in another cut differ in their last bits. That is no freak: the first
  tokens of a group have one context and so one entropy.
  """
  rng = np.random.default_rng(0)
  size = NOISE * (np.arange(DRAWS) > 0)[:, None, None]
  pitch = rng.uniform(1e4, 2e4, (DRAWS, 1, 1))

  def noisy(x):
    # Input is the same in every cut: what ties, and what is 0, stays so.
    if x.dtype != np.float32:
      return np.broadcast_to(x, (DRAWS, *x.shape))
    return (x + size * np.sin(pitch * x)).astype(np.float32)

  def noisier(x):
    noise = size * rng.normal(size=(DRAWS, *x.shape))
    return (x + noise).astype(np.float32)

  now = jax.device_get(scored(PARAMS, padded(tokens.ids, tokens.mask)))
  for i in range(STEPS):
    inner = slice(i * B, (i + 1) * B)
    part = jax.tree.map(noisy, rows(tokens, inner))
    stats = TokenStats(part.old_logprob, part.old_entropy)
    if i > 0:
      stats = jax.tree.map(noisier, rows(now, inner))
    key = jax.random.fold_in(KEY, i)
    grads = np.stack(jax.tree.leaves(under_noise(stats, part, key, chain)))
    still = [distance(grads[:, d], grads[:, 0]) for d in range(DRAWS)]
    if max(still) > 10 * NOISE or ((grads != 0) != (grads[:, :1] != 0)).any():
      return False
  return True


@jax.jit
def under_noise(stats, tokens, key, chain):
  state = fresh(chain)

  def one(stats, tokens):
    return token_gradients(CHAIN, stats, tokens, key=key, state=state)[0]

  return jax.vmap(one)(stats, tokens)


# The properties


def programs(caplog):
  messages = [record.message for record in caplog.records]
  return sum('Compiling jit(inner_step)' in message for message in messages)


def check(cuts, examples):
  """Asserts that random batches have one gradient in all cuts."""

  @settings(
    max_examples=examples, deadline=None, derandomize=True, database=None
  )
  @given(batches(), chains(), st.permutations(range(B)))
  def one_gradient(batch, steps, order):
    tokens, chain = contents(**batch), script(steps)
    assume(is_steady(tokens, chain))
    whole = runner(WHOLE)(tokens, chain)
    for cut in cuts:
      assert_same(runner(cut)(tokens, chain), whole)
    # Sequences in another order, each with the serials of its tokens.
    order = np.array(order)
    moved = rows(tokens, np.concatenate([order, B + order]))
    found = runner(WHOLE)(moved, chain)
    back = tuple(rows(grads, np.argsort(order)) for grads in found.tokens)
    assert_same(found._replace(tokens=back), whole)

  one_gradient()


def test_gradient_does_not_depend_on_microbatches_packing_or_order(caplog):
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    check(CUTS.values(), examples=15)
  # One program a cut, two inner steps each, and none for the other examples.
  assert programs(caplog) <= 2 * (1 + len(CUTS))


def test_gradient_does_not_depend_on_the_number_of_devices(caplog):
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    check(MESHES.values(), examples=6)
  assert programs(caplog) <= 2 * (1 + len(MESHES))


# Controls


PER_MICROBATCH = {
  'clip_cov': Kind(
    lambda q: f.per_microbatch(f.clip_cov(q, -9.0, 9.0), 2), (FRACTION,)
  ),
  'kl_cov': Kind(lambda q: f.per_microbatch(f.kl_cov(q), 2), (FRACTION,)),
  'forking_tokens': Kind(
    lambda q: f.per_microbatch(f.forking_tokens(q), 2), (FRACTION,)
  ),
  'token_mean': Kind(f.token_mean),
}


@pytest.mark.parametrize(
  ('steps', 'inner'),
  [
    ((('clip_cov', 0.4), ('token_mean',)), 0),
    # Silent on policy.
    ((('kl_cov', 0.4), ('token_mean',)), 1),
    ((('forking_tokens', 0.4), ('token_mean',)), 0),
  ],
)
def test_the_references_choice_in_each_microbatch_is_another(steps, inner):
  tokens = contents(
    [(b // 4, 3, 1) for b in range(STEPS * B)], [9] * (STEPS * B), seed=1,
    holes=False, ties=False, drift=0.3, mismatch=0.0,
  )  # fmt: skip
  filters = optax.chain(scripted(PER_MICROBATCH), recorder())
  chain = script(steps, PER_MICROBATCH)
  cut = runner(WHOLE, filters)(tokens, chain).weights[inner]
  # The order of sequences decides which share a microbatch.
  order = np.array([0, 4, 1, 5, 2, 6, 3, 7])
  moved = rows(tokens, np.concatenate([order, B + order]))
  other = runner(WHOLE, filters)(moved, chain).weights[inner]
  name, fraction = steps[0]
  numbers = (fraction, -9.0, 9.0) if name == 'clip_cov' else (fraction,)
  if name == 'kl_cov':
    numbers += (1.0,)
  whole = runner(WHOLE)(tokens, script([(name, *numbers), *steps[1:]]))
  assert distance(cut, whole.weights[inner]) > 1e-3
  assert distance(other, cut) > 1e-3
