"""MAWPS: elementary word problems, to see what arithmetic carries over to.

Koncel-Kedziorski et al., MAWPS: A Math Word Problem Repository, NAACL 2016.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from fractions import Fraction

from jax_rlvr.records import Completion, Prompt, user
from jax_rlvr.tasks.arithmetic import SUFFIX
from jax_rlvr.tasks.dataset import column, read, text
from jax_rlvr.tasks.numbers import last_number
from jax_rlvr.tasks.sources import Json

# Thirds and sixths are given rounded, to five decimals at the fewest.
_TOLERANCE = Fraction(1, 100_000)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mawps:
  """Word problems for evaluation only; the last number must be the answer.

  Attributes:
    path: folder of addsub.jsonl, singleop.jsonl and so on, whose rows have
      `input` and `target`.
    files: which of them to ask, without '.jsonl'. The default two are the
      problems of mostly one step.
    suffix: follows every question.
    name: of the task.
  """

  path: str
  files: Sequence[str] = ('addsub', 'singleop')
  suffix: str = SUFFIX
  name: str = 'mawps'

  def __post_init__(self):
    object.__setattr__(self, 'files', tuple(self.files))
    if not self.files:
      raise ValueError(f"{self.name}: files is empty; give e.g. ('addsub',)")

  def prompts(self, split: str) -> list[Prompt]:
    """The problems, in the files' order; the only split is 'test'.

    Raises:
      FileNotFoundError: a file is not there.
      ValueError: another split, or a row that is not MAWPS's.
    """
    if split != 'test':
      raise ValueError(f"{self.name}: split={split!r}; it has only 'test'")
    prompts = []
    for file in self.files:
      source = Json(pathlib.Path(self.path, f'{file}.jsonl'))
      rows = read(
        source,
        f'{self.name}, {split}',
        lambda _, row: (text(row, 'input'), column(row, 'target')),
      )
      prompts += [
        Prompt(
          messages=user(question + self.suffix),
          answer=str(target),
          task=self.name,
          id=f'{file}/{i}',
        )
        for i, (question, target) in enumerate(rows)
      ]
    return prompts

  def reward(self, prompt: Prompt, completion: Completion) -> float:
    """1 for an ended completion whose last number is the answer, else 0."""
    number = last_number(completion.text)
    if number is None or completion.truncated:
      return 0.0
    answer = Fraction(prompt.answer)
    return float(abs(number - answer) <= abs(answer) * _TOLERANCE)
