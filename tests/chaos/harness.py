r"""A run that is killed, stopped and damaged ends as one left alone.

  python -m tests.chaos.harness --steps 200

runs the recipe beside it twice: once straight, and once with a disturbance
every now and then. Both must end with the same numbers, `time/…` aside. Exit
code 1 where they do not.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp

from jax_rlvr import metrics

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = 'tests/chaos/recipe.py'
# One CPU device, and compilations shared among the runs.
ENVIRONMENT = os.environ | {
  'XLA_FLAGS': '',
  'JAX_PLATFORMS': 'cpu',
  'PYTHONPATH': str(ROOT),
  'JAX_COMPILATION_CACHE_DIR': os.path.join(
    tempfile.gettempdir(), 'jax_rlvr_test_cache'
  ),
  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
}
DISTURBANCES = ('kill', 'kill in a save', 'stop', 'flip a bit')


def begin(config: str, workdir: pathlib.Path) -> subprocess.Popen:
  """The run, from where it is."""
  return subprocess.Popen(
    [sys.executable, '-m', 'jax_rlvr.train',
     '--config', config, '--workdir', str(workdir)],
    cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT, text=True,
  )  # fmt: skip


def finish(config: str, workdir: pathlib.Path) -> str:
  """Runs to the end; what it printed."""
  process = begin(config, workdir)
  printed, _ = process.communicate()
  if process.returncode:
    raise RuntimeError(f'exit code {process.returncode}:\n{printed}')
  return printed


def steps_of(workdir: pathlib.Path) -> int:
  """Steps that the run has logged."""
  file = workdir / 'metrics.jsonl'
  return len(metrics.read(file)) if file.exists() else 0


def disturb(
  config: str, workdir: pathlib.Path, how: str, step: int, pause: float
) -> bool:
  """Goes on with the run until it has logged `step` steps, and disturbs it.

  Returns:
    Whether it was still running then.
  """
  # A run that is only starting has nothing to lose.
  step = max(step, steps_of(workdir) + 1)
  process = begin(config, workdir)
  with process:
    while process.poll() is None and not _is_due(workdir, how, step):
      time.sleep(0.002)
    time.sleep(pause)
    is_running = process.poll() is None
    process.send_signal(signal.SIGTERM if how == 'stop' else signal.SIGKILL)
    printed, _ = process.communicate()
  expected = 75 if how == 'stop' else -signal.SIGKILL
  if is_running and process.returncode not in (expected, 0):
    raise RuntimeError(f'exit code {process.returncode}:\n{printed}')
  if how == 'flip a bit':
    flip_a_bit(workdir)
  return is_running


def _is_due(workdir: pathlib.Path, how: str, step: int) -> bool:
  if steps_of(workdir) < step:
    return False
  if how == 'kill in a save':
    return any((workdir / 'checkpoints').glob('*orbax-checkpoint-tmp*'))
  return True


def flip_a_bit(workdir: pathlib.Path) -> None:
  """In the arrays of the newest checkpoint, if there is one before."""
  folder = workdir / 'checkpoints'
  checkpoints = sorted(
    (f for f in folder.iterdir() if f.name.isdigit()), key=lambda f: int(f.name)
  )
  if len(checkpoints) < 2:
    return
  # Some bytes of a file may serve nothing: one bit in each file of data.
  for file in (checkpoints[-1] / 'params').rglob('d/*'):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def differences(a: pathlib.Path, b: pathlib.Path) -> Iterator[str]:
  """What two finished runs do not agree on, a line each."""
  for name in ('metrics.jsonl', 'eval.jsonl'):
    rows, others = _rows(a / name), _rows(b / name)
    if len(rows) != len(others):
      yield f'{name}: {len(rows)} rows and {len(others)}'
    for row, other in zip(rows, others, strict=False):
      for key in row.keys() | other.keys():
        # As text: NaN is not equal to itself.
        if repr(row.get(key)) != repr(other.get(key)):
          yield (
            f'{name}, step {row["step"]}, {key}: {row.get(key)} and '
            f'{other.get(key)}'
          )
  last = steps_of(a)
  for item in ('params', 'training'):
    trees = [_arrays(workdir / 'checkpoints' / str(last) / item)
             for workdir in (a, b)]  # fmt: skip
    if trees[0].keys() != trees[1].keys():
      yield f'{item}: other arrays'
      continue
    for path, x in trees[0].items():
      if not np.array_equal(x, trees[1][path], equal_nan=True):
        yield f'{item}, {path}'


def _rows(file: pathlib.Path) -> list[dict]:
  return [
    {k: x for k, x in row.items() if not k.startswith('time/')}
    for row in metrics.read(file)
  ]


def _arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
  with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.restore(folder.absolute())
  return {
    jax.tree_util.keystr(path): np.asarray(x)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def disturbed(
  config: str,
  workdir: pathlib.Path,
  disturbances: Sequence[str],
  steps: int,
  draw: random.Random,
) -> str:
  """A run with disturbances at moments drawn; what its last part printed."""
  for number, how in enumerate(disturbances):
    share = (number + draw.random()) / len(disturbances)
    step = max(steps_of(workdir), int(share * (steps - 1)))
    was_running = disturb(config, workdir, how, step, draw.random() / 5)
    print(f'{how} at step {steps_of(workdir)}: {was_running}', flush=True)
  return finish(config, workdir)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--steps', type=int, default=200)
  parser.add_argument('--disturbances', type=int, default=12)
  parser.add_argument('--seed', type=int, default=random.randrange(1000))
  parser.add_argument('--workdir', type=pathlib.Path)
  arguments = parser.parse_args()
  print('seed', arguments.seed)
  draw = random.Random(arguments.seed)
  folder = arguments.workdir or pathlib.Path(tempfile.mkdtemp())
  config = f'{RECIPE}:steps={arguments.steps}'
  if arguments.steps < 100:
    config += f',checkpoint_every=3,eval_every={arguments.steps // 4}'
    config += f',reference_every={arguments.steps // 3},hangs=997'
  finish(config, folder / 'straight')
  often = -(-arguments.disturbances // len(DISTURBANCES))
  chosen = (DISTURBANCES * often)[: arguments.disturbances]
  draw.shuffle(order := list(chosen))
  printed = disturbed(
    config, folder / 'disturbed', order, arguments.steps, draw
  )
  print(printed)
  found = list(differences(folder / 'straight', folder / 'disturbed'))
  print('\n'.join(found[:50]) or 'the same')
  return bool(found)


if __name__ == '__main__':
  sys.exit(main())
