"""Groups of completions between two steps, in checkpoints and between hosts."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flax.serialization import msgpack_restore, msgpack_serialize

from jax_rlvr import hosts
from jax_rlvr.records import Completion, Prompt, Rollout

# Those that `_record` keeps as they are.
_FIELDS = (
  'prompt_ids', 'ids', 'logprob', 'sampled_logprob', 'entropy', 'versions',
  'reward', 'outcome', 'failed', 'finished',
)  # fmt: skip


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


def as_text(asked: Asked) -> str:
  """What `restored` reads; the prompt itself is the stream's."""
  saved = {
    'position': asked.position,
    'step': asked.step,
    'begun': {str(g): _record(r) for g, r in asked.begun.items()},
  }
  return base64.b64encode(msgpack_serialize(saved)).decode()


def restored(text: str, stream: Any) -> Asked:
  """The group of `as_text`; stream[position] is its prompt."""
  saved: Any = msgpack_restore(base64.b64decode(text))
  prompt = stream[saved['position']]
  begun = {int(g): _rollout(x, prompt) for g, x in saved['begun'].items()}
  return Asked(saved['position'], saved['step'], prompt, begun)


def gathered(
  rollouts: Mapping[tuple[int, int], Rollout], prompts: Sequence[Prompt]
) -> dict[tuple[int, int], Rollout]:
  """The rollouts of all hosts, by number of prompt and sample, in their order.

  Args:
    rollouts: of this host; none of another's.
    prompts: of all.
  """
  if not hosts.several():
    return dict(sorted(rollouts.items()))
  mine = {f'{p}/{g}': _record(r) for (p, g), r in rollouts.items()}
  found = {}
  for data in hosts.exchange('rollouts', msgpack_serialize(mine)):
    theirs: Any = msgpack_restore(data)
    for name, saved in theirs.items():
      prompt, sample = map(int, name.split('/'))
      found[prompt, sample] = _rollout(saved, prompts[prompt])
  return dict(sorted(found.items()))


def _record(r: Rollout) -> dict[str, Any]:
  saved = {name: getattr(r, name) for name in _FIELDS} | {
    'completion': dataclasses.asdict(r.completion),
    'parts': dict(r.parts),
  }
  # It has no word for None.
  return {name: x for name, x in saved.items() if x is not None}


def _rollout(saved: Mapping[str, Any], prompt: Prompt) -> Rollout:
  fields = dict(saved) | {'completion': Completion(**saved['completion'])}
  return Rollout(prompt=prompt, **fields)
