"""Puzzles of reasoning_gym: a hundred generators, each with its own verifier.

Stojanovski et al., Reasoning Gym: Reasoning Environments for Reinforcement
Learning with Verifiable Rewards, https://arxiv.org/abs/2505.24760, 2025.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from jax_rlvr.records import Prompt, user
from jax_rlvr.tasks import graders
from jax_rlvr.tasks.dataset import Graded, Grader

SUFFIX = ' Give the final answer, and only that, in <answer> </answer> tags.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReasoningGym(Graded):
  """One of reasoning_gym's data sets; needs `pip install 'jax-rlvr[gym]'`.

  The first entries of the data set are the test split, those that follow the
  train split, without such as ask the same as one of the test split.

  Attributes:
    dataset: as reasoning_gym has it: 'chain_sum', 'gcd', 'letter_counting' …
    size: entries of the train split. Most data sets make some thousand a
      second, 'countdown' 50.
    test_size: entries of the test split.
    seed: of the entries.
    arguments: further ones of the data set: {'min_terms': 2}.
    suffix: follows every question.
    grader: of the completions; `Prompt.extra` has the entry for it. None is
      `graders.Gym(dataset=dataset)`.
    name: of the task; the data set's if empty.
  """

  dataset: str
  size: int = 1000
  test_size: int = 100
  seed: int = 0
  arguments: Mapping[str, Any] = dataclasses.field(
    default_factory=dict, hash=False
  )
  suffix: str = SUFFIX
  grader: Grader | None = dataclasses.field(default=None, hash=False)
  name: str = ''

  def __post_init__(self):
    object.__setattr__(self, 'name', self.name or self.dataset)
    if self.grader is None:
      grader = graders.Gym(dataset=self.dataset)
      object.__setattr__(self, 'grader', grader)
    for count in ('size', 'test_size'):
      if getattr(self, count) < 1:
        raise ValueError(
          f'{self.name}: {count}={getattr(self, count)!r}; give 1 or more'
        )
    reserved = {'size', 'seed'} & set(self.arguments)
    if reserved:
      raise ValueError(
        f'{self.name}: arguments has {", ".join(sorted(reserved))}, which '
        'ReasoningGym itself takes; give it there'
      )

  def prompts(self, split: str) -> list[Prompt]:
    """The questions of a split, 'train' or 'test', always in the same order.

    Raises:
      ValueError: unknown split, or reasoning_gym has no such data set.
      ImportError: reasoning_gym is not installed.
    """
    if split not in ('train', 'test'):
      raise ValueError(f"{self.name}: split={split!r}; give 'train' or 'test'")
    entries = self._entries()
    self.require()
    test = [entries[i] for i in range(self.test_size)]
    if split == 'test':
      return [self._prompt(i, entry) for i, entry in enumerate(test)]
    held_out = {entry['question'] for entry in test}
    prompts = [
      self._prompt(i, entry)
      for i in range(self.test_size, self.test_size + self.size)
      if (entry := entries[i])['question'] not in held_out
    ]
    if not prompts:
      raise ValueError(
        f'{self.name}, train: all {self.size} questions are in the test split '
        'too; give a smaller test_size, or arguments that make more'
      )
    return prompts

  def _entries(self) -> Any:
    try:
      gym = importlib.import_module('reasoning_gym')
    except ImportError as error:
      raise ImportError(
        f'{self.name}: reasoning_gym cannot be imported ({error}); '
        "pip install 'jax-rlvr[gym]'"
      ) from error
    try:
      return gym.create_dataset(
        self.dataset,
        # One data set for both splits: entry i of seed s is entry i - 1 of
        # seed s + 1, so that two seeds would share nearly all.
        size=self.test_size + self.size,
        seed=self.seed,
        **self.arguments,
      )
    except (AssertionError, TypeError, ValueError) as error:
      reason = str(error).strip().partition('\n')[0] or type(error).__name__
      raise ValueError(
        f'{self.name}: reasoning_gym refuses {self.dataset!r} with '
        f'{dict(self.arguments)!r} ({reason})'
      ) from error

  def _prompt(self, i: int, entry: Mapping[str, Any]) -> Prompt:
    answer = entry['answer']
    return Prompt(
      messages=user(entry['question'] + self.suffix),
      answer='' if answer is None else str(answer),
      task=self.name,
      id=str(i),
      extra={'entry': entry},
    )
