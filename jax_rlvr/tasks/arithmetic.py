"""Small sums in English, for a small pretrained model."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from jax_rlvr.records import Completion, Prompt, user
from jax_rlvr.tasks.numbers import last_number

SUFFIX = ' Answer with only the final answer.'

_SPLIT_SEED = 20240503


class _Operation(NamedTuple):
  question: str
  answer: Callable[[int, int], int]
  low: int
  high: int
  descending: bool = False  # the larger number always first


# Ranges in which SmolLM2-135M-Instruct is right now and then.
_OPERATIONS = {
  'add': _Operation('What is {} + {}?', operator.add, 0, 9),
  'sub': _Operation('What is {} - {}?', operator.sub, 0, 9, True),
  'mul': _Operation('What is {} times {}?', operator.mul, 0, 9),
  'gcd': _Operation(
    'Find the greatest common divisor of {} and {}.', math.gcd, 1, 30
  ),
  'max': _Operation('What is the larger of {} and {}?', max, 0, 9),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arithmetic:
  """Questions on two numbers; the last number of the completion must be right.

  For each operation a share of the number pairs, both orders of a pair
  together, is asked in the test split only; subtraction asks the larger number
  first, so that no answer is negative. In the train split every operation
  is asked equally often: pairs of an operation that has fewer come up again.

  Transfer tasks are arguments: two-digit addition is
  `Arithmetic(name='add2', operations=('add',), low=10, high=99)`.

  Attributes:
    name: of the task.
    operations: of 'add', 'sub', 'mul', 'gcd' and 'max' (the larger of two).
    low, high: smallest and largest number; None for each operation's own: 0 to
      9, for gcd 1 to 30.
    held_out: share of the pairs kept for the test split, in (0, 1).
    test_prompts: at most so many of them are asked, for each operation.
    suffix: follows every question.
  """

  name: str = 'arithmetic'
  operations: Sequence[str] = ('add', 'sub', 'mul', 'gcd', 'max')
  low: int | None = None
  high: int | None = None
  held_out: float = 0.2
  test_prompts: int = 100
  suffix: str = SUFFIX

  def __post_init__(self):
    object.__setattr__(self, 'operations', tuple(self.operations))
    unknown = set(self.operations) - set(_OPERATIONS)
    if unknown or not self.operations:
      raise ValueError(
        f'{self.name}: operations={self.operations!r}; '
        f'give some of {", ".join(_OPERATIONS)}'
      )
    for operation in self.operations:
      low, high = self._range(operation)
      if not 0 <= low < high <= 999:
        raise ValueError(
          f'{self.name}: {operation} of numbers {low} to {high}; '
          'give 0 <= low < high <= 999'
        )
    if not 0 < self.held_out < 1:
      raise ValueError(
        f'{self.name}: held_out={self.held_out!r}; give a share between 0 and 1'
      )
    if self.test_prompts < 1:
      raise ValueError(
        f'{self.name}: test_prompts={self.test_prompts!r}; give 1 or more'
      )

  def prompts(self, split: str) -> list[Prompt]:
    """The questions of a split, 'train' or 'test', operations by turns.

    Raises:
      ValueError: unknown split, or an operation has no pair left for it.
    """
    if split not in ('train', 'test'):
      raise ValueError(f"{self.name}: split={split!r}; give 'train' or 'test'")
    asked = [self._asked(operation, split) for operation in self.operations]
    if split == 'test':
      turns = itertools.zip_longest(*asked)
      return [prompt for turn in turns for prompt in turn if prompt]
    longest = max(map(len, asked))
    return [
      prompts[i % len(prompts)] for i in range(longest) for prompts in asked
    ]

  def reward(self, prompt: Prompt, completion: Completion) -> float:
    """1 for an ended completion whose last number is the answer, else 0."""
    right = last_number(completion.text) == Fraction(prompt.answer)
    return float(right and not completion.truncated)

  def _range(self, operation: str) -> tuple[int, int]:
    low, high = _OPERATIONS[operation][2:4]
    return (
      low if self.low is None else self.low,
      high if self.high is None else self.high,
    )

  def _asked(self, operation: str, split: str) -> list[Prompt]:
    low, high = self._range(operation)
    # Neither of two equal numbers is larger.
    gap = 1 if operation == 'max' else 0
    pairs = [
      (a, b) for a in range(low, high + 1) for b in range(a + gap, high + 1)
    ]
    draw = random.Random(_SPLIT_SEED)
    # Of `random`, only random() is promised never to change.
    pairs.sort(key=lambda _: draw.random())
    cut = math.ceil(self.held_out * len(pairs))
    pairs = pairs[:cut] if split == 'test' else pairs[cut:]
    if not pairs:
      raise ValueError(
        f'{self.name}, {split}: no {operation} pair of {low} to {high} left; '
        f'give another held_out than {self.held_out} or a wider range'
      )
    # dict.fromkeys drops the second of two equal orders.
    orders = slice(1) if _OPERATIONS[operation].descending else slice(2)
    ordered = [
      pair for a, b in pairs for pair in dict.fromkeys([(b, a), (a, b)][orders])
    ]
    if split == 'test':
      ordered = ordered[: self.test_prompts]
    return [self._prompt(operation, a, b) for a, b in ordered]

  def _prompt(self, operation: str, a: int, b: int) -> Prompt:
    question, answer = _OPERATIONS[operation][:2]
    return Prompt(
      messages=user(question.format(a, b) + self.suffix),
      answer=str(answer(a, b)),
      task=self.name,
      id=f'{operation} {a} {b}',
    )
