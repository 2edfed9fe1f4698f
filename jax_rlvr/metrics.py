"""Scalars of each step: from the device to disk and console."""

from __future__ import annotations

import collections
import contextlib
import importlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import rich.console
import rich.progress
import tensorboardX

from jax_rlvr import hosts, storage


class Rows:
  """A JSONL file with one object a step."""

  def __init__(self, file: storage.Path, keep_to: int):
    """Opens the file to append, and cuts the rows of steps after `keep_to`.

    A resumed run writes those again. The cut file replaces the old one whole.
    `steps` are those that the file has.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    self.steps = set()
    text = ''
    if file.exists():
      kept = [row for row in read(file) if row['step'] <= keep_to]
      self.steps = {row['step'] for row in kept}
      text = ''.join(json.dumps(row) + '\n' for row in kept)
      new = file.with_suffix('.new')
      new.write_text(text)
      new.replace(file)
    self._file = (
      _Whole(file, text) if storage.is_remote(file) else file.open('a')
    )

  def write(self, row: Mapping[str, Any]) -> None:
    """Writes a row; it is on the disk when this returns."""
    self.steps.add(row['step'])
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()
    if not isinstance(self._file, _Whole):
      os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()


class _Whole(io.StringIO):
  """A file in a bucket, where nothing can be appended: it is written anew."""

  def __init__(self, file: storage.Path, text: str):
    super().__init__()
    self._file_there = file
    self.write(text)

  def flush(self) -> None:
    self._file_there.write_text(self.getvalue())


class Log:
  """Scalars of steps in metrics.jsonl and eval.jsonl, TensorBoard, W&B.

  Of several hosts the first alone writes them.
  """

  def __init__(
    self,
    workdir: storage.Path,
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
    self._closing = contextlib.ExitStack()
    self.rows = self.scores = self._board = self._run = None
    if not hosts.is_leader():
      return
    opened = self._closing.enter_context
    self.rows = opened(
      contextlib.closing(Rows(workdir / 'metrics.jsonl', step))
    )
    self.scores = opened(
      contextlib.closing(
        Rows(workdir / 'eval.jsonl', step if evaluated else step - 1)
      )
    )
    self._board = opened(
      tensorboardX.SummaryWriter(
        str(workdir / 'tensorboard'),
        purge_step=step + 1,
        filename_suffix=f'.{step}',
        flush_secs=10,
      )
    )
    if wandb:
      module = importlib.import_module('wandb')
      name = workdir.name
      self._run = module.init(
        project=wandb,
        id=name,
        name=name,
        resume='allow',
        dir=None if storage.is_remote(workdir) else workdir,
      )
      self._closing.callback(self._run.finish)

  def __enter__(self) -> Log:
    return self

  def __exit__(self, *_) -> None:
    self._closing.close()

  def has_scores(self, step: int) -> bool:
    """Whether an evaluation after that step is logged, on any host."""
    mine = self.scores is not None and step in self.scores.steps
    return bool(hosts.any_of('evaluated', [mine])[0])

  def step(self, step: int, scalars: Mapping[str, float]) -> None:
    """Logs what training measured in a step."""
    if self.rows:
      self.rows.write({'step': step} | dict(scalars))
    self._show(step, scalars)

  def evaluation(self, step: int, scalars: Mapping[str, float]) -> None:
    """Logs what an evaluation after a step measured."""
    if self.scores:
      self.scores.write({'step': step} | dict(scalars))
    self._show(step, scalars)

  def _show(self, step: int, scalars: Mapping[str, float]) -> None:
    if self._board:
      for name, x in scalars.items():
        self._board.add_scalar(name, x, step)
    if self._run:
      self._run.log(dict(scalars), step=step)


def read(file: storage.Path) -> list[dict[str, Any]]:
  """The rows of a JSONL file; a last line that was cut off is left out."""
  rows = []
  for line in file.read_text().splitlines():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows


def logged(workdir: storage.Path) -> tuple[list[dict[str, Any]], ...]:
  """Rows of a run's metrics.jsonl and eval.jsonl; none of a missing one."""
  found = []
  for name in ('metrics.jsonl', 'eval.jsonl'):
    rows = []
    # Not asked before it is read: a run that begins again replaces its files.
    with contextlib.suppress(FileNotFoundError):
      rows = read(workdir / name)
    found.append(rows)
  return tuple(found)


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
