"""The weight gradient, however the batch is cut and wherever it lies."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_rlvr import mesh as layouts
from jax_rlvr import policy, update
from jax_rlvr.evidence import covariance
from jax_rlvr.filters import (
  clip_cov,
  clip_ratio,
  kl_penalty,
  token_mean,
  tracked,
)
from jax_rlvr.packing import padded
from jax_rlvr.policy_gradient import as_loss
from jax_rlvr.records import Rows, Shown, TokenStats, Tracked, TrainState
from jax_rlvr.token_stats import token_stats
from tests.test_packing import CONFIG, batch

TEMPERATURE = 0.7
# 4 prompts of 4: an inner step sees 8 sequences of at most 16 tokens.
B, T = 16, 16
PARAMS = jax.device_get(policy.init(CONFIG, jax.random.key(0)))


@pytest.fixture(scope='module', autouse=True)
def quick_compiles():
  """These programs are large and their arrays tiny."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@functools.cache
def evidence():
  """A batch with the policy's own old numbers; group 1 has no variance."""
  tokens = batch(prompts=(3, 7, 1, 4))
  stats = jax.jit(functools.partial(token_stats, CONFIG))(
    PARAMS, padded(tokens.ids, tokens.mask), temperature=TEMPERATURE
  )
  advantage = np.random.default_rng(5).normal(size=(B, 1)).astype(np.float32)
  advantage[4:8] = 0
  return tokens._replace(
    advantage=advantage * tokens.mask,
    old_logprob=np.asarray(stats.logprob),
    old_entropy=np.asarray(stats.entropy),
    serial=np.arange(B * T, dtype=np.uint32).reshape(B, T),
  )


PPO = optax.chain(tracked('clip_ratio', clip_ratio()), token_mean())
COV = optax.chain(
  clip_ratio(),
  tracked('clip_cov', clip_cov(fraction=0.2, lower=0.0, upper=np.inf)),
  token_mean(),
)


def start(filters, optimizer, mesh=None):
  """A state of its own: updates donate it."""
  params = jax.tree.map(jnp.array, PARAMS)
  if mesh is not None:
    params = layouts.place(mesh, params, layouts.TRAINING)
  stats = TokenStats(*jnp.zeros((2, 1, 1)))
  return TrainState(
    np.int32(0),
    np.int32(0),
    params,
    optimizer.init(params),
    filters.init(stats),
  )


def flat(params):
  return np.concatenate(
    [np.asarray(x).ravel() for x in jax.tree.leaves(params)]
  )


def updated(
  filters,
  *,
  row_tokens=T,
  microbatch_rows=8,
  mesh=None,
  tokens=None,
  reference=None,
  **settings,
):
  """What an update of two inner steps of rate 1 returns."""
  place = jax.device_put
  if mesh is not None:
    place = functools.partial(layouts.place_rows, mesh)
  run = update.make_update(
    CONFIG,
    filters,
    optax.sgd(1.0),
    inner_steps=2,
    row_tokens=row_tokens,
    rows=8,
    microbatch_rows=microbatch_rows,
    temperature=TEMPERATURE,
    place=place,
    **settings,
  )
  state = start(filters, optax.sgd(1.0), mesh)._replace(reference=reference)
  return run(state, tokens or evidence(), jax.random.key(9))


def moved(filters, **settings):
  """What it takes from the params, and the scalars."""
  state, measured, _ = updated(filters, **settings)
  return flat(PARAMS) - flat(state.params), jax.device_get(measured)


def distance(a, b):
  return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.fixture(scope='module')
def whole():
  return moved(COV)


@pytest.fixture(scope='module')
def plain():
  return moved(PPO)


@pytest.mark.parametrize('row_tokens, microbatch_rows', [(T, 1), (40, 2)])
def test_gradient_does_not_depend_on_the_cut(
  whole, row_tokens, microbatch_rows
):
  delta, measured = moved(
    COV, row_tokens=row_tokens, microbatch_rows=microbatch_rows
  )
  assert distance(delta, whole[0]) <= 1e-5
  # The same tokens were drawn, in either inner step.
  for mine, theirs in zip(measured, whole[1], strict=True):
    kept = theirs['filters/clip_cov/kept']
    assert mine['filters/clip_cov/kept'] == kept < 0.9


def test_gradient_on_eight_devices_is_that_on_one(whole):
  delta, measured = moved(
    COV, row_tokens=T, microbatch_rows=4, mesh=layouts.make()
  )
  assert distance(delta, whole[0]) <= 1e-5
  for mine, theirs in zip(measured, whole[1], strict=True):
    kept = theirs['filters/clip_cov/kept']
    assert mine['filters/clip_cov/kept'] == kept


def dense_loss(params, tokens):
  """PPO's clipped surrogate, token mean, from all logits at once."""
  hidden = policy.forward(CONFIG, params, tokens.ids)
  logprobs = jax.nn.log_softmax(
    policy.logits(CONFIG, params, hidden) / TEMPERATURE
  )
  logprob = jnp.take_along_axis(
    logprobs[:, :-1], tokens.ids[:, 1:, None], axis=-1
  )[..., 0]
  advantage, mask = tokens.advantage[:, 1:], tokens.mask[:, 1:]
  ratio = jnp.exp(jnp.where(mask, logprob - tokens.old_logprob[:, 1:], 0.0))
  surrogate = jnp.minimum(
    ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage
  )
  return -jnp.sum(jnp.where(mask, surrogate, 0.0)) / jnp.sum(mask)


def test_gradient_is_that_of_a_dense_ppo_loss(plain, whole):
  gradient = jax.jit(jax.grad(dense_loss))
  params = PARAMS
  for inner in (slice(0, 8), slice(8, 16)):
    part = jax.tree.map(lambda x, inner=inner: x[inner], evidence())
    grads = gradient(params, part)
    params = jax.tree.map(lambda p, g: p - g, params, grads)
  delta, measured = plain
  assert distance(delta, flat(PARAMS) - flat(params)) <= 1e-5
  # The clip was at work in the second step, and Clip-Cov does more.
  assert measured[1]['filters/clip_ratio/kept'] < 1
  assert distance(whole[0], delta) > 0.05


def test_first_inner_step_is_exactly_on_policy(plain, whole):
  for _, measured in (plain, whole):
    first, second = measured
    assert first['ratio/max'] == 1 and first['kl/old'] == 0
    assert second['ratio/max'] > 1.01 and second['kl/old'] > 1e-5
    assert first['update/skipped'] == second['update/skipped'] == 0


@pytest.mark.parametrize('microbatch_rows', [8, 1])
def test_mismatch_is_where_sampler_and_trainer_disagree(microbatch_rows):
  own = evidence()
  sampler = own.old_logprob + np.where(own.mask, 0.25, 0.0)
  tokens = own._replace(old_logprob=sampler.astype(np.float32))
  _, measured = moved(PPO, microbatch_rows=microbatch_rows, tokens=tokens)
  first, second = measured
  assert first['mismatch/mean'] == pytest.approx(0.25, abs=1e-5)
  assert first['mismatch/max'] == pytest.approx(0.25, abs=1e-4)
  # Trainer − sampler is −¼: e^−¼ − 1 + ¼.
  assert first['mismatch/kl'] == pytest.approx(0.028801, abs=1e-5)
  # The weights have moved since: a difference would be no fault.
  assert not any(name.startswith('mismatch') for name in second)


def shown(**settings):
  """Of three sequences of each inner batch, and what the params moved."""
  state, _, seen = updated(COV, shown=(1, 2, 7), **settings)
  return flat(PARAMS) - flat(state.params), jax.device_get(seen)


def test_shown_tokens_are_those_that_the_filters_saw(whole):
  delta, (first, second) = shown()
  # To be looked at changes nothing.
  np.testing.assert_allclose(delta, whole[0], rtol=0, atol=1e-6)
  tokens = evidence()
  rows = [1, 2, 7]
  mask = tokens.mask[rows]
  np.testing.assert_array_equal(first.logprob, tokens.old_logprob[rows])
  np.testing.assert_array_equal(first.entropy, tokens.old_entropy[rows])
  ((came, left),) = first.filters
  # On-policy, ratio 1.
  np.testing.assert_array_equal(came, -tokens.advantage[rows])
  clipped = (came != 0) & (left == 0)
  assert 0 < clipped.sum() < mask.sum()
  # Divided by the tokens of the inner batch alone.
  n = tokens.mask[:8].sum()
  np.testing.assert_allclose(first.gradient, left / n, rtol=1e-6)
  inner = jax.tree.map(lambda x: x[:8], tokens)
  stats = TokenStats(inner.old_logprob, inner.old_entropy)
  np.testing.assert_allclose(
    first.covariance, covariance(stats, inner)[np.array(rows)], atol=1e-6
  )
  # The second inner step shows the other half, after the weights moved.
  later = [9, 10, 15]
  gap = second.logprob - tokens.old_logprob[later]
  assert np.abs(gap[tokens.mask[later]]).max() > 0.01
  assert not gap[~tokens.mask[later]].any()


@pytest.mark.parametrize(
  'cut',
  [
    {'row_tokens': 40, 'microbatch_rows': 2},
    {'microbatch_rows': 4, 'mesh': True},
  ],
)
def test_shown_tokens_do_not_depend_on_the_cut(cut):
  if 'mesh' in cut:
    cut = cut | {'mesh': layouts.make()}
  _, expected = shown()
  _, found = shown(**cut)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5),
    found,
    expected,
  )


def test_shown_tokens_cost_one_collective():
  mesh = layouts.make()
  rows = jax.sharding.NamedSharding(mesh, layouts.ROWS)
  x = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=rows)
  program = jax.jit(lambda seen: update._of_rows(seen, (0, 5, 11)))
  text = program.lower(Shown(x, x, x, x, ((x, x),))).compile().as_text()
  moved = re.findall(
    r'= (\S+) (all-reduce|all-gather|all-to-all|collective-permute)\(', text
  )
  # Three rows of six arrays, and nothing of the others.
  ((shape, kind),) = moved
  assert shape.startswith('f32[6,3,8]') and kind == 'all-reduce'


def test_filters_report_their_shares(plain, whole):
  # Group 1 has no gradient to keep; on-policy nothing is clipped.
  assert plain[1][0]['filters/clip_ratio/kept'] == 1
  assert 0 < whole[1][0]['filters/clip_cov/mass'] < 1
  tokens = evidence()
  n = tokens.mask[:8].sum()
  live = (tokens.mask & (tokens.advantage != 0))[:8].sum()
  # Drawn among covariances above 0, tokens without advantage among them.
  dropped = (1 - whole[1][0]['filters/clip_cov/kept']) * live
  assert 0 < dropped <= n // 5 + 1e-3


ADAM = optax.adam(1e-2)


@pytest.fixture(scope='module')
def adam():
  """One inner step of all, two microbatches, and a state with a past."""
  run = update.make_update(
    CONFIG,
    PPO,
    ADAM,
    inner_steps=1,
    row_tokens=T,
    rows=B,
    microbatch_rows=4,
    temperature=TEMPERATURE,
  )
  state, measured, _ = run(start(PPO, ADAM), evidence(), jax.random.key(0))
  assert measured[0]['update/skipped'] == 0
  return run, jax.device_get(state)


@pytest.mark.parametrize('value', [0.0, np.nan, np.inf])
def test_batch_without_a_usable_gradient_changes_nothing(adam, value):
  run, before = adam
  advantage = np.array(evidence().advantage)
  if value == 0:
    advantage[:] = 0
  else:
    b, t = np.argwhere(evidence().mask)[-1]
    advantage[b, t] = value
  state = jax.tree.map(jnp.array, before)
  after, measured, _ = run(
    state, evidence()._replace(advantage=advantage), jax.random.key(1)
  )
  assert measured[0]['update/skipped'] == 1
  for a, b in zip(
    jax.tree.leaves((after.params, after.optimizer)),
    jax.tree.leaves((before.params, before.optimizer)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


def test_other_contents_compile_nothing_anew(caplog):
  run = update.make_update(
    CONFIG,
    optax.chain(clip_ratio(0.1, 0.1), token_mean()),
    optax.sgd(0.5),
    inner_steps=1,
    row_tokens=40,
    rows=8,
    microbatch_rows=4,
    temperature=TEMPERATURE,
  )
  tokens = evidence()
  filters = optax.chain(clip_ratio(0.1, 0.1), token_mean())
  compiled = []
  state = start(filters, optax.sgd(0.5))
  other = tokens._replace(
    ids=tokens.ids[::-1].copy(),
    mask=tokens.mask[::-1].copy(),
    lengths=tokens.lengths[::-1].copy(),
    advantage=-2 * tokens.advantage[::-1],
  )
  for contents in (tokens, other, other._replace(mask=~other.mask & False)):
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
      state, _, _ = run(state, contents, jax.random.key(len(compiled)))
    compiled.append(
      sum('Compiling jit(inner_step)' in r.message for r in caplog.records)
    )
  assert compiled == [1, 0, 0]


def test_rows_without_gradient_cost_no_microbatch():
  # Rows 1, 3 and 4 of 5 in twos: (1, 3), (4, none), and no third.
  order, trips = update._first(jnp.array([0, 1, 0, 1, 1], bool), 2)
  np.testing.assert_array_equal(order, [1, 3, 4, 5, 5, 5])
  assert trips == 2
  _, trips = update._first(jnp.zeros(5, bool), 2)
  assert trips == 0


def test_microbatches_are_no_larger_than_the_batch():
  wanted = jnp.ones((2, 3, 1), bool)
  for room, each in ((1_000, 3), (4, 2), (1, 1)):
    trips, chosen = update._microbatches(wanted, room)
    assert chosen(0).shape == (2, each)
    assert trips == -(-3 // each)


def test_rows_of_zero_variance_groups_never_reach_the_policy():
  column = np.arange(6, dtype=np.int32)[:, None]
  rows = Rows(column, 0 * column, 0 * column, 0 * column, 0 * column, column)
  # d/dp of p · 10^row is 10^row, but NaN in rows 1 and 4.
  slope = 10.0 ** np.arange(6)
  slope[[1, 4]] = np.nan
  slope = jnp.asarray(slope, jnp.float32)

  def stats_of(p, rows):
    return TokenStats(p * slope[rows.ids])

  def pull(gradient):
    gradient = jnp.array(gradient, jnp.float32)[:, None]
    total, _ = update._pull_by_microbatch(
      stats_of, jnp.float32(0), rows, 1, TokenStats(gradient), gradient
    )
    return float(total)

  # 1 · 1 + 2 · 100 + 3 · 100000
  assert pull([1, 0, 2, 0, 0, 3]) == 300201
  assert pull([0, 0, 0, 0, 0, 0]) == 0
  assert np.isnan(pull([1, 1, 0, 0, 0, 0]))


@pytest.mark.parametrize('remat', ['none', 'dots'])
def test_gradient_does_not_depend_on_what_is_kept(whole, remat):
  assert distance(moved(COV, remat=remat)[0], whole[0]) <= 1e-5


@pytest.mark.parametrize('microbatch_rows', [8, 2])
def test_bfloat16_moves_float32_weights_as_float32_does(plain, microbatch_rows):
  delta, measured = moved(
    PPO, microbatch_rows=microbatch_rows, dtype=jnp.bfloat16
  )
  assert delta.dtype == np.float32
  cosine = delta @ plain[0] / np.linalg.norm(delta) / np.linalg.norm(plain[0])
  assert cosine > 0.99
  # Control: it is not float32 under another name.
  assert distance(delta, plain[0]) > 1e-4
  assert measured[0]['update/skipped'] == 0


def test_weights_and_moments_stay_float32():
  run = update.make_update(
    CONFIG, PPO, ADAM, inner_steps=1, row_tokens=T, rows=B, microbatch_rows=4,
    temperature=TEMPERATURE, dtype=jnp.bfloat16,
  )  # fmt: skip
  state, _, _ = run(start(PPO, ADAM), evidence(), jax.random.key(0))
  for x in jax.tree.leaves((state.params, state.optimizer)):
    assert x.dtype in (jnp.float32, jnp.int32)


def by_extras(stats, tokens):
  """Token gradients weighed by Σ π², whose mean it reports."""
  weigh = jax.lax.stop_gradient(stats.p2)
  return jnp.sum(weigh) / jnp.sum(tokens.mask), weigh


def weighed():
  def update_fn(grads, state, stats, *, tokens, **_):
    assert stats.p2_logp is None
    mean, weigh = by_extras(stats, tokens)
    grads = grads._replace(logprob=grads.logprob * weigh)
    return grads, state._replace(report={'mean': mean})

  return optax.GradientTransformationExtraArgs(
    lambda _: Tracked((), {'mean': jnp.float32(0)}), update_fn
  )


@pytest.mark.parametrize('microbatch_rows', [8, 2])
def test_filters_read_extras_in_every_inner_step(microbatch_rows):
  tokens = evidence()
  _, measured = moved(
    optax.chain(weighed(), token_mean()),
    microbatch_rows=microbatch_rows,
    extras=('p2',),
  )
  stats = token_stats(
    CONFIG, PARAMS, padded(tokens.ids, tokens.mask), temperature=TEMPERATURE,
    extras=('p2',),
  )  # fmt: skip
  expected = stats.p2[:8].sum() / tokens.mask[:8].sum()
  np.testing.assert_allclose(measured[0]['filters/mean'], expected, rtol=1e-5)
  assert measured[0]['ratio/max'] == 1
  assert measured[1]['filters/mean'] != measured[0]['filters/mean'] > 0
  assert measured[0]['grad_norm'] > 0


def test_extras_do_not_trip_the_loss():
  tokens = jax.tree.map(jnp.asarray, evidence())

  def gradient(extras):
    def loss(params):
      stats = token_stats(
        CONFIG, params, padded(tokens.ids, tokens.mask),
        temperature=TEMPERATURE, extras=extras,
      )  # fmt: skip
      return as_loss(PPO)(stats, tokens)[0]

    return flat(jax.jit(jax.grad(loss))(PARAMS))

  np.testing.assert_array_equal(
    gradient(('p2', 'p2_logp', 'logit', 'confidence')), gradient(())
  )


@pytest.mark.parametrize('microbatch_rows', [8, 1])
def test_filters_read_a_frozen_reference(microbatch_rows):
  chain = optax.chain(
    clip_ratio(), tracked('kl', kl_penalty(0.5)), token_mean()
  )
  other = jax.tree.map(lambda x: x * 1.1, PARAMS)
  tokens = evidence()
  frozen = jax.jit(functools.partial(token_stats, CONFIG))(
    other, padded(tokens.ids, tokens.mask), temperature=TEMPERATURE
  )
  told = tokens._replace(ref_logprob=np.asarray(frozen.logprob))
  expected, _ = moved(chain, tokens=told)
  found, measured = moved(
    chain, microbatch_rows=microbatch_rows, reference=other
  )
  assert distance(found, expected) < 1e-5
  # Without the penalty it goes elsewhere.
  assert distance(moved(PPO)[0], expected) > 1e-3
  # k3 of the first inner batch, whose weights are still those of old.
  mask = tokens.mask[:8]
  x = np.asarray(frozen.logprob)[:8][mask] - tokens.old_logprob[:8][mask]
  kl = np.mean(np.expm1(x) - x)
  np.testing.assert_allclose(measured[0]['kl/reference'], kl, rtol=1e-4)
