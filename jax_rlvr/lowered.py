"""The programs of a run, lowered for devices that need not be there.

No weights, no data: shapes are all it takes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_rlvr import mesh as layouts
from jax_rlvr import policy, rollout, samples
from jax_rlvr.config import Config, ConfigError
from jax_rlvr.policy import PolicyConfig, attention
from jax_rlvr.policy.pages import PAGE, PAGES
from jax_rlvr.records import Rows, TokenStats
from jax_rlvr.sampling import Engine, schedule
from jax_rlvr.sampling import slots as sampling
from jax_rlvr.setup import packed_rows
from jax_rlvr.token_stats import chunk_columns, suited_chunk
from jax_rlvr.update import make_inner_step


class Program(NamedTuple):
  """A program of a run, and what a compiled text does not tell of it.

  Attributes:
    name: of it.
    lower: traces it and lowers it.
    trips: of its loops that end by their data, outermost first.
    model_flops: of its matrix products and attention as a method needs them,
      on all devices, recomputation aside.
    least_bytes: that it must read on each device: weights once a token, and
      the keys and values that are there; 0 where nothing is said.
    per_step: how often it runs in a training step, about.
    mesh: that it runs on.
  """

  name: str
  lower: Callable[[], jax.stages.Lowered]
  trips: tuple[int, ...]
  model_flops: float
  least_bytes: float
  per_step: float
  mesh: Mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """A run on a mesh of which nothing needs to exist.

  Attributes:
    config: its knobs.
    shape: of its policy.
    mesh: its devices, as weights are updated on them.
  """

  config: Config
  shape: PolicyConfig
  mesh: Mesh

  @functools.cached_property
  def dtype(self) -> np.dtype:
    return layouts.compute_dtype(self.config.compute_dtype, self.mesh)

  @functools.cached_property
  def backend(self) -> attention.Backend:
    c = self.config
    return attention.choose(c.attention, self.shape, self.dtype, self.mesh)

  @property
  def shards(self) -> int:
    return layouts.row_shards(self.mesh)

  @functools.cached_property
  def sampling(self) -> Mesh:
    """The devices as they sample."""
    c = self.config
    return layouts.folded(self.mesh, c.sampling_tensor or c.tensor)

  @functools.cached_property
  def engine(self) -> Engine:
    c, mesh = self.config, self.sampling
    return Engine(
      policy=self.shape,
      mesh=mesh,
      slots=c.slots,
      prompt_tokens=c.max_prompt_tokens,
      completion_tokens=c.max_completion_tokens,
      dtype=self.dtype,
      backend=attention.choose(c.attention, self.shape, self.dtype, mesh),
      cache=policy.suited(self.shape, self.dtype, mesh),
    )

  @property
  def sequences(self) -> int:
    """Of an inner batch."""
    c = self.config
    return c.prompts_per_step // c.inner_steps * c.group_size

  @functools.cached_property
  def rows(self) -> int:
    """Packed rows of an inner batch, at full length."""
    return packed_rows(self.config, self.shards, self.backend)

  @property
  def microbatch(self) -> int:
    """Rows that go through a vjp at one time."""
    wanted = self.config.microbatch_tokens // self.config.row_tokens
    return min(max(wanted // self.shards, 1) * self.shards, self.rows)

  # Arrays.

  def params(self, dtype=jnp.float32) -> Any:
    """Parameters as they are updated."""
    return layouts.abstract(self.mesh, self._params(dtype), layouts.TRAINING)

  @functools.cached_property
  def stacked(self) -> Any:
    """Parameters as they sample, before `unstacked`."""
    tree = self._params(self.dtype)
    return layouts.abstract(self.sampling, tree, layouts.SAMPLING)

  def _params(self, dtype) -> Any:
    return jax.eval_shape(
      lambda p: policy.cast(p, dtype), policy.abstract_params(self.shape)
    )

  @functools.cached_property
  def state(self) -> tuple[Any, Any, Any, Any]:
    """Parameters, state of optimizer and filters, and the reference."""
    c = self.config
    params = self.params()
    optimizer = jax.eval_shape(c.optimizer.init, params)
    optimizer = jax.tree.map(
      _laid,
      optimizer,
      layouts.state_shardings(self.mesh, optimizer, layouts.TRAINING),
    )
    stats: Any = TokenStats(*jnp.zeros((2, 1, 1), jnp.float32))
    filters = _everywhere(self.mesh, jax.eval_shape(c.filters.init, stats))
    reference = self.params(self.dtype) if c.reference else None
    return params, optimizer, filters, reference

  @functools.cached_property
  def unstacked(self) -> Any:
    """Weights to sample with."""
    shapes = jax.eval_shape(policy.unstack, self.stacked)
    named = jax.tree.map(lambda x: x.sharding, self.stacked)
    of_layer = jax.tree.map(
      lambda s: NamedSharding(s.mesh, P(*s.spec[1:])), named['blocks']
    )
    named |= {'blocks': [of_layer] * self.shape.layers}
    return jax.tree.map(_laid, shapes, named)


def _laid(x, sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _everywhere(mesh: Mesh, tree: Any) -> Any:
  return jax.tree.map(lambda x: _laid(x, NamedSharding(mesh, P())), tree)


def _cut(mesh: Mesh, tree: Any, spec: P) -> Any:
  return jax.tree.map(_laid, tree, layouts.fitted(mesh, tree, spec))


def _by_rows(mesh: Mesh, tree: Any) -> Any:
  return _cut(mesh, tree, layouts.ROWS)


def shape_of(name: Any) -> PolicyConfig:
  """The shape of the policy of a recipe, by its name alone where it can be.

  Raises:
    ConfigError: no such shape is known.
  """
  if isinstance(name, PolicyConfig):
    return name
  path = pathlib.Path(name)
  if path.exists():
    return policy.load(name).config
  key = path.name.lower()
  key = re.sub(r'-(base|instruct|it|hf|chat)$', '', key)
  if key not in policy.SHAPES:
    known = ', '.join(policy.SHAPES)
    raise ConfigError(
      f'no folder {name} here and no shape of that name; give a folder with '
      f'its config.json, or one of {known}'
    )
  return policy.SHAPES[key]


def programs(plan: Plan) -> Iterator[Program]:
  """All programs that take time or memory in a training step."""
  yield inner_step(plan)
  yield from relayout(plan)
  yield prefill(plan)
  yield admit(plan)
  yield segment(plan)


def inner_step(plan: Plan) -> Program:
  """One weight update: the later ones of a step, if there are any."""
  c = plan.config
  first = c.inner_steps == 1
  step = make_inner_step(
    plan.shape,
    c.filters,
    c.optimizer,
    microbatch_rows=c.microbatch_tokens // c.row_tokens,
    temperature=c.temperature,
    remat=c.remat,
    dtype=plan.dtype,
    extras=c.token_extras,
    shards=plan.shards,
    backend=plan.backend,
    on_policy=c.oversample == 1,
    shown=samples.rows(c.sequences, c.inner_steps),
  )
  tokens = rollout.tokens(
    [], np.zeros(0), c.sequence_tokens, step=0 if c.oversample > 1 else None
  )
  tokens = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((plan.sequences, *x.shape[1:]), x.dtype),
    tokens,
  )
  row: Any = jax.ShapeDtypeStruct((plan.rows, c.row_tokens), jnp.int32)
  packed = Rows(*(row,) * 6)
  key = _everywhere(plan.mesh, jax.eval_shape(lambda: jax.random.key(0)))
  params, optimizer, filters, reference = plan.state
  at_once = plan.rows <= max(c.microbatch_tokens // c.row_tokens, plan.shards)
  trips = (_chunks(plan),)
  if not at_once:
    trips = (plan.rows // plan.microbatch, *trips)
  # What is read forward, for stats and for the gradient, and backward.
  scored = not at_once and not (first and c.oversample == 1)
  passes = 3 + (scored or bool(c.token_extras and not at_once)) + c.reference
  lengths = [c.sequence_tokens] * plan.sequences
  unscored = c.max_prompt_tokens * plan.sequences
  head = 2 * plan.shape.width * plan.shape.vocab_size
  model = plan.shape.forward_flops(lengths) - head * unscored
  return Program(
    'inner step',
    lambda: step.lower(
      params, optimizer, filters, _by_rows(plan.mesh, tokens),
      _by_rows(plan.mesh, packed), key, reference, first,
    ),
    trips,
    passes * model,
    0.0,
    c.inner_steps,
    plan.mesh,
  )  # fmt: skip


def _chunks(plan: Plan) -> int:
  """Trips of the loop over logits, in a microbatch."""
  c = plan.config
  vocabulary, tensor = plan.shape.vocab_size, plan.mesh.shape['tensor']
  cut = 1 if vocabulary % tensor else tensor
  chunk = suited_chunk(vocabulary, plan.shape.width, cut)
  width = chunk_columns(chunk, plan.microbatch, c.row_tokens, plan.shards)
  fit = c.row_tokens // c.sequence_tokens
  return math.ceil(fit * c.max_completion_tokens / width)


def relayout(plan: Plan) -> Iterator[Program]:
  """From weights to train to weights to sample with, as the sampler does."""
  held, stacked = plan.params(plan.dtype), plan.stacked
  costs = (), 0.0, 0.0, 1, plan.sampling
  if plan.sampling != plan.mesh:
    folded = layouts.abstract(plan.sampling, held, layouts.TRAINING)
    yield Program('fold', functools.partial(_moved, held, folded), *costs)
    held = folded
  yield Program('re-layout', functools.partial(_moved, held, stacked), *costs)
  unstack = jax.jit(policy.unstack)
  yield Program('unstack', lambda: unstack.lower(stacked), *costs)


def _moved(held, wanted) -> jax.stages.Lowered:
  shardings = jax.tree.map(lambda x: x.sharding, wanted)
  return jax.jit(lambda x: x, out_shardings=shardings).lower(held)


def _prompts(plan: Plan) -> tuple[jax.ShapeDtypeStruct, Any]:
  engine = plan.engine
  width = engine.prompt_widths[0]
  rows = engine.prompt_rows(width) * engine.shards
  ids = jax.ShapeDtypeStruct((rows, width), jnp.int32)
  pair = jax.ShapeDtypeStruct(
    (*ids.shape, plan.shape.kv_heads, plan.shape.head_size), plan.dtype
  )
  pair = _cut(plan.sampling, pair, layouts.PROMPTS)
  layers = (pair,) * plan.shape.layers
  return _by_rows(plan.sampling, ids), policy.Prompts(layers, layers)


def prefill(plan: Plan) -> Program:
  """Reads prompts, as many as one program does."""
  ids, _ = _prompts(plan)
  lengths = [ids.shape[1]] * ids.shape[0]
  head = 2 * plan.shape.width * plan.shape.vocab_size * ids.size
  return Program(
    'prefill',
    lambda: sampling.prefill.lower(
      plan.shape, plan.unstacked, ids, plan.engine.backend, plan.sampling
    ),
    (),
    plan.shape.forward_flops(lengths) - head,
    0.0,
    plan.config.prompts_per_step / ids.shape[0],
    plan.sampling,
  )


def idle_slots(plan: Plan) -> sampling.Slots:
  """All slots, with their widest window."""
  engine, transform = plan.engine, plan.config.transform
  count = engine.sizes[0] * engine.shards
  slots = jax.eval_shape(
    lambda: sampling.empty(
      plan.shape,
      engine.cache,
      count,
      engine.windows[-1],
      plan.dtype,
      bool(transform and transform.reads_seen),
      plan.sampling,
    )
  )
  cache, column, *rest = slots
  return sampling.Slots(
    _cut(plan.sampling, cache, cache.spec),
    _everywhere(plan.sampling, column),
    *_by_rows(plan.sampling, tuple(rest)),
  )


def admit(plan: Plan) -> Program:
  """Fills a few slots with prompts that have been read."""
  engine, slots = plan.engine, idle_slots(plan)
  each = min(engine.sizes[0], schedule.FEW)
  count = each * engine.shards
  number = jax.ShapeDtypeStruct((count,), jnp.int32)
  keys = jax.ShapeDtypeStruct((count, 2), jnp.uint32)
  seen = None
  if slots.seen is not None:
    seen = jax.ShapeDtypeStruct((count, plan.shape.vocab_size), jnp.bool_)
  fields: Any = (number,) * 6 + (keys, seen)
  entries = sampling.Entries(*fields)
  _, prompts = _prompts(plan)
  return Program(
    'admit',
    lambda: sampling.admit.lower(
      slots,
      prompts,
      _by_rows(plan.sampling, entries),
      engine.shards,
      plan.sampling,
    ),
    (),
    0.0,
    0.0,
    plan.config.prompts_per_step * plan.config.group_size / count,
    plan.sampling,
  )


def segment(plan: Plan) -> Program:
  """Decodes some tokens in every slot, all of them at their longest."""
  c, engine, slots = plan.config, plan.engine, idle_slots(plan)
  count, steps = slots.live.size, engine.segment_tokens
  scalar, number, ends = _everywhere(
    plan.sampling,
    (
      jax.ShapeDtypeStruct((), jnp.float32),
      jax.ShapeDtypeStruct((), jnp.int32),
      jax.ShapeDtypeStruct((2,), jnp.int32),
    ),
  )
  lengths = filled(plan)
  one = plan.shape.forward_flops([lengths + 1])
  one -= plan.shape.forward_flops([lengths])
  # Of a table that is no head, a few rows are read.
  read = dict(plan.unstacked)
  if not plan.shape.tied_embeddings:
    del read['embed']
  weights = bytes_of(read)
  tokens = c.sequences * c.max_completion_tokens
  return Program(
    'decode segment',
    lambda: sampling.segment.lower(
      plan.shape, plan.unstacked, slots, scalar, ends, number, steps,
      c.transform, plan.sampling,
    ),
    (steps,),
    one * count * steps,
    steps * (weights + cache_bytes(plan, lengths)),
    tokens / (count * steps),
    plan.sampling,
  )  # fmt: skip


def kernel(plan: Plan):
  """What a kernel takes on a device: `pieces.Kernel` of the plan's shapes."""

  def cost(name, operands, results):
    if name.startswith('splash_mha'):
      return _splash(name, operands, results)
    if 'ragged_paged' in name:
      return _paged(plan, operands)
    if name.startswith('AllocateBuffer'):
      return 0.0, 0.0
    return None

  return cost


# FLOPs of a pair of a query and a key, over twice the size of a head: scores
# and mix; backward, what they are recomputed from comes on top.
_PRODUCTS = {'fwd': 2, 'dq': 3, 'dkv': 4}
_FLOATS = {'bf16': 2, 'f32': 4}


def _splash(name, operands, results) -> tuple[float, float]:
  """The tiles that are not empty, whole; keys are read for each of queries."""
  kind = name.removeprefix('splash_mha_').split('_')[0]
  tiles = next(x.dims for x in operands if x.kind == 's8')[-2:]
  # [B, N, T, H], or without B where there is one row.
  big = [x for x in operands if len(x.dims) >= 3 and x.kind in _FLOATS]
  query = big[0]
  *rows, length, size = query.dims
  count, across = max(tiles), min(tiles)
  # A window leaves a band of them, a causal mask a triangle.
  run = count * across if across < count else count * (count + 1) / 2
  pairs = math.prod(rows) * run * (length // count) ** 2
  streamed = 2 * pairs / (length // count) * size * _FLOATS[query.kind]
  made = [x for x in results if x.dims[-2:] == (length, size)]
  once = query.traffic + sum(x.traffic for x in made)
  return 2.0 * size * _PRODUCTS[kind] * pairs, streamed + once


def _paged(plan: Plan, operands) -> tuple[float, float]:
  """What is filled of the pages; the rest is not read."""
  pages = max((x for x in operands if len(x.dims) == 4), key=lambda x: x.bytes)
  query = next(x for x in operands if len(x.dims) == 3)
  room = plan.engine.windows[-1]
  tokens = min(filled(plan), room)
  whole = PAGE * PAGES
  fetched = -(-tokens // whole) * whole
  slots, heads, size = query.dims
  return (
    4.0 * slots * heads * size * tokens,
    pages.traffic * min(fetched / room, 1.0) + 2 * query.traffic,
  )


def filled(plan: Plan) -> int:
  """Tokens of a slot that are there on average: half of each completion."""
  c = plan.config
  return c.max_prompt_tokens + c.max_completion_tokens // 2


def cache_bytes(plan: Plan, tokens: int) -> float:
  """Keys and values of so many tokens in each slot, on each device."""
  slots = idle_slots(plan)
  return bytes_of(slots.cache) * tokens / plan.engine.windows[-1]


def bytes_of(tree: Any) -> int:
  """Of laid-out arrays, on each device."""
  return layouts.bytes_per_device(
    tree, jax.tree.map(lambda x: x.sharding, tree)
  )


def make(
  config: Config, devices: Sequence[Any], slices: int | None = None
) -> Plan:
  """The plan of a config on devices.

  Raises:
    ValueError: it does not fit their number, or its attention does not run.
  """
  mesh = layouts.make(
    slices=slices or config.slices,
    fsdp=config.fsdp,
    tensor=config.tensor,
    devices=devices,
  )
  return Plan(config=config, shape=shape_of(config.policy), mesh=mesh)
