"""A process that runs rewards, seen from both ends.

It is a fresh interpreter with our `sys.path` that imports the tasks, never jax
and never our `__main__`. It ignores Ctrl-C and leaves when our end of its pipe
closes; on Linux the kernel kills it with us even while it hangs.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import numbers
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from typing import Any

# From <linux/prctl.h>: the signal we get when the thread that started us ends.
_PR_SET_PDEATHSIG = 1


class RewardProcess:
  """Such a process and our end of the pipe to it."""

  def __init__(self):
    self._connection, theirs = multiprocessing.Pipe()
    # Not multiprocessing.Process: that runs our __main__ again in the child,
    # and `python -m jax_rlvr.train` has imported jax there.
    code = (
      f'import sys; sys.path[:] = {sys.path!r}; '
      'from jax_rlvr.reward_process import serve; '
      f'serve({theirs.fileno()}, {os.getpid()})'
    )
    with theirs:
      self.process = subprocess.Popen(
        [sys.executable, '-c', code],
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
      )

  def send(self, message: Any) -> None:
    """Raises ChildProcessError where the process has ended."""
    try:
      self._connection.send(message)
    except OSError as error:
      raise self._ended() from error

  def receive(self, deadline_s: float) -> tuple[float | None, str]:
    """The next (reward, error).

    Raises:
      TimeoutError: nothing came within `deadline_s` seconds.
      ChildProcessError: the process has ended.
    """
    try:
      if self._connection.poll(deadline_s):
        # JSON, not a pickle: what comes from there may not run code here.
        reward, error = json.loads(self._connection.recv_bytes())
        return reward, error
    except Exception as error:  # a reward may even have written into the pipe
      raise self._ended() from error
    raise TimeoutError(f'nothing within {deadline_s:g} s')

  def kill(self) -> None:
    """Ends it at once, whatever it is doing."""
    self.process.kill()
    self.process.wait()
    self._connection.close()

  def _ended(self) -> ChildProcessError:
    with contextlib.suppress(subprocess.TimeoutExpired):
      # The pipe breaks a moment before the process is gone.
      self.process.wait(timeout=1)
    code = self.process.returncode
    return ChildProcessError(f'the process broke off with exit code {code}')


def pickled(task: Any) -> bytes:
  """The task as such a process will load it.

  Raises:
    ValueError: it could not.
  """
  try:
    data = pickle.dumps(task)
    _FreshUnpickler(io.BytesIO(data)).load()
  except Exception as error:
    raise ValueError(
      f'task {task.name!r} cannot be sent to a reward process '
      f'({_one_line(error)}); define it in a module that can be imported, '
      'with plain values as fields'
    ) from error
  return data


class _FreshUnpickler(pickle.Unpickler):
  """Loads only what a fresh process could: nothing of a script or a recipe."""

  def find_class(self, module: str, name: str) -> Any:
    if not _importable(module):
      raise ImportError(f'{name} is of {module}, which cannot be imported')
    return super().find_class(module, name)


def _importable(module: str) -> bool:
  """Whether `import module` would find a file, whatever is imported here."""
  if module == '__main__':
    return False
  path = None
  for name in itertools.accumulate(module.split('.'), '{}.{}'.format):
    specs = (finder.find_spec(name, path) for finder in sys.meta_path)
    spec = next(filter(None, specs), None)
    if spec is None:
      return False
    path = spec.submodule_search_locations
  return True


def serve(pipe: int, parent: int) -> None:
  """The life of the process: answers in, (reward, error) out.

  Args:
    pipe: file descriptor of its end.
    parent: id of the process to leave with.
  """
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  if sys.platform == 'linux':
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != parent:
    return
  with multiprocessing.connection.Connection(pipe) as connection:
    try:
      tasks = {}
      for name, task in connection.recv().items():
        try:
          tasks[name] = pickle.loads(task)
        except Exception as error:
          _reply(connection, (None, f'task {name!r}: {_one_line(error)}'))
          return
      _reply(connection, (None, ''))
      while True:
        for payload in connection.recv():
          _reply(connection, _judge(tasks, payload))
    except (EOFError, OSError):
      return


def _reply(connection, answer: tuple[float | None, str]) -> None:
  connection.send_bytes(json.dumps(answer).encode())


def _judge(
  tasks: Mapping[str, Any], payload: bytes
) -> tuple[float | None, str]:
  """The reward of one answer, or what was wrong with it."""
  try:
    prompt, completion = pickle.loads(payload)
    reward = tasks[prompt.task].reward(prompt, completion)
    if reward is None:
      return None, ''
    if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
      return None, f'not a finite number: {reward!r:.100}'
    return float(reward), ''
  except BaseException as error:  # sys.exit() too is only one answer's end
    return None, _one_line(error)


def _one_line(error: BaseException) -> str:
  """Type and message, even of an error that cannot print itself."""
  return traceback.format_exception_only(error)[-1].strip()[:200]
