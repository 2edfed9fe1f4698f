"""The text of a compiled program: HLO, an instruction a line."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import numpy as np

COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
  'ragged-all-to-all',
  'collective-broadcast',
)

_BYTES = {
  'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2,
  'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8,
  'f64': 8, 'c64': 8, 'c128': 16,
}  # fmt: skip
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?')
# A SparseCore's says so.
_END = re.compile(r'\}(, execution_thread="\w+")?')
_INSTRUCTION = re.compile(r'\s+(?:ROOT )?%?([^\s=]+) = ')


@dataclasses.dataclass(frozen=True)
class Array:
  """An array of an instruction's type.

  Attributes:
    kind: of its numbers.
    dims: its shape.
    space: of the memory it lies in; 0 is HBM.
  """

  kind: str
  dims: tuple[int, ...]
  space: int

  @property
  def bytes(self) -> float:
    return math.prod(self.dims) * _BYTES.get(self.kind, 0)

  @property
  def traffic(self) -> float:
    """Bytes of HBM."""
    return 0.0 if self.space else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of a computation.

  Attributes:
    name: of it.
    arrays: that it makes.
    op: its kind.
    operands: names of instructions of the same computation.
    arguments: what stands between the parentheses.
    rest: what stands behind them.
    root: whether it is the outcome.
  """

  name: str
  arrays: tuple[Array, ...]
  op: str
  operands: tuple[str, ...]
  arguments: str
  rest: str
  root: bool

  def called(self, attribute: str) -> list[str]:
    """Names of computations."""
    found = re.search(
      rf'\b{attribute}=(?:\{{([^}}]*)\}}|%?([^\s,]+))', self.rest
    )
    if not found:
      return []
    names = found[1].split(',') if found[1] is not None else [found[2]]
    return [name.strip().lstrip('%') for name in names]

  def number(self, attribute: str, default: int) -> int:
    found = re.search(rf'\b{attribute}=(\d+)', self.rest)
    return int(found[1]) if found else default

  @property
  def source(self) -> str:
    """What JAX calls it."""
    found = re.search(r'op_name="([^"]*)"', self.rest)
    return found[1] if found else ''

  @property
  def bytes(self) -> float:
    return sum(x.traffic for x in self.arrays)


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[str, dict[str, Computation]]:
  """Name of the entry, and all computations of a module."""
  computations, entry, current = {}, '', None
  last: Instruction | None = None
  for line in text.splitlines():
    if line.endswith('{') and not line[:1].isspace() and ' (' in line:
      name = line.split(' (')[0]
      is_entry = name.startswith('ENTRY ')
      name = name.removeprefix('ENTRY ').lstrip('%')
      entry = name if is_entry else entry
      current = computations[name] = {}
    elif _END.fullmatch(line.rstrip()):
      current = None
    elif current is not None and (found := _INSTRUCTION.match(line)):
      last = _instruction(found[1], line[found.end() :], 'ROOT ' in line[:12])
      current[last.name] = last
    elif current and last:
      # What a kernel says of itself may run over several lines.
      last = dataclasses.replace(last, rest=last.rest + line)
      current[last.name] = last
  return entry, computations


def _instruction(name: str, text: str, root: bool) -> Instruction:
  if text.startswith('('):
    stop = _closing(text, 0) + 1
  else:
    stop = text.index(' ')
  arrays = _arrays(text[:stop])
  opening = text.index('(', stop)
  closing = _closing(text, opening)
  arguments = text[opening + 1 : closing]
  return Instruction(
    name=name,
    arrays=arrays,
    op=text[stop:opening].strip(),
    operands=tuple(re.findall(r'%([^\s,()]+)', arguments)),
    arguments=arguments,
    rest=text[closing + 1 :],
    root=root,
  )


def _closing(text: str, opening: int) -> int:
  depth = 0
  for i in range(opening, len(text)):
    depth += (text[i] == '(') - (text[i] == ')')
    if not depth:
      return i
  raise ValueError(f'HLO text ends within {text[opening : opening + 60]!r}')


@functools.cache
def _arrays(text: str) -> tuple[Array, ...]:
  found = []
  for kind, dims, layout in _ARRAY.findall(text):
    space = re.search(r'S\((\d+)\)', layout)
    found.append(
      Array(
        kind,
        tuple(int(d) for d in dims.split(',') if d),
        int(space[1]) if space else 0,
      )
    )
  return tuple(found)


def kernel_name(one: Instruction) -> str:
  """Of a kernel its own, of others what XLA calls them."""
  target = re.search(r'custom_call_target="([^"]*)"', one.rest)
  name = target[1] if target else ''
  return one.name if name == 'tpu_custom_call' else name


def constant(computation: Computation, one: Instruction) -> int | None:
  while one.op in ('copy', 'bitcast') and one.operands[0] in computation:
    one = computation[one.operands[0]]
  if one.op == 'constant' and re.fullmatch(r'-?\d+', one.arguments):
    return int(one.arguments)
  return None


def products(computation: Computation, one: Instruction) -> float:
  """FLOPs of a matrix product, two a multiply-add."""
  if one.op not in ('dot', 'convolution'):
    return 0.0
  out = one.arrays[0].dims
  left, right = (computation[x].arrays[0].dims for x in one.operands[:2])
  if one.op == 'dot':
    found = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', one.rest)
    over = [int(x) for x in found[1].split(',') if x] if found else []
    return 2.0 * math.prod(out) * math.prod(left[i] for i in over)
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', one.rest)
  assert labels, one.rest
  lhs, rhs, result = labels.groups()
  pairs = 1.0
  window = _window(one.rest)
  for i, (size, stride, low, spread, gaps) in enumerate(window):
    pairs *= _taps(
      out[result.index(str(i))], left[lhs.index(str(i))], size, stride, low,
      spread, gaps,
    )  # fmt: skip
  inner = right[rhs.index('i')] if 'i' in rhs else 1
  batch = out[result.index('b')] if 'b' in result else 1
  features = out[result.index('f')] if 'f' in result else 1
  return 2.0 * batch * features * inner * pairs


def _window(rest: str) -> list[tuple[int, int, int, int, int]]:
  """Of each axis: size, stride, padding before, dilation of both sides."""
  found = re.search(r'window=\{([^}]*)\}', rest)
  if not found:
    return []
  fields = dict(part.split('=') for part in found[1].split())
  sizes = [int(x) for x in fields['size'].split('x')]

  def field(name, default):
    given = fields.get(name)
    return given.split('x') if given else [default] * len(sizes)

  return [
    (size, int(stride), int(pad.split('_')[0]), int(spread), int(gaps))
    for size, stride, pad, spread, gaps in zip(
      sizes,
      field('stride', '1'),
      field('pad', '0_0'),
      field('lhs_dilate', '1'),
      field('rhs_dilate', '1'),
      strict=True,
    )
  ]


def _taps(out, size_in, size, stride, low, spread, gaps) -> int:
  """Pairs of a place of the outcome and a tap that meets a number."""
  place = np.arange(out)[:, None] * stride - low + np.arange(size) * gaps
  inside = (place >= 0) & (place < (size_in - 1) * spread + 1)
  return int(np.sum(inside & (place % spread == 0)))


def groups(rest: str, devices: int) -> tuple[tuple[int, ...], ...]:
  """Devices of each group that talk to one another."""
  mesh = re.search(r'replica_groups=mesh\[(.*?)\] \{(.*?)\}', rest)
  iota = re.search(
    r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', rest
  )
  listed = re.search(
    r'(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]+\},?)*)\}', rest
  )
  ids = np.arange(devices)
  if mesh:
    axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    within = re.findall(r"'(\w+)'", mesh[2])
    ids = ids.reshape([int(x) for x in axes.values()])
    places = [list(axes).index(name) for name in within]
    ids = np.moveaxis(ids, places, range(-len(places), 0))
    ids = ids.reshape(-1, math.prod(int(axes[x]) for x in within))
  elif iota:
    shape, dims, order = (
      [int(x) for x in part.split(',')] if part else []
      for part in iota.groups()
    )
    ids = np.arange(math.prod(dims)).reshape(dims)
    ids = (ids.transpose(order) if order else ids).reshape(shape)
  elif listed and listed[1]:
    return tuple(
      tuple(int(x) for x in group.split(','))
      for group in re.findall(r'\{([\d,]+)\}', listed[1])
    )
  return tuple(tuple(int(x) for x in group) for group in np.atleast_2d(ids))
