"""The processes that run one program together, a host each.

Every host runs the same lines. What steers them, a number or a flag, is agreed
by a small collective; a host that fails, lags or goes missing is named.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from jax_rlvr import compilation
from jax_rlvr.config import ConfigError

if TYPE_CHECKING:
  from jaxtyping import Bool, Int

_log = logging.getLogger(__name__)

# Exit code of what can be run again, and goes on.
AGAIN = 75

# JAX gives up on a host that was silent so long, but does not always say which;
# the watch below does, and is to come first.
HEARTBEAT_S = 40
_BEAT_S = 3.0
_GONE_S = 15.0
_WAIT_LOG_S = 60.0
DEADLINE_S = 1800.0

# Bytes of a host that go to the others at one time.
CHUNK = 2**22


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of `start`, for where the environment does not say."""
  flags = parser.add_argument_group(
    'hosts', 'TPU VMs, GKE and Slurm say these themselves'
  )
  flags.add_argument('--coordinator', help='host:port of process 0')
  flags.add_argument('--processes', type=int, help='how many there are')
  flags.add_argument('--process', type=int, help='which of them this is')


def start(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
  *,
  deadline_s: float = DEADLINE_S,
) -> None:
  """Joins the other hosts, where there are any; before any use of a device.

  TPU VMs, GKE and Slurm tell JAX what it needs; elsewhere give all three.

  Args:
    coordinator: host:port of process 0.
    processes: how many there are.
    process: which of them this is.
    deadline_s: seconds to wait for hosts that lag before this one leaves.

  Raises:
    ValueError: some of the three are missing.
    RuntimeError: the others cannot be reached.
  """
  given = (coordinator, processes, process)
  if any(x is not None for x in given) and None in given:
    raise ValueError('give all of --coordinator, --processes and --process')
  if jax.distributed.is_initialized():
    return
  # It would swallow SIGTERM, by which the trainer saves and leaves.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
      coordinator, processes, process,
      # A CPU process has its devices to itself, also under Slurm.
      cluster_detection_method='deactivate' if coordinator else None,
      heartbeat_timeout_seconds=HEARTBEAT_S,
    )  # fmt: skip
  except ValueError as error:
    if 'coordinator_address' not in str(error):
      raise
    return  # No cluster around.
  except RuntimeError as error:
    if coordinator or 'must be called before' not in str(error):
      raise
    return  # Called from a program that uses its devices already.
  if jax.process_count() == 1:
    return
  if jax.local_devices()[0].platform == 'cpu':
    # A program read from the cache has lost the order of its collectives
    # (jaxlib 0.10 for CPUs): processes would wait for one another for good.
    jax.config.update('jax_enable_compilation_cache', False)
  _watch.start(deadline_s)


def run(
  command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace
) -> int:
  """Runs a command together with the other hosts, and parts from them.

  Args:
    command: returns its exit code; the same on all hosts.
    arguments: of the command, with those of `add_flags`.

  Returns:
    The exit code; 2 where the others cannot be joined.
  """
  compilation.configure()
  try:
    start(arguments.coordinator, arguments.processes, arguments.process)
  except (ValueError, RuntimeError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  compilation.keep_programs()
  try:
    code = command(arguments)
  except Exception as error:
    if not several():
      raise
    traceback.print_exc()
    abandon(error)
  leave()
  return code


def is_leader() -> bool:
  """Whether this host is the one that writes logs and prints."""
  return jax.process_index() == 0


def several() -> bool:
  """Whether there are others."""
  return jax.process_count() > 1


def agree(what: str, numbers: Sequence[int] | np.ndarray) -> Int[Any, 'h …']:
  """The int32 numbers of every host, [hosts, …].

  Args:
    what: they are for; the name in the log where a host is waited for.
    numbers: of this host, as many as of any other.
  """
  mine = np.asarray(numbers, np.int32)
  if not several():
    return mine[None]
  with _watch.at(what):
    return np.asarray(multihost_utils.process_allgather(mine))


def most(what: str, *numbers: int) -> list[int]:
  """The largest of each number over the hosts."""
  return agree(what, numbers).max(axis=0).tolist()


def any_of(what: str, flags: Sequence[bool] | np.ndarray) -> Bool[Any, ' n']:
  """Which flags are set on any host."""
  flags = np.asarray(flags, bool)
  if not several():
    return flags
  # Few shapes, for each is compiled.
  padded = np.zeros(max(-(-flags.size // 64), 1) * 64, np.int32)
  padded[: flags.size] = flags
  return agree(what, padded).max(axis=0)[: flags.size] > 0


def exchange(what: str, data: bytes) -> list[bytes]:
  """The bytes of every host."""
  if not several():
    return [data]
  sizes = agree(f'{what}: sizes', [len(data)])[:, 0].tolist()
  # Powers of two, for each is compiled; every device holds that of all hosts.
  chunk = min(1 << max(*sizes, 1024).bit_length(), CHUNK)
  parts = [[] for _ in sizes]
  for start in range(0, max(sizes), chunk):
    mine = np.frombuffer(data[start : start + chunk], np.uint8)
    padded = np.zeros(chunk, np.uint8)
    padded[: mine.size] = mine
    with _watch.at(what):
      rows = np.asarray(multihost_utils.process_allgather(padded))
    for part, row, size in zip(parts, rows, sizes, strict=True):
      part.append(row[: max(size - start, 0)].tobytes())
  return [b''.join(part) for part in parts]


@contextlib.contextmanager
def all_or_none(what: str) -> Iterator[None]:
  """What one host refuses, all refuse.

  Raises:
    ConfigError: another host raised one, or an OSError or ImportError, in the
      body; on that host it is the error itself.
  """
  refused = None
  try:
    yield
  except (ValueError, OSError, ImportError) as error:
    refused = error
  messages = exchange(what, str(refused or '').encode())
  if refused is not None:
    raise refused
  for host, message in enumerate(messages):
    if message:
      raise ConfigError(f'host {host}: {message.decode()}')


def leave() -> None:
  """Parts in good order: after this nobody is missed."""
  if several():
    agree('leaving', [0])
    _watch.stop()


def abandon(error: Exception, code: int = 1) -> NoReturn:
  """Leaves the others at once, where they cannot be expected to leave as well.

  With `AGAIN` if the error is that one of them has gone; which is said first.
  """
  print(f'error: {_first_line(error)}', file=sys.stderr, flush=True)
  if code == 1:
    # A collective fails sooner than silence tells who has gone.
    time.sleep(_GONE_S + 3 * _BEAT_S)
  sys.stdout.flush()
  os._exit(code)


class _Watch:
  """A thread that beats for this host and listens for the others.

  Beats go through the store of the coordinator, host 0.
  """

  def __init__(self):
    self.is_on = False
    self._deadline_s = DEADLINE_S
    self._count, self._what = 0, 'start'
    self._since: float | None = None

  def start(self, deadline_s: float) -> None:
    self.is_on = True
    self._deadline_s = deadline_s
    threading.Thread(target=self._run, daemon=True, name='hosts').start()

  def stop(self) -> None:
    self.is_on = False

  @contextlib.contextmanager
  def at(self, what: str):
    """Marks a point that all hosts come to, as many before it on each."""
    self._count, self._what = self._count + 1, what
    self._since = time.monotonic()
    yield
    self._since = None

  def _run(self) -> None:
    from jax._src import distributed  # The store has no public name.

    client: Any = distributed.global_state.client
    me, beat = jax.process_index(), 0
    heard: dict[int, tuple[str, float]] = {}
    logged = 0.0
    while self.is_on:
      beat += 1
      try:
        client.key_value_set(
          f'jax_rlvr/{me}', f'{beat} {self._count} {self._what}', True
        )
        found = client.key_value_dir_get('jax_rlvr/')
      except Exception as error:
        self._end(f'host 0, which coordinates, is gone ({_first_line(error)})')
        return
      now = time.monotonic()
      for key, text in found:
        host = int(key.rpartition('/')[2])
        if heard.get(host, ('',))[0] != text:
          heard[host] = text, now
      for host, (_, last) in sorted(heard.items()):
        if now - last > _GONE_S:
          self._end(f'host {host} is gone: silent for {now - last:.0f} s')
          return
      since = self._since
      waited = 0.0 if since is None else now - since
      if waited > max(_WAIT_LOG_S, logged + _WAIT_LOG_S):
        logged = waited
        self._say_who_lags(heard, waited)
      elif not waited:
        logged = 0.0
      if waited > self._deadline_s:
        self._end(f'waited {waited:.0f} s in {self._what!r}')
        return
      time.sleep(_BEAT_S)

  def _say_who_lags(self, heard, waited: float) -> None:
    behind = []
    for host, (text, _) in sorted(heard.items()):
      _, count, what = text.split(' ', 2)
      if int(count) < self._count:
        behind.append(f'host {host}, last at {what!r}')
    if behind:
      _log.warning(
        'waiting for %.0f s in %r for %s', waited, self._what, '; '.join(behind)
      )

  def _end(self, reason: str) -> None:
    if not self.is_on:
      return
    print(
      f'error: {reason}; run again to go on from the last checkpoint',
      file=sys.stderr, flush=True,
    )  # fmt: skip
    sys.stdout.flush()
    # The main thread may be in a collective that never ends.
    os._exit(AGAIN)


def _first_line(error: Exception) -> str:
  return str(error).strip().split('\n')[0]


_watch = _Watch()
