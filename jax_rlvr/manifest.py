"""What a run says of itself: enough to evaluate it without its recipe."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import logging
import operator
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax

from jax_rlvr import storage
from jax_rlvr import tokenizer as tokenizers
from jax_rlvr.config import ConfigError, Recipe, Task
from jax_rlvr.evaluation import Evaluation
from jax_rlvr.policy import PolicyConfig, abstract_params
from jax_rlvr.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


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
  tasks: tuple[Task | Evaluation, ...]
  sampling: Mapping[str, Any]


_SAMPLING = (
  'seed', 'slots', 'max_prompt_tokens', 'max_completion_tokens', 'temperature',
  'eval_temperature', 'eval_samples', 'eval_prompts', 'scorers',
  'reward_deadline_s', 'reward_memory_mb', 'compute_dtype', 'stop',
)  # fmt: skip


def write(
  workdir: storage.Path,
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
  environment = _environment()
  if file.exists():
    old = json.loads(file.read_text())
    _check_same_run(workdir, recipe, old['run'], run)
    for name in ('devices', 'cpu_threads'):
      if old['environment'][name] != environment[name]:
        _log.warning(
          '%s was begun with %s=%s and goes on with %s: its numbers differ in '
          'their last bits from now on', workdir, name,
          old['environment'][name], environment[name],
        )  # fmt: skip
  manifest = {
    'run': run,
    'steps': config.steps,
    'policy': dataclasses.asdict(policy),
    'parameters': _parameters(policy),
    'tasks': [_task_record(each) for each in config.evaluations],
    'sampling': {name: getattr(config, name) for name in _SAMPLING},
    'environment': environment,
  }
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / 'recipe.py').write_text(recipe.source)
  with tempfile.TemporaryDirectory() as folder:
    tokenizer.save(folder)
    storage.copy(pathlib.Path(folder), workdir / 'tokenizer')
  new = file.with_suffix('.new')
  new.write_text(json.dumps(manifest, indent=2) + '\n')
  new.replace(file)


def _parameters(policy: PolicyConfig) -> dict[str, list[int]]:
  """The shape of each array, by its path."""
  leaves = jax.tree_util.tree_leaves_with_path(abstract_params(policy))
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): list(x.shape)
    for path, x in leaves
  }


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


def read(workdir: storage.Path) -> Manifest:
  """Reads what `write` wrote.

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


def read_policy(workdir: storage.Path) -> tuple[PolicyConfig, Tokenizer]:
  """A run's policy and tokenizer; its tasks need not be importable.

  Raises:
    ConfigError: the directory holds no run.
  """
  policy = PolicyConfig(**_read(workdir)['policy'])
  with storage.local_copy(workdir / 'tokenizer') as folder:
    return policy, tokenizers.load(folder)


def _read(workdir: storage.Path) -> dict[str, Any]:
  file = workdir / 'manifest.json'
  if not file.exists():
    raise ConfigError(f'{workdir} holds no run: there is no manifest.json')
  return json.loads(file.read_text())


def _task_record(task: Any) -> dict[str, Any]:
  """The task as JSON that `_task` makes an equal task of.

  Dataclasses, tuples and functions, however deep, are told by their `kind`.
  """
  return _record(task, f'task {task.name!r}')


def _record(value: Any, where: str) -> Any:
  if value is None or isinstance(value, bool | int | float | str):
    return value
  if isinstance(value, list | tuple):
    items = [_record(x, f'{where}[{i}]') for i, x in enumerate(value)]
    if isinstance(value, list):
      return items
    return {'kind': 'tuple', 'arguments': items}
  if isinstance(value, Mapping):
    keys = [_record(key, f'a key of {where}') for key in value]
    items = [_record(x, f'{where}[{key!r}]') for key, x in value.items()]
    # JSON knows no other keys than texts, and `kind` would be misread.
    if all(isinstance(key, str) and key != 'kind' for key in keys):
      return dict(zip(keys, items, strict=True))
    return {'kind': 'dict', 'arguments': list(zip(keys, items, strict=True))}
  # A class or a function; a method's object would be lost.
  named = hasattr(value, '__qualname__') and not hasattr(value, '__self__')
  kind = value if named else type(value)
  record: dict[str, Any] = {'kind': f'{kind.__module__}:{kind.__qualname__}'}
  if named and '<' not in kind.__qualname__:
    return record
  if named or not dataclasses.is_dataclass(value):
    raise ConfigError(
      f'{where} is {value!r:.100}, which a manifest cannot hold; give JSON '
      'values, dataclasses of such, or functions that can be imported'
    )
  record['arguments'] = {
    field.name: _record(getattr(value, field.name), f'{where}.{field.name}')
    for field in dataclasses.fields(value)
    if field.init
  }
  return record


def _task(record: Mapping[str, Any]) -> Task:
  if 'task' in record:  # As it was when arguments were JSON values alone.
    return _made(record['task'], record['arguments'])
  return _value(record)


def _value(record: Any) -> Any:
  if isinstance(record, list):
    return [_value(x) for x in record]
  if not isinstance(record, dict):
    return record
  if 'kind' not in record:
    return {key: _value(x) for key, x in record.items()}
  arguments = _value(record.get('arguments'))
  match record['kind']:
    case 'tuple':
      return tuple(arguments)
    case 'dict':
      return dict(arguments)
    case name if arguments is None:
      return _imported(name)
    case name:
      return _made(name, arguments)


def _made(name: str, arguments: Mapping[str, Any]) -> Any:
  kind = _imported(name)
  # Else whoever writes a manifest could have anything called.
  if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
    raise ConfigError(f'{name} of the run is no dataclass; mend its manifest')
  return kind(**arguments)


def _imported(name: str) -> Any:
  module, _, path = name.partition(':')
  try:
    return operator.attrgetter(path)(importlib.import_module(module))
  except (ImportError, AttributeError) as error:
    raise ConfigError(
      f'{name} of the run cannot be imported ({error}); put its module on '
      'PYTHONPATH'
    ) from None


def _environment() -> dict[str, Any]:
  packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
  versions = {name: importlib.metadata.version(name) for name in packages}
  return versions | {
    'devices': [d.device_kind for d in jax.devices()],
    'cpu_threads': len(os.sched_getaffinity(0)),
  }
