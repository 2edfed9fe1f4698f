"""Supervised warm-up: a cold start on traces, before any reward.

A policy that never writes the format is never right, and one that is never
right learns nothing from rewards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_rlvr import masked, packing
from jax_rlvr import mesh as layouts
from jax_rlvr.checkpoint import Checkpoints, abstract_like
from jax_rlvr.config import ConfigError, WarmUp
from jax_rlvr.policy import PolicyConfig, cast
from jax_rlvr.records import Rows, Trace, TrainState
from jax_rlvr.token_stats import token_stats
from jax_rlvr.tokenizer import Tokenizer


def traces(tasks: Sequence[Any], seed: int) -> grain.MapDataset:
  """All traces of the tasks, shuffled and repeated: traces[i] for any i.

  Raises:
    ConfigError: no task has traces.
  """
  sources = [
    grain.MapDataset.source(task.traces('train'))
    for task in tasks
    if hasattr(task, 'traces')
  ]
  if not sources:
    raise ConfigError('warm_up is set, but none of the tasks has traces')
  mixed = grain.MapDataset.concatenate(sources)
  return mixed.seed(seed).shuffle().repeat()


def rows(batch: Sequence[Trace], tokenizer: Tokenizer, row_tokens: int) -> Rows:
  """Padded rows that score the completions; the end token is learnt too.

  Raises:
    ConfigError: a trace is longer than a row.
  """
  ids = np.zeros((len(batch), row_tokens), np.int32)
  mask = np.zeros((len(batch), row_tokens), bool)
  for row, trace in enumerate(batch):
    prompt = tokenizer.render(trace.prompt.messages)
    completion = [*tokenizer.encode(trace.completion), tokenizer.end_ids[0]]
    stop = len(prompt) + len(completion)
    if stop > row_tokens:
      raise ConfigError(
        f'trace {trace.prompt.id!r} has {stop} tokens, more than '
        f'max_prompt_tokens + max_completion_tokens = {row_tokens}; raise them'
      )
    ids[row, :stop] = prompt + completion
    mask[row, len(prompt) : stop] = True
  return packing.padded(ids, mask)


def warm_up(
  settings: WarmUp,
  policy: PolicyConfig,
  params: Any,
  source: Any,
  tokenizer: Tokenizer,
  row_tokens: int,
  place: Callable[[Any], Any],
  checkpoints: Checkpoints,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> Iterator[tuple[TrainState, jax.Array]]:
  """Imitates traces, going on from the last checkpoint if there is one.

  Args:
    settings: of the stage.
    policy: shape of the policy.
    params: where it starts; donated.
    source: source[i] is trace i, for any i; batches follow each other.
    tokenizer: of the policy.
    row_tokens: T.
    place: puts host rows on the devices.
    checkpoints: of this stage.
    dtype: to compute in.

  Yields:
    (state, mean nats per token) after each update; the last one is in a
    checkpoint when it is yielded.
  """

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, opt_state, batch):
    def loss(params):
      stats = token_stats(policy, cast(params, dtype), batch)
      place = layouts.after(batch.place, jnp.sum(stats.logprob))
      return -masked.mean(stats.logprob, place >= 0)

    nats, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = settings.optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, nats

  state = TrainState(
    step=np.int32(0),
    cursor=np.int32(0),
    params=params,
    optimizer=layouts.init_optimizer(settings.optimizer, params),
    filters=optax.EmptyState(),
  )
  if checkpoints.steps():
    state = checkpoints.restore(abstract_like(state))
    if int(state.step) >= settings.steps:
      yield state, jnp.float32(jnp.nan)
  for done in range(int(state.step), settings.steps):
    first = done * settings.batch_size
    batch = [source[i] for i in range(first, first + settings.batch_size)]
    batch = place(rows(batch, tokenizer, row_tokens))
    params, optimizer, nats = step(state.params, state.optimizer, batch)
    state = state._replace(
      step=np.int32(done + 1), params=params, optimizer=optimizer
    )
    last = done + 1 == settings.steps
    if last or (done + 1) % settings.checkpoint_every == 0:
      checkpoints.save(state)
    if last:
      checkpoints.wait()
    yield state, nats
