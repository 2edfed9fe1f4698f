"""From the rewards of samples to the measures of a task: pure functions.

A completion is right where its outcome, or its reward where that has no parts,
is 1 or more; one that could not be scored is wrong, and counted.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import rich.box
import rich.console
import rich.table

from jax_rlvr import storage
from jax_rlvr.records import Completion, Rollout

if TYPE_CHECKING:
  from jax_rlvr.config import Task

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
  """A prompt of an evaluation with all of its samples.

  Attributes:
    name: of the evaluation.
    rollouts: n of them, rewarded.
    answers: for each, the final answer that votes; None where there is none.
  """

  name: str
  rollouts: tuple[Rollout, ...]
  answers: tuple[Hashable | None, ...]

  @property
  def right(self) -> int:
    """Samples that are right."""
    return sum(map(is_right, self.rollouts))

  @property
  def majority(self) -> float:
    """Chance that the answer most samples agree on is right."""
    return majority(self.answers, list(map(is_right, self.rollouts)))

  def as_json(self) -> dict[str, Any]:
    """All of it but the tokens, as JSON values."""
    prompt = self.rollouts[0].prompt
    return {
      'task': self.name,
      'prompt': prompt.id,
      'question': prompt.messages[-1]['content'],
      'answer': prompt.answer,
      'right': self.right,
      'majority': self.majority,
      'samples': [
        {
          'completion': r.completion.text,
          'reward': r.reward,
          'parts': dict(r.parts),
          'extracted': None if answer is None else str(answer),
          'length': r.completion.length,
          'truncated': r.completion.truncated,
          'entropy': _entropy(r),
        }
        for r, answer in zip(self.rollouts, self.answers, strict=True)
      ],
    }


def grouped(
  name: str, task: Task, rollouts: Sequence[Rollout], samples: int
) -> list[Question]:
  """Rollouts in the order of their prompts, as questions.

  A completion whose answer `task.extract` cannot tell does not vote; without
  that method, its text votes.
  """
  extract = getattr(task, 'extract', _text)
  answers, failures = [], []
  for r in rollouts:
    try:
      answer = extract(r.completion)
      hash(answer)
    except Exception as error:  # A vote is no reason to end a run.
      answer = None
      failures.append(error)
    answers.append(answer)
  if failures:
    _log.warning(
      'extract of task %r failed on %d of %d completions, which do not vote: '
      '%r', task.name, len(failures), len(rollouts), failures[0],
    )  # fmt: skip
  return [
    Question(
      name=name,
      rollouts=tuple(rollouts[i : i + samples]),
      answers=tuple(answers[i : i + samples]),
    )
    for i in range(0, len(rollouts), samples)
  ]


def _text(completion: Completion) -> str | None:
  return completion.text.strip() or None


def is_right(r: Rollout) -> bool:
  """Whether a completion did all that was asked."""
  if r.reward is None:
    return False
  return (r.reward if r.outcome is None else r.outcome) >= 1


def pass_at(n: int, correct: int, k: int) -> float:
  """Chance that k of n samples, drawn without replacement, hold a right one.

  Unbiased for the chance that one of k new samples is right. Reference: Chen et
  al., `Evaluating Large Language Models Trained on Code
  <https://arxiv.org/abs/2107.03374>`_, 2021.

  >>> pass_at(4, 1, 4), pass_at(4, 1, 1)
  (1.0, 0.25)
  """
  return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(
  answers: Sequence[Hashable | None], rights: Sequence[bool]
) -> float:
  """Chance that the answer most samples agree on is right: maj@n of n samples.

  None does not vote; ties are divided evenly. An answer is right where all who
  gave it are.

  >>> majority(['4', '4', '5'], [True, True, False])
  1.0
  >>> majority(['4', None, '5'], [True, False, False])
  0.5
  """
  votes = collections.defaultdict(list)
  for answer, right in zip(answers, rights, strict=True):
    if answer is not None:
      votes[answer].append(right)
  most = max(map(len, votes.values()), default=0)
  winners = [all(x) for x in votes.values() if len(x) == most]
  return sum(winners) / max(len(winners), 1)


def bootstrap(
  values: Sequence[float] | np.ndarray,
  *,
  draws: int = 1000,
  level: float = 0.95,
  seed: int = 0,
) -> tuple[Any, Any]:
  """Interval of the mean, by the percentile bootstrap over questions.

  What other questions, and other samples of them, could have given. Columns are
  resampled together. Reference: Efron, `Bootstrap Methods: Another Look at the
  Jackknife <https://doi.org/10.1214/aos/1176344552>`_, 1979.

  Args:
    values: [Q], of each question, or [Q, M], of each question and measure.
    draws: means of as many questions, drawn with replacement.
    level: share of these means within the interval.
    seed: of the draws.

  Returns:
    Lower and upper edge, a number each, or a list with one a measure.

  >>> bootstrap([0.0, 1.0])
  (0.0, 1.0)
  """
  values = np.asarray(values, np.float64)
  random = np.random.default_rng(seed)
  # One at a time: a table of them all outgrows the memory with the questions.
  means = [
    values[random.integers(len(values), size=len(values))].mean(axis=0)
    for _ in range(draws)
  ]
  edges = ((1 - level) / 2, (1 + level) / 2)
  low, high = np.quantile(means, edges, axis=0).tolist()
  return low, high


def measures(questions: Sequence[Question]) -> dict[str, float]:
  """avg@n, pass@k for powers of two, maj@n, and how the samples look.

  Each of the former has its interval as `…/low` and `…/high`. n is the samples
  of a question.
  """
  n = len(questions[0].rollouts)
  right = [question.right for question in questions]
  powers = [2**i for i in range(n.bit_length())]
  columns = {
    f'avg@{n}': [c / n for c in right],
    **{f'pass@{k}': [pass_at(n, c, k) for c in right] for k in powers},
    f'maj@{n}': [question.majority for question in questions],
  }
  lows, highs = bootstrap(np.transpose(list(columns.values())))
  measured = {}
  for (name, values), low, high in zip(
    columns.items(), lows, highs, strict=True
  ):
    measured |= {
      name: _mean(values), f'{name}/low': low, f'{name}/high': high
    }  # fmt: skip
  rollouts = [r for question in questions for r in question.rollouts]
  entropies = map(_entropy, rollouts)
  return measured | {
    'entropy': _mean(x for x in entropies if x is not None),
    'length': _mean(r.completion.length for r in rollouts),
    'truncated': _mean(r.completion.truncated for r in rollouts),
    'unscorable': sum(r.reward is None for r in rollouts),
  }


def _entropy(r: Rollout) -> float | None:
  """Mean over its tokens; None of a completion that failed before the first."""
  return float(r.entropy.mean()) if len(r.entropy) else None


def _mean(values: Iterable[float]) -> float:
  values = list(values)
  return sum(values) / max(len(values), 1)


def write(file: storage.Path, questions: Sequence[Question]) -> None:
  """Writes one JSON object a question and line; the file appears whole."""
  file.parent.mkdir(parents=True, exist_ok=True)
  new = file.with_name(file.name + '.new')
  with new.open('w') as stream:
    for question in questions:
      stream.write(json.dumps(question.as_json()) + '\n')
  new.replace(file)


# Columns that a table shows only where something is not 0.
_RARE = ('truncated', 'unscorable')


def tables(measured: Mapping[str, float]) -> rich.console.Group:
  """One row a task, one column a measure, intervals below their means.

  Tasks that differ in their measures, by their samples, have a table each.
  """
  tasks: dict[str, dict[str, float]] = {}
  edges: dict[tuple[str, str], dict[str, float]] = {}
  for name, value in measured.items():
    if not name.startswith('eval/'):
      continue
    task, _, measure = name.removeprefix('eval/').rpartition('/')
    if measure in ('low', 'high'):
      task, _, of = task.rpartition('/')
      edges.setdefault((task, of), {})[measure] = value
    else:
      tasks.setdefault(task, {})[measure] = value
  hidden = {m for m in _RARE if not any(row.get(m) for row in tasks.values())}
  found: dict[tuple[str, ...], rich.table.Table] = {}
  for task, row in tasks.items():
    columns = tuple(measure for measure in row if measure not in hidden)
    if columns not in found:
      found[columns] = rich.table.Table(
        'task', *columns, box=rich.box.SIMPLE, padding=0, show_edge=False
      )
    cells = []
    for measure in columns:
      cells.append(_number(row[measure]))
      if at := edges.get((task, measure)):
        cells[-1] += f'\n[dim]{_short(at["low"])}–{_short(at["high"])}[/dim]'
    found[columns].add_row(task, *cells)
  return rich.console.Group(*found.values())


def _number(value: float) -> str:
  return str(value) if isinstance(value, int) else f'{value:.3f}'


def _short(share: float) -> str:
  """Three characters: eight measures have to fit on a line."""
  return f'{share:.2f}'.lstrip('0')[:3]
