"""What a run takes on a TPU slice that need not be there.

  python -m jax_rlvr.plan --config configs/qwen2_5_7b_clip_cov.py \\
    --topology v5p:2x2x4 [--json plan.json] [--fit] [--hlo FOLDER]

Compiles the programs of the run for the topology, from shapes alone: neither
weights nor data nor a TPU are needed, but libtpu: pip install jax_rlvr[plan].
A topology is a kind of chip (v4, v5e, v5p, v6e) and the chips along each axis
of one slice; the config says how many slices.

All sequences are taken to be as long as they may be in the update, and on
average half of a completion to be there while it is sampled. Times are those
of the chip's published peaks, not measured ones. `--fit` looks for the largest
microbatch and number of slots, and compiles a few programs more; `--hlo` keeps
the text of the compiled programs.

Ends with 0 if the run fits, 1 if it does not, 2 if it cannot be planned.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

GIB = 2**30


class PlanError(Exception):
  """A run that cannot be planned: one line."""


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog='python -m jax_rlvr.plan',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--config', required=True)
  parser.add_argument('--topology', required=True)
  parser.add_argument('--json', type=pathlib.Path)
  parser.add_argument('--fit', action='store_true')
  parser.add_argument('--hlo', type=pathlib.Path)
  arguments = parser.parse_args(argv)
  # Cells of a table are of no use in halves.
  width = None if sys.stdout.isatty() else 120
  console = Console(width=width)
  try:
    plan = make(arguments.config, arguments.topology, hlo=arguments.hlo)
    if arguments.fit:
      plan['fit'] = fit(plan)
  except PlanError as error:
    print(error, file=sys.stderr)
    return 2
  if arguments.json:
    arguments.json.write_text(json.dumps(plan, indent=1) + '\n')
  show(plan, console)
  return 0 if plan['fits'] else 1


def make(
  spec: str,
  topology: str,
  *programs: str,
  hlo: pathlib.Path | None = None,
) -> dict[str, Any]:
  """The plan of a run, as JSON values; bytes and FLOPs are those of a device.

  Args:
    spec: of a recipe, as `config.load` takes it.
    topology: of a slice.
    programs: names of those to compile; all if none is given.
    hlo: folder that gets the text of each compiled program.

  Raises:
    PlanError: it cannot be planned.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise PlanError(
      'planning compiles with libtpu, which is not here; '
      'pip install jax_rlvr[plan]'
    )
  with tempfile.TemporaryDirectory() as folder:
    hlo = hlo or pathlib.Path(folder)
    hlo.mkdir(parents=True, exist_ok=True)
    out = hlo / 'plan.json'
    out.unlink(missing_ok=True)
    done = subprocess.run(
      [
        sys.executable, '-m', 'jax_rlvr.compiled', spec, topology, hlo,
        *programs,
      ],
      env=os.environ
      | {
        'JAX_PLATFORMS': 'cpu',
        'TPU_SKIP_MDS_QUERY': '1',
        # Another process may have it loaded, too.
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
      },
      capture_output=True,
      text=True,
    )  # fmt: skip
    if not out.exists():
      last = done.stderr.strip().splitlines()[-20:]
      raise PlanError(
        '\n'.join([*last, f'compiling failed with code {done.returncode}'])
      )
    plan = json.loads(out.read_text())
  if 'error' in plan:
    raise PlanError(plan['error'])
  plan['stages'] = stages(plan)
  plan['fits'] = all(
    'too_large' not in program for program in plan['programs']
  ) and all(x <= plan['hbm_capacity_bytes'] for x in plan['stages'].values())
  plan['slots_that_fit'] = slots_that_fit(plan)
  return plan


def of(plan: dict[str, Any], name: str) -> dict[str, Any] | None:
  """A program of the plan that was compiled."""
  for program in plan['programs']:
    if program['name'] == name and 'hbm_bytes' in program:
      return program
  return None


def stages(plan: dict[str, Any]) -> dict[str, float]:
  """Bytes of HBM while a program runs: its own, and those of what waits."""
  held = plan['held']
  state, weights, slots = (
    held[name] for name in ('state', 'sampling_weights', 'slots')
  )
  # What is there beside the program's own arguments.
  waits = {
    'inner step': 0,
    'fold': state,
    're-layout': state,
    'unstack': state,
    'prefill': state + slots,
    'admit': state + weights,
    'decode segment': state,
  }
  return {
    name: beside + _own(program)
    for name, beside in waits.items()
    if (program := of(plan, name))
  }


def _own(program: dict[str, Any]) -> float:
  size = program['hbm_bytes']
  kept = size['output'] - size['aliased']
  return size['arguments'] + size['temporaries'] + kept + size['code']


def slots_that_fit(plan: dict[str, Any]) -> int | None:
  """Slots for which there is room, if temporaries grow with their number."""
  segment = of(plan, 'decode segment')
  if segment is None:
    return None
  held, shapes = plan['held'], plan['shapes']
  shards = shapes['sampling_shards']
  each = shapes['slots'] // shards
  temporaries = segment['hbm_bytes']['temporaries'] / each
  room = plan['hbm_capacity_bytes'] - plan['stages']['decode segment']
  more = room // (held['slot'] + temporaries)
  return max(0, int(each + more)) * shards


def fit(plan: dict[str, Any]) -> dict[str, Any]:
  """The largest microbatch and number of slots that fit, compiled to be sure.

  Raises:
    PlanError: nothing fits.
  """
  return {**_fit_microbatch(plan), **_fit_slots(plan)}


def _again(plan: dict[str, Any], program: str, **overrides) -> dict[str, Any]:
  given = ','.join(f'{name}={value}' for name, value in overrides.items())
  joint = ',' if ':' in plan['config'] else ':'
  spec = f'{plan["config"]}{joint}{given}'
  return make(spec, plan['topology'], program)


def _fit_microbatch(plan: dict[str, Any]) -> dict[str, Any]:
  shapes, room = plan['shapes'], plan['hbm_capacity_bytes']
  shards, row = shapes['data_shards'], shapes['row_tokens']
  most = shapes['rows'] // shards
  sizes: dict[int, float] = {}

  def size(each: int) -> float:
    """Bytes of a step with so many rows of each shard."""
    if each not in sizes:
      found = _again(plan, 'inner step', microbatch_tokens=each * shards * row)
      sizes[each] = found['stages'].get('inner step', float('inf'))
    return sizes[each]

  now = shapes['microbatch_rows'] // shards
  if 'inner step' in plan['stages']:
    sizes[now] = plan['stages']['inner step']
  low = 1
  if size(low) > room:
    return {'microbatch_tokens': 0}
  high = min(2, most)
  while low < high:
    if size(high) > room:
      break
    # What grows, grows with the rows.
    first = min(sizes)
    slope = (sizes[high] - sizes[first]) / max(high - first, 1)
    guess = most
    if slope > 0:
      guess = high + int((room - sizes[high]) / slope)
    low, high = high, min(max(guess, high), most)
  while high > low:
    if size(high) <= room:
      low = high
      break
    high = max(low, min(high - 1, int(high * 0.9)))
  return {
    'microbatch_tokens': low * shards * row,
    'microbatch_hbm_bytes': sizes[low],
  }


def _fit_slots(plan: dict[str, Any]) -> dict[str, Any]:
  slots, shards = plan['slots_that_fit'], plan['shapes']['sampling_shards']
  if slots is None:
    # Even those given were too many to compile: begin with the fewest.
    plan = _again(plan, 'decode segment', slots=shards)
    slots = plan['slots_that_fit']
  while slots:
    found = _again(plan, 'decode segment', slots=slots)
    size = found['stages'].get('decode segment')
    if size is not None and size <= plan['hbm_capacity_bytes']:
      return {'slots': slots, 'slots_hbm_bytes': size}
    slots = int(slots * 0.95) // shards * shards
  return {'slots': 0}


def show(plan: dict[str, Any], console: Console) -> None:
  """The plan for people."""
  capacity, shapes, held = (
    plan[name] for name in ('hbm_capacity_bytes', 'shapes', 'held')
  )
  mesh, sampling = (
    ' × '.join(f'{name} {size}' for name, size in plan[key].items())
    for key in ('mesh', 'sampling_mesh')
  )
  if sampling != mesh:
    mesh += f', and {sampling} to sample'
  console.print(
    f'{plan["config"]} on {plan["topology"]}: {plan["chips"]} chips, {mesh}; '
    f'{shapes["parameters"] / 1e9:.2f} billion parameters; '
    f'{shapes["rows"]} rows of {shapes["row_tokens"]} tokens an inner step, '
    f'{shapes["microbatch_rows"]} at a time; {shapes["slots"]} slots of '
    f'{shapes["columns"]} tokens; attention {shapes["attention"]}, cache '
    f'{shapes["cache"]}',
    soft_wrap=True,
  )
  memory = Table(
    'program', 'arguments', 'temporaries', 'output', 'aliased', 'waits beside',
    'together', title=f'GiB of HBM a device, of {capacity / GIB:.2f}',
  )  # fmt: skip
  for program in plan['programs']:
    if 'too_large' in program:
      memory.add_row(program['name'], *'?????', _wanted(program['too_large']))
      continue
    size, name = program['hbm_bytes'], program['name']
    together = plan['stages'][name]
    memory.add_row(
      name,
      *(
        _gib(size[kind])
        for kind in ('arguments', 'temporaries', 'output', 'aliased')
      ),
      _gib(together - _own(program)),
      f'{_gib(together)}{"" if together <= capacity else " TOO LARGE"}',
    )
  console.print(memory)
  console.print(
    f'held: state {_gib(held["state"])}, weights to sample with '
    f'{_gib(held["sampling_weights"])}, cache {_gib(held["slots"])} GiB; '
    f'room for {plan["slots_that_fit"]} slots',
    soft_wrap=True,
  )
  times = Table(
    'program', 'runs a step', 'TFLOPs', 'GB of HBM', 'GB sent', 'seconds',
    'held by', 'utilisation', 'compiled in',
    title='of one run on one device',
  )  # fmt: skip
  total = 0.0
  for program in plan['programs']:
    if 'roofline_s' not in program:
      continue
    seconds = program['roofline_s']
    total += seconds * program['runs_per_step']
    sent = sum(x['sent_bytes'] for x in program['collectives'])
    times.add_row(
      program['name'],
      f'{program["runs_per_step"]:g}',
      f'{program["flops"] / 1e12:.1f}',
      f'{program["bytes"] / 1e9:.1f}',
      f'{sent / 1e9:.2f}',
      f'{seconds:.3g}',
      bound(program),
      f'{program["utilisation"]:.0%}' if program['utilisation'] else '',
      f'{program["compile_s"]:.0f} s',
    )
  console.print(times)
  console.print(f'a step takes {total:.0f} s at the least, by these')
  said = Table('program', 'collective', 'over', 'times', 'GB', 'seconds')
  for program in plan['programs']:
    for one in program.get('collectives', [])[:5]:
      if one['seconds'] > 0.01 * program['roofline_s']:
        said.add_row(
          program['name'],
          one['kind'] + (', awaited' if one['awaited'] else ''),
          one['axes'],
          f'{one["count"]:.0f}',
          f'{one["bytes"] / 1e9:.2f}',
          f'{one["seconds"]:.3g}',
        )
  console.print(said)
  for line in verdict(plan):
    console.print(line, soft_wrap=True)
  if 'fit' in plan:
    found = plan['fit']
    console.print(
      f'fits at the most: microbatch_tokens={found["microbatch_tokens"]}, '
      f'slots={found["slots"]}'
    )


def bound(program: dict[str, Any]) -> str:
  """What a program takes longest for."""
  kinds = {'FLOPs': 'compute_s', 'HBM': 'hbm_s', 'interconnect': 'ici_s'}
  return max(kinds, key=lambda name: program[kinds[name]])


def verdict(plan: dict[str, Any]) -> list[str]:
  """Whether it fits; else what does not, by how much, and what helps."""
  if plan['fits']:
    return ['fits']
  capacity, lines = plan['hbm_capacity_bytes'], []
  for program in plan['programs']:
    name, size = program['name'], None
    if 'too_large' in program:
      size = program['too_large'].get('wanted_bytes')
    elif plan['stages'][name] > capacity:
      size = plan['stages'][name]
    else:
      continue
    wants = 'does not fit'
    if size:
      alone = (
        ' for temporaries alone'
        if 'too_large' in program
        else (' with what waits beside it')
      )
      wants = (
        f'takes {_gib(size)} GiB{alone}, {_gib(size - capacity)} more than a '
        'device has'
      )
    helps = 'lower microbatch_tokens, or raise tensor or the number of chips'
    if name in ('prefill', 'admit', 'decode segment'):
      helps = 'lower slots, or raise sampling_tensor'
    if name in ('fold', 're-layout', 'unstack'):
      helps = 'raise sampling_tensor'
    lines.append(f'{name} {wants}; {helps}')
  return lines


def _wanted(found: dict[str, Any]) -> str:
  return f'{_gib(found["wanted_bytes"])} WANTED' if len(found) > 1 else '?'


def _gib(size: float) -> str:
  return f'{size / GIB:.2f}'


if __name__ == '__main__':
  sys.exit(main())
