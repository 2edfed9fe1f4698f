"""What the documentation says can be run, runs."""

import doctest
import importlib.util
import inspect
import pathlib
import pkgutil
import re

import jax
import optax
import pytest

import jax_rlvr
from jax_rlvr import advantages, filters
from tests import runs

ROOT = pathlib.Path(__file__).parent.parent
MODULES = [
  m.name for m in pkgutil.walk_packages(jax_rlvr.__path__, 'jax_rlvr.')
]
PAGE = ROOT / 'docs' / 'filters.md'


@pytest.mark.parametrize('name', MODULES)
def test_examples_in_docstrings_run(name):
  module = importlib.import_module(name)
  known = {'jax': jax, 'optax': optax} | vars(filters) | vars(module)
  tried = 0
  for example in doctest.DocTestFinder(exclude_empty=True).find(
    module, globs=known
  ):
    result = doctest.DocTestRunner().run(example)
    assert result.failed == 0, example.name
    tried += result.attempted
  # None hides where doctest does not look.
  assert tried == inspect.getsource(module).count('>>> ')


each_filter = pytest.mark.parametrize('name', filters.ALL)
NUMBER = r'\d+(?:\.\d+)?(?:e-?\d+)?'


def part(f, label):
  """What the docstring says behind 'Label:', up to the paragraph's end."""
  return re.split(rf'\b{label}:\s', inspect.getdoc(f))[1].split('\n\n')[0]


def unsourced(f):
  """Numeric defaults that 'Defaults:' does not give as 'name number …: who'."""
  stated = {
    name: float(number)
    for name, number in re.findall(
      rf'\b(\w+) ({NUMBER})(?=[^:]*: \S)', part(f, 'Defaults')
    )
  }
  defaults = {
    name: parameter.default
    for name, parameter in inspect.signature(f).parameters.items()
    if type(parameter.default) in (int, float)
  }
  return {n for n, number in defaults.items() if stated.get(n) != number}


@each_filter
def test_every_filter_says_what_it_does(name):
  f = filters.ALL[name]
  assert '>>> ' in inspect.getdoc(f)
  kinds = ('head', 'mask', 'weight', 'penalty', 'aggregation')
  assert part(f, 'Kind').startswith(tuple(f'{kind}.' for kind in kinds))
  for label in ('Reads', 'Writes', 'Neutral', 'Defaults'):
    assert part(f, label)
  arguments = ''.join(re.findall(r'Args:\n(.*?)\n\n', f.__doc__, re.DOTALL))
  described = re.findall(r'^    (\w.*?):', arguments, re.MULTILINE)
  parameters = list(inspect.signature(f).parameters)
  assert ', '.join(described).split(', ') == (parameters or [''])


@each_filter
def test_every_default_of_a_filter_has_a_source(name):
  assert not unsourced(filters.ALL[name])


@pytest.mark.parametrize('name', advantages.ALL)
def test_every_default_of_an_advantage_has_a_source(name):
  f = advantages.ALL[name]
  assert not unsourced(f)
  assert re.search(
    r'Reference: .*`[^`]+<https://[^>]+>`_', f.__doc__, re.DOTALL
  )


def test_a_default_without_source_would_be_seen():
  def f(a=0.0002, b=2e-4, c=1.0, d=3, e=True, g=0.5):
    """Does.

    Defaults: a 2e-4, b 0.0002: PPO §1.0. c 1.5: TRL; its g 0.5.
    """

  assert unsourced(f) == {'c', 'd', 'g'}


@pytest.fixture(scope='module')
def generate():
  spec = importlib.util.spec_from_file_location(
    'generate', ROOT / 'docs' / 'generate.py'
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_page_is_what_the_generator_writes(generate):
  assert PAGE.read_text() == generate.page(), 'run python docs/generate.py'


def test_generator_sees_a_stale_page(generate, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(generate, 'PAGE', tmp_path / 'filters.md')
  assert generate.main(['--check']) == 1
  assert generate.main([]) == 0 == generate.main(['--check'])
  generate.PAGE.write_text(PAGE.read_text().replace('0.672', '0.7', 1))
  assert generate.main(['--check']) == 1
  assert 'run python docs/generate.py' in capsys.readouterr().err


def test_page_has_every_method_and_its_links_lead_somewhere():
  text = PAGE.read_text()
  headings = re.findall(r'^#+ (.*)', text, re.MULTILINE)
  assert {
    *filters.ALL,
    *(f'advantages.{name}' for name in advantages.ALL),
    *(f'recipes.{name}' for name in filters.recipes.ALL),
  } <= set(headings)
  # As GitHub makes them.
  anchors = [re.sub(r'[^\w -]', '', h).replace(' ', '-') for h in headings]
  for link in re.findall(r'\]\((?!http)([^)]+)\)', text):
    path, _, anchor = link.partition('#')
    assert (PAGE.parent / path).exists(), link
    assert not anchor or anchors.count(anchor) == 1, link
  assert '>`_' not in text


def test_python_of_the_page_runs():
  blocks = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL)
  assert len(blocks) > len(filters.ALL)
  for block in blocks:
    exec(block, {'jax': jax, 'optax': optax} | vars(filters))


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


def test_readme_python_runs(tmp_path, monkeypatch):
  runs.write(tmp_path / 'runs' / 'quickstart')
  monkeypatch.chdir(tmp_path)
  text = (ROOT / 'README.md').read_text()
  for block in re.findall(r'```python\n(.*?)```', text, re.DOTALL):
    exec(compile(block, 'README.md', 'exec'), {})


def test_analysis_page_runs_and_names_what_is_there(
  tmp_path, monkeypatch, capsys
):
  run = tmp_path / 'runs' / 'quickstart'
  runs.write(run)
  runs.log(run, 100, (0, 20, 40, 60, 80, 100))
  runs.sample(run, (1, 2))
  monkeypatch.chdir(tmp_path)
  page = ROOT / 'docs' / 'analysis.md'
  blocks = re.findall(r'```python\n(.*?)```', page.read_text(), re.DOTALL)
  # Each goes on from those before.
  names = {}
  for block in blocks:
    exec(compile(block, 'analysis.md', 'exec'), names)
  printed = capsys.readouterr().out
  assert 'R = −0.200 e^H + 0.600, ceiling 0.400' in printed
  # The logs have a covariance that is the fall of entropy itself.
  assert '99 steps, correlation 1.0' in printed
  for path in re.findall(r'\]\((?!http)([^)#]+)\)', page.read_text()):
    assert (page.parent / path).exists(), path


def test_readme_names_only_files_that_exist():
  text = (ROOT / 'README.md').read_text()
  for path in re.findall(r'\]\((?!http)([^)#]+)\)', text):
    assert (ROOT / path).exists(), path
