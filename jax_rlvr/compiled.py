"""Compiles the programs of a run for a TPU slice that need not be there.

  python -m jax_rlvr.compiled SPEC TOPOLOGY FOLDER [PROGRAM …]

It is what `jax_rlvr.plan` runs in a process of its own: libtpu wants one, and
says a lot on stderr. FOLDER gets plan.json, with a key `error` where one line
says all, and the HLO text of each program.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from jax_rlvr import chips, compilation, config, lowered
from jax_rlvr.lowered import Plan, Program
from jax_rlvr.pieces import Executed, Piece

GIB = 2**30


def main(argv: Sequence[str]) -> int:
  spec, topology, folder, *names = argv
  compilation.configure()
  # What is found there leaves no text to read.
  jax.config.update('jax_enable_compilation_cache', False)
  found: dict[str, Any]
  try:
    plan = planned(spec, topology)
  except (config.ConfigError, ValueError, OSError) as error:
    found = {'error': str(error).strip().split('\n')[0]}
  else:
    found = described(plan, spec, topology, names, pathlib.Path(folder))
  pathlib.Path(folder, 'plan.json').write_text(json.dumps(found, indent=1))
  return 2 if 'error' in found else 0


def planned(spec: str, topology: str) -> Plan:
  """The run on the devices of a topology.

  Raises:
    ValueError: it does not fit there, or something of it does not exist.
  """
  c = config.load(spec).config
  plan = lowered.make(c, slice_of(topology, c.slices))
  # What attention cannot do is told here.
  plan.backend  # noqa: B018
  return plan


def described(
  plan: Plan,
  spec: str,
  topology: str,
  names: Sequence[str],
  folder: pathlib.Path,
) -> dict[str, Any]:
  """What `jax_rlvr.plan` makes of a run, up to what follows from it."""
  kind = topology.split(':')[0]
  devices = list(plan.mesh.devices.flat)
  where = chips.Topology.of(kind, devices)
  return {
    'config': spec,
    'topology': topology,
    'mesh': dict(plan.mesh.shape),
    'sampling_mesh': dict(plan.sampling.shape),
    'chips': len(devices) // chips.CHIPS[kind].cores,
    'devices': len(devices),
    'hbm_capacity_bytes': int(where.chip.hbm),
    'libtpu': importlib.metadata.version('libtpu'),
    'flags': os.environ.get('LIBTPU_INIT_ARGS', ''),
    'shapes': shapes(plan),
    'held': held(plan),
    'programs': [
      compiled(plan, program, where, folder)
      for program in lowered.programs(plan)
      if not names or program.name in names
    ],
  }


def slice_of(topology: str, slices: int = 1) -> Sequence[Any]:
  """Devices of slices of one topology.

  Raises:
    ValueError: there is no such topology.
  """
  kind = topology.split(':')[0]
  if kind not in chips.CHIPS or ':' not in topology:
    raise ValueError(
      f'topology {topology!r} is unknown; give a kind of chip and the chips '
      f'along each axis, as v5p:2x2x4; kinds are {", ".join(chips.CHIPS)}'
    )
  more = {'num_slices': slices} if slices > 1 else {}
  try:
    return topologies.get_topology_desc(topology, 'tpu', **more).devices
  except Exception as error:  # What libtpu raises is not documented.
    reason = str(error).strip().split('\n')[0]
    raise ValueError(
      f'topology {topology!r}, {slices} times: {reason}; v5p and v4 have three '
      'axes, v5e and v6e two'
    ) from None


def shapes(plan: Plan) -> dict[str, Any]:
  """What the counts of a config come to on this mesh."""
  engine = plan.engine
  return {
    'parameters': sum(x.size for x in jax.tree.leaves(plan.params())),
    'rows': plan.rows,
    'microbatch_rows': plan.microbatch,
    'row_tokens': plan.config.row_tokens,
    'inner_steps': plan.config.inner_steps,
    'data_shards': plan.shards,
    'sampling_shards': engine.shards,
    'slots': engine.sizes[0] * engine.shards,
    'columns': engine.windows[-1],
    'filled_columns': lowered.filled(plan),
    'attention': plan.backend.name,
    'cache': engine.cache.__name__,
  }


def held(plan: Plan) -> dict[str, float]:
  """Bytes of what outlives a program, on each device."""
  params, optimizer, filters, reference = plan.state
  cast = plan.params(plan.dtype)
  slots = lowered.idle_slots(plan)
  size = lowered.bytes_of
  return {
    'state': size((params, optimizer, filters, reference)),
    'cast': size(cast),
    'sampling_weights': size(plan.unstacked),
    'slots': size(slots.cache),
    'slot': size(slots.cache) * plan.engine.shards / slots.live.size,
  }


def compiled(
  plan: Plan, program: Program, where: chips.Topology, folder: pathlib.Path
) -> dict[str, Any]:
  """One program's part of the plan; its text goes into the folder."""
  begun = time.perf_counter()
  found: dict[str, Any] = {
    'name': program.name,
    'runs_per_step': program.per_step,
  }
  with tempfile.TemporaryDirectory() as dump:
    options: Any = {'xla_dump_to': dump, 'xla_dump_hlo_as_text': True}
    try:
      executable = program.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      return found | {'too_large': too_large(str(error))}
    found['compile_s'] = time.perf_counter() - begun
    # Not `as_text`: it fails on programs that libtpu writes in its own way.
    file = next(iter(pathlib.Path(dump).glob('*after_codegen.txt')), None)
    text = file.read_text() if file else executable.as_text() or ''
  (folder / f'{program.name.replace(" ", "_")}.hlo').write_text(text)
  stats: Any = executable.memory_analysis()
  read = Executed(
    text, program.trips, lowered.kernel(plan), plan.mesh.devices.size
  )
  pieces = list(read.pieces)
  return found | {
    'hbm_bytes': {
      'arguments': stats.argument_size_in_bytes,
      'temporaries': stats.temp_size_in_bytes,
      'output': stats.output_size_in_bytes,
      'aliased': stats.alias_size_in_bytes,
      'code': stats.generated_code_size_in_bytes,
    },
    **costs(plan, program, pieces, where),
  }


def costs(
  plan: Plan,
  program: Program,
  pieces: Sequence[Piece],
  where: chips.Topology,
) -> dict[str, Any]:
  """FLOPs, bytes, collectives and seconds of a program that runs once."""
  chip = where.chip
  flops = sum(p.times * p.flops for p in pieces)
  traffic = sum(p.times * p.bytes for p in pieces)
  model = program.model_flops / plan.mesh.devices.size
  seconds = roofline(pieces, where)
  least = max(model / chip.flops, program.least_bytes / chip.hbm_bandwidth)
  return {
    'flops': flops,
    'model_flops': model,
    'bytes': traffic,
    'least_bytes': program.least_bytes,
    'collectives': list(collectives(program.mesh, pieces, where)),
    'compute_s': flops / chip.flops,
    'hbm_s': traffic / chip.hbm_bandwidth,
    'ici_s': sum(p.times * waited(p, where) for p in pieces),
    'roofline_s': seconds,
    # Small weights stay in fast memory from one token to the next.
    'utilisation': min(least / seconds, 1.0) if seconds else 0.0,
  }


def waited(piece: Piece, where: chips.Topology) -> float:
  """Seconds of a collective, of the slowest of its groups."""
  one = piece.collective
  if one is None:
    return 0.0
  if one.kind == 'collective-permute':
    return one.size / where.chip.link
  return where.seconds(one.kind, one.size, one.groups[0])


def roofline(pieces: Sequence[Piece], where: chips.Topology) -> float:
  """Seconds, if each instruction is as fast as FLOPs or HBM let it be.

  Collectives that others can run beside are done by the time that those are,
  where those of the same loop take as long; the others are waited for.
  """
  chip = where.chip
  busy, beside, alone = (defaultdict(float) for _ in range(3))
  for p in pieces:
    own = max(p.flops / chip.flops, p.bytes / chip.hbm_bandwidth)
    talk = waited(p, where)
    if p.collective and p.collective.awaited:
      alone[p.loops] += p.times * max(own, talk)
    elif p.collective:
      beside[p.loops] += p.times * talk
    else:
      busy[p.loops] += p.times * own
  return sum(
    max(busy[loops], beside[loops]) + alone[loops]
    for loops in busy.keys() | beside.keys() | alone.keys()
  )


def collectives(
  mesh: Mesh, pieces: Sequence[Piece], where: chips.Topology
) -> Iterator[dict[str, Any]]:
  """By kind and mesh axes, the slowest first."""
  total = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
  for p in pieces:
    if p.collective:
      one = p.collective
      key = one.kind, axes(mesh, one.groups[0]), one.awaited
      sums = total[key]
      sums[0] += p.times
      sums[1] += p.times * one.size
      sums[2] += p.times * chips.sent(one.kind, one.size, len(one.groups[0]))
      sums[3] += p.times * waited(p, where)
  ranked = sorted(total.items(), key=lambda item: -item[1][3])
  for (kind, names, awaited), (count, size, sent, seconds) in ranked:
    yield {
      'kind': kind,
      'axes': names,
      'awaited': awaited,
      'count': count,
      'bytes': size,
      'sent_bytes': sent,
      'seconds': seconds,
    }


def axes(mesh: Mesh, group: Sequence[int]) -> str:
  """Mesh axes along which the devices of a group differ."""
  shape = mesh.shape
  places = np.unravel_index(np.array(group), tuple(shape.values()))
  return '+'.join(
    name for name, at in zip(shape, places, strict=True) if len(set(at)) > 1
  )


def too_large(message: str) -> dict[str, Any]:
  """Bytes that a program wants, and that there are, as the compiler says."""
  found = re.search(
    r'\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)', message
  )
  if not found:
    return {'message': message.strip().split('\n')[0]}
  wanted, unit, room, room_unit = found.groups()
  scale = {'K': 2**10, 'M': 2**20, 'G': GIB, 'T': 2**40}
  return {
    'wanted_bytes': float(wanted) * scale[unit],
    'hbm_bytes': float(room) * scale[room_unit],
  }


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
