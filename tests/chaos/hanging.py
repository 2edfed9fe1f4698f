"""A task of the chaos runs, in a module that reward processes can import."""

import dataclasses
import time

from jax_rlvr.records import Completion, Prompt
from jax_rlvr.tasks import Addition


@dataclasses.dataclass(frozen=True, kw_only=True)
class HangingAddition(Addition):
  """Sums whose rewards hang on the same answers in every run.

  Attributes:
    hangs: one in about so many answers.
  """

  hangs: int = 4001

  def reward(self, prompt: Prompt, completion: Completion) -> float:
    text = f'{prompt.text}{completion.text}.'
    if sum(i * i * ord(c) for i, c in enumerate(text)) % self.hangs == 1:
      time.sleep(1000)
    return super().reward(prompt, completion)
