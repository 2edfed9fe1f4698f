"""What the sampler is asked, and what it says."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass
class Completed:
  """A completion, or the beginning of one; see `Drawn` for the numbers.

  Attributes:
    group, sample: whose.
    ids: tokens; the end token is one of them.
    logprob, sampled_logprob, entropy: nats of each.
    ended: with an end token or a stop string; else cut at its limit.
    failed: the logits of the token after the last were not finite.
  """

  group: int
  sample: int
  ids: list[int] = dataclasses.field(default_factory=list)
  logprob: list[float] = dataclasses.field(default_factory=list)
  sampled_logprob: list[float] = dataclasses.field(default_factory=list)
  entropy: list[float] = dataclasses.field(default_factory=list)
  ended: bool = False
  failed: bool = False

  def keep(self, length: int) -> None:
    """Forgets what comes after the first tokens."""
    for x in (self.ids, self.logprob, self.sampled_logprob, self.entropy):
      del x[length:]


class Group(NamedTuple):
  """Completions of one prompt.

  Attributes:
    ids: int32, one at least.
    keys: uint32 [G, 2], data of one key a completion.
    limits: int [G], completion tokens at the most; more than have begun.
    begun: what they begin with; None for nothing.
  """

  ids: np.ndarray
  keys: np.ndarray
  limits: np.ndarray
  begun: Completed | None = None

  @property
  def tokens(self) -> np.ndarray:
    """All that is there: prompt and beginning."""
    return np.append(self.ids, self.begun.ids) if self.begun else self.ids

  def start(self, number: int, sample: int) -> Completed:
    """The completion of a sample, with what is there."""
    completion = Completed(number, sample)
    if self.begun:
      for name in ('ids', 'logprob', 'sampled_logprob', 'entropy'):
        setattr(completion, name, list(getattr(self.begun, name)))
    return completion


class Progress(NamedTuple):
  """What a segment has brought.

  Attributes:
    finished: completions that it finished.
    running: those in slots.
    done, total: completions that are finished, of how many.
    tokens: that it drew.
    columns: of the window it ran with.
    slots: that it ran with.
    seconds: that it took.
  """

  finished: list[Completed]
  running: list[Completed]
  done: int
  total: int
  tokens: int
  columns: int
  slots: int
  seconds: float

  @property
  def note(self) -> str:
    """The same for people."""
    longest = max((len(c.ids) for c in self.running), default=0)
    return (
      f'{self.tokens / self.seconds:.0f} tokens/s  '
      f'{len(self.running)}/{self.slots} slots live  longest {longest}'
    )


def never(completed: Completed) -> None:
  """No text ends a completion."""
