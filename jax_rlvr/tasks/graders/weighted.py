"""Several graders at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jax_rlvr.records import Completion, Prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighted:
  """Σ weight · reward over its parts; None as soon as one part is None.

  The result has the reward of each part under its name, what else a part
  reports under name/component, and as outcome that of the first part. The
  first part also extracts.

  Attributes:
    parts: graders by name; the first says right or wrong.
    weights: of each of them, any finite number.
  """

  parts: Mapping[str, Any] = dataclasses.field(hash=False)
  weights: Mapping[str, float] = dataclasses.field(hash=False)

  def __post_init__(self):
    if not self.parts or self.parts.keys() != self.weights.keys():
      raise ValueError(
        f'Weighted: parts {", ".join(self.parts) or "none"} with weights for '
        f'{", ".join(self.weights) or "none"}; give each part its weight'
      )
    reserved = {'reward', 'outcome'} & self.parts.keys()
    if reserved:
      raise ValueError(f'Weighted: a part is called {reserved}; rename it')
    if not all(map(math.isfinite, self.weights.values())):
      raise ValueError(f'Weighted: weights={self.weights!r}; give finite ones')

  def __call__(
    self, prompt: Prompt, completion: Completion
  ) -> dict[str, float] | None:
    result: dict[str, float] = {'reward': 0.0}
    for name, grader in self.parts.items():
      grade = grader(prompt, completion)
      if grade is None:
        return None
      if not isinstance(grade, Mapping):
        grade = {'reward': grade}
      reward = grade['reward']
      result['reward'] += self.weights[name] * reward
      result.setdefault('outcome', grade.get('outcome', reward))
      result[name] = reward
      for component in grade.keys() - {'reward', 'outcome'}:
        result[f'{name}/{component}'] = grade[component]
    return result

  def extract(self, completion: Completion) -> str | None:
    """What the first part extracts."""
    first = next(iter(self.parts.values()))
    extract = getattr(first, 'extract', None)
    return extract(completion) if extract else None

  def require(self) -> None:
    """Raises what a part lacks."""
    for grader in self.parts.values():
      getattr(grader, 'require', lambda: None)()
