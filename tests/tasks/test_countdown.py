"""Puzzles that are drawn: all different, all with a solution."""

import ast
import collections
import dataclasses
import pickle
from fractions import Fraction

import pytest

from jax_rlvr.records import Completion
from jax_rlvr.tasks import Countdown

SMALL = Countdown(train_prompts=300, test_prompts=50)
TWENTY_FOUR = Countdown(
  high=9, target_low=24, target_high=24, train_prompts=60, test_prompts=20
)


def _value(node, numbers):
  """What a parsed equation comes to, exactly; collects its numbers."""
  if isinstance(node, ast.Constant):
    numbers.append(node.value)
    return Fraction(node.value)
  a, b = _value(node.left, numbers), _value(node.right, numbers)
  match node.op:
    case ast.Add():
      return a + b
    case ast.Sub():
      return a - b
    case ast.Mult():
      return a * b
    case ast.Div():
      return a / b


def _puzzle(prompt):
  return prompt.extra['target'], tuple(sorted(prompt.extra['numbers']))


@pytest.mark.parametrize(
  'task',
  [
    SMALL,
    dataclasses.replace(SMALL, numbers=(2, 6), seed=3),
    dataclasses.replace(TWENTY_FOUR, seed=1),
  ],
)
def test_every_puzzle_has_a_solution_of_exactly_its_numbers(task):
  for prompt in [*task.prompts('train'), *task.prompts('test')]:
    numbers = []
    value = _value(ast.parse(prompt.answer, mode='eval').body, numbers)
    target, given = _puzzle(prompt)
    assert value == target and tuple(sorted(numbers)) == given
    assert task.target_low <= target <= task.target_high
    assert all(task.low <= number <= task.high for number in given)
    solved = Completion(text=f'So <answer>{prompt.answer}</answer>')
    assert task.reward(prompt, solved) == 1.0
    wrong = Completion(text=f'So <answer>{prompt.answer} + 1</answer>')
    assert task.reward(prompt, wrong) == 0.0


def test_splits_share_no_puzzle_and_repeat_none():
  prompts = [*SMALL.prompts('train'), *SMALL.prompts('test')]
  assert len(set(map(_puzzle, prompts))) == len(prompts) == 350
  assert len({prompt.id for prompt in prompts}) == 350


def test_kinds_come_by_turns_and_all_operations_occur():
  prompts = SMALL.prompts('test')
  assert [len(p.extra['numbers']) for p in prompts] == [3, 4] * 25
  operations = collections.Counter(
    c for prompt in prompts for c in prompt.answer if c in '+-*/'
  )
  assert all(operations[c] >= 5 for c in '+-*/')


def test_puzzles_never_change():
  # A change of these makes every published number of the task wrong.
  puzzles = [(p.id, p.answer) for p in Countdown().prompts('test')[:3]]
  assert puzzles == [
    ('49: 87 19 57', '(87 - 57) + 19'),
    ('62: 44 18 47 41', '((47 + 18) + 41) - 44'),
    ('70: 88 49 31', '88 - (49 - 31)'),
  ]


def test_counts_of_prompts_do_not_move_the_puzzles():
  fewer = dataclasses.replace(SMALL, train_prompts=10)
  assert fewer.prompts('test') == SMALL.prompts('test')
  assert fewer.prompts('train') == SMALL.prompts('train')[:10]
  other = dataclasses.replace(SMALL, seed=1)
  assert other.prompts('test') != SMALL.prompts('test')


def test_prompt_says_all_that_the_grader_asks():
  prompt = SMALL.prompts('test')[0]
  numbers, target = prompt.extra['numbers'], prompt.extra['target']
  assert prompt.text.startswith(
    f'Using the numbers {numbers}, create an equation that equals {target}. '
  )
  assert 'each number exactly once' in prompt.text
  assert '<answer> </answer>' in prompt.text
  assert prompt.task == 'countdown'


def test_task_is_hashable_and_pickled():
  assert isinstance(hash(SMALL), int)
  assert pickle.loads(pickle.dumps(SMALL)) == SMALL
  assert SMALL.extract(Completion(text='<answer>1 + 2</answer>')) == '1+2'


@pytest.mark.parametrize(
  'arguments, match',
  [
    ({'numbers': ()}, r'numbers=\(\); give counts from 2 to 6'),
    ({'numbers': (1, 3)}, r'numbers=\(1, 3\); give counts from 2 to 6'),
    ({'low': 0}, 'low=0, high=99; give 1 <= low <= high'),
    ({'low': 9, 'high': 8}, 'low=9, high=8; give 1 <= low <= high'),
    ({'target_high': 9}, 'target_low=10, target_high=9; give 1 <= target_low'),
    ({'train_prompts': 0}, 'train_prompts=0; give 1 or more'),
    ({'test_prompts': -1}, 'test_prompts=-1; give 1 or more'),
  ],
)
def test_bad_argument_is_named(arguments, match):
  with pytest.raises(ValueError, match=f'^countdown: {match}'):
    Countdown(**arguments)


def test_more_puzzles_than_there_are_is_refused():
  task = Countdown(numbers=(2,), low=1, high=6, target_low=10, target_high=12)
  # 4+6 5+5 2*5 | 5+6 | 6+6 2*6 3*4
  with pytest.raises(ValueError, match='only 7 different puzzles .* 500 are'):
    task.prompts('test')


def test_unknown_split_is_named():
  with pytest.raises(ValueError, match="split='valid'"):
    SMALL.prompts('valid')
