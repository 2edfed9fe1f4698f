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
    env=os.environ
    | {
      'PYTHONPATH': str(ROOT),
      'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    },
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
