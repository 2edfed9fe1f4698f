"""Sums of two numbers, to be written digit by digit: the quickstart's task."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax_rlvr.records import Completion, Prompt, Trace, user

_SPLIT_SEED = 20240501
_LABEL_SEED = 20240502


@dataclasses.dataclass(frozen=True, kw_only=True)
class Addition:
  """a + b for a, b in 0 … 10**digits - 1: 'a+b=' asks for the sum's digits.

  All pairs are put in one random order that never changes; the last `held_out`
  are the test split, the others the train split.

  Attributes:
    digits: of the largest summand, 1 to 3.
    held_out: pairs kept for the test split.
    wrong: share of traces whose sum is wrong, in [0, 1]. A policy warmed up on
      them is unsure but right when greedy, which leaves RL something to do.
    traces_per_prompt: times a pair comes up in `traces`, each with a label
      drawn anew.
    name: of the task.
  """

  digits: int = 2
  held_out: int = 500
  wrong: float = 0.5
  traces_per_prompt: int = 20
  name: str = 'addition'

  def __post_init__(self):
    if self.digits not in (1, 2, 3):
      raise ValueError(f'{self.name}: digits={self.digits!r}; give 1, 2 or 3')
    if not 0 < self.held_out < 100**self.digits:
      raise ValueError(
        f'{self.name}: held_out={self.held_out!r} of {100**self.digits} pairs '
        'leaves a split empty; give a number between'
      )
    if not 0 <= self.wrong <= 1:
      raise ValueError(f'{self.name}: wrong={self.wrong!r}; give a share 0 … 1')
    if self.traces_per_prompt < 1:
      raise ValueError(
        f'{self.name}: traces_per_prompt={self.traces_per_prompt!r}; '
        'give 1 or more'
      )

  def prompts(self, split: str) -> Sequence[Prompt]:
    """The sums of a split, 'train' or 'test', always in the same order."""
    pairs = self._pairs(split)
    return _Indexed(len(pairs), lambda i: self._prompt(pairs[i]))

  def reward(self, prompt: Prompt, completion: Completion) -> float:
    """1 for exactly the sum's digits and then the end token, else 0."""
    right = not completion.truncated and completion.text == prompt.answer
    return float(right)

  def traces(self, split: str) -> Sequence[Trace]:
    """Passes over the split's prompts, each with a right or a wrong sum.

    A wrong sum is uniform over all others that occur. Trace i depends on i
    alone.
    """
    pairs = self._pairs(split)

    def trace(i: int) -> Trace:
      prompt = self._prompt(pairs[i % len(pairs)])
      draw = random.Random((_LABEL_SEED << 64) + i)
      label = int(prompt.answer)
      if draw.random() < self.wrong:
        sums = 2 * 10**self.digits - 1
        other = int(draw.random() * (sums - 1))
        label = other + (other >= label)
      return Trace(prompt=prompt, completion=str(label))

    return _Indexed(self.traces_per_prompt * len(pairs), trace)

  def _pairs(self, split: str) -> list[int]:
    """The split's pairs, each as a * 10**digits + b."""
    if split not in ('train', 'test'):
      raise ValueError(f"{self.name}: split={split!r}; give 'train' or 'test'")
    draw = random.Random(_SPLIT_SEED)
    # Of `random`, only random() is promised never to change.
    pairs = sorted(range(100**self.digits), key=lambda _: draw.random())
    cut = len(pairs) - self.held_out
    return pairs[:cut] if split == 'train' else pairs[cut:]

  def _prompt(self, pair: int) -> Prompt:
    a, b = divmod(pair, 10**self.digits)
    return Prompt(
      messages=user(f'{a}+{b}='),
      answer=str(a + b),
      task=self.name,
      id=f'{a}+{b}',
    )


class _Indexed(Sequence):
  """A sequence whose items are made when they are asked for."""

  def __init__(self, length: int, item: Callable[[int], Any]):
    self._indices = range(length)
    self._item = item

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index):
    where = self._indices[index]
    if isinstance(where, range):
      return [self._item(i) for i in where]
    return self._item(where)

  def __iter__(self) -> Iterator[Any]:
    return map(self._item, self._indices)
