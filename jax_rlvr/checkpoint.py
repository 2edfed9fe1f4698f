"""What a run leaves on disk: checkpoints, and a manifest to read them by.

Checkpoints are Orbax's, written whole or not at all. Each step has three items:
`params`, a plain nested dict that Orbax restores without this package,
`training`, the other arrays of the TrainState, and `carried`, its completions
that go on, as JSON. Nothing here is a pickle.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from jax_rlvr import mesh as layouts
from jax_rlvr import tokenizer as tokenizers
from jax_rlvr.config import ConfigError, Recipe, Task
from jax_rlvr.policy import Params, PolicyConfig, abstract_params
from jax_rlvr.records import TrainState
from jax_rlvr.tokenizer import Tokenizer


class Checkpoints:
  """The checkpoints of one folder. Saving goes on in the background."""

  def __init__(self, folder: pathlib.Path, keep: int | None = None):
    self.folder = pathlib.Path(folder).absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep)
    self._manager = ocp.CheckpointManager(self.folder, options=options)

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._manager.close()

  def steps(self) -> list[int]:
    """Steps that were committed, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, state: TrainState) -> None:
    """Starts to save; arrays are copied first, so the state may be donated."""
    items = ocp.args.Composite(
      params=ocp.args.StandardSave(state.params),
      training=ocp.args.StandardSave(_training(state)),
      carried=ocp.args.JsonSave({'groups': state.carried}),
    )
    self._manager.save(int(state.step), args=items)

  def wait(self) -> None:
    """Returns when all that was saved is committed."""
    self._manager.wait_until_finished()

  def restore(self, abstract: TrainState, step: int | None = None):
    """The state saved at `step` (the latest if None), laid out as `abstract`.

    Args:
      abstract: ShapeDtypeStructs, with shardings, for every leaf.
      step: one of `steps()`.

    Raises:
      ConfigError: no such checkpoint, or one that cannot be read.
    """
    restored = self._restore(
      step,
      params=ocp.args.StandardRestore(abstract.params),
      training=ocp.args.StandardRestore(_training(abstract)),
      carried=ocp.args.JsonRestore(),
    )
    return TrainState(
      params=restored['params'],
      carried=tuple(restored['carried']['groups']),
      **restored['training'],
    )

  def restore_params(self, abstract: Any, step: int | None = None) -> Any:
    """As `restore`, for the params alone."""
    item = ocp.args.StandardRestore(abstract)
    return self._restore(step, params=item)['params']

  def _restore(self, step, **items):
    steps = self.steps()
    if step is None:
      step = steps[-1] if steps else None
    if step not in steps:
      have = ', '.join(map(str, steps)) or 'none'
      raise ConfigError(
        f'no checkpoint of step {step} in {self.folder}; there: {have}'
      )
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax raises many kinds for a damaged file.
      reason = str(error).strip().split('\n')[0][:200]
      raise ConfigError(
        f'checkpoint {self.folder / str(step)} cannot be read ({reason}); '
        'remove it to go on from the one before'
      ) from error


def _training(state: TrainState) -> dict[str, Any]:
  arrays = state._asdict()
  return {k: arrays[k] for k in ('step', 'cursor', 'optimizer', 'filters')}


def abstract_like(state: Any) -> Any:
  """ShapeDtypeStructs of a tree of arrays, with shardings where they have."""

  def one(x):
    sharding = getattr(x, 'sharding', None)  # Counters are host scalars.
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(one, state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
  """What a run directory says of itself: enough to evaluate it.

  Attributes:
    policy: shape of the policy.
    tokenizer: of the policy.
    tasks: those evaluated, rebuilt by name and arguments.
    sampling: the config's numbers that completions and rewards depend on.
  """

  policy: PolicyConfig
  tokenizer: Tokenizer
  tasks: tuple[Task, ...]
  sampling: Mapping[str, Any]


_SAMPLING = (
  'seed', 'slots', 'max_prompt_tokens', 'max_completion_tokens', 'temperature',
  'eval_temperature', 'eval_samples', 'eval_prompts', 'scorers',
  'reward_deadline_s', 'compute_dtype', 'stop',
)  # fmt: skip


def write_manifest(
  workdir: pathlib.Path,
  recipe: Recipe,
  policy: PolicyConfig,
  tokenizer: Tokenizer,
) -> None:
  """Writes recipe, tokenizer and manifest into a new run directory.

  Raises:
    ConfigError: the directory holds the run of another recipe.
  """
  config = recipe.config
  overrides = {k: repr(v) for k, v in recipe.overrides.items()}
  run = {'recipe': recipe.name, 'overrides': overrides}
  file = workdir / 'manifest.json'
  if file.exists():
    _check_same_run(workdir, recipe, json.loads(file.read_text())['run'], run)
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / 'recipe.py').write_text(recipe.source)
  tokenizer.save(workdir / 'tokenizer')
  manifest = {
    'run': run,
    'policy': dataclasses.asdict(policy),
    'tasks': [_task_record(t) for t in config.eval_tasks or config.tasks],
    'sampling': {name: getattr(config, name) for name in _SAMPLING},
    'environment': _environment(),
  }
  new = file.with_suffix('.new')
  new.write_text(json.dumps(manifest, indent=2) + '\n')
  new.replace(file)


def _check_same_run(workdir, recipe, old, new) -> None:
  """More steps may be asked of a run; all else must stay."""

  def identity(run):
    kept = {k: v for k, v in run['overrides'].items() if k != 'steps'}
    return run['recipe'], kept

  same_source = (workdir / 'recipe.py').read_text() == recipe.source
  if identity(old) != identity(new) or not same_source:
    given = ','.join(f'{k}={v}' for k, v in old['overrides'].items())
    edited = '' if same_source else ', whose text was another'
    raise ConfigError(
      f'{workdir} holds a run of {old["recipe"]}:{given}{edited}; '
      'give another --workdir'
    )


def read_manifest(workdir: pathlib.Path) -> Manifest:
  """Reads what `write_manifest` wrote.

  Raises:
    ConfigError: the directory holds no run, or a task cannot be imported.
  """
  policy, tokenizer = read_policy(workdir)
  manifest = _read(workdir)
  return Manifest(
    policy=policy,
    tokenizer=tokenizer,
    tasks=tuple(_task(record) for record in manifest['tasks']),
    sampling=manifest['sampling'],
  )


def read_policy(workdir: pathlib.Path) -> tuple[PolicyConfig, Tokenizer]:
  """A run's policy and tokenizer; its tasks need not be importable.

  Raises:
    ConfigError: the directory holds no run.
  """
  policy = PolicyConfig(**_read(workdir)['policy'])
  return policy, tokenizers.load(workdir / 'tokenizer')


def read_params(
  workdir: pathlib.Path,
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


def _read(workdir: pathlib.Path) -> dict[str, Any]:
  file = workdir / 'manifest.json'
  if not file.exists():
    raise ConfigError(f'{workdir} holds no run: there is no manifest.json')
  return json.loads(file.read_text())


def _task_record(task: Any) -> dict[str, Any]:
  kind = type(task)
  return {
    'task': f'{kind.__module__}:{kind.__qualname__}',
    'arguments': dataclasses.asdict(task),
  }


def _task(record: Mapping[str, Any]) -> Task:
  module, _, name = record['task'].partition(':')
  try:
    kind = getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError) as error:
    raise ConfigError(
      f'task {record["task"]} of the run cannot be imported ({error}); put its '
      'module on PYTHONPATH'
    ) from None
  return kind(**record['arguments'])


def _environment() -> dict[str, Any]:
  packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
  versions = {name: importlib.metadata.version(name) for name in packages}
  return versions | {
    'devices': [d.device_kind for d in jax.devices()],
    'cpu_threads': len(os.sched_getaffinity(0)),
  }
