"""What TPU chips can do, as their maker publishes it.

From https://cloud.google.com/tpu/docs/v4, …/v5e, …/v5p and …/v6e. A link's
bandwidth is that of the chip in both directions over twice its links. DCN is
the network of a host, or of a pod, over its chips.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """A kind of chip.

  Attributes:
    flops: bfloat16 FLOPs a second.
    hbm: bytes of memory, as far as the compiler grants them to programs.
    hbm_bandwidth: bytes a second.
    link: bytes a second that one link carries in one direction.
    dcn: bytes a second that leave the slice.
    around: chips along an axis of the torus from which on it is closed.
    cores: devices of a chip, as the compiler counts them.
  """

  flops: float
  hbm: float
  hbm_bandwidth: float
  link: float
  dcn: float
  around: int
  cores: int = 1


CHIPS = {
  'v4': Chip(
    flops=275e12,
    hbm=30.5 * GIB,
    hbm_bandwidth=1200e9,
    link=50e9,
    dcn=6.25e9,
    around=4,
    cores=2,
  ),
  'v5e': Chip(
    flops=197e12,
    hbm=15.75 * GIB,
    hbm_bandwidth=819e9,
    link=50e9,
    dcn=3.125e9,
    around=16,
  ),
  'v5p': Chip(
    flops=459e12,
    hbm=95 * GIB,
    hbm_bandwidth=2765e9,
    link=100e9,
    dcn=6.25e9,
    around=4,
  ),
  'v6e': Chip(
    flops=918e12,
    hbm=31.24 * GIB,
    hbm_bandwidth=1600e9,
    link=100e9,
    dcn=12.5e9,
    around=16,
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
  """Devices of one kind, and where they are.

  Attributes:
    chip: what one *device* can do: of a chip with two cores, half.
    places: of each device, its slice and its coordinates in the torus.
    bounds: chips of a slice along each axis.
  """

  chip: Chip
  places: Sequence[tuple[int, ...]]
  bounds: tuple[int, ...]

  @classmethod
  def of(cls, kind: str, devices: Sequence[Any]) -> Topology:
    """Of devices, in the order in which a program numbers them."""
    places = [(getattr(d, 'slice_index', 0) or 0, *d.coords) for d in devices]
    bounds = tuple(1 + max(place[1:][i] for place in places) for i in range(3))
    whole = CHIPS[kind]
    chip = dataclasses.replace(
      whole,
      **{
        name: getattr(whole, name) / whole.cores
        for name in ('flops', 'hbm', 'hbm_bandwidth', 'link', 'dcn')
      },
    )
    return cls(chip=chip, places=places, bounds=bounds)

  def bandwidth(self, group: Sequence[int]) -> float:
    """Bytes a second at which a ring of devices passes its shares on.

    A ring on each axis along which the devices differ: in both directions
    where they go all the way around a closed one, else in one.
    """
    members = [self.places[i] for i in group]
    if len({place[0] for place in members}) > 1:
      return self.chip.dcn
    links = 0
    for axis, bound in enumerate(self.bounds, 1):
      met = len({place[axis] for place in members})
      if met > 1:
        closed = met == bound and bound % self.chip.around == 0
        links += 2 if closed else 1
    return max(links, 1) * self.chip.link

  def seconds(self, kind: str, size: float, group: Sequence[int]) -> float:
    """That a collective takes.

    Args:
      kind: as HLO calls it.
      size: bytes of the whole that its members share, gather or reduce.
      group: devices that take part.
    """
    return sent(kind, size, len(group)) / self.bandwidth(group)


def sent(kind: str, size: float, members: int) -> float:
  """Bytes that each member sends, the whole being `size` bytes."""
  if kind == 'collective-permute':
    return size
  share = size * (members - 1) / members
  return 2 * share if kind == 'all-reduce' else share
