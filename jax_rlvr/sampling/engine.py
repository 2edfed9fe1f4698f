"""The sampler: continuous batching inside jit, in shapes known beforehand."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jax_rlvr import mesh as layouts
from jax_rlvr import policy
from jax_rlvr.policy import PolicyConfig, Rings, attention
from jax_rlvr.policy.pages import Pages
from jax_rlvr.sampling.requests import Completed, Group, Progress, never
from jax_rlvr.sampling.schedule import Schedule
from jax_rlvr.sampling.transforms import Transform

# Narrowest window, in columns; wider ones are twice as wide each.
COLUMNS = 128

# Widths of windows and of prompts are multiples of it.
ROUND = 32

# Prompt tokens that one program reads at one time, on each data shard.
PREFILL_TOKENS = 2048

# How often the slots may be halved as the last sequences run out.
HALVINGS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
  """The programs that complete prompts, and the shapes they come in.

  Attributes:
    policy: shape of the policy.
    mesh: where it runs.
    slots: sequences decoded at one time, a multiple of the data shards.
    prompt_tokens: of the longest prompt.
    completion_tokens: of the longest completion.
    dtype: to compute in.
    backend: of attention, for reading prompts.
    cache: kind of cache.
    segment_tokens: that a segment draws at the most, a slot.
  """

  policy: PolicyConfig
  mesh: jax.sharding.Mesh
  slots: int
  prompt_tokens: int
  completion_tokens: int
  dtype: np.dtype = np.dtype(np.float32)
  backend: attention.Backend = attention.XLA
  cache: type[Rings] | type[Pages] = Rings
  segment_tokens: int = 32

  @property
  def shards(self) -> int:
    return layouts.row_shards(self.mesh)

  @property
  def sizes(self) -> list[int]:
    """Slots of a shard, largest first."""
    most = -(-self.slots // self.shards)
    return list(dict.fromkeys(-(-most >> i) for i in range(HALVINGS + 1)))

  @property
  def windows(self) -> list[int]:
    """Columns, narrowest first."""
    longest = _rounded(self.prompt_tokens + self.completion_tokens)
    if not self.cache.widens:
      return [longest]
    windows = []
    columns = COLUMNS
    while columns < longest:
      windows.append(columns)
      columns *= 2
    return [*windows, longest]

  def window(self, tokens: int) -> int:
    """Columns of the narrowest window with room for so many tokens."""
    return next(columns for columns in self.windows if columns >= tokens)

  def warm_up(
    self, weights: dict[str, Any], transform: Transform | None = None
  ) -> None:
    """Compiles, for every number of slots and window, what `complete` runs."""
    for shape in itertools.product(self.sizes, self.windows):
      Schedule(self, weights, [], 1.0, (0,), transform, never, shape).rehearse()

  @property
  def bytes_per_device(self) -> int:
    """Weights to sample with, and the cache at its largest."""
    weights = jax.eval_shape(
      lambda params: policy.cast(params, self.dtype),
      policy.abstract_params(self.policy),
    )
    cache = jax.eval_shape(
      lambda: self.cache.empty(
        self.policy,
        self.sizes[0] * self.shards,
        self.windows[-1],
        self.dtype,
        self.mesh,
      )
    )
    return layouts.bytes_per_device(
      (weights, cache),
      (
        layouts.shardings(self.mesh, weights, layouts.SAMPLING),
        layouts.fitted(self.mesh, cache, cache.spec),
      ),
    )

  def check(self) -> None:
    """Whether the devices have room for the cache.

    Raises:
      ValueError: they have not; it gives the numbers.
    """
    room = layouts.memory(self.mesh)
    needed = self.bytes_per_device
    if room is not None and needed > room:
      gib = 2**30
      raise ValueError(
        f'{self.slots} slots of {self.windows[-1]} tokens take '
        f'{needed / gib:.1f} GiB a device, weights included, and it has '
        f'{room / gib:.1f}; lower slots or max_completion_tokens, or raise '
        'tensor'
      )

  @property
  def prompt_widths(self) -> list[int]:
    """Columns in which prompts are read; the widest for begun completions."""
    return sorted({_rounded(self.prompt_tokens), self.windows[-1]})

  def prompt_width(self, tokens: int) -> int:
    """Columns in which a prompt of so many tokens is read."""
    return next(width for width in self.prompt_widths if width >= tokens)

  def prompt_rows(self, width: int) -> int:
    """Prompts that one program reads on each data shard."""
    return max(1, min(self.sizes[0], PREFILL_TOKENS // width))

  def unstacked(self, params: Any) -> dict[str, Any]:
    """Parameters as `complete` takes them: cast, cut over heads, by layer."""
    params = policy.cast(params, self.dtype)
    given = jax.tree.leaves(params)[0].sharding
    if getattr(given, 'mesh', self.mesh) != self.mesh:
      # Cut as finely on this mesh first: in one go each device would get all
      # weights to take its part of.
      params = layouts.place(self.mesh, params, layouts.TRAINING)
    params = layouts.place(self.mesh, params, layouts.SAMPLING)
    return _unstack(params, turn=self.mesh.devices.flat[0].platform == 'cpu')

  def complete(
    self,
    weights: dict[str, Any],
    groups: Sequence[Group],
    *,
    temperature: float,
    end_ids: Sequence[int],
    transform: Transform | None = None,
    stop: Callable[[Completed], int | None] = never,
  ) -> Iterator[Progress]:
    """Completes the groups, in about their order, a segment at a time.

    A completion depends on its first tokens, its key and the weights alone. Of
    several hosts each brings groups of its own, and sees what became of them.

    Args:
      weights: as `unstacked` gives them.
      groups: all there is to do here.
      temperature: 0 for argmax.
      end_ids: any of them ends a completion.
      transform: of the distribution that is drawn from.
      stop: of a completion that has grown, how many of its tokens there should
        be if it ends with them; None to go on.
    """
    for number, group in enumerate(groups):
      self._check_group(number, group)
    self.check()
    run = Schedule(self, weights, groups, temperature, end_ids, transform, stop)
    while run.begin():
      yield run.advance()

  def _check_group(self, number: int, group: Group) -> None:
    if not len(group.ids):
      raise ValueError(f'prompt {number} is empty; give it a token at least')
    limit = int(np.max(group.limits))
    if len(group.ids) + limit > self.windows[-1]:
      raise ValueError(
        f'prompt {number} of {len(group.ids)} tokens leaves no room for '
        f'{limit} more in {self.windows[-1]}; raise prompt_tokens'
      )


def _rounded(columns: int) -> int:
  return -(-columns // ROUND) * ROUND


_unstack = jax.jit(policy.unstack, static_argnames='turn')
