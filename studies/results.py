r"""Small files of what the runs of a study measured, and how to read them.

  python -m studies.results entropy_mechanism

keeps what the study needs of those of its runs, `runs/<name>` for each line of
`runs.txt`, that are done. All else is drawn and tabled from the files it makes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Callable, Sequence

import numpy as np
from scipy import special

from jax_rlvr import metrics
from jax_rlvr.analysis.entropy_law import ENTROPY

HERE = pathlib.Path(__file__).parent
STEPS = (
  'step',
  'reward/mean',
  ENTROPY,
  'covariance/mean',
  'covariance/prompts',
)
SCORES = 'avg@4', 'avg@8', 'pass@4', 'pass@8', 'entropy'


@dataclasses.dataclass(frozen=True)
class Run:
  """What one run measured.

  Attributes:
    rows: of metrics.jsonl, by step.
    evaluations: of eval.jsonl.
  """

  rows: list[dict]
  evaluations: list[dict]

  def at(self, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and what was measured at them.

    Args:
      field: of the rows, or of the evaluations: 'avg@8' of the one task.
    """
    rows = self.rows + self.evaluations
    ends = f'/{field}'
    found = [
      (row['step'], x)
      for row in rows
      for name, x in row.items()
      if name == field or (name.startswith('eval/') and name.endswith(ends))
    ]
    step, value = np.array(found, float).reshape(-1, 2).T
    return step, value

  def last(self, field: str, count: int = 1) -> float:
    """Mean of the last so many, which one measurement is too noisy for."""
    return float(self.at(field)[1][-count:].mean())


def entropy(run: Run) -> float:
  """At the end, nats, of the rollouts of the last tenth of the steps."""
  return run.last(ENTROPY, max(len(run.rows) // 10, 1))


def read(study: str) -> dict[str, dict[int, Run]]:
  """Runs by 'policy/method', and by seed."""
  found = {}
  for file in sorted((HERE / study / 'results').glob('*/*.json')):
    name, _, seed = file.stem.rpartition('.')
    kept = json.loads(file.read_text())
    run = Run(*(_rows(kept[part]) for part in ('rows', 'evaluations')))
    found.setdefault(f'{file.parent.name}/{name}', {})[int(seed)] = run
  return found


def interval(values: Sequence[float], level: float = 0.95) -> tuple:
  """Mean over seeds and half the width of its interval, by Student's t."""
  values = np.asarray(values, float)
  if len(values) < 2:
    return float(values.mean()), math.nan
  quantile = special.stdtrit(len(values) - 1, (1 + level) / 2)
  half = quantile * values.std(ddof=1) / math.sqrt(len(values))
  return float(values.mean()), float(half)


def shown(values: Sequence[float], digits: int = 2) -> str:
  """Mean ± half width; of one seed the value."""
  mean, half = interval(values)
  if math.isnan(half):
    return f'{mean:.{digits}f}'
  return f'{mean:.{digits}f} ± {half:.{digits}f}'


def difference(
  method: dict[int, Run], other: dict[int, Run], of: Callable[[Run], float]
) -> list[float]:
  """Of the seeds that both have: they begin with the same policy."""
  return [of(method[s]) - of(other[s]) for s in sorted(method) if s in other]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """In Markdown."""
  lines = [header, ['---'] * len(header), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def with_tables(text: str, tables: dict[str, str]) -> str:
  """A README with each table between its marks.

  Raises:
    ValueError: it lacks a mark.
  """
  for name, lines in tables.items():
    start, end = f'<!-- {name} -->', f'<!-- end of {name} -->'
    head, found, rest = text.partition(start)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
      raise ValueError(f'no {start} … {end}')
    text = f'{head}{start}\n\n{lines}\n\n{end}{tail}'
  return text


def draw(axis, step, seeds: Sequence[np.ndarray], colour, label: str) -> None:
  """Seeds thin, their mean thick, and how many they are in the label."""
  for value in seeds:
    axis.plot(step, value, color=colour, alpha=0.3, lw=0.8)
  mean = np.mean(seeds, axis=0)
  axis.plot(step, mean, color=colour, label=f'{label} ({len(seeds)})')


def draw_runs(axis, runs: dict[int, Run], field: str, colour, label) -> None:
  """As `draw`, a field of runs by seed."""
  steps, seeds = zip(*(run.at(field) for run in runs.values()), strict=True)
  draw(axis, steps[0], seeds, colour, label)


def present(
  study: str, tables: dict[str, str], figures: Callable[[], None]
) -> None:
  """Writes the tables into the README; --figures draws the figures too."""
  readme = HERE / study / 'README.md'
  readme.write_text(with_tables(readme.read_text(), tables))
  if '--figures' in sys.argv:
    figures()


def _rows(columns: dict[str, list]) -> list[dict]:
  return [
    {name: x for name, x in zip(columns, values, strict=True) if x is not None}
    for values in zip(*columns.values(), strict=True)
  ]


def _columns(rows: list[dict], names: Sequence[str]) -> dict[str, list]:
  def rounded(x):
    return x if x is None or isinstance(x, int) else float(f'{x:.4g}')

  there = [name for name in names if any(name in row for row in rows)]
  return {name: [rounded(row.get(name)) for row in rows] for name in there}


def is_done(run: pathlib.Path) -> bool:
  _, evaluations = metrics.logged(run)
  if not evaluations:
    return False
  steps = json.loads((run / 'manifest.json').read_text())['steps']
  return evaluations[-1]['step'] == steps


def gather(run: pathlib.Path) -> dict:
  """The columns that are kept of a run: what all need, and what filters say."""
  rows, evaluations = metrics.logged(run)
  scores = sorted(n for n in evaluations[0] if n.split('/')[-1] in SCORES)
  parts = '/kept', '/selected', '/below_mean', '/probability', '/threshold'
  reported = sorted(n for n in rows[-1] if n.endswith(parts))
  return {
    'rows': _columns(rows, [*STEPS, *reported]),
    'evaluations': _columns(evaluations, ['step', *scores]),
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    prog='python -m studies.results',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('study')
  parser.add_argument('--runs', type=pathlib.Path, default='runs')
  arguments = parser.parse_args()
  folder = HERE / arguments.study
  for line in (folder / 'runs.txt').read_text().splitlines():
    name, _ = line.split()
    policy, method, seed = name.split('/')
    if not is_done(arguments.runs / name):
      print(f'not done: {name}')
      continue
    file = folder / 'results' / policy / f'{method}.{seed}.json'
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = json.dumps(gather(arguments.runs / name), separators=(',', ':'))
    file.write_text(kept + '\n')


if __name__ == '__main__':
  main()
