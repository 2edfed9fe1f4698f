"""Programs compiled for TPUs that need not be there.

libtpu wants a process of its own, so the files of such tests also run as
scripts: they print what they found as a line of JSON.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[1]

needed = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason='libtpu is absent: install the extra `plan`',
)


def found_by(script: str, *arguments: str) -> Any:
  """What a file, run as a script, says."""
  env = os.environ | {
    'PYTHONPATH': str(ROOT),
    'JAX_PLATFORMS': 'cpu',
    'TPU_SKIP_MDS_QUERY': '1',
    # Another process may have it loaded, too.
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  }
  done = subprocess.run(
    [sys.executable, script, *arguments],
    env=env,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])
