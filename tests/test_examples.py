"""The examples run, and their notebooks are what their scripts say."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / 'examples').glob('*.py'))
ENVIRONMENT = os.environ | {
  'XLA_FLAGS': '',
  'PYTHONPATH': str(ROOT),
  'JAX_COMPILATION_CACHE_DIR': os.path.join(
    tempfile.gettempdir(), 'jax_rlvr_test_cache'
  ),
  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
}

each_script = pytest.mark.parametrize('script', SCRIPTS, ids=lambda f: f.stem)


def run(script):
  """What the script prints, from a process of its own, on one CPU device."""
  done = subprocess.run(
    [sys.executable, str(script)],
    cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def cells(script):
  """(kind, text) of each `# %%` cell."""
  before, *parts = re.split(
    r'^# %%( \[markdown\])?\n', script.read_text(), flags=re.MULTILINE
  )
  assert not before
  found = []
  for mark, text in zip(parts[::2], parts[1::2], strict=True):
    if mark:
      text = re.sub(r'^# ?', '', text, flags=re.MULTILINE)
    found.append(('markdown' if mark else 'code', text.strip('\n')))
  return found


def notebook(script):
  return json.loads(script.with_suffix('.ipynb').read_text())


@each_script
def test_notebook_has_the_cells_of_the_script(script):
  found = [
    (cell['cell_type'], ''.join(cell['source']))
    for cell in notebook(script)['cells']
  ]
  assert found == cells(script), 'run python docs/generate.py --notebooks'
  assert {kind for kind, _ in found} == {'code', 'markdown'}


@each_script
def test_notebook_was_run_from_top_to_bottom(script):
  code = [c for c in notebook(script)['cells'] if c['cell_type'] == 'code']
  assert [c['execution_count'] for c in code] == list(range(1, len(code) + 1))
  outputs = [output for c in code for output in c['outputs']]
  assert outputs and {o.get('name') for o in outputs} == {'stdout'}
  assert script.with_suffix('.ipynb').stat().st_size < 100_000


def test_compose_learns_and_shows_what_filters_do():
  shown = run(ROOT / 'examples' / 'compose.py')
  selected = re.findall(r'forking_tokens.* selected (\S+)', shown)
  assert selected == ['1.000', '0.800', '0.600', '0.400', '0.200', '0.200']
  half, all_of_them = re.findall(r'^spare +kept (\S+)', shown, re.MULTILINE)[:2]
  assert float(half) < 1 and all_of_them == '1.000'
  assert "{'above': 0.3, 'steps': 50}" in shown

  def row(step):
    line = re.search(rf'^ *{step}  (.*)', shown, re.MULTILINE)[1]
    return [[float(x) for x in cell.split()] for cell in line.split(' ' * 5)]

  start, end = row(0), row(60)
  assert len(start) == len(end) == 4
  assert all(reward < 0.25 for reward, _, _ in start)
  assert all(reward > 0.95 for reward, _, _ in end)
  grpo, *others = (entropy for _, entropy, _ in end)
  assert all(entropy > grpo for entropy in others)
