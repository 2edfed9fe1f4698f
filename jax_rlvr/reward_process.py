"""A process that runs rewards, seen from both ends.

It is a fresh interpreter with our `sys.path` that imports the tasks, never jax
and never our `__main__`. What rewards print is thrown away. It ignores Ctrl-C
and leaves when our end of its socket closes; on Linux the kernel kills it with
us even while it hangs.

What a reward starts may outlive its answer, and ends with the process: its
process group, and on Linux what descends from it, is of its session or has its
token in the environment. This is no sandbox. It does not reach what a process
started that the kernel killed with us; what has left its session, its parents
and its environment; what forks out of these faster than we read /proc; nor a
reward that forges replies or signals strangers.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.util
import io
import itertools
import json
import math
import numbers
import os
import pathlib
import pickle
import resource
import secrets
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

# From <linux/prctl.h>: the signal we get when the thread that started us ends.
_PR_SET_PDEATHSIG = 1
# A variable of this name marks what a process starts.
TOKEN = 'JAX_RLVR_REWARDS'
# Processes and threads of the user, so that one who forks without end does not
# take the machine before its deadline. Does not bind root.
_PROCESSES = 1 << 14
_LONGEST = 1 << 24  # bytes of a reply, by far
# At most, until a process has read what it is sent, and is gone when killed.
_SEND_S = 60.0
_KILL_S = 10.0


@dataclasses.dataclass(frozen=True)
class Score:
  """What became of an answer.

  Attributes:
    reward: None where there is none.
    failure: 'timeout' or 'error' where it was given up; '' where the task
      itself decided.
    outcome: the component that says right or wrong; the reward where none does.
    parts: other components of the reward, by name.
  """

  reward: float | None
  failure: str = ''
  outcome: float | None = None
  parts: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.outcome is None:
      object.__setattr__(self, 'outcome', self.reward)


class RewardProcess:
  """Such a process and our end of the socket to it.

  Attributes:
    stopped: `stop` was called; whatever it was doing, it is not to blame.
  """

  def __init__(self, memory_limit_mb: int = 0):
    self.stopped = False
    self._received = b''
    self._replies = 0
    self._token = f'{os.getpid()}-{secrets.token_hex(8)}'
    self._connection, theirs = socket.socketpair()
    # Not multiprocessing.Process: that runs our __main__ again in the child,
    # and `python -m jax_rlvr.train` has imported jax there.
    code = (
      f'import sys; sys.path[:] = {sys.path!r}; '
      'from jax_rlvr.reward_process import serve; '
      f'serve({theirs.fileno()}, {os.getpid()}, {memory_limit_mb})'
    )
    with theirs:
      self.process = subprocess.Popen(
        [sys.executable, '-c', code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
        env=os.environ | {TOKEN: self._token},
      )

  def send(self, message: Any) -> None:
    """Raises ChildProcessError where the process has ended."""
    self._connection.settimeout(_SEND_S)
    try:
      self._connection.sendall(pickle.dumps(message))
    except OSError as error:
      raise self._ended() from error

  def receive(
    self, deadline_s: float, count: int = 1
  ) -> tuple[list[Score | str], bool]:
    """The next reply, on `count` answers.

    Returns:
      For each its score or what went wrong; and whether memory ran out, which
      earlier rewards may have used up.

    Raises:
      TimeoutError: nothing came within `deadline_s` seconds.
      ChildProcessError: the process has ended or talks nonsense.
    """
    end = time.monotonic() + deadline_s
    while b'\n' not in self._received:
      left = end - time.monotonic()
      if left <= 0:
        raise TimeoutError(f'nothing within {deadline_s:g} s')
      self._connection.settimeout(min(left, 1.0))
      try:
        data = self._connection.recv(1 << 16)
      except OSError as error:
        # Children may hold the other end of the dead, which then stays open.
        if isinstance(error, TimeoutError) and self.process.poll() is None:
          continue
        data = b''
      if not data:
        raise self._ended()
      self._received += data
      if len(self._received) > _LONGEST:
        raise ChildProcessError('the process talks without end')
    line, _, self._received = self._received.partition(b'\n')
    try:
      # JSON, not a pickle: what comes from there may not run code here. The
      # number shows whether a reward itself wrote into the socket.
      number, scores, spent = json.loads(line)
      scores = [s if isinstance(s, str) else Score(**s) for s in scores]
      if (number, len(scores)) != (self._replies, count):
        raise ValueError('a reply out of turn')
    except Exception as error:
      raise ChildProcessError(f'the process said {line!r:.100}') from error
    self._replies += 1
    return scores, spent

  def stop(self) -> None:
    """Has `send` and `receive`, in whatever thread, give up at once."""
    self.stopped = True
    with contextlib.suppress(OSError):
      self._connection.shutdown(socket.SHUT_RDWR)

  def kill(self) -> bool:
    """Ends it and all it started at once; False where something is left."""
    self._connection.close()
    end, found = time.monotonic() + _KILL_S, set()
    while time.monotonic() < end:
      family = self._family()
      # They are stopped until there are no more, for of those whose parent is
      # dead nobody knows where they are from.
      number = signal.SIGKILL if family <= found else signal.SIGSTOP
      found |= family
      # The group gets it as a whole, however fast it forks.
      for process in (-self.process.pid, *family):
        with contextlib.suppress(OSError):
          os.kill(process, number)
      if self.process.poll() is not None and not family:
        return True
      time.sleep(0.005)
    return False

  def _family(self) -> set[int]:
    """It and what it started, of what runs; nothing where there is no /proc."""
    pid, token = self.process.pid, f'{TOKEN}={self._token}'.encode()
    family, parents = set(), {}
    for path in pathlib.Path('/proc').glob('[0-9]*'):
      try:
        stat = (path / 'stat').read_bytes().rpartition(b')')[2].split()
        state, parent, _, session = stat[:4]
        if state in b'ZX':
          continue
        parents[int(path.name)] = int(parent)
        if int(session) == pid or token in (path / 'environ').read_bytes():
          family.add(int(path.name))
      except (OSError, ValueError):
        continue  # it is gone, or of another user
    while new := {p for p in parents if parents[p] in family} - family:
      family |= new
    return family

  def _ended(self) -> ChildProcessError:
    with contextlib.suppress(subprocess.TimeoutExpired):
      # The socket breaks a moment before the process is gone.
      self.process.wait(timeout=0 if self.stopped else 1)
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
    if module == '__main__' or not importlib.util.find_spec(module):
      raise ImportError(f'{name} is of {module}, which cannot be imported')
    return super().find_class(module, name)


def serve(pipe: int, parent: int, memory_limit_mb: int) -> None:
  """The life of the process: calls in, replies out, until its parent leaves."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  if sys.platform == 'linux':
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != parent:
    return
  limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_NPROC: _PROCESSES}
  if memory_limit_mb:
    limits[resource.RLIMIT_AS] = memory_limit_mb << 20
  for which, limit in limits.items():
    _, most = resource.getrlimit(which)
    if most == resource.RLIM_INFINITY or limit < most:
      resource.setrlimit(which, (limit, limit))
  os.set_inheritable(pipe, False)
  os.dup2(1, 2)  # late: what goes wrong before is worth seeing
  me, serials = os.getpid(), itertools.count()
  with (
    contextlib.suppress(EOFError, OSError),
    socket.socket(fileno=pipe) as connection,
    connection.makefile('rb') as calls,
  ):

    def reply(scores: Sequence[Mapping | str], spent: bool = False) -> None:
      if os.getpid() != me:
        os._exit(1)  # a reward has forked, and both came back
      line = json.dumps([next(serials), scores, spent]) + '\n'
      connection.sendall(line.encode())

    tasks = {}
    for name, task in pickle.load(calls).items():
      try:
        tasks[name] = pickle.loads(task)
      except Exception as error:
        reply([f'task {name!r}: {_one_line(error)}'])
        return
    reply([{'reward': None}])
    while True:
      for name, payloads in pickle.load(calls):
        reply(*_judge(tasks[name], payloads))


def _judge(
  task: Any, payloads: Sequence[bytes]
) -> tuple[list[Mapping | str], bool]:
  """A reply on the answers of one call."""
  try:
    answers = [pickle.loads(payload) for payload in payloads]
    if hasattr(task, 'rewards'):
      rewards = list(task.rewards(*map(list, zip(*answers, strict=True))))
      if len(rewards) != len(answers):
        raise ValueError(f'{len(rewards)} rewards for {len(answers)} answers')
    else:
      rewards = [task.reward(*answer) for answer in answers]
  except BaseException as error:  # sys.exit() too is only one answer's end
    return [_one_line(error)] * len(payloads), isinstance(error, MemoryError)
  return [_score(reward) for reward in rewards], False


def _score(reward: Any) -> Mapping[str, Any] | str:
  """The fields of a score, or what is wrong with the reward."""
  try:
    parts = dict(reward) if isinstance(reward, Mapping) else {'reward': reward}
    if 'reward' not in parts:
      raise ValueError(f"no 'reward' in {reward!r:.100}")
    for name, part in parts.items():
      if part is None and name in ('reward', 'outcome'):
        continue
      if not isinstance(name, str):
        raise ValueError(f'{name!r:.100} is not the name of a component')
      if not isinstance(part, numbers.Real) or not math.isfinite(part):
        raise ValueError(f'{name} is not a finite number: {part!r:.100}')
      parts[name] = float(part)
    total, outcome = parts.pop('reward'), parts.pop('outcome', None)
    outcome = None if total is None else outcome
    return {'reward': total, 'outcome': outcome, 'parts': parts}
  except BaseException as error:
    return _one_line(error)


def _one_line(error: BaseException) -> str:
  """Type and message, even of an error that cannot print itself."""
  return traceback.format_exception_only(error)[-1].strip()[:200]
