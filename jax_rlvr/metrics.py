"""Scalars of each step: from the device to disk and console."""

from __future__ import annotations

import collections
import importlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import rich.console
import rich.progress
import tensorboardX


class Rows:
  """A JSONL file with one object a step."""

  def __init__(self, file: pathlib.Path, keep_to: int):
    """Opens the file to append, and cuts the rows of steps after `keep_to`.

    A resumed run writes those again. The cut file replaces the old one whole.
    `steps` are those that the file has.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    self.steps = set()
    if file.exists():
      kept = [row for row in read(file) if row['step'] <= keep_to]
      self.steps = {row['step'] for row in kept}
      new = file.with_suffix('.new')
      new.write_text(''.join(json.dumps(row) + '\n' for row in kept))
      new.replace(file)
    self._file = file.open('a')

  def write(self, row: Mapping[str, Any]) -> None:
    """Writes a row; it is on the disk when this returns."""
    self.steps.add(row['step'])
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()


class Log:
  """Scalars of steps in metrics.jsonl and eval.jsonl, TensorBoard, W&B."""

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    step: int,
    evaluated: bool,
    wandb: str = '',
  ):
    """Opens the logs of a run to go on after `step`.

    Args:
      workdir: of the run; its name is that of the W&B run.
      step: that the run goes on from; what was logged of later ones is cut.
      evaluated: keep the scores of `step` itself.
      wandb: project to log to; '' for none.
    """
    self.rows = Rows(workdir / 'metrics.jsonl', step)
    self.scores = Rows(workdir / 'eval.jsonl', step if evaluated else step - 1)
    self._board = tensorboardX.SummaryWriter(
      str(workdir / 'tensorboard'),
      purge_step=step + 1,
      filename_suffix=f'.{step}',
      flush_secs=10,
    )
    self._run = None
    if wandb:
      module = importlib.import_module('wandb')
      name = workdir.absolute().name
      self._run = module.init(
        project=wandb, id=name, name=name, dir=workdir, resume='allow'
      )

  def __enter__(self) -> Log:
    return self

  def __exit__(self, *_) -> None:
    self.rows.close()
    self.scores.close()
    self._board.close()
    if self._run is not None:
      self._run.finish()

  def step(self, step: int, scalars: Mapping[str, float]) -> None:
    """Logs what training measured in a step."""
    self.rows.write({'step': step} | dict(scalars))
    self._show(step, scalars)

  def evaluation(self, step: int, scalars: Mapping[str, float]) -> None:
    """Logs what an evaluation after a step measured."""
    self.scores.write({'step': step} | dict(scalars))
    self._show(step, scalars)

  def _show(self, step: int, scalars: Mapping[str, float]) -> None:
    for name, x in scalars.items():
      self._board.add_scalar(name, x, step)
    if self._run is not None:
      self._run.log(dict(scalars), step=step)


def read(file: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a JSONL file; a last line that was cut off is left out."""
  rows = []
  for line in file.read_text().splitlines():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows


def reduce(measured: Iterable[Mapping[str, Any]]) -> dict[str, float]:
  """One number per name from the dicts of a step's inner steps.

  `…/max` takes the maximum and `…/skipped` the sum; all others the mean of the
  inner steps that have it.
  """
  found = collections.defaultdict(list)
  for scalars in measured:
    for name, x in scalars.items():
      found[name].append(np.asarray(x))
  return {name: float(_how(name)(xs)) for name, xs in found.items()}


def _how(name: str):
  if name.endswith('/max'):
    return np.max
  return np.sum if name.endswith('/skipped') else np.mean


def progress(console: rich.console.Console) -> rich.progress.Progress:
  """A progress bar with ETA; tasks carry a `note` to show behind it."""
  return rich.progress.Progress(
    rich.progress.TextColumn('{task.description}'),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeElapsedColumn(),
    rich.progress.TimeRemainingColumn(),
    rich.progress.TextColumn('{task.fields[note]}'),
    console=console,
  )
