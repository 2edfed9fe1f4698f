"""Published methods: what they print is what they are, and what they state."""

import ast
import functools
import inspect
import re

import jax
import numpy as np
import optax
import pytest

from jax_rlvr import advantages, filters
from jax_rlvr.filters import recipes
from jax_rlvr.policy_gradient import policy_gradient, token_gradients
from jax_rlvr.records import Tokens, TokenStats, Tracked
from tests.test_config import small

# Advantage and filters by the papers, in words of the menu.
PUBLISHED = {
  'grpo': 'group_norm: clip_ratio(0.2, 0.2) sequence_mean_token_mean()',
  'dr_grpo': 'group_mean: clip_ratio(0.2, 0.2) sequence_mean_token_sum(3000)',
  'dapo': 'group_norm: clip_ratio(0.2, 0.28) token_mean()',
  'rloo': 'leave_one_out: sequence_mean_token_sum()',
  'reinforce_plus_plus': 'batch_norm: clip_ratio(0.2, 0.2) token_mean()',
  'reinforce_plus_plus_baseline': (
    'group_mean_batch_norm: clip_ratio(0.2, 0.2) token_mean()'
  ),
  'opo': 'length_weighted: token_mean()',
  'gspo': 'group_norm: gspo(0.0003, 0.0004) sequence_mean_token_mean()',
  'gmpo': 'group_norm: gmpo(0.4, 0.4) sequence_mean_token_mean()',
  'cispo': 'group_norm: cispo(1.0, 4.0) token_mean()',
  'lite_ppo': 'group_mean_batch_std: clip_ratio(0.2, 0.2) token_mean()',
  'pass_at_k': (
    'functools.partial(pass_at_k, k=4): clip_ratio(0.2, 0.2) token_mean()'
  ),
  'clip_cov': (
    'group_norm: clip_ratio(1.0, 1.0) clip_cov(0.0002, 1.0, 5.0) token_mean()'
  ),
  'kl_cov': 'group_norm: kl_cov(0.002, 1.0) token_mean()',
  'beyond_80_20': (
    'group_norm: clip_ratio(0.2, 0.28) forking_tokens(0.2) token_mean()'
  ),
}
NAMES = {
  'functools': functools,
  'optax': optax,
  **advantages.ALL,
  **filters.ALL,
}

each_recipe = pytest.mark.parametrize('name', recipes.ALL)


def _source(method) -> str:
  """What a method prints, as the arguments of a call."""
  return f'dict(\n{method}\n)'


def _from_print(method):
  return eval(_source(method), NAMES)


def _group(prompts=4, size=8, longest=12):
  """Rewards, valid, lengths; two prompts are solved by some completions."""
  rng = np.random.default_rng(0)
  rewards = np.float32(rng.random((prompts, size)) < 0.4)
  valid = rng.random((prompts, size)) < 0.9
  rewards[0] = 1.0
  lengths = rng.integers(2, longest, (prompts, size)).astype(np.int32)
  return rewards, valid, lengths


@functools.cache
def _batch(name):
  """Ratios on both sides of any clip, an advantage by the recipe's own."""
  rewards, valid, lengths = _group()
  advantage = recipes.ALL[name]().advantage(rewards, valid, lengths)
  rng = np.random.default_rng(1)
  shape = rewards.size, 16
  t = np.arange(16)
  mask = (t >= 2) & (t < 2 + lengths.reshape(-1, 1))
  old = -rng.gamma(1.0, 1.5, shape).astype(np.float32)
  logprob = old + rng.normal(0, 0.9, shape).astype(np.float32)
  # Some sequences have hardly moved: inside the clip of whole sequences.
  logprob = np.where(np.arange(shape[0])[:, None] % 2, logprob, old)
  entropy = rng.gamma(1.0, 1.0, shape).astype(np.float32)
  advantage = np.repeat(advantage.reshape(-1, 1), 16, 1)
  return TokenStats(logprob, entropy), Tokens(mask, advantage, old)


def _gradients(chain, stats, tokens):
  run = jax.jit(functools.partial(token_gradients, chain))
  return run(stats, tokens, key=jax.random.key(0))


@functools.cache
def _run(name):
  """The recipe with its defaults on its batch: gradients and state."""
  return _gradients(recipes.ALL[name]().filters, *_batch(name))


def _assert_trees_equal(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


# What they print


def test_recipes_are_those_of_the_papers():
  assert set(recipes.ALL) == set(PUBLISHED)


@each_recipe
def test_print_is_the_published_method(name):
  advantage, steps = PUBLISHED[name].split(': ')
  lines = [f'  {step},' for step in re.findall(r'\w+\(.*?\)', steps)]
  expected = [f'advantage={advantage},', 'filters=optax.chain(', *lines, '),']
  assert str(recipes.ALL[name]()).splitlines() == expected


@each_recipe
def test_print_runs_and_is_the_composition(name):
  method = recipes.ALL[name]()
  printed = _from_print(method)
  assert set(printed) == {'advantage', 'filters'}
  group = _group()
  found = method.advantage(*group)
  assert found.any()
  np.testing.assert_array_equal(printed['advantage'](*group), found)

  stats, tokens = _batch(name)
  grads, _ = _run(name)
  expected, _ = _gradients(printed['filters'], stats, tokens)
  _assert_trees_equal(grads, expected)
  # Control: the aggregation alone is another gradient, where there is more.
  if len(method.steps) > 1:
    bare = optax.chain(method.steps[-1]())
    plain, _ = _gradients(bare, stats, tokens)
    assert (np.asarray(plain.logprob) != np.asarray(grads.logprob)).any()


@pytest.mark.parametrize(
  ('name', 'argument', 'words'),
  [
    ('dr_grpo', {'length': 256}, 'sequence_mean_token_sum(256)'),
    ('pass_at_k', {'k': 2}, 'functools.partial(pass_at_k, k=2)'),
    ('clip_cov', {'fraction': 0.05}, 'clip_cov(0.05, 1.0, 5.0)'),
    ('kl_cov', {'fraction': 0.05}, 'kl_cov(0.05, 1.0)'),
    ('beyond_80_20', {'fraction': 0.5}, 'forking_tokens(0.5)'),
  ],
)
def test_arguments_reach_the_print_and_the_composition(name, argument, words):
  default, method = recipes.ALL[name](), recipes.ALL[name](**argument)
  assert words in str(method) and words not in str(default)
  stats, tokens = _batch(name)

  changed = (
    method.advantage(*_group()),
    _gradients(method.filters, stats, tokens)[0],
  )
  before = default.advantage(*_group()), _run(name)[0]
  same = jax.tree.map(lambda a, b: bool((a == b).all()), changed, before)
  assert not all(jax.tree.leaves(same))


# What they state


def _stated(recipe) -> set[float]:
  """Numbers of the docstring's section, those of chapters aside."""
  text = inspect.getdoc(recipe).split('Numbers:')[1].split('\n\n')[0]
  text = re.sub(r'§[\d.]+', '', text)
  return {float(x) for x in re.findall(r'\b\d+(?:\.\d+)?(?:e-\d+)?\b', text)}


def _literals(method) -> list[float]:
  nodes = ast.walk(ast.parse(_source(method)))
  return [x.value for x in nodes if isinstance(x, ast.Constant)]


@each_recipe
def test_every_number_of_the_composition_is_stated(name):
  recipe = recipes.ALL[name]
  missing = set(_literals(recipe())) - _stated(recipe)
  assert not missing, missing


def test_a_number_that_is_not_stated_would_be_seen():
  # Control: 4e-4 and .0004 are one number, .0005 another; §5.1 states none.
  assert _stated(recipes.gspo) == {3e-4, 4e-4}
  assert _literals(recipes.gspo()) == [0.0003, 0.0004]
  changed = recipes.clip_cov(fraction=5e-4)
  assert set(_literals(changed)) - _stated(recipes.clip_cov) == {0.0005}


@each_recipe
def test_recipe_says_what_it_is_and_by_whom(name):
  doc = inspect.getdoc(recipes.ALL[name])
  assert re.search(r'Reference: `[^`]+<https://arxiv.org/abs/[\d.]+>`_', doc)
  for argument in inspect.signature(recipes.ALL[name]).parameters:
    assert re.search(rf'Args:\n  {argument}: ', doc)


# What they do


@each_recipe
def test_every_filter_is_tracked_under_its_name(name):
  method = recipes.ALL[name]()
  names = [step.func.__name__ for step in method.steps[:-1]]
  initial = method.filters.init(_batch(name)[0])
  _, state = _run(name)
  for its_state in (initial, state):
    tracked = [node for node in its_state if isinstance(node, Tracked)]
    assert len(tracked) == len(names)
    for filter_name, node in zip(names, tracked, strict=True):
      keys = set(node.report)
      assert {f'{filter_name}/kept', f'{filter_name}/mass'} <= keys
      assert {key.split('/')[0] for key in keys} == {filter_name}
      assert all(np.isfinite(x) for x in node.report.values())
  # The filters act on this batch: a mask keeps fewer, a head or a penalty
  # changes the mass.
  for node in state:
    if isinstance(node, Tracked):
      assert any(
        value != 1
        for key, value in node.report.items()
        if key.endswith(('/kept', '/mass'))
      )


@each_recipe
def test_recipe_goes_into_a_config_as_it_is(name):
  method = recipes.ALL[name]()
  config = small(advantage=method.advantage, filters=method.filters)
  rewards, valid, lengths = _group()
  advantage = config.advantage(rewards, valid, lengths)
  assert advantage.dtype == np.float32 and advantage.shape == rewards.shape
  # One state, whichever access of the property it came from.
  stats, tokens = _batch(name)
  grads, state = _run(name)
  assert jax.tree.structure(config.filters.init(stats)) == jax.tree.structure(
    state
  )


@each_recipe
def test_gradients_are_finite_not_zero_and_silent_outside_the_mask(name):
  stats, tokens = _batch(name)
  grads, _ = _run(name)
  live = np.asarray(tokens.mask & (tokens.advantage != 0))
  assert np.isfinite(grads.logprob).all()
  assert np.asarray(grads.logprob)[live].any()
  assert not np.asarray(grads.logprob)[~tokens.mask].any()
  # None of them has an entropy bonus.
  assert not np.asarray(grads.entropy).any()


def test_rloo_is_reinforce_over_whole_sequences():
  # Ratio × advantage, summed over tokens, mean over sequences.
  stats, tokens = _batch('rloo')
  grads, _ = _run('rloo')
  expected = np.asarray(policy_gradient(stats, tokens).logprob) / 32
  assert tokens.mask.any(axis=1).sum() == 32
  np.testing.assert_allclose(grads.logprob, expected, rtol=1e-6)
