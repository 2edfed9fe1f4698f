"""What every filter of the menu promises. A new filter joins by a line."""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_rlvr import filters
from jax_rlvr.filters import entropy_bonus, tracked
from jax_rlvr.policy_gradient import policy_gradient, token_gradients
from jax_rlvr.records import Tokens, TokenStats

INFINITY = float('inf')
SHAPE = (8, 12)
BAND = {'fraction': 0.1, 'lower': 0.1, 'upper': 2.0}


class Case(NamedTuple):
  name: str
  kwargs: dict[str, Any]
  # What makes the filter the identity. Aggregations have none: dividing by
  # the number of tokens or sequences is what they are for.
  neutral: dict[str, Any] | None


CASES = [
  Case('clip_ratio', {}, {'low': INFINITY, 'high': INFINITY}),
  Case(
    'clip_ratio',
    {'low': 0.1, 'high': 0.3, 'dual': 1.6},
    {'low': INFINITY, 'high': INFINITY, 'dual': INFINITY},
  ),
  Case('clip_cov', BAND, {'fraction': 0.0}),
  Case('clip_cov', BAND | {'at_least_one': False}, {'fraction': 0.0}),
  Case('kl_cov', {'fraction': 0.2}, {'coef': 0.0}),
  Case(
    'kl_cov',
    {'fraction': 0.1, 'coef': 0.5, 'penalty': 'k2', 'at_least_one': False},
    {'coef': 0.0, 'penalty': 'k2'},
  ),
  Case(
    'kl_cov',
    {'fraction': 0.2, 'coef': 0.5, 'penalty': 'k3'},
    {'coef': 0.0, 'penalty': 'k3'},
  ),
  Case('forking_tokens', {'fraction': 0.3}, {'fraction': 1.0}),
  Case(
    'forking_tokens',
    {'fraction': 0.6, 'keep': 'bottom', 'rescale': False},
    {'fraction': 1.0, 'keep': 'bottom', 'rescale': False},
  ),
  Case('entropy_bonus', {'coef': 0.1}, {'coef': 0.0}),
  Case('token_mean', {}, None),
  Case('sequence_mean_token_mean', {}, None),
  Case('sequence_mean_token_sum', {'length': 12}, None),
]
IDS = [
  '-'.join([case.name, *(str(value) for value in case.kwargs.values())])
  for case in CASES
]
each_filter = pytest.mark.parametrize('index', range(len(CASES)), ids=IDS)


def _build(index):
  case = CASES[index]
  return filters.ALL[case.name](**case.kwargs)


def _in_chain(tx):
  """After a bonus, so that both leaves come with gradients."""
  return optax.chain(entropy_bonus(0.25), tx)


@functools.cache
def _compiled(index):
  """The filter in its chain, jitted once for all tests; traces it counts."""
  chain, traces = _in_chain(_build(index)), []

  @jax.jit
  def run(stats, tokens, key, state):
    traces.append(index)
    return token_gradients(chain, stats, tokens, key=key, state=state)

  return chain, run, traces


def _run(index, stats, tokens, seed=0):
  chain, run, _ = _compiled(index)
  key = jax.random.key(seed)
  return run(stats, tokens, key, chain.init(stats))[0]


@functools.cache
def _batch(seed=0):
  """Eight rows, one of them empty, ratios on both sides of any clip."""
  rng = np.random.default_rng(seed)
  mask = rng.random(SHAPE) < 0.7
  mask[:, 0], mask[3] = False, False
  old = -rng.gamma(1.0, 1.5, SHAPE).astype(np.float32)
  logprob = old + rng.normal(0, 0.4, SHAPE).astype(np.float32)
  # In steps of a half: there are ties to break.
  logprob = np.round(2 * logprob) / 2
  advantage = np.repeat(rng.normal(size=(8, 1)), 12, 1).astype(np.float32)
  advantage[5] = 0.0
  serial = rng.choice(2**32, SHAPE, replace=False).astype(np.uint32)
  entropy = np.round(2 * rng.gamma(1.0, 1.0, SHAPE).astype(np.float32)) / 2
  stats = TokenStats(jnp.array(logprob), jnp.array(entropy))
  return stats, Tokens(*map(jnp.array, (mask, advantage, old, serial)))


@functools.cache
def _plain():
  """What comes to the filter, and leaves a neutral one."""
  return token_gradients(entropy_bonus(0.25), *_batch())[0]


def _assert_same(found, expected):
  """To rounding, and silent at the same tokens."""
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(a == 0, b == 0)


def _types(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


# The menu


def test_every_filter_of_the_menu_is_under_contract():
  assert {case.name for case in CASES} == set(filters.ALL)


def test_menu_has_no_starts_and_no_wrappers():
  assert not {'policy_gradient', 'stateless', 'tracked'} & set(filters.ALL)


@pytest.mark.parametrize(
  ('name', 'signature'),
  [
    ('clip_ratio', {'low': 0.2, 'high': 0.2, 'dual': None}),
    (
      'clip_cov',
      {'fraction': 2e-4, 'lower': 1.0, 'upper': 5.0, 'at_least_one': True},
    ),
    (
      'kl_cov',
      {'fraction': 2e-3, 'coef': 1.0, 'penalty': 'abs', 'at_least_one': True},
    ),
    ('forking_tokens', {'fraction': 0.2, 'keep': 'top', 'rescale': True}),
  ],
)
def test_defaults_and_their_order_are_those_of_the_papers(name, signature):
  parameters = inspect.signature(filters.ALL[name]).parameters.values()
  assert [(p.name, p.default) for p in parameters] == list(signature.items())


@each_filter
def test_the_batch_makes_the_filter_act(index):
  # Control of everything below.
  stats, tokens = _batch()
  after = _run(index, stats, tokens)
  changed = jax.tree.map(lambda a, b: bool((a != b).any()), _plain(), after)
  assert any(changed)
  assert after.logprob.any()


# The contract


@each_filter
def test_structure_and_float32_are_kept(index):
  stats, tokens = _batch()
  grads = _run(index, stats, tokens)
  assert isinstance(grads, TokenStats)
  assert _types(grads) == _types(stats)


@each_filter
def test_silent_outside_the_mask_whatever_lies_there(index):
  stats, tokens = _batch()
  nan = jnp.where(tokens.mask, 0.0, jnp.nan)
  poisoned = _run(
    index,
    TokenStats(stats.logprob + nan, stats.entropy + nan),
    tokens._replace(
      advantage=tokens.advantage + nan, old_logprob=tokens.old_logprob + nan
    ),
  )
  clean = _run(index, stats, tokens)
  jax.tree.map(np.testing.assert_array_equal, poisoned, clean)
  for leaf in poisoned:
    assert not np.asarray(leaf)[~np.asarray(tokens.mask)].any()


@each_filter
def test_jit_equals_eager(index):
  stats, tokens = _batch()
  chain = _in_chain(_build(index))
  eager, _ = token_gradients(chain, stats, tokens, key=jax.random.key(0))
  _assert_same(_run(index, stats, tokens), eager)


@each_filter
def test_second_call_neither_compiles_again_nor_changes_the_state(index):
  chain, run, traces = _compiled(index)
  stats, tokens = _batch()
  first = chain.init(stats)
  _, second = run(stats, tokens, jax.random.key(0), first)
  stats, tokens = _batch(seed=1)
  _, third = run(stats, tokens, jax.random.key(1), second)
  assert len(traces) == 1
  structures = {jax.tree.structure(state) for state in (first, second, third)}
  assert len(structures) == 1
  assert _types(first) == _types(second) == _types(third)


@each_filter
def test_injected_and_tracked_equals_plain(index):
  case = CASES[index]
  words = [name for name, x in case.kwargs.items() if isinstance(x, str)]
  injected = optax.inject_hyperparams(
    filters.ALL[case.name], static_args=words, hyperparam_dtype=jnp.float32
  )(**case.kwargs)
  chain = _in_chain(tracked('it', injected))
  stats, tokens = _batch()

  @jax.jit
  def run(state):
    key = jax.random.key(0)
    return token_gradients(chain, stats, tokens, key=key, state=state)

  first = chain.init(stats)
  grads, second = run(first)
  _assert_same(grads, _run(index, stats, tokens))
  assert jax.tree.structure(first) == jax.tree.structure(second)
  assert _types(first) == _types(second)


@each_filter
def test_row_order_does_not_matter(index):
  order = np.random.default_rng(2).permutation(8)
  # Without advantages all covariances tie.
  for batch in (_batch(), _hostile()['no advantages']):
    permuted = _run(index, *jax.tree.map(lambda x: x[order], batch))
    expected = jax.tree.map(lambda g: g[order], _run(index, *batch))
    _assert_same(permuted, expected)


@pytest.mark.parametrize(
  'index',
  [i for i, case in enumerate(CASES) if case.neutral is not None],
  ids=[i for i, c in zip(IDS, CASES, strict=True) if c.neutral is not None],
)
def test_neutral_setting_is_the_identity(index):
  case = CASES[index]
  stats, tokens = _batch()
  chain = _in_chain(filters.ALL[case.name](**case.kwargs | case.neutral))
  key = jax.random.key(0)
  found, _ = token_gradients(chain, stats, tokens, key=key)
  jax.tree.map(np.testing.assert_array_equal, found, _plain())


@each_filter
def test_eight_devices_equal_one_and_gather_nothing(index):
  stats, tokens = _batch()
  chain = _in_chain(_build(index))
  mesh = Mesh(np.array(jax.devices()[:8]), ('rows',))
  sharding = NamedSharding(mesh, PartitionSpec('rows'))
  spread = jax.device_put((stats, tokens), sharding)

  @jax.jit
  def run(stats, tokens):
    return token_gradients(chain, stats, tokens, key=jax.random.key(0))[0]

  program = run.lower(*spread).compile()
  found = program(*spread)
  _assert_same(found, _run(index, stats, tokens))
  assert all(leaf.sharding.is_equivalent_to(sharding, 2) for leaf in found)
  text = program.as_text()
  for costly in ('all-gather', 'all-to-all', 'collective-permute', ' sort('):
    assert costly not in text, costly


@each_filter
def test_unknown_extra_arguments_are_accepted(index):
  stats, tokens = _batch()
  tx = _build(index)
  grads = policy_gradient(stats, tokens)
  plain = {'tokens': tokens, 'key': jax.random.key(0)}
  extra = plain | {'loss': jnp.float32(1.0), 'nobody_knows': 'this'}

  def shapes(arguments):
    return jax.eval_shape(
      lambda g: tx.update(g, tx.init(stats), stats, **arguments), grads
    )

  assert shapes(extra) == shapes(plain)


@each_filter
def test_works_inside_optax_combinators(index):
  stats, tokens = _batch()
  # Applied on even steps only.
  sometimes = optax.conditionally_transform(
    _build(index), lambda step: step % 2 == 0
  )
  bonus = entropy_bonus(0.25)
  combined = {
    'chain': optax.chain(optax.chain(bonus, _build(index))),
    'named': optax.named_chain(('bonus', bonus), ('it', _build(index))),
    'sometimes': optax.chain(bonus, sometimes),
  }
  key = jax.random.key(0)

  @jax.jit
  def run(stats, tokens):
    found = {}
    for name, chain in combined.items():
      found[name], state = token_gradients(chain, stats, tokens, key=key)
    found['not now'], _ = token_gradients(
      chain, stats, tokens, key=key, state=state
    )
    return found

  found = run(stats, tokens)
  _assert_same(found.pop('not now'), _plain())
  for grads in found.values():
    _assert_same(grads, _run(index, stats, tokens))


# Hostile batches


@functools.cache
def _hostile():
  stats, tokens = _batch()
  row, column = np.argwhere(np.asarray(tokens.mask))[7]
  x = np.zeros(SHAPE, np.float32)
  x[:, ::3], x[:, 1::3] = 100.0, -100.0
  one = np.zeros(SHAPE, bool)
  one[2, 5] = True
  minus_infinity = stats._replace(
    logprob=stats.logprob.at[row, column].set(-jnp.inf)
  )
  never = jnp.full(SHAPE, -jnp.inf, jnp.float32)
  return {
    'logprob -inf': (minus_infinity, tokens),
    'logprob and old_logprob -inf': (
      minus_infinity,
      tokens._replace(
        old_logprob=tokens.old_logprob.at[row, column].set(-jnp.inf)
      ),
    ),
    'every logprob -inf': (stats._replace(logprob=never), tokens),
    'old_logprob -inf': (
      stats,
      tokens._replace(
        old_logprob=tokens.old_logprob.at[row, column].set(-jnp.inf)
      ),
    ),
    'ratios e^100 and e^-100': (
      stats._replace(logprob=tokens.old_logprob + x), tokens
    ),
    'all masked': (stats, tokens._replace(mask=jnp.zeros(SHAPE, bool))),
    'single token': (stats, tokens._replace(mask=jnp.array(one))),
    'equal advantages': (
      stats, tokens._replace(advantage=jnp.full(SHAPE, 0.1, jnp.float32))
    ),
    'no advantages': (stats, tokens._replace(advantage=jnp.zeros(SHAPE))),
    'sure of everything': (
      TokenStats(jnp.zeros(SHAPE), jnp.zeros(SHAPE)),
      tokens._replace(old_logprob=jnp.zeros(SHAPE)),
    ),
  }  # fmt: skip


@each_filter
def test_finite_and_silent_outside_the_mask_for_hostile_batches(index):
  for name, (stats, tokens) in _hostile().items():
    for leaf in _run(index, stats, tokens):
      assert np.isfinite(leaf).all(), name
      assert not np.asarray(leaf)[~np.asarray(tokens.mask)].any(), name
