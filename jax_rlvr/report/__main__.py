r"""Runs as one page: curves, the entropy law, covariance, token microscope.

  python -m jax_rlvr.report runs/clip_cov runs/grpo --out report.html

The file needs no network and no server. Exit codes: 0 done; 2 bad input.
"""

from __future__ import annotations

import argparse
import base64
import html
import pathlib
import sys
from collections.abc import Sequence
from importlib import resources
from typing import Any

from jax_rlvr import storage
from jax_rlvr.config import ConfigError
from jax_rlvr.report import data

SCRIPTS = (
  'data', 'scales', 'plot', 'charts', 'overview', 'tokens', 'microscope',
  'page',
)  # fmt: skip


def page(runs: Sequence[dict[str, Any]]) -> str:
  """The report of runs that `data.read` has read."""
  assets = resources.files('jax_rlvr.report') / 'assets'

  def text(name: str) -> str:
    return (assets / name).read_text()

  parts = {
    '{{title}}': html.escape(' · '.join(run['name'] for run in runs)),
    '{{style}}': text('page.css'),
    '{{script}}': '\n'.join(text(f'{name}.js') for name in SCRIPTS),
    # Nothing in base64 ends a script.
    '{{data}}': base64.b64encode(data.pack(runs)).decode(),
  }
  whole = text('page.html')
  for name, part in parts.items():
    before, after = whole.split(name)
    whole = before + part + after
  return whole


def _named_apart(runs: list[dict[str, Any]], workdirs: Sequence[Any]) -> None:
  """Gives runs of one name that of the folder they are in as well."""
  names = [run['name'] for run in runs]
  for run, workdir in zip(runs, workdirs, strict=True):
    if names.count(run['name']) > 1:
      run['name'] = f'{workdir.parent.name}/{workdir.name}'


def main(argv: Sequence[str] | None = None) -> int:
  """The command; returns its exit code."""
  parser = argparse.ArgumentParser(
    prog='python -m jax_rlvr.report',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    'runs', nargs='+', metavar='RUN', help='folder, or gs://bucket/folder'
  )
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument(
    '--tokens',
    type=int,
    default=400_000,
    help='under the microscope, of all runs; steps are left out to keep to it',
  )
  arguments = parser.parse_args(argv)
  try:
    workdirs = [storage.path(run) for run in arguments.runs]
    each = arguments.tokens // len(workdirs)
    runs = [data.read(workdir, each) for workdir in workdirs]
    _named_apart(runs, workdirs)
    arguments.out.write_text(page(runs), encoding='utf-8')
  except (ConfigError, ValueError, OSError, ImportError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  size = arguments.out.stat().st_size
  print(f'{arguments.out}: {size / 1e6:.1f} MB, {len(runs)} runs')
  return 0


if __name__ == '__main__':
  sys.exit(main())
