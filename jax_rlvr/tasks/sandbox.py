"""Runs a Python program of somebody else where it can do little harm.

Isolated, a program has process, network, IPC and mount namespaces of its own:
it sees the interpreter and the system's libraries, read-only, and an empty
folder in memory; no network, no other process, no other file. It has no
privileges, an empty environment, and limits on time, memory, processes and
files. All of its processes are gone when `run` returns. What this does not
stop: mistakes of the kernel, and reading what lies in /usr.

Not isolated, there are only the limits, the empty environment and a process
group that is killed at the end: a program can read and write what we can, use
the network, and leave its group.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import NamedTuple

_log = logging.getLogger(__name__)

_LAUNCHER = pathlib.Path(__file__).with_name('sandbox_launcher.py')

# Beyond the program's own deadline: two interpreters start, on a busy machine.
_GRACE_S = 30.0
_LAST_ERRORS = 2000


class Result(NamedTuple):
  """How a program ended.

  Attributes:
    output: what it printed, cut at the limit.
    errors: the end of what it printed to standard error.
    code: exit status; 128 + the signal that ended it; None at the deadline.
  """

  output: str
  errors: str
  code: int | None


def run(
  source: str,
  stdin: str = '',
  *,
  timeout_s: float = 5.0,
  memory_mb: int = 1024,
  output_bytes: int = 4 << 20,
  isolated: bool = True,
) -> Result:
  """Runs a Python program to its end.

  Args:
    source: of the program; nothing but the standard library is there.
    stdin: its standard input, which then ends.
    timeout_s: seconds until it and all that it started are killed.
    memory_mb: address space of each of its processes, in MiB.
    output_bytes: of its output and of each file that it writes; writing more
      fails.
    isolated: as above.

  Raises:
    RuntimeError: it could not be isolated, or nothing came back.
  """
  arguments = {
    'parent': os.getpid(),
    'isolated': isolated,
    'timeout_s': timeout_s,
    'memory': memory_mb << 20,
    'output': output_bytes,
  }
  with tempfile.TemporaryDirectory(
    prefix='jax_rlvr_program_', ignore_cleanup_errors=True
  ) as name:
    folder = pathlib.Path(name)
    folder.chmod(0o755)  # the launcher may go on as another user
    (folder / 'main.py').write_bytes(source.encode(errors='replace'))
    (folder / 'input').write_bytes(stdin.encode(errors='replace'))
    try:
      launcher = subprocess.run(
        # Not a virtual environment's link, which is nothing without it.
        [os.path.realpath(getattr(sys, '_base_executable', sys.executable))]
        + ['-I', '-S', os.path.abspath(_LAUNCHER), json.dumps(arguments)],
        cwd=folder,
        env={},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout_s + _GRACE_S,
        start_new_session=True,
      )
    except subprocess.TimeoutExpired:
      raise RuntimeError('the launcher did not come back') from None
    try:
      code = json.loads(launcher.stdout)['code']
    except (ValueError, TypeError, KeyError):
      said = launcher.stdout.decode(errors='replace').splitlines()
      said = [line for line in said if line.strip() and line[0] != '{']
      raise RuntimeError(said[-1] if said else 'the launcher died') from None
    return Result(
      output=_read(folder / 'output', output_bytes),
      errors=_read(folder / 'errors', output_bytes)[-_LAST_ERRORS:],
      code=code,
    )


@functools.cache
def isolation() -> str:
  """What keeps programs from being isolated here; '' where they can be.

  Found out by running one, once.
  """
  if sys.platform != 'linux':
    return f'{sys.platform} has no namespaces'
  try:
    result = run('print(6 * 7)', timeout_s=_GRACE_S)
  except RuntimeError as error:
    return str(error)
  if result.output != '42\n':
    last = result.errors.strip().splitlines()[-1:] or [f'exit {result.code}']
    return f'the interpreter does not start in there: {last[0]}'
  _log.info('programs run in namespaces of their own, without a network')
  return ''


def require_isolation() -> None:
  """Raises ValueError, with the remedy, where programs cannot be isolated."""
  if reason := isolation():
    raise ValueError(
      f'programs cannot be isolated here ({reason}); allow user namespaces '
      '(sysctl kernel.apparmor_restrict_unprivileged_userns=0; docker run '
      '--security-opt seccomp=unconfined) or, where nothing is at stake, set '
      'allow_unsandboxed_code=True'
    )


def _read(path: pathlib.Path, limit: int) -> str:
  if not path.exists():  # not isolated, a program can remove it
    return ''
  with path.open('rb') as file:
    return file.read(limit).decode(errors='replace')
