"""Several processes on this machine, as a pod runs one on each host."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence

ROOT = pathlib.Path(__file__).parents[1]


def free_port() -> int:
  """A port of the loopback that nobody listens on."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


@contextlib.contextmanager
def begun(
  logs: pathlib.Path,
  processes: int,
  devices: int,
  command: Sequence[str],
  more_flags: str = '',
) -> Iterator[list[subprocess.Popen]]:
  """So many of `python <command>`, killed in the end.

  Each gets the flags by which it finds the others, and more of XLA's; what it
  prints goes to logs/<number>.txt.
  """
  logs.mkdir(parents=True, exist_ok=True)
  coordinator = f'127.0.0.1:{free_port()}'
  environment = os.environ | {
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices} '
    f'{more_flags}',
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(ROOT),
  }
  with contextlib.ExitStack() as stack:
    running = []
    for i in range(processes):
      flags = [
        '--coordinator', coordinator,
        '--processes', str(processes), '--process', str(i),
      ]  # fmt: skip
      log = stack.enter_context((logs / f'{i}.txt').open('w'))
      process = subprocess.Popen(
        [sys.executable, *command, *(flags if processes > 1 else ())],
        cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
      )  # fmt: skip
      stack.callback(process.wait)
      stack.callback(process.kill)
      running.append(process)
    yield running


def ended(running: Sequence[subprocess.Popen], within_s: float) -> list[int]:
  """Their exit codes."""
  return [process.wait(within_s) for process in running]
