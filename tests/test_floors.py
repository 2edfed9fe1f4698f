"""Who may import whom."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / 'jax_rlvr'

FLOORS = {
  1: (
    'records checksum masked prng storage compilation hosts mesh chat '
    'tokenizer tokenizer_folder advantages config metrics policy_gradient '
    'evidence evaluation scores chips hlo pieces'
  ),
  2: 'filters tasks policy checkpoint manifest stream samples',
  3: 'token_stats sampling packing scoring reward_process',
  4: 'sft actor carried rollout update loaded analysis',
  5: 'evaluate setup export lowered compiled plan report watch',
  6: 'train',
}
FLOOR = {room: n for n, rooms in FLOORS.items() for room in rooms.split()}
MACHINERY = {
  'train',
  'update',
  'actor',
  'carried',
  'rollout',
  'token_stats',
  'sampling',
  'packing',
  'setup',
}
METHODS = {'filters', 'tasks', 'advantages'}


def room(file: pathlib.Path) -> str:
  return file.relative_to(PACKAGE).with_suffix('').parts[0]


def imports(file: pathlib.Path) -> set[str]:
  """Rooms that a file imports when it runs."""
  tree = ast.parse(file.read_text())
  typing_only = {
    id(node)
    for branch in ast.walk(tree)
    if isinstance(branch, ast.If) and 'TYPE_CHECKING' in ast.dump(branch.test)
    for node in ast.walk(branch)
  }
  found = set()
  for node in ast.walk(tree):
    if id(node) in typing_only:
      continue
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    else:
      continue
    parts = [name.split('.') for name in names]
    found |= {p[1] for p in parts if p[0] == 'jax_rlvr' and len(p) > 1}
  return found - {room(file)}


FILES = sorted(f for f in PACKAGE.rglob('*.py') if f != PACKAGE / '__init__.py')


def test_every_module_has_a_floor():
  assert {room(file) for file in FILES} == set(FLOOR)


@pytest.mark.parametrize('file', FILES, ids=lambda f: str(f.name))
def test_no_file_imports_from_a_floor_above(file):
  above = {r for r in imports(file) if FLOOR[r] > FLOOR[room(file)]}
  assert not above


def test_rooms_import_in_no_circle():
  graph = {r: set() for r in FLOOR}
  for file in FILES:
    graph[room(file)] |= imports(file)
  list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize('file', FILES, ids=lambda f: str(f.name))
def test_machinery_imports_no_method(file):
  if room(file) in MACHINERY:
    assert not imports(file) & METHODS


def test_the_reader_of_imports_sees_a_method():
  assert 'evidence' in imports(PACKAGE / 'filters' / 'ratio.py')
  assert 'sampling' in imports(PACKAGE / 'actor.py')


@pytest.mark.parametrize('module', ['jax_rlvr', 'jax_rlvr.tasks'])
def test_import_is_light(module):
  code = f'import {module}, sys; print("jax" in sys.modules)'
  out = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert out.stdout.strip() == 'False'


def test_public_names_resolve():
  import jax_rlvr

  for name in jax_rlvr.__all__:
    assert getattr(jax_rlvr, name) is not None
  with pytest.raises(AttributeError, match='no attribute'):
    jax_rlvr.nothing  # noqa: B018
