"""Splits, wording and rewards of arithmetic in English."""

import collections
import dataclasses
import json
import math

import pytest

from jax_rlvr.records import Completion, Prompt, user
from jax_rlvr.tasks import Arithmetic


def _pairs(task, split):
  """Unordered pairs of each operation."""
  pairs = collections.defaultdict(set)
  for prompt in task.prompts(split):
    operation, a, b = prompt.id.split()
    pairs[operation].add(frozenset([int(a), int(b)]))
  return pairs


@pytest.mark.parametrize(
  'task',
  [Arithmetic(), Arithmetic(name='add2', operations=('add',), low=10, high=99)],
)
def test_splits_share_no_pair_in_either_order(task):
  train, test = _pairs(task, 'train'), _pairs(task, 'test')
  assert set(train) == set(test) == set(task.operations)
  assert not any(train[operation] & test[operation] for operation in train)


def test_a_fifth_of_the_pairs_is_held_out():
  task = Arithmetic(test_prompts=10**6)
  test = _pairs(task, 'test')
  # Unordered pairs of 0 … 9: 55. Of 1 … 30: 465. Of two different in 0 … 9: 45.
  counts = {operation: len(pairs) for operation, pairs in test.items()}
  assert counts == {'add': 11, 'sub': 11, 'mul': 11, 'gcd': 93, 'max': 9}
  train = _pairs(task, 'train')
  assert len(train['add']) == 44 and len(train['max']) == 36


def test_train_prompts_are_balanced_and_in_turns():
  prompts = Arithmetic().prompts('train')
  operations = [prompt.id.split()[0] for prompt in prompts]
  assert operations[:6] == ['add', 'sub', 'mul', 'gcd', 'max', 'add']
  assert len(set(collections.Counter(operations).values())) == 1


def test_test_prompts_are_unique_and_limited():
  ids = [prompt.id for prompt in Arithmetic(test_prompts=30).prompts('test')]
  counts = collections.Counter(id.split()[0] for id in ids)
  assert len(set(ids)) == len(ids)
  assert counts['gcd'] == 30 and counts['max'] == 18
  assert 11 < counts['add'] <= 22


def test_prompts_never_change():
  assert Arithmetic().prompts('train') == Arithmetic().prompts('train')
  # A change of these makes every published number of the task wrong.
  texts = [prompt.text for prompt in Arithmetic(suffix='').prompts('test')[:5]]
  assert texts == [
    'What is 8 + 3?',
    'What is 8 - 3?',
    'What is 8 times 3?',
    'Find the greatest common divisor of 13 and 13.',
    'What is the larger of 7 and 4?',
  ]


@pytest.mark.parametrize(
  'operation, function',
  [
    ('add', lambda a, b: a + b),
    ('sub', lambda a, b: a - b),
    ('mul', lambda a, b: a * b),
    ('gcd', math.gcd),
    ('max', max),
  ],
)
def test_answers_are_right(operation, function):
  prompts = Arithmetic(operations=(operation,)).prompts('train')
  for prompt in prompts:
    _, a, b = prompt.id.split()
    assert prompt.answer == str(function(int(a), int(b)))
    assert a in prompt.text and b in prompt.text
    assert prompt.text.endswith(' Answer with only the final answer.')


def test_subtraction_asks_the_larger_number_first():
  task = Arithmetic(operations=('sub',))
  prompts = task.prompts('train') + task.prompts('test')
  assert len(prompts) == 55
  assert all(int(prompt.answer) >= 0 for prompt in prompts)


@pytest.mark.parametrize(
  'text, truncated, reward',
  [
    ('-4', False, 1.0),
    ('−4', False, 1.0),
    ('3 - 7 = -4.', False, 1.0),
    ('**-4.0**', False, 1.0),
    ('-4', True, 0.0),
    ('4', False, 0.0),
    ('3-7', False, 0.0),
    ('-4 or 4', False, 0.0),
    ('-40', False, 0.0),
    ('-4.01', False, 0.0),
    ('minus four', False, 0.0),
    ('', False, 0.0),
  ],
)
def test_reward_is_for_the_last_number_of_an_ended_text(
  text, truncated, reward
):
  prompt = Prompt(messages=user('3 - 7'), answer='-4', task='arithmetic')
  task = Arithmetic()
  completion = Completion(text=text, truncated=truncated)
  assert task.reward(prompt, completion) == reward


def test_task_is_rebuilt_from_json():
  task = Arithmetic(name='add2', operations=('add',), low=10, high=99)
  arguments = json.loads(json.dumps(dataclasses.asdict(task)))
  assert Arithmetic(**arguments) == task


@pytest.mark.parametrize(
  'arguments, match',
  [
    ({'operations': ('div',)}, r"operations=\('div',\)"),
    ({'operations': ()}, r'operations=\(\)'),
    ({'low': 12}, 'add of numbers 12 to 9'),
    ({'high': 10**6}, 'add of numbers 0 to 1000000'),
    ({'held_out': 0}, 'held_out=0'),
    ({'held_out': 1.0}, 'held_out=1.0'),
    ({'test_prompts': 0}, 'test_prompts=0'),
  ],
)
def test_bad_argument_is_named(arguments, match):
  with pytest.raises(ValueError, match=f'arithmetic: {match}'):
    Arithmetic(**arguments)


def test_empty_split_is_named_with_a_remedy():
  task = Arithmetic(operations=('max',), low=3, high=4)
  with pytest.raises(ValueError, match='arithmetic, train: no max .*held_out'):
    task.prompts('train')


def test_unknown_split_is_named():
  with pytest.raises(ValueError, match="split='valid'"):
    Arithmetic().prompts('valid')
