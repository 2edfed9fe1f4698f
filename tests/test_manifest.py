"""A run directory says what is needed to evaluate it."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from jax_rlvr import manifest, policy
from jax_rlvr.config import ConfigError, Recipe
from jax_rlvr.tasks import (
  Addition,
  Arithmetic,
  Countdown,
  Dataset,
  Parquet,
  Rows,
  Tfds,
  math500,
)
from tests.test_config import small

CONFIG = small()


def recipe(name='a.py', source='text', config=CONFIG, **overrides) -> Recipe:
  return Recipe(config=config, name=name, source=source, overrides=overrides)


def write(workdir, run):
  c = run.config
  manifest.write(workdir, run, c.policy, c.tokenizer)


def test_manifest_comes_back(tmp_path):
  tasks = (
    Addition(digits=1, held_out=10, name='sums'),
    Arithmetic(operations=('add', 'gcd')),
  )
  config = small(eval_tasks=tasks, eval_temperature=0.5, seed=4)
  write(tmp_path / 'run', recipe(config=config, lr=1e-3))
  found = manifest.read(tmp_path / 'run')
  assert found.policy == CONFIG.policy
  assert found.tokenizer == CONFIG.tokenizer
  assert [each.task for each in found.tasks] == list(tasks)
  assert {each.temperature for each in found.tasks} == {0.5}
  for saved, task in zip(found.tasks, tasks, strict=True):
    assert saved.name == task.name
    assert saved.task.prompts('test')[:5] == task.prompts('test')[:5]
  assert found.sampling['eval_temperature'] == 0.5
  assert found.sampling['seed'] == 4
  assert (tmp_path / 'run' / 'recipe.py').read_text() == 'text'


def test_every_shape_survives_the_manifest(tmp_path):
  # Nested and tuple fields are lists and objects in JSON.
  for name in ('llama-3.1-8b', 'gemma-3-27b'):
    config = small(policy=policy.SHAPES[name])
    write(tmp_path / name, recipe(config=config))
    saved, _ = manifest.read_policy(tmp_path / name)
    assert saved == policy.SHAPES[name]
    assert hash(saved) == hash(policy.SHAPES[name])


def test_manifest_names_the_train_tasks_where_no_others_are_evaluated(tmp_path):
  write(tmp_path, recipe())
  (found,) = manifest.read(tmp_path).tasks
  assert (found.task,) == CONFIG.tasks


def test_more_steps_may_be_asked_of_a_run(tmp_path):
  write(tmp_path, recipe(lr=1.0, steps=5))
  write(tmp_path, recipe(lr=1.0, steps=9))
  write(tmp_path, recipe(lr=1.0))


@pytest.mark.parametrize(
  'other',
  [
    recipe(name='b.py', lr=1.0),
    recipe(lr=2.0),
    recipe(lr=1.0, seed=1),
    recipe(),
    recipe(lr=1.0, source='edited'),
  ],
  ids=['name', 'value', 'added', 'removed', 'source'],
)
def test_work_directory_of_another_recipe_is_refused(tmp_path, other):
  write(tmp_path, recipe(lr=1.0))
  before = (tmp_path / 'manifest.json').read_text()
  with pytest.raises(ConfigError, match=r'run of a.py:lr=1.0.*--workdir') as e:
    write(tmp_path, other)
  assert ('whose text was another' in str(e.value)) == (
    other.source == 'edited'
  )
  assert (tmp_path / 'manifest.json').read_text() == before
  assert (tmp_path / 'recipe.py').read_text() == 'text'


def test_directory_without_a_run_is_refused(tmp_path):
  with pytest.raises(ConfigError, match='holds no run'):
    manifest.read(tmp_path)


@dataclasses.dataclass(frozen=True)
class Holder:
  """Stands for a task, a source or a grader; holds anything."""

  value: Any
  name: str = 'holder'
  made: int = dataclasses.field(default=0, init=False)

  def __call__(self, prompt, completion):
    del prompt, completion


def plain(prompt, completion):
  """Stands for a grader that is a function."""
  del prompt, completion


@pytest.mark.parametrize(
  'value',
  [
    None,
    True,
    -1,
    2.5,
    'text',
    [1, 'a', None],
    (1, 'a', None),
    ((), [()], {'a': (1, [2, (3,)])}),
    {},
    {'a': {'b': [1.5]}},
    {'kind': 'tuple', 'arguments': [1]},
    {'kind': 'kind'},
    {1: 'one', (2, 3): 'pair'},
    Holder(1),
    Holder((Holder([Holder({'a': Holder('deep')})]), 'x')),
    {'kind': Holder(('kind',))},
    plain,
    Holder,
    policy.PolicyConfig,
  ],
  ids=lambda value: getattr(value, '__name__', repr(value))[:40],
)
def test_task_of_anything_comes_back_equal(value):
  task = Holder(value)
  saved = json.loads(json.dumps(manifest._task_record(task)))
  found = manifest._task(saved)
  assert found == task
  assert type(found.value) is type(value)
  # Equal and not only alike: [1] is no (1,), True no 1.
  assert repr(found) == repr(task)


@pytest.mark.parametrize(
  'task',
  [
    Dataset(
      name='sums',
      grader=Holder((1, 2)),
      train=Rows([{'question': '1+1', 'answer': 2, 'kind': 'add'}]),
      test=Parquet('data', split='test'),
      extra=('kind',),
      only={'kind': 'add'},
    ),
    Dataset(name='other', grader=plain, test=Tfds('gsm8k', split='test[:9%]')),
    Countdown(numbers=(3,)),
    math500('problems.jsonl'),
  ],
  ids=lambda task: task.name,
)
def test_task_of_sources_and_a_grader_comes_back_equal(task):
  saved = json.loads(json.dumps(manifest._task_record(task)))
  assert manifest._task(saved) == task


def test_manifest_of_a_task_of_json_values_alone_is_read(tmp_path):
  # As it was written before tasks had sources and graders.
  record = {
    'task': 'jax_rlvr.tasks.arithmetic:Arithmetic',
    'arguments': dataclasses.asdict(Arithmetic(operations=('add', 'gcd'))),
  }
  saved = json.loads(json.dumps(record))
  assert manifest._task(saved) == Arithmetic(operations=('add', 'gcd'))
  record['arguments'] = {'value': {'kind': 'tuple', 'arguments': [1]}}
  record['task'] = f'{__name__}:Holder'
  assert manifest._task(record).value == {'kind': 'tuple', 'arguments': [1]}


@pytest.mark.parametrize(
  'value, place',
  [
    (pathlib.PurePosixPath('a'), r"value is PurePosixPath\('a'\)"),
    ([0, {'a': {1}}], r"value\[1\]\['a'\] is \{1\}"),
    (Holder((lambda: 0,)), r'value\.value\[0\] is <function'),
    ('a'.split, 'value is <built-in method'),
  ],
)
def test_value_that_a_manifest_cannot_hold_is_named(value, place):
  with pytest.raises(ConfigError, match=f"^task 'holder'.{place}") as caught:
    manifest._task_record(Holder(value))
  assert '\n' not in str(caught.value)


def test_task_that_is_gone_is_named(tmp_path):
  write(tmp_path, recipe())
  file = tmp_path / 'manifest.json'
  file.write_text(file.read_text().replace(':Addition', ':Subtraction'))
  with pytest.raises(ConfigError, match='addition:Subtraction of the run'):
    manifest.read(tmp_path)


def test_manifest_calls_nothing_but_dataclasses():
  record = {'kind': 'os:system', 'arguments': {'command': 'true'}}
  with pytest.raises(ConfigError, match='os:system of the run is no dataclass'):
    manifest._task(record)
