"""What an evaluation asks of a task, and how it samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from jax_rlvr.config import Task
  from jax_rlvr.records import Prompt
  from jax_rlvr.sampling import Transform


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
  """Held-out prompts of one task, and how they are completed.

  Attributes:
    task: that asks.
    samples: completions of each prompt.
    temperature: 0 for argmax.
    prompts: asked, the split's first ones; all if None or more than it has.
    max_completion_tokens: where completions are cut; the run's limit if None.
    transform: of the distribution that is drawn from, see `jax_rlvr.sampling`.
    stop: texts that end a completion, which is cut before them.
    split: of the task's prompts.
    name: in metrics, `eval/<name>/…`; the task's if ''. The same task asked in
      two ways needs one.
  """

  task: Task
  samples: int
  temperature: float
  prompts: int | None = None
  max_completion_tokens: int | None = None
  transform: Transform | None = None
  stop: Sequence[str] = ()
  split: str = 'test'
  name: str = ''

  def __post_init__(self):
    object.__setattr__(self, 'name', self.name or self.task.name)
    self._require_count('samples', self.samples)
    for field in ('prompts', 'max_completion_tokens'):
      value = getattr(self, field)
      if value is not None:
        self._require_count(field, value)
    is_number = isinstance(self.temperature, int | float)
    if not (is_number and 0 <= self.temperature < float('inf')):
      raise self._wrong('temperature', 'a number, 0 or more')
    if isinstance(self.stop, str):
      raise self._wrong('stop', 'a sequence of texts')
    # As it comes back from JSON.
    object.__setattr__(self, 'stop', tuple(self.stop))

  def asked(self) -> list[Prompt]:
    """The prompts, in the order of their split.

    Raises:
      ValueError: there are none.
    """
    prompts = self.task.prompts(self.split)
    if not len(prompts):
      raise ValueError(
        f'task {self.task.name!r} has no {self.split} prompts; check its '
        'arguments'
      )
    count = min(self.prompts or len(prompts), len(prompts))
    return [prompts[i] for i in range(count)]

  def _require_count(self, field: str, value: object) -> None:
    is_count = isinstance(value, int) and not isinstance(value, bool)
    if not is_count or value < 1:
      raise self._wrong(field, 'an integer, 1 or more')

  def _wrong(self, field: str, what: str) -> ValueError:
    value = getattr(self, field)
    return ValueError(
      f'evaluation {self.name!r}: {field}={value!r} must be {what}'
    )


def resolved(
  asked: Sequence[Task | Evaluation], knobs: Mapping[str, Any]
) -> tuple[Evaluation, ...]:
  """Evaluations as they are, tasks with the settings that they share.

  Args:
    asked: of both, in any order.
    knobs: of a config, by name: `eval_samples` and so on.

  Raises:
    ValueError: two have one name.
  """
  evaluations = tuple(
    each
    if isinstance(each, Evaluation)
    else Evaluation(
      task=each,
      samples=knobs['eval_samples'],
      temperature=knobs['eval_temperature'],
      prompts=knobs['eval_prompts'],
      transform=knobs.get('eval_transform'),
      stop=knobs.get('stop', ()),
    )
    for each in asked
  )
  names = [each.name for each in evaluations]
  for name in names:
    if names.count(name) > 1:
      raise ValueError(
        f'two evaluations are called {name!r}; give one another name='
      )
  return evaluations


def tasks_of(evaluations: Sequence[Evaluation]) -> list[Task]:
  """Their tasks, each once."""
  tasks = []
  for each in evaluations:
    if each.task not in tasks:
      tasks.append(each.task)
  return tasks
