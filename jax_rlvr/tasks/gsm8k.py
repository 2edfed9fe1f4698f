"""GSM8K: grade-school word problems with whole-number answers.

Cobbe et al., Training Verifiers to Solve Math Word Problems,
https://arxiv.org/abs/2110.14168, 2021.
"""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
from collections.abc import Mapping
from fractions import Fraction

from jax_rlvr.records import Completion, Prompt, user
from jax_rlvr.tasks import jsonl
from jax_rlvr.tasks.numbers import last_number

_FIELDS = ('question', 'answer')


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
    where = f'{self.name}, {split}'
    if split not in ('train', 'test'):
      raise ValueError(f"{self.name}: split={split!r}; give 'train' or 'test'")
    if self.path is None:
      rows = _from_tfds(split, where)
    else:
      file = pathlib.Path(self.path, f'{split}.jsonl')
      rows = jsonl.rows(file, _FIELDS, where)
    return [
      Prompt(
        messages=user(row['question'] + self.suffix),
        answer=_gold(row['answer'], f'{where}, row {i}'),
        task=self.name,
        id=f'{split}/{i}',
      )
      for i, row in enumerate(rows)
    ]

  def reward(self, prompt: Prompt, completion: Completion) -> float:
    """1 for a completion whose last number is the answer, else 0."""
    if self.require_end and completion.truncated:
      return 0.0
    return float(last_number(completion.text) == Fraction(prompt.answer))


def _gold(answer: str, where: str) -> str:
  """The number after the last '####'."""
  _, mark, end = answer.rpartition('####')
  number = last_number(end)
  if not mark or number is None:
    raise ValueError(f"{where}: the answer does not end with '#### <number>'")
  return str(number)


def _from_tfds(split: str, where: str) -> list[Mapping[str, str]]:
  try:
    tfds = importlib.import_module('tensorflow_datasets')
    # Without TensorFlow a builder is known by name once its module is imported.
    importlib.import_module('tensorflow_datasets.text.gsm8k')
    source = tfds.data_source('gsm8k', split=split)
    rows = source.__getitems__(range(len(source)))
  except Exception as error:
    # TFDS fails in many ways: not installed, not prepared, no network, no disk.
    reason = str(error).strip().partition('\n')[0] or type(error).__name__
    raise FileNotFoundError(
      f'{where}: TFDS has no gsm8k ({reason}); give path=, a folder of '
      'train.jsonl and test.jsonl, or set TFDS_DATA_DIR to where TFDS has '
      "prepared 'gsm8k' with file_format='array_record'"
    ) from error
  return [{field: row[field].decode() for field in _FIELDS} for row in rows]
