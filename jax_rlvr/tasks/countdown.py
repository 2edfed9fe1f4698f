"""Countdown: make an equation of given numbers that comes to a target.

The task of TinyZero, https://github.com/Jiayi-Pan/TinyZero, 2025. Nothing is
downloaded: puzzles are drawn, each with an equation that solves it.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

from jax_rlvr.records import Prompt, user
from jax_rlvr.tasks import graders
from jax_rlvr.tasks.dataset import Graded, Grader

SUFFIX = (
  ' Show your work in <think> </think> tags, and give the equation in <answer> '
  '</answer> tags, for example <answer> (1 + 2) / 3 </answer>.'
)

# Draws in a row without a new puzzle, after which there seem to be no more.
_MAX_MISSES = 20_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Countdown(Graded):
  """Numbers and a target; each number is to be used exactly once.

  Puzzles are drawn in an order that depends on all arguments but the counts of
  prompts; no two have the same target and the same numbers, in whatever order.
  The first are the test split, those that follow the train split. Equations
  whose steps are all whole and positive solve them.

  Attributes:
    numbers: how many a puzzle has; such puzzles by turns.
    low, high: smallest and largest number.
    target_low, target_high: smallest and largest target.
    train_prompts, test_prompts: puzzles of the splits.
    seed: of the puzzles.
    suffix: follows every puzzle.
    grader: of the completions; `Prompt.extra` has target and numbers for it.
    name: of the task.
  """

  numbers: Sequence[int] = (3, 4)
  low: int = 1
  high: int = 99
  target_low: int = 10
  target_high: int = 99
  train_prompts: int = 10_000
  test_prompts: int = 500
  seed: int = 0
  suffix: str = SUFFIX
  grader: Grader = dataclasses.field(default=graders.Countdown(), hash=False)
  name: str = 'countdown'

  def __post_init__(self):
    object.__setattr__(self, 'numbers', tuple(self.numbers))
    if not self.numbers or not all(2 <= count <= 6 for count in self.numbers):
      raise ValueError(
        f'{self.name}: numbers={self.numbers!r}; give counts from 2 to 6'
      )
    for low, high in (('low', 'high'), ('target_low', 'target_high')):
      if not 1 <= getattr(self, low) <= getattr(self, high):
        raise ValueError(
          f'{self.name}: {low}={getattr(self, low)!r}, '
          f'{high}={getattr(self, high)!r}; give 1 <= {low} <= {high}'
        )
    for count in ('train_prompts', 'test_prompts'):
      if getattr(self, count) < 1:
        raise ValueError(
          f'{self.name}: {count}={getattr(self, count)!r}; give 1 or more'
        )

  def prompts(self, split: str) -> list[Prompt]:
    """The puzzles of a split, 'train' or 'test', always in the same order.

    Raises:
      ValueError: unknown split, or there are not that many puzzles.
    """
    self.require()
    if split == 'test':
      return self._puzzles(self.test_prompts)
    if split == 'train':
      puzzles = self._puzzles(self.test_prompts + self.train_prompts)
      return puzzles[self.test_prompts :]
    raise ValueError(f"{self.name}: split={split!r}; give 'train' or 'test'")

  def _puzzles(self, count: int) -> list[Prompt]:
    # Of `random`, only random() is promised never to change.
    draw = random.Random(self.seed).random
    spread = self.high - self.low + 1
    found, seen, misses = [], set(), 0
    while len(found) < count:
      numbers = [
        self.low + int(draw() * spread)
        for _ in range(self.numbers[len(found) % len(self.numbers)])
      ]
      equation, target = _combined(numbers, draw)
      puzzle = (target, *sorted(numbers))
      if self.target_low <= target <= self.target_high and puzzle not in seen:
        seen.add(puzzle)
        found.append(self._prompt(numbers, target, equation))
        misses = 0
      elif (misses := misses + 1) == _MAX_MISSES:
        raise ValueError(
          f'{self.name}: only {len(found)} different puzzles were found, and '
          f'{count} are needed; give fewer prompts or wider ranges'
        )
    return found

  def _prompt(self, numbers: list[int], target: int, equation: str) -> Prompt:
    text = (
      f'Using the numbers {numbers}, create an equation that equals {target}. '
      'You can use basic arithmetic operations (+, -, *, /), and you must use '
      'each number exactly once.'
    )
    return Prompt(
      messages=user(text + self.suffix),
      answer=equation,
      task=self.name,
      id=f'{target}: {" ".join(map(str, numbers))}',
      extra={'target': target, 'numbers': numbers},
    )


def _combined(
  numbers: Sequence[int], draw: Callable[[], float]
) -> tuple[str, int]:
  """A random equation of the numbers, and what it comes to."""
  terms = [(str(number), number) for number in numbers]
  while len(terms) > 1:
    a = terms.pop(int(draw() * len(terms)))
    b = terms.pop(int(draw() * len(terms)))
    if a[1] < b[1]:
      a, b = b, a
    possible = '+*'
    if a[1] > b[1]:
      possible += '-'
    if a[1] % b[1] == 0:
      possible += '/'
    operation = possible[int(draw() * len(possible))]
    value = {
      '+': a[1] + b[1],
      '*': a[1] * b[1],
      '-': a[1] - b[1],
      '/': a[1] // b[1],
    }[operation]
    terms.append((f'({a[0]} {operation} {b[0]})', value))
  equation, value = terms[0]
  return equation[1:-1], value
