r"""A run's numbers in the terminal, as they grow.

  python -m jax_rlvr.watch runs/quickstart

Reward, entropy, KL, lengths, shares that filters keep, the last evaluation, and
the entropy law with what it predicts. It warns where entropy is on its way to
the end: where, as it falls now, the law has almost no score left to gain within
`--within` steps. Ends with the run, or with Ctrl-C. Exit codes: 0; 2 there is
no run, or nothing in it yet.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.live
import rich.markup
import rich.table

from jax_rlvr import metrics, scores, storage
from jax_rlvr.analysis import entropy_law, least_squares
from jax_rlvr.analysis.entropy_law import Law, Trend

# Names in the order they are shown; those of filters follow.
_SHOWN = (
  'reward/mean', 'entropy/sequence_mean', 'entropy/p80', 'length/mean',
  'length/clipped_share', 'groups/zero_variance_share', 'kl/old',
  'kl/reference', 'ratio/max', 'covariance/mean', 'covariance/prompts',
  'grad_norm', 'update/skipped', 'time/rollout_s', 'time/update_s',
  'time/rollout_tokens_per_s',
)  # fmt: skip
_BLOCKS = '▁▂▃▄▅▆▇█'


class NothingThere(ValueError):
  """There is no run, or nothing in it yet: one line."""


@dataclasses.dataclass(frozen=True)
class Logs:
  """What a run has written so far.

  Attributes:
    rows: of metrics.jsonl, one at least.
    evaluations: of eval.jsonl.
    steps: that the run is to have; None where its manifest does not say.
  """

  rows: Sequence[Mapping[str, Any]]
  evaluations: Sequence[Mapping[str, Any]]
  steps: int | None = None

  @property
  def done(self) -> bool:
    """Whether the last step is logged, and its evaluation."""
    last = self.rows[-1]['step']
    evaluated = {each['step'] for each in self.evaluations}
    return last == self.steps and last in evaluated


def read(run: storage.Path) -> Logs:
  """Reads the logs of a run directory.

  Raises:
    NothingThere: there is no such directory, or no step in it yet.
  """
  rows, evaluations = metrics.logged(run)
  if not rows:
    missing = 'no step is logged yet' if run.exists() else 'no such folder'
    raise NothingThere(f'nothing to watch in {run}: {missing}')
  steps = None
  with contextlib.suppress(FileNotFoundError):
    steps = json.loads((run / 'manifest.json').read_text()).get('steps')
  return Logs(rows, evaluations, steps)


def sparkline(values: Iterable[float], width: int = 24) -> str:
  """A curve of at most so many characters, means of equal stretches of it.

  What is not finite is a gap.

  >>> sparkline([0, 1, 2, 3, float('nan'), 7])
  '▁▂▃▄ █'
  """
  values = np.array(list(values), float)
  parts = np.array_split(values, min(width, len(values)) or 1)
  found = [part[np.isfinite(part)] for part in parts]
  means = np.array([part.mean() if part.size else math.nan for part in found])
  finite = means[np.isfinite(means)]
  if not finite.size:
    return ' ' * len(means)
  low, high = finite.min(), finite.max()
  scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
  return ''.join(
    _BLOCKS[round((x - low) * scale)] if math.isfinite(x) else ' '
    for x in means
  )


def law_of(logs: Logs) -> tuple[Law, Trend] | None:
  """The law of all evaluations so far, and the entropy's trend, if they are."""
  pairs = entropy_law.pairs(logs.rows, logs.evaluations)
  try:
    law = entropy_law.fit(pairs.entropy, pairs.score)
    return law, entropy_law.trend(*entropy_law.entropies(logs.rows))
  except ValueError:  # Too few, or all at one entropy.
    return None


def warning(logs: Logs, within: int) -> str:
  """What to say of an entropy that is about to be used up; '' of others.

  Nothing as long as the evaluations do not tell, at 95 %, that the score rises
  as entropy falls: a law of noise has little to gain anywhere.

  Args:
    logs: of a run.
    within: steps that are soon.
  """
  found = law_of(logs)
  if found is None:
    return ''
  law, trend = found
  _, slope = law.line.slope_band()
  if slope >= 0:
    return ''
  left = entropy_law.steps_to_ceiling(law, trend)
  if left > within:
    return ''
  now = trend.at(trend.now)
  if not left:
    return (
      f'entropy is used up: at {now:.3f} nats the law has less than 0.01 left '
      f'to gain to its ceiling of {law.ceiling:.3f}'
    )
  return (
    f'entropy is collapsing: from {now:.3f} nats the score comes to within '
    f'0.01 of its predicted ceiling of {law.ceiling:.3f} in about '
    f'{math.ceil(left)} steps'
  )


def frame(logs: Logs, name: str, within: int = 100) -> rich.console.Group:
  """All of it, to print with rich.

  Args:
    logs: of a run.
    name: of the run, in the first line.
    within: as in `warning`.
  """
  parts: list[Any] = [_head(logs, name), _curves(logs)]
  if logs.evaluations:
    last = logs.evaluations[-1]
    parts.append(f'held out, after {last["step"]} steps:')
    parts.append(scores.tables(last))
  parts.append(_law(logs))
  if said := warning(logs, within):
    parts.append(f'[bold yellow]warning[/]: {said}')
  return rich.console.Group(*parts)


def _head(logs: Logs, name: str) -> str:
  step = logs.rows[-1]['step']
  seconds = [
    row.get('time/rollout_s', math.nan) + row.get('time/update_s', math.nan)
    for row in logs.rows[-20:]
  ]
  pace = float(np.median(seconds))
  text = f'[bold]{rich.markup.escape(name)}[/]  step {step}'
  if logs.steps:
    text += f' of {logs.steps}'
  if math.isfinite(pace):
    text += f', {_number(pace)} s a step'
    if logs.steps and logs.steps > step:
      text += f', {_duration((logs.steps - step) * pace)} to go'
  return text


def _duration(seconds: float) -> str:
  minutes = math.ceil(seconds / 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes} min' if hours else f'{minutes} min'


def _curves(logs: Logs) -> rich.table.Table:
  table = rich.table.Table(
    'metric', 'first', 'now', 'all steps',
    box=rich.box.SIMPLE, padding=(0, 1), show_edge=False,
  )  # fmt: skip
  table.columns[1].justify = table.columns[2].justify = 'right'
  there = {name: None for row in logs.rows for name in row}
  filters = [name for name in there if name.startswith('filters/')]
  for name in [*filter(there.__contains__, _SHOWN), *filters]:
    values = [row.get(name, math.nan) for row in logs.rows]
    curve = sparkline(values)
    table.add_row(name, _number(values[0]), _number(values[-1]), curve)
  return table


def _number(value: float) -> str:
  return f'{value:.4g}' if math.isfinite(value) else '–'


def _law(logs: Logs) -> str:
  found = law_of(logs)
  if found is None:
    return (
      'entropy law: not before '
      f'{least_squares.LEAST_POINTS} evaluations have a next step'
    )
  law, trend = found
  low, high = law.band(0.0)
  text = (
    f'entropy law: R = {-law.a:.3f} · e^H + {law.b:.3f}, '
    f'R² {law.line.r2:.3f} of {law.line.freedom + 2} evaluations\n'
    f'ceiling {law.ceiling:.3f} (95 %: {low:.3f} to {high:.3f})'
  )
  if logs.steps:
    entropy = trend.at(logs.steps + 1)
    text += (
      f', predicted after {logs.steps} steps {float(law.score(entropy)):.3f} '
      f'at {entropy:.3f} nats'
    )
  return text


def main(argv: Sequence[str] | None = None) -> int:
  """The command; returns its exit code."""
  parser = argparse.ArgumentParser(
    prog='python -m jax_rlvr.watch',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('run', help='folder, or gs://bucket/folder')
  parser.add_argument('--once', action='store_true', help='show it and end')
  parser.add_argument('--every', type=float, default=2.0, help='seconds')
  parser.add_argument(
    '--within', type=int, default=100, help='steps, to warn of a collapse'
  )
  arguments = parser.parse_args(argv)
  console = rich.console.Console()
  try:
    run = storage.path(arguments.run)
    logs = read(run)
  except (NothingThere, OSError, ImportError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2

  def shown():
    return frame(logs, arguments.run, arguments.within)

  if arguments.once:
    console.print(shown())
    return 0
  with (
    contextlib.suppress(KeyboardInterrupt),
    rich.live.Live(shown(), console=console, auto_refresh=False) as live,
  ):
    while not logs.done:
      time.sleep(arguments.every)
      # A run that is begun again may have cut its logs for a moment.
      with contextlib.suppress(NothingThere):
        logs = read(run)
      live.update(shown(), refresh=True)
  return 0


if __name__ == '__main__':
  sys.exit(main())
