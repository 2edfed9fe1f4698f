"""Groups of completions between two steps, and in checkpoints as JSON."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_rlvr.records import Completion, Prompt, Rollout

_ARRAYS = {
  'prompt_ids': np.int32,
  'ids': np.int32,
  'logprob': np.float32,
  'sampled_logprob': np.float32,
  'entropy': np.float32,
  'versions': np.int32,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
  """A prompt that is being completed.

  Attributes:
    position: of the prompt in the stream.
    step: in which it was asked first; its keys are that step's.
    prompt: what was asked.
    begun: completions that there are, by number within the group.
  """

  position: int
  step: int
  prompt: Prompt
  begun: dict[int, Rollout]

  def is_whole(self, samples: int) -> bool:
    """Whether all of so many completions are finished."""
    finished = sum(r.finished for r in self.begun.values())
    return finished == samples


def as_json(asked: Asked) -> dict[str, Any]:
  """What `restored` reads; the prompt itself is the stream's."""
  return {
    'position': asked.position,
    'step': asked.step,
    'begun': {str(g): _rollout_as_json(r) for g, r in asked.begun.items()},
  }


def restored(saved: Mapping[str, Any], stream: Any) -> Asked:
  """The group of `as_json`; stream[position] is its prompt."""
  prompt = stream[saved['position']]
  begun = {int(g): _rollout(x, prompt) for g, x in saved['begun'].items()}
  return Asked(saved['position'], saved['step'], prompt, begun)


def _rollout_as_json(r: Rollout) -> dict[str, Any]:
  arrays = {
    name: base64.b64encode(getattr(r, name).astype(dtype).tobytes()).decode()
    for name, dtype in _ARRAYS.items()
  }
  return arrays | {
    'completion': dataclasses.asdict(r.completion),
    'failed': r.failed,
    'finished': r.finished,
  }


def _rollout(saved: Mapping[str, Any], prompt: Prompt) -> Rollout:
  arrays: dict[str, Any] = {
    name: np.frombuffer(base64.b64decode(saved[name]), dtype)
    for name, dtype in _ARRAYS.items()
  }
  return Rollout(
    prompt=prompt,
    completion=Completion(**saved['completion']),
    failed=saved['failed'],
    finished=saved['finished'],
    **arrays,
  )
