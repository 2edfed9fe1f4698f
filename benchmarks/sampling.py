"""How fast the sampler is: beside peers, and beside what the machine can do.

  python benchmarks/sampling.py --hf-python VENV/bin/python \\
    --tunix-python VENV/bin/python

Hugging Face `generate`, Tunix's vanilla sampler and this project's take turns
on random weights of a 135 M Llama shape, in float32 and on two cores. Each has
a process and an environment of its own (`peers/`). All complete the same
prompts; how long each completion gets is settled beforehand.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import importlib
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import time

import numpy as np

RESULTS = pathlib.Path(__file__).parent / 'results' / 'sampling.json'
CORES = 2

SMOLLM2 = {
  'vocab_size': 49_152,
  'layers': 30,
  'width': 576,
  'heads': 9,
  'kv_heads': 3,
  'head_size': 64,
  'feed_forward': 1536,
}
TOY = {
  'vocab_size': 512,
  'layers': 2,
  'width': 64,
  'heads': 2,
  'kv_heads': 1,
  'head_size': 32,
  'feed_forward': 128,
}

# How many times as fast as whom we mean to be.
TARGETS = {
  'uniform': {'hf': 1.7, 'tunix': 1.6},
  'shared': {'tunix': 2.0},
  'tail': {'static': 2.2, 'hf': 3.0, 'tunix': 3.0},
}
# How close decoding is to come to its bare weight products, %.
SHARES = {'wall': 65, 'cpu': 75}

LABELS = {
  'ours': 'ours',
  'static': 'our static batches',
  'hf': 'HF generate',
  'tunix': 'Tunix',
}
UNITS = {'wall': 'wall-ms/token', 'cpu': 'CPU-ms/token'}


@dataclasses.dataclass(frozen=True)
class Work:
  """Completions to make.

  Attributes:
    prompts: all of one length.
    samples: completions a prompt.
    lengths: tokens of completion i, which is of prompt i // samples.
    slots: sequences decoded at one time, or rows of a batch.
  """

  prompts: list[list[int]]
  samples: int
  lengths: list[int]
  slots: int

  def of_length(self, length: int) -> Work:
    return dataclasses.replace(self, lengths=[length] * len(self.lengths))


def all_work(tiny: bool) -> dict[str, Work]:
  """Work by the name of its workload."""
  rng = np.random.default_rng(0)
  shape = TOY if tiny else SMOLLM2

  def work(prompts, tokens, samples, slots, lengths):
    ids = rng.integers(2, shape['vocab_size'], (prompts, tokens)).tolist()
    return Work(ids, samples, lengths, slots)

  if tiny:
    return {
      'uniform': work(4, 8, 1, 4, [6] * 4),
      'shared': work(2, 16, 2, 4, [4] * 4),
      'tail': work(4, 8, 2, 4, long_tail(8, 2)),
    }
  return {
    'uniform': work(32, 64, 1, 32, [128] * 32),
    'shared': work(8, 256, 8, 64, [64] * 64),
    'tail': work(16, 64, 8, 32, long_tail(128, 32)),
  }


def long_tail(count: int, median: int) -> list[int]:
  """Lognormal lengths in random order; the longest is 8 medians."""
  noise = np.random.default_rng(0).standard_normal(count)
  noise -= np.median(noise)
  lengths = median * np.exp(noise * np.log(8) / noise.max())
  return np.maximum(1, np.rint(lengths)).astype(int).tolist()


# Processes that take turns


class Contestant:
  """A process that does work when asked, and times itself."""

  def __init__(self, name: str, python: str, tiny: bool):
    self._process = subprocess.Popen(
      [python, __file__, f'--worker={name}'] + ['--tiny'] * tiny,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self.versions = self._answer()

  def run(self, how: str, work: Work) -> dict:
    request = {'how': how} | dataclasses.asdict(work)
    self._process.stdin.write(json.dumps(request) + '\n')
    self._process.stdin.flush()
    return self._answer()

  def _answer(self) -> dict:
    line = self._process.stdout.readline()
    if not line:
      raise OSError(f'it stopped with exit code {self._process.wait()}')
    return json.loads(line)


def serve(name: str, shape: dict) -> None:
  """A contestant's side: a line of JSON for each line of JSON."""
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # whatever libraries print

  def answer(found):
    answers.write(json.dumps(found) + '\n')
    answers.flush()

  versions, runs = importlib.import_module(f'peers.{name}').build(shape)
  answer(versions)
  for line in sys.stdin:
    request = json.loads(line)
    run = runs[request.pop('how')]
    request['prompts'] = np.array(request['prompts'])
    wall, cpu = time.perf_counter(), time.process_time()
    made = run(**request)
    answer(
      {
        'wall': time.perf_counter() - wall,
        'cpu': time.process_time() - cpu,
        'made': made,
      }
    )


def contestants(pythons: dict, tiny: bool) -> dict[str, Contestant]:
  """Those that are there."""
  found = {}
  for name, python in pythons.items():
    try:
      if python is None:
        raise OSError(f'no --{name}-python was given')
      found[name] = Contestant(name, python, tiny)
    except OSError as error:
      if name == 'ours':
        raise
      print(f'Without {LABELS[name]}: {error}')
  return found


def measure(title: str, turns: dict, repeats: int) -> dict:
  """Median wall and CPU seconds of each (contestant, how, work)."""
  seconds = collections.defaultdict(list)
  for repeat in range(repeats + 1):
    for name, (contestant, how, work) in turns.items():
      found = contestant.run(how, work)
      assert found.pop('made') == to_make(how, work), (title, name)
      if repeat:  # the first one compiles
        seconds[name].append(found)
      print(
        f'{title}, {repeat or "warm-up"}, {name}: '
        f'{found["wall"]:.2f} s wall, {found["cpu"]:.2f} s CPU',
        flush=True,
      )
  return {
    name: {
      clock: statistics.median(x[clock] for x in all_found) for clock in UNITS
    }
    for name, all_found in seconds.items()
  }


def to_make(how: str, work: Work) -> list[int]:
  """Tokens that each completion has in the end, those of no use included."""
  if how.startswith('bare'):
    return []
  if how == 'ours':
    return work.lengths
  batches = [
    work.lengths[start : start + work.slots]
    for start in range(0, len(work.lengths), work.slots)
  ]
  return [max(batch) for batch in batches for _ in batch]


# What is found


def row(name: str, value: float, unit: str, target: float | None = None):
  met = None if target is None else value >= target
  return {'name': name, 'value': value, 'unit': unit} | {
    'target': target,
    'met': met,
  }


def compared(title: str, work: Work, there: dict, repeats: int) -> list[dict]:
  """Rows of a workload: milliseconds a token, and who is how much faster."""
  # Static batches are run by our own process.
  by = {name: there.get(name, there['ours']) for name in LABELS}
  names = [
    name
    for name in ('ours', *TARGETS[title])
    if name in there or name == 'static'
  ]
  seconds = measure(
    title, {name: (by[name], name, work) for name in names}, repeats
  )
  rows = [
    row(
      f'{title}: {LABELS[name]}',
      1e3 * seconds[name][clock] / sum(work.lengths),
      unit,
    )
    for name in names
    for clock, unit in UNITS.items()
  ]
  for name, target in TARGETS[title].items():
    for clock in UNITS if name in seconds else ():
      ratio = seconds[name][clock] / seconds['ours'][clock]
      label = f'{title}: {LABELS[name]} / ours, {clock}'
      rows.append(row(label, ratio, '×', target))
  return rows


def share_of_limit(work: Work, there: dict, repeats: int) -> list[dict]:
  """Rows of decoding beside its bare weight products."""
  us = there['ours']
  turns = {
    'ours': (us, 'ours', work),
    'ours, first token': (us, 'ours', work.of_length(1)),
    'products, scanned': (us, 'bare_scanned', work),
    'products, unrolled': (us, 'bare_unrolled', work),
    'products, turned': (us, 'bare_turned', work),
  }
  seconds = measure('limit', turns, repeats)
  tokens = sum(work.lengths) - len(work.lengths)
  rows = []
  for clock, unit in UNITS.items():
    whole, first, *products = (seconds[name][clock] for name in turns)
    rows.append(
      row('limit: our decoding', 1e3 * (whole - first) / tokens, unit)
    )
    for name, x in zip(list(turns)[2:], products, strict=True):
      rows.append(row(f'limit: {name}', 1e3 * x / tokens, unit))
    share = 100 * min(products) / (whole - first)
    rows.append(
      row(f'limit: share of it reached, {clock}', share, '%', SHARES[clock])
    )
  return rows


def environment(there: dict, repeats: int) -> dict:
  versions = {}
  for contestant in there.values():
    versions |= contestant.versions
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
  models = [
    x.split(':')[1].strip() for x in lines if x.startswith('model name')
  ]
  return {
    'machine': ' '.join([platform.system(), platform.machine(), *models[:1]]),
    'cpu_count': os.cpu_count(),
    'cores_used': CORES,
    'load': os.getloadavg()[0],
    'python': platform.python_version(),
    **versions,
    'repeats': repeats,
    'command': shlex.join(['python', *sys.argv]),
    'date': datetime.date.today().isoformat(),
  }


def show(rows: list[dict]) -> None:
  # A contestant's environment need not have it.
  import rich
  from rich.table import Table

  table = Table('', title='Sampling')
  for heading in ('value', 'unit', 'target', ''):
    table.add_column(heading, justify='right')
  for x in rows:
    held = x['target'] is not None
    table.add_row(
      x['name'],
      f'{x["value"]:.3g}',
      x['unit'],
      f'{x["target"]:g}' if held else '',
      ('met' if x['met'] else 'MISSED') if held else '',
    )
  rich.print(table)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--hf-python', help='of an environment that has it')
  parser.add_argument('--tunix-python', help='of an environment that has it')
  parser.add_argument('--repeats', type=int, default=3)
  workloads = [*TARGETS, 'limit']
  parser.add_argument('--only', nargs='+', choices=workloads, default=workloads)
  parser.add_argument('--tiny', action='store_true', help='a toy, for a test')
  parser.add_argument('--json', type=pathlib.Path, default=RESULTS)
  parser.add_argument('--worker', help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.worker:
    serve(arguments.worker, TOY if arguments.tiny else SMOLLM2)
    return
  if hasattr(os, 'sched_setaffinity'):  # contestants inherit it
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
  pythons = {
    'ours': sys.executable,
    'hf': arguments.hf_python,
    'tunix': arguments.tunix_python,
  }
  there = contestants(pythons, arguments.tiny)
  work = all_work(arguments.tiny)
  rows = []
  for title in arguments.only:
    if title == 'limit':
      rows += share_of_limit(work['uniform'], there, arguments.repeats)
    else:
      rows += compared(title, work[title], there, arguments.repeats)
  show(rows)
  found = {'environment': environment(there, arguments.repeats), 'rows': rows}
  arguments.json.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(found, indent=2, ensure_ascii=False)
  arguments.json.write_text(text + '\n', encoding='utf-8')


if __name__ == '__main__':
  main()
