"""Prompts → completions, with the weights at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jax_rlvr import mesh as layouts
from jax_rlvr.policy import PolicyConfig, attention, suited
from jax_rlvr.records import Completion, Prompt, Rollout
from jax_rlvr.sampling import Completed, Engine, Group, Progress, stops, written

if TYPE_CHECKING:
  from jax_rlvr.sampling import Transform
  from jax_rlvr.tokenizer import Tokenizer


class Interrupted(Exception):
  """A rollout that was asked to end; what it had is lost."""


OnProgress = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
  """Takes no notice of progress."""


class Segment(NamedTuple):
  """What a segment of sampling has brought, by number among the P · G.

  Attributes:
    finished: completions that it finished.
    running: turns those in slots into completions that are not finished.
  """

  finished: dict[int, Rollout]
  running: Callable[[], dict[int, Rollout]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Actor:
  """What it takes, beside weights, to complete prompts.

  Attributes:
    policy: shape of the policy.
    tokenizer: renders prompts and ends completions.
    mesh: where sampling runs.
    slots: sequences decoded at one time; rounded up to the data shards.
    dtype: to compute in, as the trainer does.
    backend: of attention, for reading prompts.
  """

  policy: PolicyConfig
  tokenizer: Tokenizer
  mesh: jax.sharding.Mesh
  slots: int
  dtype: np.dtype = np.dtype(np.float32)
  backend: attention.Backend = attention.XLA

  def engine(self, prompt_tokens: int, completion_tokens: int) -> Engine:
    """The sampler for prompts and completions of at most so many tokens."""
    return Engine(
      policy=self.policy,
      mesh=self.mesh,
      slots=self.slots,
      prompt_tokens=prompt_tokens,
      completion_tokens=completion_tokens,
      dtype=self.dtype,
      backend=self.backend,
      cache=suited(self.policy, self.dtype, self.mesh),
    )

  def judged(self, count: int) -> list[int]:
    """Which of so many prompts this host has completed and is to judge."""
    shards, own = layouts.row_shards(self.mesh), layouts.own_shards(self.mesh)
    crew = layouts.crew(self.mesh)
    turn = crew.index(jax.process_index())
    return [
      p
      for p in range(count)
      if p % shards in own and p // shards % len(crew) == turn
    ]

  def complete(
    self,
    params: Any,
    prompts: Sequence[Prompt],
    keys: jax.Array,
    *,
    temperature: float,
    max_completion_tokens: int,
    max_prompt_tokens: int = 1,
    transform: Transform | None = None,
    stop: Sequence[str] = (),
    begun: Mapping[int, Rollout] | None = None,
    version: int = 0,
    on_progress: OnProgress = ignore,
  ) -> Iterator[Segment]:
    """Completes each prompt, a segment at a time; of several hosts each some.

    Completions are numbered prompt · G + sample. Hosts come to the end of each
    segment, and of all, together.

    Args:
      params: of the policy.
      prompts: P of them.
      keys: [P, G], one a completion.
      temperature: 0 for argmax.
      max_completion_tokens: token limit.
      max_prompt_tokens: of any prompt to come, so that shapes stay the same;
        the longest here if that is more.
      transform: of the distribution that is drawn from.
      stop: texts that end a completion, which is cut before them.
      begun: completions to go on with; finished ones are left alone.
      version: of the params, stamped on each token.
      on_progress: called after each segment.

    Raises:
      ValueError: a prompt is empty, a stop text cannot be written, or what it
        takes does not fit on the devices.
    """
    begun = begun or {}
    encoded = [
      np.array(self.tokenizer.render(prompt.messages), np.int32)
      for prompt in prompts
    ]
    engine = self.engine(
      max(max_prompt_tokens, *map(len, encoded)), max_completion_tokens
    )
    groups, numbers = [], []
    samples = keys.shape[1]
    data = np.asarray(jax.random.key_data(keys)).reshape(-1, 2)
    own = set(layouts.own_shards(self.mesh))
    for p, ids in enumerate(encoded):
      if p % engine.shards not in own:
        continue
      mine = range(p * samples, (p + 1) * samples)
      started = [[i] for i in mine if i in begun and not begun[i].finished]
      for members in (*started, [i for i in mine if i not in begun]):
        if members:
          limits = np.full(len(members), max_completion_tokens)
          before = begun.get(members[0])
          groups.append(
            Group(
              ids,
              data[members],
              limits,
              None if before is None else _as_completed(before),
            )
          )
          numbers.append(members)

    def named(completions, finished):
      found = {}
      for c in completions:
        number = numbers[c.group][c.sample]
        prompt = number // samples
        before = begun.get(number)
        found[number] = self._rollout(
          prompts[prompt], encoded[prompt], c, before, version, finished, stop
        )
      return found

    for progress in engine.complete(
      engine.unstacked(params),
      groups,
      temperature=temperature,
      end_ids=self.tokenizer.end_ids,
      transform=transform,
      stop=stops(self.tokenizer, stop),
    ):
      on_progress(progress)
      running = progress.running
      yield Segment(
        named(progress.finished, True),
        lambda running=running: named(running, False),
      )

  def _rollout(
    self, prompt, prompt_ids, c: Completed, before, version, finished, stop
  ) -> Rollout:
    versions = np.full(len(c.ids), version, np.int32)
    if before:
      versions[: len(before.ids)] = before.versions[: len(c.ids)]
    return Rollout(
      prompt=prompt,
      prompt_ids=prompt_ids,
      ids=np.array(c.ids, np.int32),
      logprob=np.array(c.logprob, np.float32),
      sampled_logprob=np.array(c.sampled_logprob, np.float32),
      entropy=np.array(c.entropy, np.float32),
      versions=versions,
      completion=Completion(
        text=written(self.tokenizer, c, self.tokenizer.end_ids, stop),
        length=len(c.ids),
        truncated=not c.ended,
      ),
      failed=c.failed,
      finished=finished,
    )


def _as_completed(r: Rollout) -> Completed:
  return Completed(
    0,
    0,
    r.ids.tolist(),
    r.logprob.tolist(),
    r.sampled_logprob.tolist(),
    r.entropy.tolist(),
  )
