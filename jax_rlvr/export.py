r"""A run's policy as a folder that transformers, vLLM and others load.

  python -m jax_rlvr.export --workdir runs/quickstart --out exported

The recipe is not executed, and the tasks need not be importable.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from jax_rlvr import checkpoint, manifest, policy, storage
from jax_rlvr import mesh as layouts
from jax_rlvr.config import ConfigError


def export(
  workdir: storage.Path,
  out: pathlib.Path,
  step: int | None = None,
  dtype: str = 'bfloat16',
) -> int:
  """Writes the policy of a checkpoint, the latest if None; returns its step.

  Raises:
    ConfigError, ValueError: there is no such checkpoint, the folder holds
      something already, or no architecture of transformers fits the policy.
  """
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise ConfigError(f'{out} holds something already; give a new --out')
  shape, tokenizer = manifest.read_policy(workdir)
  params, step = checkpoint.read_params(
    workdir, shape, layouts.make(), layouts.TRAINING, step
  )
  policy.save(out, shape, params, dtype=dtype, end_ids=tokenizer.end_ids)
  tokenizer.save(out)
  return step


def main(argv: Sequence[str] | None = None) -> int:
  """The command; returns its exit code."""
  parser = argparse.ArgumentParser(
    prog='python -m jax_rlvr.export',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--workdir', type=storage.path, required=True)
  parser.add_argument('--step', type=int, help='of the checkpoint; the latest')
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument(
    '--dtype', choices=('bfloat16', 'float32'), default='bfloat16'
  )
  arguments = parser.parse_args(argv)
  try:
    step = export(
      arguments.workdir, arguments.out, arguments.step, arguments.dtype
    )
  except (ConfigError, ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  print(f'step {step} of {arguments.workdir} is in {arguments.out}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
