"""The benchmarks run; what they measure is not for a test to judge."""

import json
import os
import pathlib
import subprocess
import sys

import jax

ROOT = pathlib.Path(__file__).parent.parent


def test_filters_benchmark_prints_its_tables(tmp_path):
  found = tmp_path / 'filters.json'
  ran = subprocess.run(
    [sys.executable, 'benchmarks/filters.py', '--rows=16', '--tokens=64']
    + ['--repeats=1', '--cpu_only', f'--json={found}'],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert ran.returncode == 0, ran.stderr
  for line in ('whole chain', 'lax.top_k', 'Limits', '3 × one count'):
    assert line in ran.stdout
  figures = json.loads(found.read_text())
  assert figures['shape'] == [16, 64]
  assert all(x['wall'] > 0 for x in figures['one device'].values())
  assert len(figures['limits']) == 4


def test_sampling_benchmark_writes_its_rows(tmp_path):
  found = tmp_path / 'sampling.json'
  ran = subprocess.run(
    [sys.executable, 'benchmarks/sampling.py', '--tiny', '--repeats=1']
    + ['--tunix-python=/nowhere/python', f'--json={found}'],
    cwd=ROOT,
    env=os.environ
    | {
      'PYTHONPATH': str(ROOT),
      'XLA_FLAGS': '',  # one device
    },
    capture_output=True,
    text=True,
  )
  assert ran.returncode == 0, ran.stderr
  for peer in ('HF generate', 'Tunix'):
    assert f'Without {peer}' in ran.stdout
  figures = json.loads(found.read_text(encoding='utf-8'))
  assert figures['environment']['jax'] == jax.__version__
  rows = {(x['name'], x['unit']): x for x in figures['rows']}
  assert len(rows) == len(figures['rows'])
  assert rows['uniform: ours', 'CPU-ms/token']['value'] > 0
  assert not any('Tunix' in name for name, _ in rows)
  held = {name: x['target'] for (name, _), x in rows.items() if x['target']}
  assert held == {
    'tail: our static batches / ours, wall': 2.2,
    'tail: our static batches / ours, cpu': 2.2,
    'limit: share of it reached, wall': 65,
    'limit: share of it reached, cpu': 75,
  }
  for x in rows.values():
    assert set(x) == {'name', 'value', 'unit', 'target', 'met'}
    assert (x['target'] is None) == (x['met'] is None)
