"""Programs compiled for TPUs that need not be there.

libtpu wants a process of its own, so the files of such tests also run as
scripts: they print what they found as a line of JSON.
"""

import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import numpy as np
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
    # Or this file would be found where libtpu itself is meant.
    'PYTHONSAFEPATH': '1',
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


def groups(instruction: str, devices: int) -> list[list[int]]:
  """The groups of devices among which a collective of compiled HLO works."""
  listed = re.search(
    r'(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]+\},?)*)\}',
    instruction,
  )
  iota = re.search(
    r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?',
    instruction,
  )
  mesh = re.search(r'replica_groups=mesh\[(.*?)\] \{(.*?)\}', instruction)
  if mesh:
    axes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    within = re.findall(r"'(\w+)'", mesh[2])
    ids = np.arange(devices).reshape([int(x) for x in axes.values()])
    places = [list(axes).index(name) for name in within]
    ids = np.moveaxis(ids, places, range(-len(places), 0))
    return ids.reshape(-1, math.prod(int(axes[x]) for x in within)).tolist()
  if iota:
    shape, dims, order = (
      [int(x) for x in part.split(',')] if part else None
      for part in iota.groups()
    )
    ids = np.arange(devices).reshape(dims)
    ids = ids if order is None else ids.transpose(order)
    return ids.reshape(shape).tolist()
  assert listed, instruction
  return [
    [int(x) for x in group.split(',')]
    for group in re.findall(r'\{([\d,]+)\}', listed[1])
  ] or [list(range(devices))]
