"""Prompts → completions → rewards → Tokens."""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_rlvr import hosts, prng
from jax_rlvr.actor import Actor, OnProgress, Segment, ignore
from jax_rlvr.carried import Asked, as_text, gathered, restored
from jax_rlvr.config import Config
from jax_rlvr.prng import Stream
from jax_rlvr.records import Prompt, Rollout, Tokens, TrainState

if TYPE_CHECKING:
  from jax_rlvr.scoring import Scorers

_log = logging.getLogger(__name__)


def collect(
  state: TrainState,
  stream: Any,
  actor: Actor,
  scorers: Scorers,
  config: Config,
  on_progress: OnProgress = ignore,
) -> tuple[list[Rollout], TrainState, dict[str, float]]:
  """Takes a step's prompts from the stream, completes and rewards them.

  With `config.oversample` above 1 more groups are begun than are needed, and
  sampling ends with the segment in which enough of them are whole. The rest
  goes on in the next step; its tokens keep the numbers of the weights that drew
  them. With `config.dynamic_sampling` a group whose outcomes are all equal is
  dropped, and further prompts are asked, `config.max_asked` times the prompts
  per step at the most. What is dropped, and when sampling ends, depends on
  tokens and rewards alone: the latter are waited for.

  Args:
    state: its params sample, its cursor says which prompts are next.
    stream: stream[i] is the prompt at position i, for any i.
    actor, scorers, config: of the run.
    on_progress: called after each segment of sampling.

  Returns:
    The rollouts of P groups, or of fewer where the limit was met; the state
    with its cursor moved on and with what it carries over; and the scalars of
    the step.
  """
  c, step, samples = config, int(state.step), config.group_size
  asked = [restored(saved, stream) for saved in state.carried]
  carried = sum(len(group.begun) for group in asked)
  cursor, started = int(state.cursor), time.perf_counter()
  # Places in `asked` of the groups that this host judges.
  judged: set[int] = set()
  scores: dict[tuple[int, int], Future] = {}

  def take(place: int, sample: int, r: Rollout) -> None:
    asked[place].begun[sample] = r
    if r.finished and place in judged:
      scores[place, sample] = scorers.submit(r.prompt, r.completion)

  known = {place for place, g in enumerate(asked) if g.is_whole(samples)}

  def whole() -> np.ndarray:
    flags = [group.is_whole(samples) for group in asked]
    return hosts.any_of('whole groups', flags)

  def usable() -> np.ndarray:
    if not c.dynamic_sampling:
      return whole()
    flags = [
      place in judged | known
      and group.is_whole(samples)
      and _differ(place, group, scores, scorers)
      for place, group in enumerate(asked)
    ]
    return hosts.any_of('usable groups', flags)

  while (missing := c.prompts_per_step - np.count_nonzero(usable())) > 0:
    room = math.ceil(c.prompts_per_step * c.max_asked) - len(asked)
    unfinished = np.flatnonzero(~whole()).tolist()
    new = min(math.ceil(missing * c.oversample) - len(unfinished), room)
    positions = range(cursor, cursor + max(new, 0))
    unfinished += range(len(asked), len(asked) + len(positions))
    asked += [Asked(i, step, stream[i], {}) for i in positions]
    cursor = positions.stop
    if not unfinished:
      _log.warning(
        'step %d goes on with %d of %d groups: of %d prompts no more had '
        'outcomes that differ', step, c.prompts_per_step - missing,
        c.prompts_per_step, len(asked),
      )  # fmt: skip
      break
    groups = [asked[place] for place in unfinished]
    judged |= {unfinished[i] for i in actor.judged(len(groups))}
    for segment in actor.complete(
      state.params,
      [group.prompt for group in groups],
      jnp.concatenate([_keys(c.seed, group, samples) for group in groups]),
      temperature=c.temperature,
      max_completion_tokens=c.max_completion_tokens,
      max_prompt_tokens=c.max_prompt_tokens,
      transform=c.transform,
      stop=c.stop,
      begun={
        p * samples + sample: r
        for p, group in enumerate(groups)
        for sample, r in group.begun.items()
      },
      version=step,
      on_progress=on_progress,
    ):
      for number, r in segment.finished.items():
        take(unfinished[number // samples], number % samples, r)
      if (
        c.oversample > 1
        and np.count_nonzero(whole()) >= c.prompts_per_step
        and np.count_nonzero(usable()) >= c.prompts_per_step
      ):
        for number, r in segment.running().items():
          take(unfinished[number // samples], number % samples, r)
        break
  places = np.flatnonzero(usable())[: c.prompts_per_step].tolist()
  left = [g for place, g in enumerate(asked) if place not in places]
  rewarded, scalars = _rewarded(
    {
      (place, sample): r
      for place in judged
      for sample, r in asked[place].begun.items()
    },
    scores,
    scorers,
    started,
  )
  prompts = [group.prompt for group in asked]
  for (place, sample), r in gathered(rewarded, prompts).items():
    asked[place].begun[sample] = r
  chosen = [asked[place] for place in places]

  def of(groups: Iterable[Asked]) -> list[Rollout]:
    return [group.begun[i] for group in groups for i in range(samples)]

  if c.balance_rewards:
    means = [_mean_reward(of([group])) for group in chosen]
    chosen = [chosen[i] for i in balanced(means, c.inner_steps)]
  rollouts = of(chosen)
  finished = [group for group in asked if group.is_whole(samples)]
  stale = [np.less(r.versions, step) for r in rollouts]
  scalars |= summary(of(finished), samples) | {
    'rollout/carried': carried,
    'rollout/stale_share': float(np.mean(np.concatenate(stale or [[0]]))),
    'groups/asked': len(asked),
    'groups/dropped': len(finished) - len(chosen),
  }
  scalars |= _pace(
    [r for g in asked for r in g.begun.values() if r.finished], scalars
  )
  keeps = c.oversample > 1
  state = state._replace(
    cursor=np.int32(cursor), carried=tuple(map(as_text, left if keeps else ()))
  )
  return rollouts, state, scalars


def _keys(seed: int, group: Asked, samples: int) -> jax.Array:
  """[1, G] keys: of the step in which a prompt was asked first."""
  key = prng.key(seed, Stream.SAMPLE, group.step)
  return prng.sample_keys(key, [group.position], samples)


def _differ(
  place: int,
  group: Asked,
  scores: Mapping[tuple[int, int], Future],
  scorers: Scorers,
) -> bool:
  """Whether the outcomes of a group do; waits for them."""
  pending = {
    sample: scores[place, sample]
    for sample in group.begun
    if (place, sample) in scores
  }
  judged, _ = scorers.gather(list(pending.values()))
  outcomes = {s: r.outcome for s, r in group.begun.items()} | dict(
    zip(pending, (score.outcome for score in judged), strict=True)
  )
  return len(set(outcomes.values()) - {None}) > 1


def _mean_reward(group: Sequence[Rollout]) -> float:
  return float(np.mean([r.reward or 0.0 for r in group]))


def balanced(means: Sequence[float], parts: int) -> list[int]:
  """An order of groups in which equal parts have about equal sums of means.

  Sorted, they are dealt to the parts to and fro.

  >>> balanced([0.1, 0.9, 0.2, 0.8], 2)
  [1, 0, 3, 2]
  """
  order = sorted(range(len(means)), key=lambda i: -means[i])
  turn = [*range(parts), *reversed(range(parts))]
  dealt = [[] for _ in range(parts)]
  for place, group in enumerate(order):
    dealt[turn[place % len(turn)]].append(group)
  return [group for part in dealt for group in part]


def score(
  actor: Actor,
  prompts: Sequence[Prompt],
  samples: int,
  segments: Iterator[Segment],
  scorers: Scorers,
) -> tuple[list[Rollout], dict[str, float]]:
  """Rewards completions while others are being decoded.

  Args:
    actor: that completes the prompts.
    prompts: P of them.
    samples: G, completions of each.
    segments: of completing them.
    scorers: that know their tasks.

  Returns:
    The rollouts in the order of their numbers, and `reward/…`, `time/…`,
    `rollout/…` scalars.
  """
  started = time.perf_counter()
  mine = set(actor.judged(len(prompts)))
  rollouts, scores = {}, {}
  for segment in segments:
    for number, r in segment.finished.items():
      place = divmod(number, samples)
      if place[0] in mine:
        rollouts[place] = r
        scores[place] = scorers.submit(r.prompt, r.completion)
  rewarded, scalars = _rewarded(rollouts, scores, scorers, started)
  everything = list(gathered(rewarded, prompts).values())
  return everything, scalars | _pace(everything, scalars)


def _rewarded(
  rollouts: Mapping[tuple[int, int], Rollout],
  scores: Mapping[tuple[int, int], Future],
  scorers: Scorers,
  started: float,
) -> tuple[dict[tuple[int, int], Rollout], dict[str, float]]:
  """Waits for rewards; `time/hidden_share` of them were there already.

  Rollouts without a score stay as they are. What failed is counted over all
  hosts.
  """
  sampled = time.perf_counter()
  hidden = [score.done() for score in scores.values()]
  judged, failures = scorers.gather(list(scores.values()))
  rewarded = dict(rollouts)
  for place, score in zip(scores, judged, strict=True):
    if not rollouts[place].failed:
      rewarded[place] = dataclasses.replace(
        rollouts[place],
        reward=score.reward,
        outcome=score.outcome,
        parts=score.parts,
      )
  counts = hosts.agree('rewards', list(failures.values())).sum(axis=0).tolist()
  return rewarded, dict(zip(failures, counts, strict=True)) | {
    'time/rollout_s': sampled - started,
    'time/score_s': time.perf_counter() - sampled,
    'time/hidden_share': float(np.mean(hidden or [True])),
  }


def _pace(rollouts: Sequence[Rollout], scalars) -> dict[str, float]:
  """Of all rollouts of a step, on all hosts."""
  tokens = sum(r.completion.length for r in rollouts)
  return {
    'time/rollout_tokens_per_s': tokens / scalars['time/rollout_s'],
    'rollout/failed': sum(r.failed for r in rollouts),
  }


def outcomes(rollouts: Sequence[Rollout], samples: int):
  """What advantages are made of: (rewards, valid, lengths), [P, G] each."""
  valid = np.array([r.reward is not None for r in rollouts])
  rewards = np.array([r.reward or 0.0 for r in rollouts], np.float32)
  lengths = np.array([r.completion.length for r in rollouts], np.int32)
  return tuple(x.reshape(-1, samples) for x in (rewards, valid, lengths))


def tokens(
  rollouts: Sequence[Rollout],
  advantages: np.ndarray,
  row_tokens: int,
  rows: int | None = None,
  step: int | None = None,
) -> Tokens:
  """The batch as padded rows, host arrays.

  Args:
    rollouts: completions, grouped by prompt.
    advantages: [P, G].
    row_tokens: T; no prompt + completion is longer.
    rows: B; what the rollouts do not fill has no mask. Their number if None.
    step: tokens drawn before it are not fresh; all are if None.
  """
  shape = (rows or len(rollouts), row_tokens)
  ids = np.zeros(shape, np.int32)
  lengths = np.zeros(shape[0], np.int32)
  mask, fresh = np.zeros((2, *shape), bool)
  advantage, logprob, sampled_logprob, entropy = np.zeros(
    (4, *shape), np.float32
  )
  for row, (rollout, value) in enumerate(
    zip(rollouts, advantages.reshape(-1), strict=True)
  ):
    start = len(rollout.prompt_ids)
    stop = start + len(rollout.ids)
    ids[row, :start], ids[row, start:stop] = rollout.prompt_ids, rollout.ids
    lengths[row] = stop
    mask[row, start:stop] = not rollout.failed
    advantage[row, start:stop] = value
    logprob[row, start:stop] = rollout.logprob
    sampled_logprob[row, start:stop] = rollout.sampled_logprob
    entropy[row, start:stop] = rollout.entropy
    if step is not None:
      fresh[row, start:stop] = rollout.versions == step
  fields: dict[str, Any] = {
    'mask': mask,
    'advantage': advantage,
    'old_logprob': logprob,
    'serial': np.arange(ids.size, dtype=np.uint32).reshape(shape),
    'sampled_logprob': sampled_logprob,
    'old_entropy': entropy,
    'ids': ids,
    'lengths': lengths,
    'fresh': None if step is None else fresh,
  }
  return Tokens(**fields)


def summary(rollouts: Sequence[Rollout], samples: int) -> dict[str, float]:
  """Scalars of a step's rollouts: reward, length, entropy and groups.

  `entropy/token_mean` weighs every token the same, `entropy/sequence_mean`
  every sequence: the first paper's definition.
  """
  rewards, valid, lengths = outcomes(rollouts, samples)
  scored = rewards[valid] if valid.any() else np.zeros(1, np.float32)
  parts = collections.defaultdict(list)
  for r in rollouts:
    for name, value in r.parts.items():
      parts[name].append(value)
  low = np.where(valid, rewards, np.inf).min(axis=1)
  high = np.where(valid, rewards, -np.inf).max(axis=1)
  return {
    'reward/mean': float(scored.mean()),
    'reward/std': float(scored.std()),
    **{f'reward/parts/{k}': float(np.mean(x)) for k, x in parts.items()},
    'entropy/token_mean': float(
      np.concatenate([r.entropy for r in rollouts]).mean()
    ),
    'entropy/sequence_mean': float(
      np.mean([r.entropy.mean() for r in rollouts])
    ),
    'length/mean': float(lengths.mean()),
    'length/p50': float(np.median(lengths)),
    'length/max': int(lengths.max()),
    'length/clipped_share': float(
      np.mean([r.completion.truncated for r in rollouts])
    ),
    'groups/zero_variance_share': float(np.mean(low >= high)),
  }
