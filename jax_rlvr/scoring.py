"""Runs rewards in worker processes that can be killed.

Each worker process has a thread here that feeds it chunks of answers and waits
for their rewards one by one, so that the deadline is per answer and the answer
at fault is known when a worker hangs or dies. That answer is tried once more in
a new process and then is unscorable; the others of its chunk are not touched.

Not pebble or concurrent.futures: they share one pipe between the workers, so
that a worker that dies with no answer in hand breaks the pool.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import logging
import math
import pickle
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax_rlvr.records import Completion, Prompt
from jax_rlvr.reward_process import RewardProcess, pickled

_log = logging.getLogger(__name__)

# A chunk saves wake-ups; too large a one leaves other workers idle at the end.
_CHUNK = 32
_TRIES = 2
# Imports of a task's module from a slow disk must fit.
_START_DEADLINE_S = 120.0
_STARTS = 3
# Failures in full until the next gather, and the pace of signs of life.
_LOGGED = 5
_WAIT_LOG_S = 30.0


class Score(NamedTuple):
  """What became of an answer.

  Attributes:
    reward: None where there is none.
    failure: 'timeout' or 'error' where it was given up; '' where the task
      itself decided.
  """

  reward: float | None
  failure: str = ''


@dataclasses.dataclass(kw_only=True, eq=False)
class _Answer:
  payload: bytes  # the pickled prompt and completion
  label: str  # for the log
  future: concurrent.futures.Future
  tries: int = 0


class Scorers:
  """Worker processes that score completions; a context manager.

  Example:
    with Scorers([Addition()], workers=4) as scorers:
      futures = [scorers.submit(prompt, completion) for … in …]
      rewards, counts = scorers.gather(futures)
  """

  def __init__(
    self, tasks: Sequence[Any], workers: int = 1, deadline_s: float = 10.0
  ):
    """Checks the tasks; starts no process yet.

    Args:
      tasks: objects with a `name` and a `reward(prompt, completion)`.
      workers: processes.
      deadline_s: seconds a single reward may take before its process is killed.

    Raises:
      ValueError: a name is taken twice, a number is not positive, or a fresh
        process could not load a task.
    """
    if workers < 1:
      raise ValueError(f'{workers=} processes for rewards; give 1 or more')
    if not deadline_s > 0:
      raise ValueError(f'{deadline_s=} for a reward; give seconds above 0')
    self._tasks = {}
    for task in tasks:
      if task.name in self._tasks:
        raise ValueError(
          f'two tasks are called {task.name!r}; give one another name'
        )
      self._tasks[task.name] = pickled(task)
    self._deadline_s = deadline_s
    self._changed = threading.Condition()
    # The condition guards what follows.
    self._waiting: collections.deque[_Answer] = collections.deque()
    self._workers: set[RewardProcess] = set()
    self._closed = False
    self._logged = 0
    self._threads = [
      threading.Thread(target=self._work, name=f'scorer-{i}', daemon=True)
      for i in range(workers)
    ]
    for thread in self._threads:
      thread.start()

  def __enter__(self) -> Scorers:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def submit(
    self, prompt: Prompt, completion: Completion
  ) -> concurrent.futures.Future[Score]:
    """Hands in one completion; returns at once.

    Raises:
      ValueError: no task is called `prompt.task`.
      RuntimeError: the scorers are closed.
    """
    if prompt.task not in self._tasks:
      raise ValueError(
        f'no task is called {prompt.task!r}, as prompt {prompt.id!r} says; '
        f'there are {", ".join(self._tasks) or "none"}'
      )
    answer = _Answer(
      payload=pickle.dumps((prompt, completion)),
      label=f'{prompt.task}, prompt {prompt.id!r}',
      future=concurrent.futures.Future(),
    )
    with self._changed:
      if self._closed:
        raise RuntimeError('the scorers are closed')
      self._waiting.append(answer)
      self._changed.notify()
    return answer.future

  def gather(
    self, futures: Sequence[concurrent.futures.Future[Score]]
  ) -> tuple[list[float | None], dict[str, int]]:
    """Waits for rewards, in the order of the futures.

    Returns:
      The rewards, None where unscorable, and how many answers ran into the
      deadline ('reward/timeouts'), failed in another way ('reward/errors'), and
      have no reward for whatever reason ('reward/unscorable').

    Raises:
      RuntimeError: worker processes do not start, or the scorers were closed.
    """
    pending = set(futures)
    while pending:
      _, pending = concurrent.futures.wait(pending, timeout=_WAIT_LOG_S)
      if pending:
        _log.warning('waiting for %d of %d rewards', len(pending), len(futures))
    scores = [future.result() for future in futures]
    with self._changed:
      self._logged = 0
    failures = collections.Counter(score.failure for score in scores)
    return [score.reward for score in scores], {
      'reward/timeouts': failures['timeout'],
      'reward/errors': failures['error'],
      'reward/unscorable': sum(score.reward is None for score in scores),
    }

  def close(self) -> None:
    """Kills the processes; answers still without a reward get none."""
    with self._changed:
      self._closed = True
      self._changed.notify_all()
      for worker in self._workers:
        worker.process.kill()
    for thread in self._threads:
      thread.join()
    while self._waiting:
      future = self._waiting.popleft().future
      if not future.cancelled():
        future.set_exception(RuntimeError('the scorers were closed'))

  def _work(self) -> None:
    """What each thread does: keeps one process busy."""
    worker = None
    while chunk := self._take():
      if worker and worker.process.poll() is not None:
        # It died between answers, so none of them is to blame.
        self._discard(worker)
        worker = None
      try:
        worker = worker or self._start()
      except RuntimeError as error:
        for answer in chunk:
          answer.future.set_exception(error)
        continue
      if not self._score(worker, chunk):
        self._discard(worker)
        worker = None
    if worker:
      self._discard(worker)

  def _take(self) -> list[_Answer]:
    """This thread's share of the waiting answers; none when closed."""
    with self._changed:
      while True:
        self._changed.wait_for(lambda: self._waiting or self._closed)
        if self._closed:
          return []
        share = math.ceil(len(self._waiting) / len(self._threads))
        taken = [self._waiting.popleft() for _ in range(min(share, _CHUNK))]
        chunk = [
          answer
          for answer in taken
          # Runs already when tried before; False when cancelled by its owner.
          if answer.future.running()
          or answer.future.set_running_or_notify_cancel()
        ]
        if chunk:
          return chunk

  def _score(self, worker: RewardProcess, chunk: list[_Answer]) -> bool:
    """Settles what it can of a chunk; False when the process is useless."""
    left = collections.deque(chunk)
    try:
      worker.send([answer.payload for answer in chunk])
      while left:
        reward, error = worker.receive(self._deadline_s)
        answer = left.popleft()
        if error:
          self._failed(answer, 'error', error)
        else:
          answer.future.set_result(Score(reward))
      return True
    except (TimeoutError, ChildProcessError) as error:
      late = isinstance(error, TimeoutError)
      culprit = left.popleft()
      with self._changed:
        self._waiting.extendleft(reversed(left))
        self._changed.notify_all()
      self._failed(culprit, 'timeout' if late else 'error', str(error))
      return False

  def _failed(self, answer: _Answer, failure: str, reason: str) -> None:
    """Has an answer tried once more, or gives it up."""
    answer.tries += 1
    with self._changed:
      # Once closed, processes die by our own hand: close() settles the answer.
      again = answer.tries < _TRIES or self._closed
      if self._logged < _LOGGED and not self._closed:
        self._logged += 1
        what = 'trying once more' if again else 'unscorable'
        _log.warning('reward of %s: %s; %s', answer.label, reason, what)
      if again:
        self._waiting.appendleft(answer)
        self._changed.notify()
    if not again:
      answer.future.set_result(Score(None, failure))

  def _start(self) -> RewardProcess:
    """A new process that is ready; RuntimeError where none can be had."""
    for _ in range(_STARTS):
      worker = None
      try:
        worker = RewardProcess()
        with self._changed:
          self._workers.add(worker)
          if self._closed:
            worker.process.kill()
        worker.send(self._tasks)
        _, error = worker.receive(_START_DEADLINE_S)
        if not error:
          return worker
      except OSError as problem:
        error = str(problem)
      if worker:
        self._discard(worker)
      if self._closed:
        raise RuntimeError('the scorers were closed')
      _log.warning('a reward process did not start: %s', error)
    raise RuntimeError(f'reward processes do not start: {error}')

  def _discard(self, worker: RewardProcess) -> None:
    with self._changed:
      self._workers.discard(worker)
    worker.kill()
