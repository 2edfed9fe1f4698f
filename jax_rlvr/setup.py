"""From a recipe to the first step: everything that a run stands on.

What can be refused is refused here, before anything compiles.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.table
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from jax_rlvr import (
  checkpoint,
  config,
  evaluate,
  hosts,
  manifest,
  metrics,
  packing,
  policy,
  prng,
  rollout,
  samples,
  sft,
  storage,
)
from jax_rlvr import mesh as layouts
from jax_rlvr import stream as streams
from jax_rlvr.actor import Actor
from jax_rlvr.checkpoint import Checkpoints
from jax_rlvr.config import Config, ConfigError, Task, WarmUp
from jax_rlvr.policy import attention
from jax_rlvr.policy_gradient import token_gradients
from jax_rlvr.prng import Stream
from jax_rlvr.records import Prompt, Tokens, TokenStats, TrainState
from jax_rlvr.sampling import stops
from jax_rlvr.update import make_update


class Setup(NamedTuple):
  """All that a run needs beside its state.

  Attributes:
    recipe: where its knobs come from.
    mesh: where weights are updated.
    actor: completes prompts, on a mesh of its own of the same devices.
    backend: of attention, in the update.
    prompts: trained on, of each task.
    dropped: (id, tokens) of those that are too long, of each task.
    stream: stream[i] is the prompt at position i, for any i.
    pretrained: weights to start from, still in their files; or None.
    console: where to show progress.
  """

  recipe: config.Recipe
  mesh: jax.sharding.Mesh
  actor: Actor
  backend: attention.Backend
  prompts: list[Sequence[Prompt]]
  dropped: list[Sequence[tuple[str, int]]]
  stream: Any
  pretrained: policy.Pretrained | None
  console: Console

  @property
  def config(self) -> Config:
    """The knobs of the run."""
    return self.recipe.config


def prepare(spec: str, console: Console) -> Setup:
  """Meets every error that can be met before anything compiles.

  Leaves nothing on the disk.

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
  prompts, dropped = [], []
  for task in c.tasks:
    kept, long = streams.fitting(
      _prompts(task),
      lambda prompt: tokenizer.render(prompt.messages),
      c.max_prompt_tokens,
      c.long_prompts,
    )
    prompts.append(kept)
    dropped.append(long)
  mesh = layouts.make(slices=c.slices, fsdp=c.fsdp, tensor=c.tensor)
  sampling = layouts.folded(mesh, c.sampling_tensor or c.tensor)
  for each in (mesh, sampling):
    layouts.check_heads(each, shape.heads)
  dtype = layouts.compute_dtype(c.compute_dtype, mesh)
  backend = attention.choose(c.attention, shape, dtype, mesh)
  actor = Actor(
    policy=shape,
    tokenizer=tokenizer,
    mesh=sampling,
    slots=c.slots,
    dtype=dtype,
    backend=attention.choose(c.attention, shape, dtype, sampling),
  )
  stops(tokenizer, c.stop)
  engine = actor.engine(c.max_prompt_tokens, c.max_completion_tokens)
  engine.check()
  evaluate.check(actor, c.evaluations, c.max_completion_tokens)
  stream = streams.stream(prompts, c.seed, c.weights)
  return Setup(
    recipe, mesh, actor, backend, prompts, dropped, stream, pretrained, console
  )


def _check_filters(c: Config) -> None:
  """Traces the chain on the shapes it will see: what it lacks shows here."""
  nothing = rollout.tokens([], np.zeros(0), c.sequence_tokens)
  frozen = nothing._replace(ref_logprob=nothing.old_logprob)
  try:
    _trace_filters(c, frozen if c.reference else nothing)
  except ValueError as error:
    if 'tokens.ref_logprob' in str(error):
      raise ConfigError(f'{error}; give reference=True') from None
    raise


def _trace_filters(c: Config, nothing: Tokens) -> None:
  sequences = c.prompts_per_step // c.inner_steps * c.group_size
  tokens = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((sequences, *x.shape[1:]), x.dtype),
    nothing,
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


def _prompts(task: Task) -> Sequence[Prompt]:
  prompts = task.prompts('train')
  if not len(prompts):
    raise ConfigError(
      f'task {task.name!r} has no train prompts; check its arguments'
    )
  return prompts


def record(setup: Setup, workdir: storage.Path) -> None:
  """Writes into the run directory what a run is.

  Raises:
    ConfigError: it holds another run, or hosts do not share it.
    OSError: it cannot be written.
  """
  with hosts.all_or_none('recording the run'):
    if hosts.is_leader():
      _record(setup, workdir)
  with hosts.all_or_none('looking at the run'):
    file = workdir / 'manifest.json'
    text = file.read_bytes() if file.exists() else b''
    seen = hosts.agree('the run', [zlib.crc32(text) >> 1])
    if seen[jax.process_index()] != seen[0]:
      raise ConfigError(
        f'{workdir} is not the folder that host 0 writes; give one that all '
        'hosts share'
      )


def _record(setup: Setup, workdir: storage.Path) -> None:
  c, actor = setup.config, setup.actor
  manifest.write(workdir, setup.recipe, actor.policy, actor.tokenizer)
  rows = [
    {'task': task.name, 'prompt': name, 'tokens': tokens}
    for task, dropped in zip(c.tasks, setup.dropped, strict=True)
    for name, tokens in dropped
  ]
  if rows:
    text = ''.join(json.dumps(row) + '\n' for row in rows)
    (workdir / 'dropped.jsonl').write_text(text)
    setup.console.print(
      f'{len(rows)} prompts of more than {c.max_prompt_tokens} tokens are left '
      f'out: {workdir / "dropped.jsonl"}'
    )


def start(
  setup: Setup, workdir: storage.Path, checkpoints: Checkpoints
) -> TrainState:
  """The state to go on from: the last checkpoint, or the warm-up's end."""
  c, actor = setup.config, setup.actor
  shardings = layouts.shardings(
    setup.mesh, policy.abstract_params(actor.policy), layouts.TRAINING
  )
  if setup.pretrained is None:
    params = jax.jit(
      functools.partial(policy.init, actor.policy), out_shardings=shardings
    )(prng.key(c.seed, Stream.INIT, 0))
  else:
    setup.console.print(f'reading the weights of {c.policy}')
    params = setup.pretrained.read(shardings)
  if c.warm_up and not checkpoints.steps():
    params = _warm_up(setup, workdir, c.warm_up, params)
  # State of filters is batch-level: any [B, T] will do.
  stats: Any = TokenStats(*jnp.zeros((2, 1, 1), jnp.float32))
  state = TrainState(
    step=np.int32(0),
    cursor=np.int32(0),
    params=params,
    optimizer=layouts.init_optimizer(c.optimizer, params),
    filters=jax.device_put(
      c.filters.init(stats), NamedSharding(setup.mesh, PartitionSpec())
    ),
  )
  if not checkpoints.steps():
    return reset_reference(setup, workdir, state) if c.reference else state
  state = checkpoints.restore(checkpoint.abstract_like(state))
  setup.console.print(f'going on from the checkpoint of step {state.step}')
  if not c.reference:
    return state
  frozen = jax.eval_shape(lambda p: policy.cast(p, actor.dtype), params)
  abstract = layouts.abstract(setup.mesh, frozen, layouts.TRAINING)
  return state._replace(
    reference=checkpoint.read_reference(workdir, int(state.step), abstract)
  )


def reset_reference(
  setup: Setup,
  workdir: storage.Path,
  state: TrainState,
  oldest: int | None = None,
) -> TrainState:
  """The state with its own policy as the reference policy, which is saved.

  Args:
    setup: of the run.
    workdir: of the run.
    state: whose params to keep.
    oldest: step of the oldest checkpoint; references that none needs any more
      are deleted.
  """
  reference = jax.tree.map(
    # Params are donated: what is not cast is copied.
    lambda x, own: jnp.copy(x) if x is own else x,
    policy.cast(state.params, setup.actor.dtype),
    state.params,
  )
  checkpoint.save_reference(workdir, int(state.step), reference, oldest)
  return state._replace(reference=reference)


def _warm_up(
  setup: Setup, workdir: storage.Path, settings: WarmUp, params: Any
) -> Any:
  c, actor = setup.config, setup.actor
  with (
    Checkpoints(workdir / 'warm_up', keep=1) as checkpoints,
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
      lambda rows: layouts.place_rows(setup.mesh, rows),
      checkpoints,
      actor.dtype,
    ):
      params, done = state.params, int(state.step)
      if done % 50 == 0 or done == settings.steps:
        note = f'{float(nats):.3f} nats a token'
        progress.update(bar, completed=done, note=note)
  return params


def packed_rows(c: Config, shards: int, backend: attention.Backend) -> int:
  """Rows that an inner batch of a run is packed into at the most."""
  return packing.rows_needed(
    c.prompts_per_step // c.inner_steps,
    c.group_size,
    c.max_prompt_tokens,
    c.max_completion_tokens,
    c.row_tokens,
    shards,
    backend.shares_prompts,
  )


def update_of(setup: Setup):
  """The run's `update(state, tokens, key) -> (state, measured)`."""
  c, mesh = setup.config, setup.mesh
  shards = layouts.row_shards(mesh)
  rows = packed_rows(c, shards, setup.backend)
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
    own=layouts.own_shards(mesh),
    place_own=functools.partial(layouts.place_own_rows, mesh),
    on_policy=c.oversample == 1,
    shown=samples.rows(c.sequences, c.inner_steps),
  )


def resolved(setup: Setup) -> rich.table.Table:
  """What the run comes to, in the vocabulary of the config."""
  c, shape = setup.config, setup.actor.policy
  params, mesh = policy.abstract_params(shape), setup.mesh
  count = sum(x.size for x in jax.tree.leaves(params))
  uncut = layouts.uncut(mesh, params, layouts.TRAINING)
  table = rich.table.Table('setting', 'value', title='resolved')
  engine = setup.actor.engine(c.max_prompt_tokens, c.max_completion_tokens)
  slots = [size * engine.shards for size in engine.sizes]
  for name, value in {
    'parameters': f'{count:,}',
    'tasks': ', '.join(task.name for task in c.tasks),
    'train prompts': f'{sum(map(len, setup.prompts)):,}',
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
    'mesh': _named(mesh),
    'mesh to sample on': _named(setup.actor.mesh),
    'held whole on each device': ', '.join(uncut) or 'norms alone',
  }.items():
    table.add_row(name, str(value))
  return table


def _named(mesh: jax.sharding.Mesh) -> str:
  return ' × '.join(f'{axis} {size}' for axis, size in mesh.shape.items())


def memory(setup: Setup) -> rich.table.Table:
  """What a run holds on each device; activations come on top.

  `plan` compiles the programs and knows these too.
  """
  c, actor = setup.config, setup.actor
  params = policy.abstract_params(actor.policy)
  cut = layouts.shardings(setup.mesh, params, layouts.TRAINING)
  weights = layouts.bytes_per_device(params, cut)
  count = sum(x.size for x in jax.tree.leaves(params))
  moments = sum(
    x.size * x.dtype.itemsize
    for x in jax.tree.leaves(jax.eval_shape(c.optimizer.init, params))
  )
  # Its arrays are cut as the parameters they belong to.
  optimizer = moments * weights // (4 * count)
  frozen = jax.eval_shape(lambda p: policy.cast(p, actor.dtype), params)
  computed = layouts.bytes_per_device(frozen, cut)
  reference = computed if c.reference else 0
  held = weights + optimizer + reference
  engine = actor.engine(c.max_prompt_tokens, c.max_completion_tokens)
  room = layouts.memory(setup.mesh)
  table = rich.table.Table('GiB a device', '', title='memory')
  for name, size in {
    'weights': weights,
    'optimizer state': optimizer,
    'reference policy': reference,
    'gradients': weights,
    'weights in the compute type': computed,
    'update, activations aside': held + weights + computed,
    'rollout: weights to sample with, cache': engine.bytes_per_device,
    'rollout, activations aside': held + engine.bytes_per_device,
    'there is': room,
  }.items():
    table.add_row(name, '?' if size is None else f'{size / 2**30:.2f}')
  return table


def first_prompt(setup: Setup) -> str:
  """The first prompt of the run as the policy reads it."""
  prompt, tokenizer = setup.stream[0], setup.actor.tokenizer
  ids = tokenizer.render(prompt.messages)
  return f'prompt {prompt.id!r}, {len(ids)} tokens: {tokenizer.decode(ids)!r}'
