"""What a compiled program does: all that runs, and how often.

XLA counts the body of a loop once and a kernel not at all; here both count as
often, and as much, as they run.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence

from jax_rlvr import hlo

# They name or rename what is there.
_FREE = frozenset(
  'parameter constant tuple get-tuple-element bitcast after-all partition-id '
  'replica-id opt-barrier add-dependency domain'.split()
)
_SLICES = ('dynamic-slice', 'slice', 'gather')


@dataclasses.dataclass(frozen=True)
class Collective:
  """What devices say to one another, of one kind and in one place.

  Attributes:
    kind: as HLO calls it.
    size: bytes of the whole that each group has or gets.
    groups: numbers of devices.
    awaited: nothing else runs meanwhile.
    source: what JAX calls it.
  """

  kind: str
  size: float
  groups: tuple[tuple[int, ...], ...]
  awaited: bool
  source: str


@dataclasses.dataclass(frozen=True)
class Piece:
  """An instruction that runs, with how often.

  Attributes:
    op: its kind, or a kernel's name.
    source: what JAX calls it.
    loops: names of the loops around it, outermost first.
    times: that it runs.
    flops: of its matrix products, each time.
    bytes: that it reads and writes in HBM, each time.
    collective: that it is, if it is one.
  """

  op: str
  source: str
  loops: tuple[str, ...]
  times: float
  flops: float = 0.0
  bytes: float = 0.0
  collective: Collective | None = None


# (kernel's name, its operands, its results) → FLOPs and bytes, or None.
Kernel = Callable[
  [str, Sequence[hlo.Array], Sequence[hlo.Array]], tuple[float, float] | None
]


class Executed:
  """A compiled program, and how often its loops go around."""

  def __init__(
    self,
    text: str,
    trips: Sequence[float] = (),
    kernel: Kernel = lambda *_: None,
    devices: int = 1,
  ):
    """Reads a program.

    Args:
      text: HLO after optimization, its schedule included.
      trips: of loops that end by their data, by how many of those they are
        in; what is deeper goes around as often as the last.
      kernel: what a custom kernel takes.
      devices: that it runs on.
    """
    self.entry, self.computations = hlo.parse(text)
    self.trips, self.kernel, self.devices = tuple(trips), kernel, devices

  @property
  def pieces(self) -> Iterator[Piece]:
    """All that runs, fused instructions as one."""
    yield from self._pieces(self.entry, 1.0, (), 0)

  def _pieces(self, name, times, loops, depth) -> Iterator[Piece]:
    computation = self.computations[name]
    for one in computation.values():
      if one.op == 'while':
        known = self.known_trips(computation, one)
        count = known
        if known is None:
          if not self.trips:
            raise ValueError(f'loop {one.source} ends by its data: give trips')
          count = self.trips[min(depth, len(self.trips) - 1)]
        (body,) = one.called('body')
        yield from self._pieces(
          body, times * count, (*loops, one.source), depth + (known is None)
        )
      elif one.op == 'conditional':
        branches = one.called('branch_computations') or [
          *one.called('true_computation'),
          *one.called('false_computation'),
        ]
        choices = [
          list(self._pieces(branch, times, loops, depth)) for branch in branches
        ]
        yield from max(choices, key=_weight)
      elif inner := _callee(one):
        for piece in self._pieces(inner, times, loops, depth):
          if piece.collective and one.op == 'async-start':
            collective = dataclasses.replace(piece.collective, awaited=False)
            piece = dataclasses.replace(piece, collective=collective)
          yield piece
      elif one.op not in _FREE and not one.op.endswith(('-done', '-update')):
        yield from self._simple(computation, one, times, loops)

  def _simple(self, computation, one, times, loops) -> Iterator[Piece]:
    kind = one.op.removesuffix('-start')
    operands = self._operands(computation, one)
    piece = Piece(one.op, one.source, loops, times)
    if kind in hlo.COLLECTIVES:
      moved = sum(x.traffic for x in operands) + one.bytes
      if one.op.endswith('-start'):
        # Its type names the operands, too.
        moved = one.bytes
      collective = self._collective(one, operands, kind)
      yield dataclasses.replace(piece, bytes=moved, collective=collective)
    elif one.op == 'fusion':
      (inner,) = one.called('calls')
      yield from self._inside(inner, piece)
      yield dataclasses.replace(
        piece,
        flops=self._flops(inner),
        bytes=self._fusion_bytes(computation, one, inner),
      )
    elif one.op == 'custom-call':
      name = hlo.kernel_name(one)
      found = self.kernel(name, operands, one.arrays)
      if found is None:
        # What it writes into stays where it is.
        into = re.search(
          r'output_to_operand_aliasing=\{\{\}: \((\d+)', one.rest
        )
        kept = operands[int(into[1])].traffic if into else 0.0
        moved = sum(x.traffic for x in operands) + one.bytes
        found = 0.0, moved - 2 * kept
      yield dataclasses.replace(piece, op=name, flops=found[0], bytes=found[1])
    elif one.op in ('copy-start', 'slice-start'):
      # Its type names what it makes and what it reads.
      moved = sum(x.traffic for x in one.arrays[:2])
      if one.op == 'slice-start':
        moved = 2 * one.arrays[-2].bytes
      yield dataclasses.replace(piece, bytes=moved)
    else:
      yield dataclasses.replace(
        piece,
        flops=hlo.products(computation, one),
        bytes=_moved(computation, one, operands),
      )

  def _inside(self, name, piece) -> Iterator[Piece]:
    """Collectives that are fused with what they feed."""
    for one in self.computations[name].values():
      kind = one.op.removesuffix('-start')
      if kind in hlo.COLLECTIVES:
        operands = self._operands(self.computations[name], one)
        collective = self._collective(one, operands, kind)
        collective = dataclasses.replace(collective, awaited=False)
        yield dataclasses.replace(piece, op=kind, collective=collective)
      elif one.op == 'fusion':
        yield from self._inside(one.called('calls')[0], piece)

  def _operands(self, computation, one) -> list[hlo.Array]:
    return [
      x
      for name in one.operands
      if name in computation
      for x in computation[name].arrays
    ]

  def _collective(self, one, operands, kind) -> Collective:
    groups = hlo.groups(one.rest, self.devices)
    before = sum(x.bytes for x in operands)
    after = sum(x.bytes for x in one.arrays)
    size = before if kind == 'reduce-scatter' else after
    if one.op.endswith('-start'):
      # Operands, and then what is made of them.
      size = max(before, after - before)
    if kind == 'collective-permute':
      size = before
    return Collective(
      kind, size, groups, not one.op.endswith('-start'), one.source
    )

  def _flops(self, name: str) -> float:
    """Of a fused computation."""
    computation, total = self.computations[name], 0.0
    for one in computation.values():
      if one.op == 'fusion':
        total += self._flops(one.called('calls')[0])
      else:
        total += hlo.products(computation, one)
    return total

  def _fusion_bytes(self, computation, one, inner) -> float:
    """Slices of what is sliced, and of what is written into; all of others."""
    parameters = self._parameters(inner)
    total = 0.0
    for i, name in enumerate(one.operands):
      arrays = computation[name].arrays
      if sum(x.traffic for x in arrays):
        read = self._read(inner, parameters[i]) if i in parameters else None
        whole = sum(x.traffic for x in arrays)
        total += whole if read is None else min(read, whole)
    return total + self._written(inner, one)

  def _read(self, name: str, parameter: str) -> float | None:
    """Bytes of a parameter that a fused computation reads; None for all."""
    computation, total = self.computations[name], 0.0
    if computation[parameter].root:
      return None
    for one in computation.values():
      if parameter not in one.operands:
        continue
      if one.op in _SLICES and one.operands[0] == parameter:
        total += sum(x.bytes for x in one.arrays)
      elif one.op == 'dynamic-update-slice' and one.operands[0] == parameter:
        pass
      elif one.op in ('bitcast', 'fusion'):
        inner, place = name, one.name
        if one.op == 'fusion':
          (inner,) = one.called('calls')
          place = self._parameters(inner)[one.operands.index(parameter)]
          if self._handed_on(inner, place):
            inner, place = name, one.name
        read = self._read(inner, place)
        if read is None:
          return None
        total += read
      else:
        return None
    return total

  def _parameters(self, name: str) -> dict[int, str]:
    """Names of a computation's parameters by their number."""
    return {
      int(x.arguments): x.name
      for x in self.computations[name].values()
      if x.op == 'parameter'
    }

  def _handed_on(self, name: str, parameter: str) -> bool:
    """Whether a fused computation makes a parameter its outcome."""
    computation = self.computations[name]
    (one,) = (x for x in computation.values() if x.root)
    while one.op == 'bitcast':
      one = computation[one.operands[0]]
    return one.name == parameter

  def _written(self, name: str, outer: hlo.Instruction) -> float:
    computation = self.computations[name]
    (root,) = (x for x in computation.values() if x.root)
    parts = [root]
    if root.op == 'tuple':
      parts = [computation[x] for x in root.operands]
    total = 0.0
    for part, array in zip(parts, outer.arrays, strict=False):
      while part.op == 'bitcast':
        part = computation[part.operands[0]]
      if part.op == 'dynamic-update-slice' and not array.space:
        update = computation[part.operands[1]]
        total += sum(x.bytes for x in update.arrays)
      elif part.op == 'fusion' and not array.space:
        total += min(
          self._written(part.called('calls')[0], part), array.traffic
        )
      else:
        total += array.traffic
    return total

  def known_trips(self, computation, one) -> int | None:
    """How often a loop goes around; None where data decide."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', one.rest)
    if known:
      return int(known[1])
    (condition,) = one.called('condition')
    (body,) = one.called('body')
    test = self.computations[condition]
    root = next(x for x in test.values() if x.root)
    if root.op == 'fusion':
      (inner,) = root.called('calls')
      renamed = dict(enumerate(root.operands))
      test = dict(test)
      for x in self.computations[inner].values():
        if x.op == 'parameter':
          x = dataclasses.replace(test[renamed[int(x.arguments)]], name=x.name)
        test[x.name] = x
      root = next(x for x in self.computations[inner].values() if x.root)
    if root.op != 'compare' or 'direction=LT' not in root.rest:
      return None
    counter, limit = (test[name] for name in root.operands)
    stop = hlo.constant(test, limit)
    if counter.op != 'get-tuple-element' or stop is None:
      stop_place = limit.number('index', -1)
      if counter.op != 'get-tuple-element' or stop_place < 0:
        return None
      stop = self._entering(computation, one, stop_place)
      if stop is None or not self._kept(body, stop_place):
        return None
    place = counter.number('index', -1)
    start = self._entering(computation, one, place)
    step = self._step(body, place)
    if start is None or step is None:
      return None
    return max(0, math.ceil((stop - start) / step))

  def _entering(self, computation, one, place) -> int | None:
    start = computation.get(one.operands[0])
    if start is None or start.op != 'tuple':
      return None
    return hlo.constant(computation, computation[start.operands[place]])

  def _next(
    self, body: str, place: int
  ) -> tuple[hlo.Computation, hlo.Instruction]:
    computation = self.computations[body]
    (root,) = (x for x in computation.values() if x.root)
    return computation, computation.get(root.operands[place], root)

  def _kept(self, body: str, place: int) -> bool:
    computation, last = self._next(body, place)
    return last.op == 'get-tuple-element' and last.number('index', -1) == place

  def _step(self, body: str, place: int) -> int | None:
    computation, last = self._next(body, place)
    while last.op == 'copy':
      last = computation[last.operands[0]]
    if last.op == 'fusion':
      (inner,) = last.called('calls')
      computation = self.computations[inner]
      (last,) = (x for x in computation.values() if x.root)
    if last.op != 'add':
      return None
    steps = [hlo.constant(computation, computation[x]) for x in last.operands]
    steps = [x for x in steps if x is not None]
    return steps[0] if len(steps) == 1 else 1


def _callee(one: hlo.Instruction) -> str | None:
  """The computation that an instruction stands for, if it does."""
  attributes = {
    'call': ('to_apply', 'calls'),
    'async-start': ('calls', 'to_apply'),
    # SparseCores': no kernel has a name there, but what it does is said.
    'custom-call': ('called_computations',),
  }
  for attribute in attributes.get(one.op, ()):
    if names := one.called(attribute):
      return names[0]
  return None


def _weight(pieces: Sequence[Piece]) -> float:
  return sum(p.times * (p.flops / 200 + p.bytes) for p in pieces)


def _moved(computation, one, operands) -> float:
  if one.op in ('dynamic-slice', 'slice', 'gather'):
    return one.bytes + sum(x.bytes for x in one.arrays)
  if one.op == 'dynamic-update-slice':
    update = computation.get(one.operands[1])
    return 2 * sum(x.traffic for x in update.arrays) if update else one.bytes
  return sum(x.traffic for x in operands) + one.bytes
