"""What the token limit does to rewards.

Yu et al., DAPO: An Open-Source LLM Reinforcement Learning System at Scale,
§3.4, https://arxiv.org/abs/2503.14476, 2025.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jax_rlvr.records import Completion, Prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlong:
  """Soft overlong punishment: 0, then linearly down to −penalty (eq. 13).

  Lengths are in tokens, the end token included. To be added to another reward
  with `Weighted`.

  Attributes:
    max_tokens: from which on all of the penalty is due.
    buffer: tokens over which it grows: before max_tokens − buffer it is 0.
    penalty: at max_tokens and beyond.
  """

  max_tokens: int
  buffer: int
  penalty: float = 1.0

  def __post_init__(self):
    if not 0 < self.buffer <= self.max_tokens:
      raise ValueError(
        f'Overlong: buffer={self.buffer!r} of max_tokens={self.max_tokens!r}; '
        'give 0 < buffer <= max_tokens'
      )
    if not 0 <= self.penalty < float('inf'):
      raise ValueError(
        f'Overlong: penalty={self.penalty!r}; give a finite number, 0 or more'
      )

  def __call__(self, prompt: Prompt, completion: Completion) -> float:
    del prompt  # long is long
    left = self.max_tokens - self.buffer - completion.length
    return self.penalty * max(-1.0, min(0.0, left / self.buffer))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
  """Overlong filtering: a truncated completion is unscorable, not wrong.

  Attributes:
    grader: of completions that ended.
  """

  grader: Any

  def __call__(
    self, prompt: Prompt, completion: Completion
  ) -> float | dict[str, float] | None:
    return None if completion.truncated else self.grader(prompt, completion)

  def extract(self, completion: Completion) -> str | None:
    """What the grader extracts, of a completion that ended."""
    extract = getattr(self.grader, 'extract', None)
    return extract(completion) if extract and not completion.truncated else None

  def require(self) -> None:
    """Raises what the grader lacks."""
    getattr(self.grader, 'require', lambda: None)()
