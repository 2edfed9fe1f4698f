"""What filters cost: seconds on this machine, FLOPs and bytes on a pod.

  python benchmarks/filters.py --check --json filters.json

A chain, its parts and the selections it is made of are timed on eight virtual
CPU devices and on one. Then they are compiled for a pod that is not there
(extra: plan), beside the least that an update of a 7B policy costs on it.
README.md has the limits and what was found.
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib.util
import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from unittest import mock

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    # Eight devices share few cores: a collective may wait long for its turn.
    '--xla_cpu_collective_call_terminate_timeout_seconds=600',
  ]
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import rich  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402
from rich.table import Table  # noqa: E402

from jax_rlvr import evidence, filters, masked, mesh, policy  # noqa: E402
from jax_rlvr.policy_gradient import token_gradients  # noqa: E402
from jax_rlvr.records import Tokens, TokenStats  # noqa: E402

TOPOLOGY, CHIPS = 'v5p:4x4x4', 64

MOST_PASSES = 3  # over the arrays, per bit of a selection
MOST_SHARE = 0.1  # of an update's FLOPs and bytes, %
WIDEST = 128  # numbers that one collective may carry

# A selection decides 64 bits: 32 of a score and 32 of a serial number, or 32
# each of a quantile's two neighbours.
BITS = 64

QWEN_7B = policy.SHAPES['qwen2.5-7b']


# The programs: functions of (stats, tokens, key)


def batch(rows: int, length: int) -> tuple[TokenStats, Tokens, jax.Array]:
  """An inner batch, three quarters of it completion tokens, and a key."""
  shape = rows, length
  keys = jax.random.split(jax.random.key(0), 4)
  logprob = -jnp.abs(jax.random.normal(keys[0], shape))
  old_logprob = logprob + 0.1 * jax.random.normal(keys[1], shape)
  entropy = jnp.abs(jax.random.normal(keys[2], shape))
  advantage = jnp.broadcast_to(jax.random.normal(keys[3], (rows, 1)), shape)
  serial = jnp.arange(rows * length, dtype=jnp.uint32).reshape(shape)
  mask = serial % length >= length // 4
  tokens = Tokens(mask, advantage, old_logprob, serial)
  return TokenStats(logprob, entropy), tokens, jax.random.key(1)


def _gradients(*chain):
  return lambda stats, tokens, key: token_gradients(
    optax.chain(*chain), stats, tokens, key=key
  )


def _largest(stats, tokens, key):
  del key
  n = masked.share(0.2, masked.count(tokens.mask))
  return masked.largest(stats.entropy, tokens.mask, n, tokens.serial)


def _top_k(stats, tokens, key):
  """The score of the last of as many tokens, found the usual way."""
  del key
  score = jnp.where(tokens.mask, stats.entropy, -jnp.inf).ravel()
  # A fifth of three quarters; XLA wants to know how many when it compiles.
  return jax.lax.top_k(score, score.size * 3 // 20)[0][-1]


# A filter's own cost is the distance from the first line, where it starts. 'one
# count' is what a selection does for each of its bits.
PROGRAMS = {
  'policy gradient': _gradients(optax.identity()),
  'clip_cov': _gradients(filters.clip_cov()),
  'kl_cov': _gradients(filters.kl_cov()),
  'forking_tokens': _gradients(filters.forking_tokens(0.2)),
  'whole chain': _gradients(
    filters.clip_ratio(1.0, 1.0),
    filters.clip_cov(),
    filters.forking_tokens(0.2),
    filters.entropy_bonus(),
    filters.token_mean(),
  ),
  'evidence.summary': lambda stats, tokens, key: evidence.summary(
    stats, tokens
  ),
  'masked.largest': _largest,
  'masked.quantile': lambda stats, tokens, key: masked.quantile(
    stats.entropy, tokens.mask, 0.8
  ),
  'one count': lambda stats, tokens, key: masked.count(
    tokens.mask & (stats.entropy >= 0.5)
  ),
}
NAIVE = {'masked.largest': _largest, 'lax.top_k': _top_k}


def layout(devices: Mesh) -> tuple[NamedSharding, NamedSharding]:
  """Of [B, T], cut by rows, and of all else."""
  return NamedSharding(devices, mesh.ROWS), NamedSharding(devices, P())


def jitted(program, arguments, rows, whole):
  """The program, with results that lie as its arguments do."""
  results = jax.eval_shape(program, *arguments)
  return jax.jit(
    # A function of its own, as jit remembers those it has traced.
    lambda *x: program(*x),
    out_shardings=jax.tree.map(
      lambda x: rows if x.ndim == 2 else whole, results
    ),
  )


# Seconds on this machine


def measure(rows: int, length: int, repeats: int) -> dict:
  eight = layout(mesh.make())
  one = (SingleDeviceSharding(jax.devices()[0]),) * 2
  few = min(rows, 512)
  return {
    'eight devices': timed(PROGRAMS, (rows, length), eight, repeats),
    'one device': timed(PROGRAMS, (rows, length), one, repeats),
    'naive shape': (few, length),
    'naive': timed(NAIVE, (few, length), eight, min(repeats, 3)),
  }


def timed(programs: dict, shape, layout, repeats: int) -> dict:
  """Median wall and CPU seconds of each; their runs take turns."""
  rows, whole = layout
  make = functools.partial(batch, *shape)
  arguments = jax.jit(make, out_shardings=(rows, rows, whole))()
  calls = {
    name: functools.partial(jitted(program, arguments, *layout), *arguments)
    for name, program in programs.items()
  }
  entropy, mask = map(np.asarray, (arguments[0].entropy, arguments[1].mask))
  # The least that a bit can cost: both arrays once through the processor.
  calls['one read'] = lambda: (
    entropy.view(np.uint32).max(),
    np.count_nonzero(mask),
  )
  samples = collections.defaultdict(list)
  for repeat in range(repeats + 1):
    for name, call in calls.items():
      wall, cpu = time.perf_counter(), time.process_time()
      jax.block_until_ready(call())
      sample = time.perf_counter() - wall, time.process_time() - cpu
      if repeat:  # the first one compiles
        samples[name].append(sample)
  medians = {
    name: map(statistics.median, zip(*x, strict=True))
    for name, x in samples.items()
  }
  return {
    name: {'wall': wall, 'cpu': cpu} for name, (wall, cpu) in medians.items()
  }


# FLOPs and bytes on a pod


def on_a_pod(rows: int, length: int) -> dict:
  """`compiled`, in a process of its own: libtpu is loud and stays."""
  child = subprocess.run(
    [sys.executable, __file__, '--compile_only']
    + [f'--rows={rows}', f'--tokens={length}'],
    env=os.environ
    | {
      'TPU_SKIP_MDS_QUERY': '1',  # there is no TPU to ask
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # nor one to share
    },
    capture_output=True,
    text=True,
  )
  if child.returncode:
    sys.stderr.write(child.stderr)
    raise SystemExit(f'could not compile for {TOPOLOGY}, see above')
  return json.loads(child.stdout.splitlines()[-1])


def compiled(rows: int, length: int) -> dict:
  """What each program costs one chip of the pod, by XLA's own account."""
  devices = topologies.get_topology_desc(TOPOLOGY, 'tpu').devices
  pod = Mesh(
    np.array(devices).reshape(1, CHIPS, 1),
    ('slice', 'fsdp', 'tensor'),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )
  by_rows, whole = layout(pod)

  def lay(x):
    sharding = by_rows if x.ndim == 2 else whole
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  arguments = jax.eval_shape(functools.partial(batch, rows, length))
  arguments = jax.tree.map(lay, arguments)
  return {
    name: cost(program, arguments, (by_rows, whole))
    for name, program in (PROGRAMS | NAIVE).items()
  }


def cost(program, arguments, layout) -> dict:
  """FLOPs, bytes and collectives of one run.

  XLA counts the body of a loop once, whatever its trips. So each loop is
  compiled with two trips of its body unrolled, and with four: the difference is
  two trips of every loop. All loops of a program make as many, a multiple of
  four. Not one and two trips: there the compiler may also move a copy or so.
  """
  two, four = (unrolled(program, arguments, layout, n) for n in (2, 4))
  (trips,) = two.pop('trips') or {4}
  assert trips % 4 == 0, trips
  return {
    name: x + (trips - 2) * (four[name] - x) / 2 for name, x in two.items()
  }


def unrolled(program, arguments, layout, by: int) -> dict:
  """XLA's account of the program with `by` trips in the body of a loop."""
  program = jitted(program, arguments, *layout)
  loop, trips = jax.lax.fori_loop, set()

  def fori_loop(lower, upper, body, init):
    trips.add(upper - lower)
    return loop(lower, upper, body, init, unroll=by)

  with mock.patch('jax.lax.fori_loop', fori_loop):
    executable = program.lower(*arguments).compile()
  text, account = executable.as_text(), executable.cost_analysis()
  # A gather may well be written as a wide all-reduce: widths tell.
  collectives = re.findall(
    r'= (.*) (?:all-|reduce-scatter|collective-)[a-z-]*(?<!-done)\(', text
  )
  shapes = re.findall(r'\[([\d,]*)\]', ' '.join(collectives))
  widths = [math.prod(map(int, filter(None, x.split(',')))) for x in shapes]
  return {
    'flops': account['flops'],
    # To and from any memory, on the chip or off it: more than HBM sees.
    'bytes': account['bytes accessed'],
    'collectives': len(collectives),
    'widest': max(widths, default=0),
    'sorts': text.count(' sort('),
    'trips': trips,
  }


def update_floor(tokens: float) -> dict:
  """The least that an update of a 7B policy costs each chip.

  FLOPs: 6 a token and weight, embedding aside: forward once, backward twice.
  Recomputing layers makes it 8; attention and softmax come on top.

  Bytes, in bfloat16: each product of a layer reads its input and writes its
  output, once forward and twice backward. Products that share an input share
  the reading; all of attention, norms, activations and the head are free.
  Weights are read forward and backward and their gradients written, once in
  all. The optimizer reads float32 gradients, and reads and writes weights and
  two moments, of the chip's own share.
  """
  c = QWEN_7B
  sizes = jax.tree.map(lambda x: x.size, policy.abstract_params(c))
  weights = sum(jax.tree.leaves(sizes))
  # Input and output of query, key, value; of output; of gate, up; of down.
  heads = 2 * (c.heads + c.kv_heads) * c.head_size
  layer = heads + 4 * c.width + 3 * c.feed_forward
  mine = tokens / CHIPS
  return {
    'flops': 6 * (weights - sizes['embed']) * mine,
    'bytes': 3 * 2 * layer * c.layers * mine
    + 3 * 2 * weights
    + 7 * 4 * weights / CHIPS,
  }


# What is printed


def limits(figures: dict) -> list[dict]:
  """Each figure that is held to a limit, and whether it keeps it."""
  found = []

  def hold(what, figure, limit, unit=''):
    found.append(
      {'what': what, 'figure': figure, 'limit': limit, 'unit': unit}
      | {'met': figure <= limit}
    )

  seconds = figures['one device']
  for name in ('masked.largest', 'masked.quantile'):
    for unit in ('one count', 'one read'):
      passes = seconds[name]['cpu'] / seconds[unit]['cpu'] / BITS
      hold(f'{name}, a bit', passes, MOST_PASSES, f' × {unit}')
  for name in ('whole chain', 'evidence.summary') if 'chip' in figures else ():
    chip = figures['chip'][name]
    for live, floor in figures['update'].items():
      for unit in ('flops', 'bytes'):
        share = 100 * chip[unit] / floor[unit]
        what = f'{name}, {unit}, {live} live'
        hold(what, share, MOST_SHARE, ' % of update')
    hold(f'{name}, widest collective', chip['widest'], WIDEST)
    hold(f'{name}, sorts', chip['sorts'], 0)
  return found


def show(figures: dict) -> None:
  here = [figures['eight devices'], figures['one device']]
  print_table(
    'Seconds on {} × {}, wall / CPU'.format(*figures['shape']),
    ['eight devices', 'one device'],
    [[name, *(_seconds(place[name]) for place in here)] for name in here[0]],
  )
  print_table(
    'Seconds on {} × {}'.format(*figures['naive shape']),
    ['eight devices, wall / CPU'],
    [[name, _seconds(x)] for name, x in figures['naive'].items()],
  )
  if 'chip' in figures:
    chip = figures['chip'] | {
      f'update, {live} live': floor for live, floor in figures['update'].items()
    }
    print_table(
      f'One chip of {TOPOLOGY}',
      ['GFLOPs', 'GB', 'collectives', 'widest', 'sorts'],
      [[name, *_account(x)] for name, x in chip.items()],
    )
  print_table(
    'Limits',
    ['figure', 'limit', ''],
    [
      [x['what'], f'{x["figure"]:.2g}', f'{x["limit"]:g}{x["unit"]}']
      + ['met' if x['met'] else 'BROKEN']
      for x in figures['limits']
    ],
  )


def print_table(title: str, headings: list[str], lines: list[list[str]]):
  table = Table('', title=title)
  for heading in headings:
    table.add_column(heading, justify='right')
  for line in lines:
    table.add_row(*line)
  rich.print(table)


def _seconds(times: dict) -> str:
  return f'{times["wall"]:.3f} / {times["cpu"]:.3f}'


def _account(x: dict) -> list[str]:
  giga = [f'{x[unit] / 1e9:,.3g}' for unit in ('flops', 'bytes')]
  whole = ('collectives', 'widest', 'sorts')
  return giga + [f'{x[name]:,.0f}' if name in x else '' for name in whole]


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--rows', type=int, default=4096)
  parser.add_argument('--tokens', type=int, default=8192, help='of a row')
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--cpu_only', action='store_true', help='no pod')
  parser.add_argument('--compile_only', action='store_true', help='no clock')
  parser.add_argument('--check', action='store_true', help='exit 1 if broken')
  parser.add_argument('--json', type=pathlib.Path, help='write figures here')
  arguments = parser.parse_args()
  shape = arguments.rows, arguments.tokens
  if arguments.rows % (8 if arguments.cpu_only else CHIPS):
    parser.error(f'--rows must be a multiple of {CHIPS}, of 8 with --cpu_only')
  if arguments.compile_only:
    print(json.dumps(compiled(*shape)))
    return
  figures: dict = {'shape': shape}
  if not arguments.cpu_only and not importlib.util.find_spec('libtpu'):
    print("No libtpu, hence no pod: pip install 'jax_rlvr[plan]'")
  elif not arguments.cpu_only:
    figures['chip'] = on_a_pod(*shape)
    figures['update'] = {
      live: update_floor(math.prod(shape) * share)
      for live, share in (('all', 1), ('1/8', 1 / 8))
    }
  figures |= measure(*shape, arguments.repeats)
  figures['limits'] = limits(figures)
  show(figures)
  if arguments.json:
    arguments.json.write_text(json.dumps(figures, indent=2) + '\n')
  if arguments.check and not all(x['met'] for x in figures['limits']):
    raise SystemExit(1)


if __name__ == '__main__':
  main()
