"""What a run leaves on disk: checkpoints, and a manifest to read them by.

Checkpoints are Orbax's, written whole or not at all. Each step has four items:
`params`, a plain nested dict that Orbax restores without this package,
`training`, the other arrays of the TrainState, `carried`, its completions that
go on, as JSON, and `checksums` of all of these. Nothing here is a pickle.
"""

from __future__ import annotations

import contextlib
import json
import logging
import operator
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jax_rlvr import hosts, storage
from jax_rlvr import mesh as layouts
from jax_rlvr.checksum import checksums
from jax_rlvr.config import ConfigError
from jax_rlvr.policy import Params, PolicyConfig, abstract_params
from jax_rlvr.records import TrainState

_log = logging.getLogger(__name__)


class Checkpoints:
  """The checkpoints of one folder. Saving goes on in the background.

  One process saves; others may read meanwhile.
  """

  def __init__(
    self,
    folder: storage.Path,
    keep: int | None = None,
    *,
    keep_every: int = 0,
    keep_best: str = '',
  ):
    """Opens the folder.

    Args:
      folder: of the checkpoints; to save, it need not exist.
      keep: newest ones kept; all if None. What a save that was killed has left
        is removed where there is a number: only one that saves gives it.
      keep_every: those of multiples of so many steps are kept too; 0 for none.
      keep_best: the one highest in this of the `scores` that `save` is given is
        kept too; '' for none.
    """
    self.folder = storage.path(folder)
    policies: list[preservation_policy.PreservationPolicy]
    policies = [preservation_policy.LatestN(keep)]
    if keep_every:
      policies.append(preservation_policy.EveryNSteps(keep_every))
    best = None
    if keep_best:
      best = operator.itemgetter(keep_best)
      policies.append(
        preservation_policy.BestN(
          get_metric_fn=best, n=1, keep_checkpoints_without_metrics=False
        )
      )
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
        best_fn=best,
        cleanup_tmp_directories=keep is not None,
      ),
    )

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    with contextlib.suppress(Exception) if kind else self._writing():
      self._manager.close()

  def steps(self) -> list[int]:
    """Steps that were committed, oldest first."""
    return sorted(self._manager.all_steps())

  def save(
    self, state: TrainState, scores: Mapping[str, float] | None = None
  ) -> None:
    """Starts to save; arrays are copied first, so the state may be donated.

    Args:
      state: to save, as the checkpoint of its step.
      scores: of an evaluation of it, for `keep_best`.

    Raises:
      ConfigError: this one or the one before cannot be written.
    """
    items = ocp.args.Composite(
      params=ocp.args.StandardSave(state.params),
      training=ocp.args.StandardSave(_training(state)),
      carried=ocp.args.JsonSave({'groups': state.carried}),
      checksums=ocp.args.JsonSave(_checksums(state)),
    )
    with self._writing():
      self._manager.save(
        int(state.step), args=items, metrics=dict(scores) if scores else None
      )

  def wait(self) -> None:
    """Returns when all that was saved is committed.

    Raises:
      ConfigError: it cannot be written.
    """
    with self._writing():
      self._manager.wait_until_finished()

  @contextlib.contextmanager
  def _writing(self):
    try:
      yield
    except Exception as error:  # Orbax raises many kinds for a full disk.
      have = ', '.join(map(str, self.steps())) or 'none'
      raise ConfigError(
        f'a checkpoint cannot be written to {self.folder} ({_reason(error)}); '
        f'whole ones there: {have}; make room and run again'
      ) from error

  def restore(self, abstract: TrainState, step: int | None = None):
    """The state saved at `step` (the latest if None), laid out as `abstract`.

    Where the latest is damaged, it is set aside and the one before restored.

    Args:
      abstract: ShapeDtypeStructs, with shardings, for every leaf.
      step: one of `steps()`.

    Raises:
      ConfigError: no such checkpoint, or none that can be read.
    """
    while True:
      found = self._step(step)
      try:
        with hosts.all_or_none('restoring'):
          return self._restore_state(abstract, found)
      except ConfigError as error:
        if step is not None or len(self.steps()) == 1:
          raise
        aside = self._set_aside(found)
        _log.error(
          '%s; it is in %s now, and the one of step %d is taken',
          error, aside, self.steps()[-1],
        )  # fmt: skip

  def _restore_state(self, abstract: TrainState, step: int) -> TrainState:
    restored = self._read(
      step,
      params=ocp.args.StandardRestore(abstract.params),
      training=ocp.args.StandardRestore(_training(abstract)),
      carried=ocp.args.JsonRestore(),
    )
    state = TrainState(
      params=restored['params'],
      carried=tuple(restored['carried']['groups']),
      **restored['training'],
    )
    self._check(step, _checksums(state), restored['checksums'])
    return state

  def restore_params(self, abstract: Any, step: int | None = None) -> Any:
    """As `restore`, for the params alone; a damaged one is refused."""
    step = self._step(step)
    restored = self._read(step, params=ocp.args.StandardRestore(abstract))
    params = restored['params']
    self._check(step, checksums({'params': params}), restored['checksums'])
    return params

  def _step(self, step: int | None) -> int:
    steps = self.steps()
    if step is None and steps:
      return steps[-1]
    if step not in steps:
      have = ', '.join(map(str, steps)) or 'none'
      raise ConfigError(
        f'no checkpoint of step {step} in {self.folder}; there: {have}'
      )
    return step

  def _read(self, step: int, **items) -> Any:
    items['checksums'] = ocp.args.JsonRestore()
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax raises many kinds for a damaged file.
      raise self._damaged(step, _reason(error)) from error

  def _check(self, step: int, found: dict, saved: dict) -> None:
    wrong = [name for name, value in found.items() if saved.get(name) != value]
    if wrong:
      raise self._damaged(step, f'{wrong[0]} is not what was saved')

  def _damaged(self, step: int, reason: str) -> ConfigError:
    return ConfigError(
      f'checkpoint {self.folder / str(step)} is damaged ({reason}); take '
      'another step'
    )

  def _set_aside(self, step: int) -> storage.Path:
    """Moves a checkpoint out of the way of those to come."""
    aside = self.folder.with_name(f'{self.folder.name}_damaged')
    place = aside
    with hosts.all_or_none('setting a checkpoint aside'):
      if hosts.is_leader():
        aside.mkdir(exist_ok=True)
        place = aside / f'{step}-{len(list(aside.iterdir()))}'
        (self.folder / str(step)).rename(place)
    self._manager.reload()
    return place


def _reason(error: Exception) -> str:
  return str(error).strip().split('\n')[0][:200] or type(error).__name__


def _checksums(state: TrainState) -> dict[str, int]:
  """Of all that is saved, by the paths they have there."""
  text = json.dumps(state.carried, sort_keys=True)
  return checksums({'params': state.params, 'training': _training(state)}) | {
    'carried': zlib.crc32(text.encode())
  }


def _training(state: TrainState) -> dict[str, Any]:
  arrays = state._asdict()
  return {k: arrays[k] for k in ('step', 'cursor', 'optimizer', 'filters')}


def save_reference(
  workdir: storage.Path, step: int, params: Params, oldest: int | None = None
) -> None:
  """Writes params that serve as reference policy from a step on.

  Args:
    workdir: of the run.
    step: from which on.
    params: as they are computed with.
    oldest: step of the oldest checkpoint: earlier references than it needs are
      deleted.

  Raises:
    ConfigError: they cannot be written.
  """
  folder = storage.path(workdir) / 'reference'
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(folder / str(step), params, force=True)
  except Exception as error:
    raise ConfigError(
      f'the reference policy cannot be written to {folder} ({_reason(error)}); '
      'make room and run again'
    ) from error
  if not hosts.is_leader():
    return
  steps = _references(folder)
  needed = max([s for s in steps if s <= (oldest or 0)], default=0)
  for old in steps:
    if old < needed:
      epath.Path(folder / str(old)).rmtree()


def read_reference(workdir: storage.Path, step: int, abstract: Any) -> Params:
  """The reference policy of a step, laid out as `abstract`.

  Raises:
    ConfigError: there is none, or it cannot be read.
  """
  folder = storage.path(workdir) / 'reference'
  steps = [s for s in _references(folder) if s <= step]
  if not steps:
    raise ConfigError(f'no reference policy for step {step} in {folder}')
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(folder / str(steps[-1]), abstract)
  except Exception as error:
    raise ConfigError(
      f'the reference policy {folder / str(steps[-1])} cannot be read '
      f'({_reason(error)})'
    ) from error


def _references(folder: storage.Path) -> list[int]:
  return sorted(int(f.name) for f in folder.iterdir() if f.name.isdigit())


def abstract_like(state: Any) -> Any:
  """ShapeDtypeStructs of a tree of arrays, with shardings where they have."""

  def one(x):
    sharding = getattr(x, 'sharding', None)  # Counters are host scalars.
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(one, state)


def read_params(
  workdir: storage.Path,
  policy: PolicyConfig,
  mesh: Mesh,
  table: layouts.Table,
  step: int | None = None,
) -> tuple[Params, int]:
  """A run's parameters on their devices, and the step that they are of.

  Args:
    workdir: of the run.
    policy: its shape.
    mesh: the devices.
    table: how parameters lie on them.
    step: of the checkpoint; the latest if None.

  Raises:
    ConfigError: no such checkpoint, or one that cannot be read.
  """
  abstract = layouts.abstract(mesh, abstract_params(policy), table)
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    params = checkpoints.restore_params(abstract, step)
    return params, checkpoints.steps()[-1] if step is None else step
