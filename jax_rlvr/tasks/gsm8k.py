"""GSM8K: grade-school word problems with whole-number answers.

Cobbe et al., Training Verifiers to Solve Math Word Problems,
https://arxiv.org/abs/2110.14168, 2021.
"""

from __future__ import annotations

import dataclasses
import pathlib
from fractions import Fraction

from jax_rlvr.records import Completion, Prompt, user
from jax_rlvr.tasks.dataset import read, text
from jax_rlvr.tasks.numbers import last_number
from jax_rlvr.tasks.sources import Json, Row, Tfds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gsm8k:
  """Word problems; the last number of the completion must be the answer.

  Attributes:
    path: folder of train.jsonl and test.jsonl as OpenAI publishes them. None
      reads the data set from TFDS, without TensorFlow; what TFDS has not
      prepared in its own folder (`TFDS_DATA_DIR`), it downloads.
    suffix: follows every question.
    require_end: a completion cut off at the token limit earns nothing, even
      where its last number is right.
    name: of the task.
  """

  path: str | None = None
  suffix: str = (
    ' Let\'s think step by step and output the final answer after "####".'
  )
  require_end: bool = False
  name: str = 'gsm8k'

  def prompts(self, split: str) -> list[Prompt]:
    """The problems of a split, 'train' (7473) or 'test' (1319).

    Raises:
      FileNotFoundError: the data is not there.
      ValueError: unknown split, or a row that is not GSM8K's.
    """
    if split not in ('train', 'test'):
      raise ValueError(f"{self.name}: split={split!r}; give 'train' or 'test'")
    who = f'{self.name}, {split}'

    def asked(i: int, row: Row) -> Prompt:
      return Prompt(
        messages=user(text(row, 'question') + self.suffix),
        answer=_gold(text(row, 'answer')),
        task=self.name,
        id=f'{split}/{i}',
      )

    if self.path is not None:
      file = pathlib.Path(self.path, f'{split}.jsonl')
      return list(read(Json(file), who, asked))
    try:
      return list(read(Tfds('gsm8k', split=split), who, asked))
    except FileNotFoundError as error:
      raise FileNotFoundError(
        f'{error}; or give path=, a folder of train.jsonl and test.jsonl'
      ) from error

  def reward(self, prompt: Prompt, completion: Completion) -> float:
    """1 for a completion whose last number is the answer, else 0."""
    if self.require_end and completion.truncated:
      return 0.0
    return float(last_number(completion.text) == Fraction(prompt.answer))


def _gold(answer: str) -> str:
  """The number after the last '####'."""
  _, mark, end = answer.rpartition('####')
  number = last_number(end)
  if not mark or number is None:
    raise ValueError("the answer does not end with '#### <number>'")
  return str(number)
