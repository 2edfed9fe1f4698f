"""A function of yours as a grader."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax_rlvr.records import Completion, Prompt

_PATH = re.compile(r'[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*(?:\.[^\W\d]\w*)*')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Function:
  """What a function says, by its name.

  It is called as `function(prompt, completion, **arguments)` and returns a
  reward, as graders do. Its module should not import jax.

  Attributes:
    path: 'module:function', imported when first needed.
    batch: it is called as `function(prompts, completions, **arguments)` and
      returns a list, one result a completion.
    arguments: further ones by name, JSON-able.

  Example:
    >>> Function(path='my_rewards:brevity', arguments={'words': 20})
    Function(path='my_rewards:brevity', batch=False, arguments={'words': 20})
  """

  path: str
  batch: bool = False
  arguments: Mapping[str, Any] = dataclasses.field(
    default_factory=dict, hash=False
  )

  def __post_init__(self):
    if not isinstance(self.path, str) or not _PATH.fullmatch(self.path):
      raise ValueError(
        f"Function: path={self.path!r}; give 'module:function', as "
        "'my_rewards:brevity'"
      )

  def __call__(
    self, prompt: Prompt, completion: Completion
  ) -> float | dict[str, float] | None:
    """Raises ImportError as `require` does, ValueError for a bad result."""
    if self.batch:
      return self._many([prompt], [completion])[0]
    result = _load(self.path)(prompt, completion, **self.arguments)
    return _grade(result, self.path)

  @property
  def many(self) -> Callable[..., list[float | dict[str, float] | None]]:
    """`many(prompts, completions)`: grades, in their order; with `batch` only.

    Without it each completion is judged by itself, and has its own deadline.
    """
    if not self.batch:
      raise AttributeError(f'{self.path} takes one completion at a time')
    return self._many

  def _many(self, prompts: Sequence[Prompt], completions: Sequence[Completion]):
    results = list(_load(self.path)(prompts, completions, **self.arguments))
    if len(results) != len(completions):
      raise ValueError(
        f'{self.path} returned {len(results)} results for '
        f'{len(completions)} completions; return one for each'
      )
    return [_grade(result, self.path) for result in results]

  def require(self) -> None:
    """Raises ImportError where the function cannot be imported."""
    _load(self.path)


@functools.cache
def _load(path: str) -> Callable[..., Any]:
  module, _, names = path.partition(':')
  try:
    found = importlib.import_module(module)
  except ImportError as error:
    raise ImportError(
      f'{path}: module {module} cannot be imported ({error}); is its folder on '
      'PYTHONPATH?'
    ) from error
  for name in names.split('.'):
    if not hasattr(found, name):
      close = difflib.get_close_matches(name, dir(found), n=1)
      hint = f'; did you mean {close[0]}?' if close else ''
      raise ImportError(f'{path}: {module} has no {name}{hint}')
    found = getattr(found, name)
  if not callable(found):
    raise ImportError(f'{path} is no function but {found!r:.80}')
  return found


def _grade(result: Any, path: str) -> float | dict[str, float] | None:
  if result is None:
    return None
  if not isinstance(result, Mapping):
    return _finite(result, path)
  if 'reward' not in result:
    raise ValueError(
      f"{path} returned a dict without 'reward': {sorted(map(str, result))}"
    )
  return {str(name): _finite(part, path) for name, part in result.items()}


def _finite(value: Any, path: str) -> float:
  # NumPy's and jax's scalars are no Real numbers, all of them.
  if not isinstance(value, numbers.Real) or not math.isfinite(value):
    raise ValueError(
      f'{path} returned {value!r:.80}; return a finite number, None or a dict '
      "with 'reward'"
    )
  return float(value)
