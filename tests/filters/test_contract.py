"""What every filter of the menu promises. A new filter joins by a line."""

import functools
import inspect
import re
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
  # What makes the filter the identity. Most aggregations have none: dividing
  # by the number of tokens or sequences is what they are for.
  neutral: dict[str, Any] | None = None
  # Heads overwrite what has come, and so are written first.
  head: bool = False


CASES = [
  Case('gspo', {'low': 0.1, 'high': 0.2}, head=True),
  Case('gmpo', {'low': 0.2, 'high': 0.3}, head=True),
  Case(
    'cispo',
    {'low': 0.2, 'high': 0.3},
    {'low': INFINITY, 'high': INFINITY},
    head=True,
  ),
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
  Case(
    'forking_tokens',
    {'fraction': 0.3, 'rule': 'quantile'},
    {'fraction': 1.0, 'rule': 'quantile'},
  ),
  Case(
    'forking_tokens',
    {'fraction': 0.3, 'scope': 'sequence'},
    {'fraction': 1.0, 'scope': 'sequence'},
  ),
  Case(
    'forking_tokens',
    {
      'fraction': 0.5,
      'keep': 'bottom',
      'rule': 'quantile',
      'scope': 'sequence',
    },
    {'fraction': 1.0},
  ),
  Case('entropy_above', {}, {'threshold': -INFINITY}),
  Case(
    'entropy_above',
    {'threshold': 1.0, 'keep': 'bottom', 'rescale': False},
    {'threshold': INFINITY},
  ),
  # Identities where nothing was sampled off policy; see test_off_policy.
  Case('tis', {'cap': 1.2}),
  Case('tis', {'cap': 1.2, 'scope': 'sequence'}),
  Case('icepop', {'lower': 0.8, 'upper': 1.3}),
  Case('icepop', {'lower': 0.5, 'upper': 2.0, 'scope': 'sequence'}),
  Case(
    'sequence_mask',
    {'lower': 0.9, 'upper': 1.1},
    {'lower': 0.0, 'upper': INFINITY},
  ),
  Case('opsm', {'delta': 0.01}, {'delta': INFINITY}),
  Case('kl_penalty', {}, {'coef': 0.0}),
  Case(
    'kl_penalty',
    {'coef': 0.1, 'value': 'k3', 'gradient': 'k2'},
    {'coef': 0.0},
  ),
  Case(
    'kl_penalty',
    {'coef': 0.1, 'value': 'k2', 'gradient': 'k1'},
    {'coef': 0.0},
  ),
  Case('entropy_bonus', {'coef': 0.1}, {'coef': 0.0}),
  Case('token_mean', {}),
  Case('sequence_mean_token_mean', {}),
  Case('sequence_mean_token_sum', {'length': 12}),
  Case('token_sum', {'constant': 50}, {'constant': 1.0}),
]
IDS = [
  '-'.join([case.name, *(str(value) for value in case.kwargs.values())])
  for case in CASES
]
each_filter = pytest.mark.parametrize('index', range(len(CASES)), ids=IDS)


def _build(index):
  case = CASES[index]
  return filters.ALL[case.name](**case.kwargs)


def _steps(index, tx):
  """With a bonus, so that both leaves come with, or have, gradients."""
  steps = [('bonus', entropy_bonus(0.25)), ('it', tx)]
  return steps[::-1] if CASES[index].head else steps


def _in_chain(index, tx):
  return optax.chain(*(step for _, step in _steps(index, tx)))


@functools.cache
def _compiled(index):
  """The filter in its chain, jitted once for all tests; traces it counts."""
  chain, traces = _in_chain(index, _build(index)), []

  @jax.jit
  def run(stats, tokens, key, state):
    traces.append(index)
    return token_gradients(chain, stats, tokens, key=key, state=state)

  return chain, run, traces


def _run_with_state(index, stats, tokens, seed=0):
  chain, run, _ = _compiled(index)
  key = jax.random.key(seed)
  return run(stats, tokens, key, chain.init(stats))


def _run(index, stats, tokens, seed=0):
  return _run_with_state(index, stats, tokens, seed)[0]


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
  sampled, ref = (
    old + rng.normal(0, spread, SHAPE).astype(np.float32)
    for spread in (0.3, 0.6)
  )
  stats = TokenStats(jnp.array(logprob), jnp.array(entropy))
  return stats, Tokens(
    *map(jnp.array, (mask, advantage, old, serial, sampled)),
    old_entropy=jnp.array(entropy[::-1]),
    ref_logprob=jnp.array(ref),
  )


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
  tools = {'policy_gradient', 'stateless', 'tracked', 'per_microbatch'}
  assert all(callable(getattr(filters, name)) for name in tools)
  assert not tools & set(filters.ALL)


NEEDED = inspect.Parameter.empty
# Arguments in order, and those by keyword only.
SIGNATURES = {
  'clip_ratio': ({'low': 0.2, 'high': 0.2, 'dual': None}, {}),
  'gspo': ({'low': 3e-4, 'high': 4e-4}, {}),
  'gmpo': ({'low': 0.4, 'high': 0.4}, {}),
  # Distances, as verl has them: TRL's 5 is 1 + 4.
  'cispo': ({'low': 1.0, 'high': 4.0}, {}),
  # Shares, not percents; SkyRL takes 0.2 for 2e-3.
  'clip_cov': (
    {'fraction': 2e-4, 'lower': 1.0, 'upper': 5.0, 'at_least_one': True},
    {},
  ),
  'kl_cov': (
    {'fraction': 2e-3, 'coef': 1.0, 'penalty': 'abs', 'at_least_one': True},
    {},
  ),
  'forking_tokens': (
    {'fraction': 0.2, 'keep': 'top', 'rescale': True},
    {'rule': 'exact', 'scope': 'batch'},
  ),
  'entropy_above': ({'threshold': 0.672, 'keep': 'top', 'rescale': True}, {}),
  'entropy_bonus': ({'coef': 1e-3}, {}),
  'kl_penalty': ({'coef': 0.04, 'value': 'k3', 'gradient': 'k3'}, {}),
  'tis': ({'cap': 2.0, 'scope': 'token'}, {}),
  'icepop': ({'lower': 0.5, 'upper': 5.0, 'scope': 'token'}, {}),
  'sequence_mask': ({'lower': 0.999, 'upper': 1.001}, {}),
  'opsm': ({'delta': 0.5}, {}),
  'token_mean': ({}, {}),
  'sequence_mean_token_mean': ({}, {}),
  'sequence_mean_token_sum': ({'length': 1.0}, {}),
  'token_sum': ({'constant': NEEDED}, {}),
}


@pytest.mark.parametrize('name', filters.ALL)
def test_defaults_and_their_order_are_those_of_the_papers(name):
  parameters = inspect.signature(filters.ALL[name]).parameters.values()
  by_name = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
  ordered = [(p.name, p.default) for p in parameters if p not in by_name]
  first, variants = SIGNATURES[name]
  assert ordered == list(first.items())
  assert {p.name: p.default for p in by_name} == variants


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
      advantage=tokens.advantage + nan,
      old_logprob=tokens.old_logprob + nan,
      sampled_logprob=tokens.sampled_logprob + nan,
      ref_logprob=tokens.ref_logprob + nan,
    ),
  )
  clean = _run(index, stats, tokens)
  jax.tree.map(np.testing.assert_array_equal, poisoned, clean)
  for leaf in jax.tree.leaves(poisoned):
    assert not np.asarray(leaf)[~np.asarray(tokens.mask)].any()


@each_filter
def test_jit_equals_eager(index):
  stats, tokens = _batch()
  chain = _in_chain(index, _build(index))
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
  chain = _in_chain(index, tracked('it', injected))
  stats, tokens = _batch()

  @jax.jit
  def run(stats, tokens, state):
    key = jax.random.key(0)
    return token_gradients(chain, stats, tokens, key=key, state=state)

  first = chain.init(stats)
  grads, second = run(stats, tokens, first)
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
  neutral = filters.ALL[case.name](**case.kwargs | case.neutral)
  chain = _in_chain(index, neutral)
  key = jax.random.key(0)
  found, _ = token_gradients(chain, stats, tokens, key=key)
  jax.tree.map(np.testing.assert_array_equal, found, _plain())


@each_filter
def test_eight_devices_equal_one_and_gather_nothing(index):
  stats, tokens = _batch()
  chain = _in_chain(index, _build(index))
  mesh = Mesh(np.array(jax.devices()[:8]), ('rows',))
  sharding = NamedSharding(mesh, PartitionSpec('rows'))
  spread = jax.device_put((stats, tokens), sharding)

  @jax.jit
  def run(stats, tokens):
    return token_gradients(chain, stats, tokens, key=jax.random.key(0))[0]

  program = run.lower(*spread).compile()
  found = program(*spread)
  _assert_same(found, _run(index, stats, tokens))
  assert all(
    leaf.sharding.is_equivalent_to(sharding, 2)
    for leaf in jax.tree.leaves(found)
  )
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
    optax.chain(_build(index)), lambda step: step % 2 == 0
  )
  chain = optax.chain(optax.named_chain(*_steps(index, sometimes)))

  @jax.jit
  def run(stats, tokens, state):
    key = jax.random.key(0)
    return token_gradients(chain, stats, tokens, key=key, state=state)

  now, state = run(stats, tokens, chain.init(stats))
  not_now, _ = run(stats, tokens, state)
  _assert_same(now, _run(index, stats, tokens))
  _assert_same(not_now, _plain())


def _words(doc, label):
  """What a docstring lists behind a label, up to the full stop."""
  found = re.search(rf'{label}: ([^.]*)\.', doc)
  assert found, label
  return set(re.findall(r'\w+', found[1]))


@each_filter
def test_docstring_names_the_evidence_that_cannot_be_missing(index):
  stats, tokens = _batch()
  tx = _build(index)
  doc = inspect.getdoc(filters.ALL[CASES[index].name])
  named = _words(doc, 'Reads') | (_words(doc, 'Writes') & {'entropy'})
  optional = {'entropy', 'sampled_logprob', 'ref_logprob', 'key'}

  def trace_without(*missing):
    gone = dict.fromkeys(missing)
    key = gone.pop('key', jax.random.key(0))
    entropy = gone.pop('entropy', stats.entropy)
    batch = TokenStats(stats.logprob, entropy), tokens._replace(**gone)
    jax.eval_shape(lambda: token_gradients(tx, *batch, key=key)[0])

  trace_without(*optional - named)
  for needed in optional & named:
    with pytest.raises(ValueError, match=f'{CASES[index].name}.*{needed}'):
      trace_without(needed)


# Hostile batches


@functools.cache
def _hostile():
  stats, tokens = _batch()
  row, column = np.argwhere(np.asarray(tokens.mask))[7]
  x = np.zeros(SHAPE, np.float32)
  x[:, ::3], x[:, 1::3] = 100.0, -100.0
  one = np.zeros(SHAPE, bool)
  one[2, 5] = True

  def spoiled(logprob):
    return logprob.at[row, column].set(-jnp.inf)

  minus_infinity = stats._replace(logprob=spoiled(stats.logprob))
  never = jnp.full(SHAPE, -jnp.inf, jnp.float32)
  return {
    'logprob -inf': (minus_infinity, tokens),
    'logprob and old_logprob -inf': (
      minus_infinity,
      tokens._replace(old_logprob=spoiled(tokens.old_logprob)),
    ),
    'every logprob -inf': (stats._replace(logprob=never), tokens),
    'old_logprob -inf': (
      stats,
      tokens._replace(old_logprob=spoiled(tokens.old_logprob)),
    ),
    'sampled_logprob -inf': (
      stats,
      tokens._replace(sampled_logprob=spoiled(tokens.sampled_logprob)),
    ),
    'old_logprob and sampled_logprob -inf': (
      stats,
      tokens._replace(
        old_logprob=spoiled(tokens.old_logprob),
        sampled_logprob=spoiled(tokens.sampled_logprob),
      ),
    ),
    'every sampled_logprob -inf': (
      stats, tokens._replace(sampled_logprob=never)
    ),
    'ref_logprob -inf': (
      stats, tokens._replace(ref_logprob=spoiled(tokens.ref_logprob))
    ),
    'logprob and ref_logprob -inf': (
      minus_infinity,
      tokens._replace(ref_logprob=spoiled(tokens.ref_logprob)),
    ),
    'every ref_logprob -inf': (stats, tokens._replace(ref_logprob=never)),
    'ratios e^100 and e^-100': (
      stats._replace(logprob=tokens.old_logprob + np.minimum(x, 0.0)),
      tokens._replace(old_logprob=tokens.old_logprob - np.maximum(x, 0.0)),
    ),
    'samplers and references e^100 and e^-100 off': (
      stats,
      tokens._replace(
        sampled_logprob=tokens.old_logprob + x,
        ref_logprob=stats.logprob + x,
      ),
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
    grads, state = _run_with_state(index, stats, tokens)
    for leaf in jax.tree.leaves(grads):
      assert np.isfinite(leaf).all(), name
      assert not np.asarray(leaf)[~np.asarray(tokens.mask)].any(), name
    # What it reports, too.
    for leaf in jax.tree.leaves(state):
      assert np.isfinite(leaf).all(), name
