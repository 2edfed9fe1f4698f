"""The order of prompts: a function of (seed, position)."""

import collections
import itertools

import grain
import pytest

from jax_rlvr.config import ConfigError
from jax_rlvr.records import Prompt, user
from jax_rlvr.stream import fitting, stream


def _prompts(task, count):
  return [
    Prompt(messages=user(f'{i}'), answer='', task=task, id=f'{task}{i}')
    for i in range(count)
  ]


# Grain is slow to shuffle few: it walks until it falls upon one of them.
A, B = _prompts('a', 70), _prompts('b', 50)


def _ids(prompts):
  return [prompt.id for prompt in prompts]


def test_without_weights_the_order_is_that_of_one_shuffled_source():
  # Runs begun before there were weights go on with this order.
  before = grain.MapDataset.source(A + B).seed(3).shuffle().repeat()
  now = stream([A, B], seed=3)
  assert [now[i] for i in range(100)] == [before[i] for i in range(100)]


@pytest.mark.parametrize(
  'weights, ids',
  [
    ((), 'a1 a2 b4 a5 b2 b0'),
    ((2, 1), 'a5 a3 b1 a6 a0 b2'),
  ],
)
def test_order_of_a_seed_never_changes(weights, ids):
  # A change of these makes every published run another.
  prompts = stream([A[:7], B[:5]], seed=0, weights=weights)
  assert _ids(prompts[i] for i in range(6)) == ids.split()


@pytest.mark.parametrize('weights', [(), (1, 1), (3, 1)])
def test_random_access_equals_iteration_wherever_it_begins(weights):
  prompts = stream([A, B], seed=1, weights=weights)
  walked = _ids(itertools.islice(prompts, 60))
  again = stream([A, B], seed=1, weights=weights)
  assert [again[i].id for i in reversed(range(60))] == walked[::-1]
  iterator = iter(again.to_iter_dataset())
  assert _ids(itertools.islice(iterator, 60)) == walked


def test_positions_beyond_any_run_can_be_asked():
  for weights in ((), (1, 2)):
    prompts = stream([A, B], seed=1, weights=weights)
    assert prompts[2**40] in A + B


@pytest.mark.parametrize(
  'weights, shares',
  [
    ((1, 1), (0.5, 0.5)),
    ((3, 1), (0.75, 0.25)),
    ((0.9, 0.1), (0.9, 0.1)),
    ((3, 7), (0.3, 0.7)),
    ((1e-3, 1), (1 / 1001, 1000 / 1001)),
  ],
)
def test_sources_are_asked_in_proportion_from_early_on(weights, shares):
  sources = [_prompts('a', 3000), _prompts('b', 2000)]
  prompts = stream(sources, seed=0, weights=weights)
  for stretch in (200, 5000):
    counts = collections.Counter(prompts[i].task for i in range(stretch))
    for task, share in zip('ab', shares, strict=True):
      # One turn, and a hundredth of the smallest weight.
      assert abs(counts[task] - share * stretch) <= 1 + 0.01 * share * stretch


@pytest.mark.parametrize('weights', [(1, 1), (5, 2)])
def test_every_epoch_of_a_source_has_each_prompt_once_in_a_new_order(weights):
  prompts = stream([A, B], seed=2, weights=weights)
  first = [prompts[i] for i in range(1000)]
  for source in (A, B):
    asked = [p.id for p in first if p.task == source[0].task]
    size = len(source)
    epochs = [asked[i * size : (i + 1) * size] for i in range(5)]
    assert all(sorted(epoch) == sorted(_ids(source)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 5


def test_sources_of_one_size_are_shuffled_apart():
  same = stream([_prompts('a', 50), _prompts('b', 50)], seed=0, weights=(1, 1))
  first = [same[i].id for i in range(500)]
  orders = [
    tuple(x[1:] for x in first if x[0] == task)[50 * epoch : 50 * (epoch + 1)]
    for task in 'ab'
    for epoch in range(5)
  ]
  assert len(set(orders)) == 10


def test_seeds_order_prompts_differently():
  for weights in ((), (1, 1)):
    orders = [
      tuple(_ids(stream([A, B], seed, weights)[i] for i in range(12)))
      for seed in range(4)
    ]
    assert len(set(orders)) == 4


def test_source_of_one_prompt_is_asked_in_its_turns():
  prompts = stream([A, B[:1]], seed=0, weights=(1, 1))
  assert [prompts[i].task for i in range(10)].count('b') == 5


@pytest.mark.parametrize(
  'sources, weights, message',
  [
    ([A, B], (1,), '1 weights for 2 sources; give one each'),
    ([A, B], (1, 0), 'weights=(1, 0); give numbers above 0'),
    ([A, B], (1, -1.0), 'weights=(1, -1.0); give numbers above 0'),
    ([A, B], (float('nan'), 1), 'weights=(nan, 1); give numbers above 0'),
    ([A, B], (float('inf'), 1), 'weights=(inf, 1); give numbers above 0'),
    ([A, []], (1, 1), 'no prompts in sources [1] of 2'),
    ([], (), 'no prompts in sources [] of 0'),
  ],
)
def test_bad_mixture_is_refused_in_one_line(sources, weights, message):
  with pytest.raises(ValueError) as caught:
    stream(sources, 0, weights)
  assert str(caught.value) == message


def _render(prompt):
  """As many tokens as the number of the prompt says."""
  return [0] * int(prompt.text)


def test_fitting_prompts_are_all_kept():
  assert fitting(A, _render, 69, 'refuse') == (A, [])


def test_long_prompt_is_refused_with_a_remedy():
  with pytest.raises(ConfigError) as caught:
    fitting(A, _render, 4, 'refuse')
  assert str(caught.value) == (
    "prompt 'a5' of task 'a' has 5 tokens, more than max_prompt_tokens=4; "
    "raise it, or leave such prompts out with long_prompts='drop'"
  )


def test_long_prompts_are_dropped_and_listed():
  kept, dropped = fitting(A[:7], _render, 4, 'drop')
  assert kept == A[:5]
  assert dropped == [('a5', 5), ('a6', 6)]


def test_task_whose_prompts_are_all_too_long_is_refused():
  with pytest.raises(
    ConfigError, match="all 2 prompts of task 'a' .*shortest 5;"
  ):
    fitting(A[5:7], _render, 4, 'drop')
