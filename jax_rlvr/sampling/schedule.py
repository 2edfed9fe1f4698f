"""Which slot decodes what, and for how long: the host's half of the sampler.

Between two segments of the jitted loop it takes out what is finished, reads
prompts, fills idle slots, widens the attention window, and, once nothing waits
any more, packs what is live into fewer slots. Nothing of that changes a
completion: those depend on their keys.

Of several hosts each does so for its own shards. Programs run on all of them,
so the hosts agree which program comes next, and in what shape.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jax_rlvr import hosts, policy
from jax_rlvr import mesh as layouts
from jax_rlvr.sampling import slots as programs
from jax_rlvr.sampling.draw import Drawn
from jax_rlvr.sampling.requests import Completed, Group, Progress
from jax_rlvr.sampling.transforms import Transform

if TYPE_CHECKING:
  from jax_rlvr.sampling.engine import Engine

# Completions that one program puts into slots, on each data shard: so many, or
# as many as there are slots.
FEW = 8


class _Waiting(NamedTuple):
  """A completion whose prompt has been read: row `source` of a prefill."""

  prefill: int
  source: int
  of: Completed


class Schedule:
  """What the slots are doing, and what waits for one."""

  def __init__(
    self,
    engine: Engine,
    weights: dict[str, Any],
    groups: Sequence[Group],
    temperature: float,
    end_ids: Sequence[int],
    transform: Transform | None,
    stop: Callable[[Completed], int | None],
    shape: tuple[int, int] | None = None,
  ):
    """All slots idle, all groups unread; see `Engine.complete`.

    `shape` is (slots of a shard, columns); the smallest that serve if None.
    """
    self.engine, self.weights = engine, weights
    self.groups, self.stop, self.transform = groups, stop, transform
    self.temperature = np.float32(temperature)
    self.end_ids = np.array(end_ids, np.int32)
    self.unread = collections.deque(range(len(groups)))
    self.shards = len(layouts.own_shards(engine.mesh))
    self.waiting = [collections.deque() for _ in range(self.shards)]
    # What has been read, by its number, while any host has use for it.
    self.prefills: dict[int, policy.Prompts] = {}
    self.number = 0
    self.done, self.total = 0, sum(len(group.limits) for group in groups)
    self.size, self.columns = shape or (
      self._size_for(self.total),
      engine.windows[0],
    )
    self.idle, self.goes_on = 0, False
    self.occupants: list[list[Completed | None]]
    self.occupants = [[None] * self.size for _ in range(self.shards)]
    self.slots = programs.empty(
      engine.policy,
      engine.cache,
      self.size * engine.shards,
      self.columns,
      engine.dtype,
      bool(transform and transform.reads_seen),
      engine.mesh,
    )

  def begin(self) -> bool:
    """Fills idle slots; False if there is nothing left to decode, anywhere."""
    self._read()
    assigned = self._assign()
    waiting = [entry.prefill for shard in self.waiting for entry in shard]
    everywhere = hosts.agree(
      'what to decode',
      [
        max(sum(map(bool, shard)) for shard in self.occupants),
        max(map(self._tokens_after_segment, self._running()), default=0),
        any(assigned),
        bool(self.unread or waiting),
        -min(waiting, default=self.number),
        sum(shard.count(None) for shard in self.occupants),
      ],
    )
    busy, tokens, begins, waits, oldest, _ = everywhere.max(axis=0).tolist()
    if not busy:
      return False
    # Hosts of a crew count the same slots.
    crew = len(layouts.crew(self.engine.mesh))
    self.idle = int(everywhere[:, -1].sum()) // crew
    self.goes_on = bool(waits)
    columns = self.engine.window(tokens)
    if columns > self.columns:
      self._repack(self.size, columns)
    if not (begins or waits):
      for size in self.engine.sizes:
        if busy <= size < self.size:
          self.idle -= (self.size - size) * self.engine.shards
          self._repack(size, self.columns)
    while begins:
      heads = [shard[0][1].prefill for shard in assigned if shard]
      number, count = hosts.most(
        'what to begin',
        -min(heads, default=self.number),
        max(map(len, assigned)),
      )
      if not count:
        break
      self._admit(
        -number, assigned, self.size if count > FEW else min(self.size, FEW)
      )
    for number in [n for n in self.prefills if n < -oldest]:
      del self.prefills[number]
    return True

  def rehearse(self) -> None:
    """Runs the programs of these slots and columns, on nothing."""
    engine = self.engine
    for width in engine.prompt_widths:
      self.prefills[0] = self._prefill([], width)
      for count in {min(self.size, FEW), self.size}:
        self._admit(0, [[] for _ in self.occupants], count)
    self.advance()
    smaller = [size for size in engine.sizes if size < self.size][:1]
    wider = [columns for columns in engine.windows if columns > self.columns]
    shapes = [(self.size, x) for x in wider] + [
      (x, self.columns) for x in smaller
    ]
    slots, shape = self.slots, (self.size, self.columns)
    for new in shapes:
      self._repack(*new)
      self.slots, (self.size, self.columns) = slots, shape

  def advance(self) -> Progress:
    """One segment."""
    engine, columns = self.engine, self.columns
    begun = time.perf_counter()
    everyone = [c for shard in self.occupants for c in shard]
    self.slots, drawn = programs.segment(
      engine.policy,
      self.weights,
      self.slots,
      self.temperature,
      self.end_ids,
      np.int32(self._idle_limit()),
      engine.segment_tokens,
      self.transform,
      engine.mesh,
    )
    live, counts, drawn = layouts.own_rows(
      (self.slots.live, self.slots.counts, drawn)
    )
    finished, stopped, tokens = [], [], 0
    for slot, completion in enumerate(everyone):
      if completion is None:
        continue
      start = len(completion.ids)
      new = Drawn(*(x[slot, : counts[slot] - start] for x in drawn))
      tokens += len(new.ids)
      self._grow(completion, new)
      kept = self.stop(completion)
      if kept is not None:
        completion.keep(kept)
        completion.ended, completion.failed = True, False
        stopped.append(slot)
      if kept is not None or not live[slot]:
        finished.append(completion)
        shard, number = divmod(slot, self.size)
        self.occupants[shard][number] = None
    if stopped:
      live = live & ~np.isin(np.arange(live.size), stopped)
      self.slots = self.slots._replace(
        live=layouts.place_own_rows(engine.mesh, live)
      )
    self.done += len(finished)
    return Progress(
      finished=finished,
      running=list(self._running()),
      done=self.done,
      total=self.total,
      tokens=tokens,
      columns=columns,
      slots=len(everyone),
      seconds=time.perf_counter() - begun,
    )

  def _grow(self, completion: Completed, new: Drawn) -> None:
    """Appends what a slot has drawn."""
    completion.failed = not new.finite.all()
    # Nothing is drawn from such logits.
    good = len(new.ids) - completion.failed
    for name in ('ids', 'logprob', 'sampled_logprob', 'entropy'):
      getattr(completion, name).extend(getattr(new, name)[:good].tolist())
    completion.ended = bool(good) and bool(
      np.isin(new.ids[good - 1], self.end_ids)
    )

  def _running(self) -> Iterator[Completed]:
    return (c for shard in self.occupants for c in shard if c)

  def _read(self) -> None:
    """Reads prompts until each shard has enough for its idle slots.

    A program that reads some reads as many as it has places for.
    """
    shards = range(self.shards)
    while True:
      wanted = max(
        self.occupants[z].count(None) - len(self.waiting[z]) for z in shards
      )
      width = 0
      if self.unread and wanted > 0:
        longest = len(self.groups[self.unread[0]].tokens)
        width = self.engine.prompt_width(longest)
      (width,) = hosts.most('prompts to read', width)
      if not width:
        return
      taken = []
      for place in self._prompt_places(width):
        if not self.unread or len(self.groups[self.unread[0]].tokens) > width:
          break
        taken.append((place, self.unread.popleft()))
      self.prefills[self.number] = self._prefill(taken, width)
      for (z, row), number in taken:
        self.waiting[z].extend(
          _Waiting(self.number, row, self.groups[number].start(number, sample))
          for sample in range(len(self.groups[number].limits))
        )
      self.number += 1

  def _prompt_places(self, width: int) -> list[tuple[int, int]]:
    """(shard, row) of the prompts of one `prefill`, in turn."""
    rows = range(self.engine.prompt_rows(width))
    return [(z, row) for row in rows for z in range(self.shards)]

  def _prefill(
    self, taken: list[tuple[tuple[int, int], int]], width: int
  ) -> policy.Prompts:
    """Reads the prompts of groups, in their places."""
    places = self._prompt_places(width)
    ids = np.zeros((self.shards, places[-1][1] + 1, width), np.int32)
    for place, number in taken:
      prompt = self.groups[number].tokens
      ids[place][: len(prompt)] = prompt
    return programs.prefill(
      self.engine.policy,
      self.weights,
      layouts.place_own_rows(self.engine.mesh, ids.reshape(-1, width)),
      self.engine.backend,
      self.engine.mesh,
    )

  def _assign(self) -> list[list[tuple[int, _Waiting]]]:
    """Which idle slots of each shard take which completions."""
    assigned = []
    for occupants, waiting in zip(self.occupants, self.waiting, strict=True):
      idle = [slot for slot, c in enumerate(occupants) if c is None]
      taken = [(slot, waiting.popleft()) for slot in idle[: len(waiting)]]
      for slot, entry in taken:
        occupants[slot] = entry.of
      assigned.append(taken)
    return assigned

  def _repack(self, size: int, columns: int) -> None:
    """Live slots first, in as many as `size`."""
    chosen = np.array(
      [
        sorted(range(self.size), key=lambda i, s=shard: s[i] is None)[:size]
        for shard in self.occupants
      ],
      np.int32,
    )
    self.slots = programs.repack(
      self.engine.policy,
      self.slots,
      layouts.place_own_rows(self.engine.mesh, chosen.reshape(-1)),
      columns,
      self.engine.shards,
      self.engine.mesh,
    )
    self.occupants = [
      [shard[i] for i in order]
      for shard, order in zip(self.occupants, chosen, strict=True)
    ]
    self.size, self.columns = size, columns

  def _tokens_after_segment(self, completion: Completed) -> int:
    group = self.groups[completion.group]
    now = len(completion.ids) + self.engine.segment_tokens
    return len(group.ids) + min(now, int(group.limits[completion.sample]))

  def _admit(
    self,
    prefill: int,
    assigned: list[list[tuple[int, _Waiting]]],
    count: int,
  ) -> None:
    """Copies prompts of one prefill into `count` slots of each shard."""
    shape = (len(assigned), count)
    slots = np.full(shape, self.size, np.int32)
    sources, ids, lengths, counts, limits = np.zeros((5, *shape), np.int32)
    keys = np.zeros((*shape, 2), np.uint32)
    seen = None
    if self.slots.seen is not None:
      seen = np.zeros((*shape, self.engine.policy.vocab_size), bool)
    for z, shard in enumerate(assigned):
      for m in range(count):
        if not shard or shard[0][1].prefill != prefill:
          break
        slot, (_, source, completion) = shard.pop(0)
        at, group = (z, m), self.groups[completion.group]
        tokens = group.tokens
        slots[at], sources[at] = slot, source
        ids[at], lengths[at] = tokens[-1], len(tokens) - 1
        counts[at], limits[at] = (
          len(completion.ids),
          group.limits[completion.sample],
        )
        keys[at] = group.keys[completion.sample]
        if seen is not None:
          seen[at][tokens] = True
    entries = programs.Entries(
      slots, sources, ids, lengths, counts, limits, keys, seen
    )
    entries = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), entries)
    self.slots = programs.admit(
      self.slots,
      self.prefills[prefill],
      layouts.place_own_rows(self.engine.mesh, entries),
      self.engine.shards,
      self.engine.mesh,
    )

  def _idle_limit(self) -> int:
    """Idle slots, of all hosts, at which a segment should end."""
    count = self.size * self.engine.shards
    if self.goes_on:
      return self.idle + max(1, count // 8)
    smaller = [size for size in self.engine.sizes if size < self.size]
    if not smaller:
      return count + 1
    return max(self.idle + 1, count - smaller[0] * self.engine.shards)

  def _size_for(self, completions: int) -> int:
    """Slots of a shard for so many of this host, spread evenly."""
    (each,) = hosts.most('completions', -(-completions // self.shards))
    return next(
      (size for size in reversed(self.engine.sizes) if size >= each),
      self.engine.sizes[0],
    )
