"""Prompts → completions → rewards → Tokens."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jax_rlvr import mesh as layouts
from jax_rlvr import prng
from jax_rlvr.config import Config
from jax_rlvr.policy import PolicyConfig, cast
from jax_rlvr.prng import Stream
from jax_rlvr.records import Completion, Prompt, Rollout, Tokens, TrainState
from jax_rlvr.sampling import sample

if TYPE_CHECKING:
  from jax_rlvr.scoring import Scorers
  from jax_rlvr.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Actor:
  """What it takes, beside weights, to complete prompts.

  Attributes:
    policy: shape of the policy.
    tokenizer: renders prompts and ends completions.
    mesh: where sampling runs.
    slots: sequences decoded at one time, about.
    dtype: to compute in, as the trainer does.
  """

  policy: PolicyConfig
  tokenizer: Tokenizer
  mesh: jax.sharding.Mesh
  slots: int
  dtype: np.dtype = np.dtype(np.float32)

  def complete(
    self,
    params: Any,
    prompts: Sequence[Prompt],
    keys: jax.Array,
    *,
    temperature: float,
    max_completion_tokens: int,
    max_prompt_tokens: int | None = None,
  ) -> Iterator[list[Rollout]]:
    """Completes each prompt, yielding whole groups as they are done.

    Args:
      params: of the policy.
      prompts: P of them.
      keys: [P, G], one a completion.
      temperature: 0 for argmax.
      max_completion_tokens: token limit.
      max_prompt_tokens: width of the prompts; the longest, rounded up, if None.
    """
    encoded = [self.tokenizer.render(prompt.messages) for prompt in prompts]
    longest = max(map(len, encoded))
    width = max_prompt_tokens or math.ceil(longest / 16) * 16
    samples = keys.shape[1]
    shards = layouts.row_shards(self.mesh)
    wanted = min(len(prompts), max(1, self.slots // samples))
    slab = math.ceil(wanted / shards) * shards
    weights = layouts.place(
      self.mesh, cast(params, self.dtype), layouts.SAMPLING
    )
    for start in range(0, len(prompts), slab):
      # A short last slab repeats prompts, so that one shape serves all.
      index = [min(i, len(prompts) - 1) for i in range(start, start + slab)]
      lengths = np.array([len(encoded[i]) for i in index], np.int32)
      ids = np.zeros((slab, width), np.int32)
      for row, i in zip(ids, index, strict=True):
        row[: len(encoded[i])] = encoded[i]
      ids, lengths, slab_keys = layouts.place_rows(
        self.mesh, (ids, lengths, keys[np.array(index)])
      )
      sampled = sample(
        self.policy,
        weights,
        ids,
        lengths,
        slab_keys,
        np.float32(temperature),
        np.array(self.tokenizer.end_ids, np.int32),
        max_tokens=max_completion_tokens,
      )
      sampled = jax.device_get(sampled)
      real = min(slab, len(prompts) - start)
      yield [
        self._rollout(prompts[start + p], encoded[start + p], sampled, (p, g))
        for p in range(real)
        for g in range(samples)
      ]

  def _rollout(self, prompt, prompt_ids, sampled, place) -> Rollout:
    length, ended = sampled.lengths[place], bool(sampled.ended[place])
    ids, logprob, sampled_logprob, entropy = (
      x[place][:length].copy() for x in sampled.tokens
    )
    text = self.tokenizer.decode([int(i) for i in (ids[:-1] if ended else ids)])
    return Rollout(
      prompt=prompt,
      prompt_ids=np.array(prompt_ids, np.int32),
      ids=ids,
      logprob=logprob,
      sampled_logprob=sampled_logprob,
      entropy=entropy,
      completion=Completion(text=text, length=int(length), truncated=not ended),
    )


def collect(
  state: TrainState,
  stream: Any,
  actor: Actor,
  scorers: Scorers,
  config: Config,
  on_progress: Callable[[int], None] = lambda tokens: None,
) -> tuple[list[Rollout], TrainState, dict[str, float]]:
  """Takes a step's prompts from the stream, completes and rewards them.

  Args:
    state: its params sample, its cursor says which prompts are next.
    stream: stream[i] is the prompt at position i, for any i.
    actor, scorers, config: of the run.
    on_progress: called with the number of new completion tokens.

  Returns:
    P * G rollouts grouped by prompt, the state with its cursor moved on, and
    the step's scalars.
  """
  first = int(state.cursor)
  positions = range(first, first + config.prompts_per_step)
  key = prng.key(config.seed, Stream.SAMPLE, int(state.step))
  groups = actor.complete(
    state.params,
    [stream[i] for i in positions],
    sample_keys(key, positions, config.group_size),
    temperature=config.temperature,
    max_completion_tokens=config.max_completion_tokens,
    max_prompt_tokens=config.max_prompt_tokens,
  )
  rollouts, scalars = score(groups, scorers, on_progress)
  state = state._replace(cursor=np.int32(positions.stop))
  return rollouts, state, summary(rollouts, config.group_size) | scalars


def sample_keys(
  key: jax.Array, positions: Sequence[int], samples: int
) -> jax.Array:
  """[P, G] keys: of each prompt by its position, of each sample by its number.

  So a completion does not depend on what is sampled beside it.
  """
  fold = jax.random.fold_in
  of_prompt = jax.vmap(fold, (None, 0))(key, np.array(positions, np.uint32))
  of_sample = jax.vmap(jax.vmap(fold, (None, 0)), (0, None))
  return of_sample(of_prompt, np.arange(samples, dtype=np.uint32))


def score(
  groups: Iterator[list[Rollout]],
  scorers: Scorers,
  on_progress: Callable[[int], None] = lambda tokens: None,
) -> tuple[list[Rollout], dict[str, float]]:
  """Rewards completions while the next ones are being decoded.

  Returns:
    The rollouts in order, and `reward/…`, `time/…`, `rollout/…` scalars.
  """
  rollouts, futures = [], []
  start = time.perf_counter()
  for done in groups:
    rollouts += done
    futures += [scorers.submit(r.prompt, r.completion) for r in done]
    on_progress(sum(r.completion.length for r in done))
  sampled = time.perf_counter()
  rewards, failures = scorers.gather(futures)
  scored = time.perf_counter()
  rollouts = [
    dataclasses.replace(rollout, reward=reward)
    for rollout, reward in zip(rollouts, rewards, strict=True)
  ]
  tokens = sum(r.completion.length for r in rollouts)
  return rollouts, failures | {
    'time/rollout_s': sampled - start,
    'time/score_s': scored - sampled,
    'rollout/tokens_per_s': tokens / (sampled - start),
  }


def outcomes(rollouts: Sequence[Rollout], samples: int):
  """What advantages are made of: (rewards, valid, lengths), [P, G] each."""
  valid = np.array([r.reward is not None for r in rollouts])
  rewards = np.array([r.reward or 0.0 for r in rollouts], np.float32)
  lengths = np.array([r.completion.length for r in rollouts], np.int32)
  return tuple(x.reshape(-1, samples) for x in (rewards, valid, lengths))


def tokens(
  rollouts: Sequence[Rollout], advantages: np.ndarray, row_tokens: int
) -> Tokens:
  """The batch as padded rows, host arrays.

  Args:
    rollouts: B completions, grouped by prompt.
    advantages: [P, G].
    row_tokens: T; no prompt + completion is longer.
  """
  shape = (len(rollouts), row_tokens)
  ids = np.zeros(shape, np.int32)
  lengths = np.zeros(len(rollouts), np.int32)
  mask = np.zeros(shape, bool)
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
    mask[row, start:stop] = True
    advantage[row, start:stop] = value
    logprob[row, start:stop] = rollout.logprob
    sampled_logprob[row, start:stop] = rollout.sampled_logprob
    entropy[row, start:stop] = rollout.entropy
  fields: dict[str, Any] = {
    'mask': mask,
    'advantage': advantage,
    'old_logprob': logprob,
    'serial': np.arange(ids.size, dtype=np.uint32).reshape(shape),
    'sampled_logprob': sampled_logprob,
    'old_entropy': entropy,
    'ids': ids,
    'lengths': lengths,
  }
  return Tokens(**fields)


def summary(rollouts: Sequence[Rollout], samples: int) -> dict[str, float]:
  """Scalars of a step's rollouts: reward, length, entropy and groups.

  `entropy/token_mean` weighs every token the same, `entropy/sequence_mean`
  every sequence: the first paper's definition.
  """
  rewards, valid, lengths = outcomes(rollouts, samples)
  scored = rewards[valid] if valid.any() else np.zeros(1, np.float32)
  low = np.where(valid, rewards, np.inf).min(axis=1)
  high = np.where(valid, rewards, -np.inf).max(axis=1)
  return {
    'reward/mean': float(scored.mean()),
    'reward/std': float(scored.std()),
    'entropy/token_mean': float(
      np.concatenate([r.entropy for r in rollouts]).mean()
    ),
    'entropy/sequence_mean': float(
      np.mean([r.entropy.mean() for r in rollouts])
    ),
    'length/mean': float(lengths.mean()),
    'length/max': int(lengths.max()),
    'length/clipped_share': float(
      np.mean([r.completion.truncated for r in rollouts])
    ),
    'groups/zero_variance_share': float(np.mean(low >= high)),
  }
