"""What the documentation says can be run, runs."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import jax
import optax
import pytest

import jax_rlvr
from jax_rlvr import filters

ROOT = pathlib.Path(__file__).parent.parent
MODULES = [
  m.name for m in pkgutil.walk_packages(jax_rlvr.__path__, 'jax_rlvr.')
]


@pytest.mark.parametrize('name', MODULES)
def test_examples_in_docstrings_run(name):
  module = importlib.import_module(name)
  known = {'jax': jax, 'optax': optax} | vars(filters) | vars(module)
  for example in doctest.DocTestFinder(exclude_empty=True).find(
    module, globs=known
  ):
    assert doctest.DocTestRunner().run(example).failed == 0, example.name


def test_every_filter_has_an_example():
  for name, factory in filters.ALL.items():
    assert '>>> ' in factory.__doc__, name


def commands(file: pathlib.Path) -> list[str]:
  """Lines of the bash blocks."""
  blocks = re.findall(r'```bash\n(.*?)```', file.read_text(), re.DOTALL)
  return [line for block in blocks for line in block.splitlines() if line]


def test_every_readme_command_is_run_by_ci():
  def plain(line):
    # Long runs are cut short, in a place of their own.
    line = re.sub(r'\.py:steps=1,eval_prompts=4', '.py', line)
    return re.sub(r'--workdir "?(\$runs|runs)/(\w+)"?', r'--workdir \2', line)

  run = {plain(line) for line in (ROOT / '.ci/run').read_text().splitlines()}
  asked = commands(ROOT / 'README.md')
  assert len(asked) >= 5
  for line in asked:
    assert plain(line) in run, line


def test_readme_python_runs():
  text = (ROOT / 'README.md').read_text()
  for block in re.findall(r'```python\n(.*?)```', text, re.DOTALL):
    exec(compile(block, 'README.md', 'exec'), {})


def test_readme_names_only_files_that_exist():
  text = (ROOT / 'README.md').read_text()
  for path in re.findall(r'\]\((?!http)([^)#]+)\)', text):
    assert (ROOT / path).exists(), path
