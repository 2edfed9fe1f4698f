"""From a recipe to the first step: everything that a run stands on.

What can be refused is refused here, before anything compiles.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.table
from rich.console import Console

from jax_rlvr import (
  checkpoint,
  config,
  metrics,
  packing,
  policy,
  prng,
  rollout,
  sft,
)
from jax_rlvr import mesh as layouts
from jax_rlvr.actor import Actor
from jax_rlvr.checkpoint import Checkpoints
from jax_rlvr.config import Config, ConfigError, WarmUp
from jax_rlvr.policy import attention
from jax_rlvr.policy_gradient import token_gradients
from jax_rlvr.prng import Stream
from jax_rlvr.records import Prompt, TokenStats, TrainState
from jax_rlvr.sampling import stops
from jax_rlvr.update import make_update


class Setup(NamedTuple):
  """All that a run needs beside its state.

  Attributes:
    config: its knobs.
    actor: completes prompts.
    backend: of attention, in the update.
    prompts: trained on, of all tasks.
    pretrained: weights to start from, still in their files; or None.
    workdir: the run directory.
    console: where to show progress.
  """

  config: Config
  actor: Actor
  backend: attention.Backend
  prompts: list[Prompt]
  pretrained: policy.Pretrained | None
  workdir: pathlib.Path
  console: Console


def prepare(spec: str, workdir: pathlib.Path, console: Console) -> Setup:
  """Meets every error that can be met before anything compiles.

  Raises:
    ConfigError, ValueError, OSError, ImportError: one line that names the
      thing and the remedy.
  """
  recipe = config.load(spec)
  c = recipe.config
  pretrained, tokenizer = None, c.tokenizer
  if isinstance(c.policy, policy.PolicyConfig):
    shape = c.policy
    if tokenizer is None:
      raise ConfigError(
        'tokenizer=None with a policy of random weights; give a tokenizer'
      )
  else:
    pretrained = policy.load(c.policy)
    shape = pretrained.config
    if tokenizer is None:
      tokenizer = pretrained.tokenizer
    if tokenizer is None:
      raise ConfigError(
        f'{c.policy} brings no tokenizer; put tokenizer.json and '
        'tokenizer_config.json beside the weights, or give tokenizer='
      )
  if c.sequence_tokens > shape.max_tokens:
    raise ConfigError(
      f'max_prompt_tokens + max_completion_tokens = {c.sequence_tokens}, '
      f'but the policy was made for {shape.max_tokens}; lower one of them'
    )
  _check_filters(c)
  for task in c.eval_tasks or c.tasks:
    _checked(task, 'test', tokenizer, None)
  prompts = [
    prompt
    for task in c.tasks
    for prompt in _checked(task, 'train', tokenizer, c.max_prompt_tokens)
  ]
  mesh = layouts.make(slices=c.slices, fsdp=c.fsdp, tensor=c.tensor)
  dtype = layouts.compute_dtype(c.compute_dtype, mesh)
  backend = attention.choose(c.attention, shape, dtype, mesh)
  actor = Actor(
    policy=shape,
    tokenizer=tokenizer,
    mesh=mesh,
    slots=c.slots,
    dtype=dtype,
    backend=backend,
  )
  stops(tokenizer, c.stop)
  engine = actor.engine(c.max_prompt_tokens, c.max_completion_tokens)
  engine.check()
  checkpoint.write_manifest(workdir, recipe, shape, tokenizer)
  return Setup(c, actor, backend, prompts, pretrained, workdir, console)


def _check_filters(c: Config) -> None:
  """Traces the chain on the shapes it will see: what it lacks shows here."""
  nothing = rollout.tokens([], np.zeros(0), c.sequence_tokens)
  sequences = c.prompts_per_step // c.inner_steps * c.group_size
  tokens = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((sequences, *x.shape[1:]), x.dtype), nothing
  )
  extras = dict.fromkeys(c.token_extras, tokens.old_logprob)
  stats = TokenStats(tokens.old_logprob, tokens.old_entropy, **extras)
  jax.eval_shape(
    lambda stats, tokens: token_gradients(
      c.filters, stats, tokens, key=jax.random.key(0)
    ),
    stats,
    tokens,
  )


def _checked(task, split, tokenizer, limit) -> Sequence[Prompt]:
  """The prompts of a split: some, none of them longer than the limit."""
  prompts = task.prompts(split)
  if not len(prompts):
    raise ConfigError(
      f'task {task.name!r} has no {split} prompts; check its arguments'
    )
  for prompt in prompts if limit else ():
    length = len(tokenizer.render(prompt.messages))
    if length > limit:
      raise ConfigError(
        f'prompt {prompt.id!r} of task {task.name!r} has {length} tokens, more '
        f'than max_prompt_tokens={limit}; raise it'
      )
  return prompts


def start(setup: Setup, checkpoints: Checkpoints) -> TrainState:
  """The state to go on from: the last checkpoint, or the warm-up's end."""
  c, actor = setup.config, setup.actor
  if setup.pretrained is None:
    params = policy.init(actor.policy, prng.key(c.seed, Stream.INIT, 0))
    params = layouts.place(actor.mesh, params, layouts.TRAINING)
  else:
    abstract = policy.abstract_params(actor.policy)
    setup.console.print(f'reading the weights of {c.policy}')
    params = setup.pretrained.read(
      layouts.shardings(actor.mesh, abstract, layouts.TRAINING)
    )
  if c.warm_up and not checkpoints.steps():
    params = _warm_up(setup, c.warm_up, params)
  # State of filters is batch-level: any [B, T] will do.
  stats: Any = TokenStats(*jnp.zeros((2, 1, 1), jnp.float32))
  state = TrainState(
    step=np.int32(0),
    cursor=np.int32(0),
    params=params,
    optimizer=jax.jit(c.optimizer.init)(params),
    filters=c.filters.init(stats),
  )
  if checkpoints.steps():
    state = checkpoints.restore(checkpoint.abstract_like(state))
    setup.console.print(f'going on from the checkpoint of step {state.step}')
  return state


def _warm_up(setup: Setup, settings: WarmUp, params: Any) -> Any:
  c, actor = setup.config, setup.actor
  with (
    Checkpoints(setup.workdir / 'warm_up', keep=1) as checkpoints,
    metrics.progress(setup.console) as progress,
  ):
    bar = progress.add_task('warm-up', total=settings.steps, note='')
    for state, nats in sft.warm_up(
      settings,
      actor.policy,
      params,
      sft.traces(c.tasks, c.seed),
      actor.tokenizer,
      c.sequence_tokens,
      lambda rows: layouts.place_rows(actor.mesh, rows),
      checkpoints,
      actor.dtype,
    ):
      params, done = state.params, int(state.step)
      if done % 50 == 0 or done == settings.steps:
        note = f'{float(nats):.3f} nats a token'
        progress.update(bar, completed=done, note=note)
  return params


def update_of(setup: Setup):
  """The run's `update(state, tokens, key) -> (state, measured)`."""
  c, mesh = setup.config, setup.actor.mesh
  shards = layouts.row_shards(mesh)
  rows = packing.rows_needed(
    c.prompts_per_step // c.inner_steps,
    c.group_size,
    c.max_prompt_tokens,
    c.max_completion_tokens,
    c.row_tokens,
    shards,
    setup.backend.shares_prompts,
  )
  return make_update(
    setup.actor.policy,
    c.filters,
    c.optimizer,
    inner_steps=c.inner_steps,
    row_tokens=c.row_tokens,
    rows=rows,
    microbatch_rows=c.microbatch_tokens // c.row_tokens,
    temperature=c.temperature,
    remat=c.remat,
    dtype=setup.actor.dtype,
    extras=c.token_extras,
    shards=shards,
    share_prompts=setup.backend.shares_prompts,
    backend=setup.backend,
    place=functools.partial(layouts.place_rows, mesh),
    on_policy=c.oversample == 1,
  )


def resolved(setup: Setup) -> rich.table.Table:
  """What the run comes to, in the vocabulary of the config."""
  c, shape = setup.config, setup.actor.policy
  count = sum(x.size for x in jax.tree.leaves(policy.abstract_params(shape)))
  table = rich.table.Table('setting', 'value', title='resolved')
  engine = setup.actor.engine(c.max_prompt_tokens, c.max_completion_tokens)
  slots = [size * engine.shards for size in engine.sizes]
  for name, value in {
    'parameters': f'{count:,}',
    'tasks': ', '.join(task.name for task in c.tasks),
    'train prompts': f'{len(setup.prompts):,}',
    'steps': c.steps,
    'prompts per step': c.prompts_per_step,
    'group size': c.group_size,
    'inner steps per rollout batch': c.inner_steps,
    'microbatch tokens': c.microbatch_tokens,
    'max prompt tokens': c.max_prompt_tokens,
    'max completion tokens': c.max_completion_tokens,
    'decoding programs': (
      f'{", ".join(map(str, slots))} slots × '
      f'{", ".join(map(str, engine.windows))} columns'
    ),
    'attention': setup.backend.name,
    'compute type': setup.actor.dtype.name,
    'temperature': c.temperature,
    'seed': c.seed,
    'devices': f'{jax.device_count()} × {jax.devices()[0].device_kind}',
  }.items():
    table.add_row(name, str(value))
  return table
