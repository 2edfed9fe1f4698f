"""Tasks whose prompts are rows of a data set, judged by a grader."""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from jax_rlvr.records import Completion, Prompt, user
from jax_rlvr.tasks.sources import Json, Parquet, Path, Row, Source

_log = logging.getLogger(__name__)

T = TypeVar('T')
Reward = float | Mapping[str, float] | None


class Grader(Protocol):
  """Judges completions: a frozen dataclass, or a function of a module.

  Optional methods: `extract(completion) -> Hashable`, the final answer that
  votes in maj@k; `many(prompts, completions) -> list`, all at once; `require()`
  raises what is not installed.
  """

  def __call__(self, prompt: Prompt, completion: Completion) -> Reward: ...


def read(
  source: Source, who: str, make: Callable[[int, Row], T]
) -> Iterator[T]:
  """What `make(i, row)` makes of each row.

  Args:
    source: of the rows.
    who: task and split; all errors begin with it.
    make: raises ValueError for a row that is not as it should be.

  Raises:
    FileNotFoundError: the data is not there.
    ValueError: it cannot be read.
  """
  try:
    rows = source.rows()
  except FileNotFoundError as error:
    raise FileNotFoundError(f'{who}: {error}') from error
  except ValueError as error:
    raise ValueError(f'{who}: {error}') from error
  for i, row in enumerate(rows):
    try:
      made = make(i, row)
    except ValueError as error:
      raise ValueError(f'{who}: {source.where(i)}: {error}') from None
    yield made


def column(row: Row, name: str) -> Any:
  """A row's value; dots lead into nested ones ('reward_model.ground_truth').

  Raises:
    ValueError: there is none.
  """
  if name in row:
    return row[name]
  value: Any = row
  for part in name.split('.'):
    if not isinstance(value, Mapping) or part not in value:
      raise ValueError(f'no column {name!r}; there: {", ".join(row)}')
    value = value[part]
  return value


def text(row: Row, name: str) -> str:
  """A column that is to be text; ValueError where it is none."""
  value = column(row, name)
  if not isinstance(value, str):
    raise ValueError(f'column {name!r} is {value!r:.60}, no text')
  return value


class Graded:
  """Leaves the judgement to the grader: the half of a task that all share."""

  if TYPE_CHECKING:

    @property
    def grader(self) -> Any: ...

  def reward(self, prompt: Prompt, completion: Completion) -> Reward:
    """What the grader says."""
    return self.grader(prompt, completion)

  @property
  def rewards(self) -> Callable[..., list[Reward]]:
    """`rewards(prompts, completions)`, only where the grader has `many`."""
    # Else the AttributeError says that this task has none.
    return self.grader.many

  def extract(self, completion: Completion) -> Hashable:
    """The final answer, as the grader reads it; the text where it does not."""
    extract = getattr(self.grader, 'extract', None)
    return completion.text if extract is None else extract(completion)

  def require(self) -> None:
    """Raises what the grader lacks."""
    getattr(self.grader, 'require', lambda: None)()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset(Graded):
  """Rows of a data set; a grader compares completions with their answers.

  Columns are named as they are in the rows; dots lead into nested ones. A row
  without an answer is left out, and a log line says how many were.

  Attributes:
    name: of the task.
    grader: `grader(prompt, completion)` is the reward; see
      `jax_rlvr.tasks.graders`.
    train, test: where the rows of the splits come from; None for no such split.
    prompt: column of the question: a text, or a conversation, the list of
      `{'role': …, 'content': …}` that verl has.
    answer: column of the reference answer; what is no text becomes JSON.
    extra: columns that `Prompt.extra` has, for the grader.
    system: what a system message says that begins the conversation, in place
      of one that is there; none if empty.
    prefix, suffix: around the question, or around the conversation's last
      message.
    only: what columns must equal: {'data_source': 'math_dapo'}. Other rows
      are not asked.
    unique: rows with the messages and answer of an earlier one are not asked;
      some data sets repeat theirs, to be evaluated many times.
  """

  name: str
  grader: Grader = dataclasses.field(hash=False)
  train: Source | None = None
  test: Source | None = None
  prompt: str = 'question'
  answer: str = 'answer'
  extra: Sequence[str] = ()
  system: str = ''
  prefix: str = ''
  suffix: str = ''
  only: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
  unique: bool = False

  def __post_init__(self):
    if isinstance(self.extra, str):
      raise ValueError(
        f'{self.name}: extra={self.extra!r}; give a sequence of columns'
      )
    object.__setattr__(self, 'extra', tuple(self.extra))
    if self.train is None and self.test is None:
      raise ValueError(f'{self.name}: neither train nor test; give a source')
    for split in ('train', 'test'):
      source = getattr(self, split)
      if source is not None and not hasattr(source, 'rows'):
        raise ValueError(
          f'{self.name}: {split}={source!r}; give Json, Parquet, Tfds or Rows'
        )
    if not callable(self.grader):
      raise ValueError(f'{self.name}: grader={self.grader!r} cannot be called')

  def prompts(self, split: str) -> list[Prompt]:
    """The prompts of a split, 'train' or 'test', in the order of its rows.

    Raises:
      FileNotFoundError: the data is not there.
      ValueError: no such split, a row that cannot be read, or none is left.
    """
    self.require()
    sources = {'train': self.train, 'test': self.test}
    source = sources.get(split)
    if source is None:
      there = ' and '.join(repr(k) for k, v in sources.items() if v is not None)
      raise ValueError(f'{self.name}: split={split!r}; it has {there}')
    who = f'{self.name}, {split}'
    prompts, seen, rows, fitting, empty = [], set(), 0, 0, 0
    for prompt in read(source, who, lambda i, row: self._asked(split, i, row)):
      rows += 1
      if prompt is None:
        continue
      fitting += 1
      if not prompt.answer.strip():
        empty += 1
        continue
      key = (prompt.answer, *(m['content'] for m in prompt.messages))
      if not self.unique or key not in seen:
        seen.add(key)
        prompts.append(prompt)
    if not fitting:
      raise ValueError(
        f'{who}: none of {rows} rows is as only={dict(self.only)!r} says; '
        'change it'
      )
    if not prompts:
      raise ValueError(
        f'{who}: none of {fitting} rows has an answer in column '
        f'{self.answer!r}; give another as answer'
      )
    if empty:
      _log.warning(
        '%s: %d of %d rows have no answer and are left out', who, empty, fitting
      )
    return prompts

  def _asked(self, split: str, i: int, row: Row) -> Prompt | None:
    """The prompt of a row; None where `only` keeps it out."""
    for name, value in self.only.items():
      if column(row, name) != value:
        return None
    return Prompt(
      messages=self._messages(column(row, self.prompt)),
      answer=_text(column(row, self.answer), self.answer),
      task=self.name,
      id=f'{split}/{i}',
      extra={name: column(row, name) for name in self.extra},
    )

  def _messages(self, value: Any) -> tuple[Mapping[str, str], ...]:
    messages = user(value) if isinstance(value, str) else value
    if not isinstance(messages, list | tuple) or not messages:
      raise ValueError(
        f'column {self.prompt!r} is {value!r:.60}, neither text nor messages'
      )
    conversation = []
    for message in messages:
      match message:
        case {'role': str(role), 'content': str(content)}:
          conversation.append({'role': role, 'content': content})
        case _:
          raise ValueError(
            f'column {self.prompt!r} has {message!r:.60}, which is no '
            "{'role': text, 'content': text}"
          )
    if conversation[-1]['role'] != 'user':
      raise ValueError(
        f'column {self.prompt!r} ends with a message of role '
        f'{conversation[-1]["role"]!r}; a prompt ends with one of the user'
      )
    if self.system and conversation[0]['role'] == 'system':
      conversation.pop(0)
    conversation[-1]['content'] = (
      self.prefix + conversation[-1]['content'] + self.suffix
    )
    if self.system:
      conversation.insert(0, {'role': 'system', 'content': self.system})
    return tuple(conversation)


def _text(value: Any, name: str) -> str:
  """An answer as text; nothing where there is none."""
  if isinstance(value, str):
    return value
  # Tables have NaN where numbers are missing.
  if value is None or value in ([], {}) or value != value:
    return ''
  try:
    return json.dumps(value, ensure_ascii=False)
  except TypeError:
    raise ValueError(f'column {name!r} is {value!r:.60}, no JSON') from None


def verl(
  path: Path,
  *,
  name: str,
  grader: Grader,
  split: Literal['train', 'test'] = 'train',
  **rest: Any,
) -> Dataset:
  """Rows as verl's preprocessing writes them: prompt, reward_model and so on.

  Args:
    path: a .parquet, .json or .jsonl file; or the folder of train.parquet and
      test.parquet.
    name: of the task.
    grader: of the completions.
    split: that a file is; a folder has both.
    **rest: of `Dataset`. Give `extra=('data_source', 'extra_info')` to a grader
      that reads what verl's `compute_score` does.

  References: https://verl.readthedocs.io/en/latest/preparation/prepare_data.html
  """
  path = pathlib.Path(path)
  if path.suffix == '.parquet':
    sources: dict[str, Any] = {split: Parquet(path)}
  elif path.suffix in ('.json', '.jsonl'):
    sources = {split: Json(path)}
  else:
    sources = {s: Parquet(path / f'{s}.parquet') for s in ('train', 'test')}
  columns: dict[str, Any] = {
    'prompt': 'prompt',
    'answer': 'reward_model.ground_truth',
  }
  return Dataset(name=name, grader=grader, **(columns | sources | rest))
