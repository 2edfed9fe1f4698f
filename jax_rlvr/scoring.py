"""Runs rewards in worker processes that can be killed.

Each worker process has a thread here that feeds it chunks of answers and waits
for their rewards one by one, so that the deadline is per answer and the answer
at fault is known when a worker hangs or dies. That answer is tried once more in
a new process and then is unscorable; the others of its chunk are not touched.
A task that judges in batches gets its answers of a chunk at one time; when that
fails they are tried one by one, which leaves the one at fault.

Not pebble or concurrent.futures: they share one pipe between the workers, so
that a worker that dies with no answer in hand breaks the pool.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import logging
import math
import pickle
import threading
import time
from collections.abc import Sequence
from typing import Any

from jax_rlvr.records import Completion, Prompt
from jax_rlvr.reward_process import RewardProcess, Score, pickled

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
# Around the settling of futures: the batch deadline may have come first.
_UNLESS_SETTLED = contextlib.suppress(concurrent.futures.InvalidStateError)


@dataclasses.dataclass(kw_only=True, eq=False)
class _Answer:
  task: str
  payload: bytes  # the pickled prompt and completion
  label: str  # for the log
  alone: bool  # not in a batch
  future: concurrent.futures.Future
  tries: int = 0


class Scorers:
  """Worker processes that score completions; a context manager.

  Example:
    with Scorers([Addition()], workers=4) as scorers:
      futures = [scorers.submit(prompt, completion) for … in …]
      scores, counts = scorers.gather(futures)
  """

  def __init__(
    self,
    tasks: Sequence[Any],
    workers: int = 1,
    deadline_s: float = 10.0,
    memory_limit_mb: int = 0,
    batch_deadline_s: float = math.inf,
  ):
    """Checks the tasks; starts no process yet.

    Args:
      tasks: objects with a `name` and a `reward(prompt, completion)`: a finite
        number, None, or a dict of numbers with 'reward' and perhaps 'outcome';
        or with `rewards(prompts, completions)`, a list of these.
      workers: processes.
      deadline_s: seconds a reward may take before its process is killed; a
        batch may take as many times that as it has answers.
      memory_limit_mb: address space of a process; 0 for no limit. A reward that
        wants more gets a MemoryError. Libraries with threads map gigabytes.
      batch_deadline_s: seconds that `gather` may wait.

    Raises:
      ValueError: a name is taken twice, a number is not positive, or a fresh
        process could not load a task.
    """
    if not (workers > 0 and deadline_s > 0 and batch_deadline_s > 0):
      knobs = f'{workers=}, {deadline_s=}, {batch_deadline_s=}'
      raise ValueError(f'{knobs}: give more than 0')
    if memory_limit_mb < 0:
      raise ValueError(f'{memory_limit_mb=}: give MiB, or 0 for no limit')
    self._tasks = {}
    for task in tasks:
      if task.name in self._tasks:
        raise ValueError(f'two tasks are called {task.name!r}; rename one')
      self._tasks[task.name] = pickled(task)
    self._batched = {task.name for task in tasks if hasattr(task, 'rewards')}
    self._deadline_s = deadline_s
    self._batch_deadline_s = batch_deadline_s
    self._memory_limit_mb = memory_limit_mb
    self._changed = threading.Condition()
    # The condition guards what follows; processes with what they are at.
    self._waiting: collections.deque[_Answer] = collections.deque()
    self._workers: dict[RewardProcess, list[_Answer]] = {}
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
      task=prompt.task,
      alone=prompt.task not in self._batched,
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
  ) -> tuple[list[Score], dict[str, int]]:
    """Waits for scores, in the order of the futures.

    At the batch deadline the rest is unscorable and its processes are replaced.

    Returns:
      The scores, and how many answers ran into a deadline ('reward/timeouts'),
      failed in another way ('reward/errors'), and have no reward for whatever
      reason ('reward/unscorable').

    Raises:
      RuntimeError: worker processes do not start, or the scorers were closed.
    """
    end = time.monotonic() + self._batch_deadline_s
    while pending := [future for future in futures if not future.done()]:
      left = end - time.monotonic()
      if left <= 0:
        self._give_up(pending)
        break
      _, late = concurrent.futures.wait(pending, min(left, _WAIT_LOG_S))
      if late:
        _log.warning('waiting for %d of %d rewards', len(late), len(futures))
    scores = [future.result() for future in futures]
    with self._changed:
      self._logged = 0
    failures = collections.Counter(score.failure for score in scores)
    return scores, {
      'reward/timeouts': failures['timeout'],
      'reward/errors': failures['error'],
      'reward/unscorable': sum(score.reward is None for score in scores),
    }

  def _give_up(self, futures: list[concurrent.futures.Future]) -> None:
    _log.warning('no time for %d rewards: unscorable', len(futures))
    with self._changed:
      for future in futures:
        with _UNLESS_SETTLED:
          future.set_result(Score(None, 'timeout'))
      for worker, answers in self._workers.items():
        if any(answer.future.done() for answer in answers):
          worker.stop()

  def close(self) -> None:
    """Kills the processes; answers still without a reward get none."""
    with self._changed:
      self._closed = True
      self._changed.notify_all()
      for worker in self._workers:
        worker.stop()
    for thread in self._threads:
      thread.join()
    for answer in self._waiting:
      with _UNLESS_SETTLED:
        answer.future.set_exception(RuntimeError('the scorers were closed'))

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
          with _UNLESS_SETTLED:
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
        if chunk := [a for a in taken if not a.future.done()]:
          return chunk

  def _score(self, worker: RewardProcess, chunk: list[_Answer]) -> bool:
    """Settles what it can of a chunk; False when the process is useless."""
    calls: dict[Any, list[_Answer]] = {}
    for a in [a for a in chunk if not a.future.done()]:
      calls.setdefault(a if a.alone else a.task, []).append(a)
    left, useless, failed = collections.deque(calls.values()), False, []
    try:
      worker.send([(c[0].task, [a.payload for a in c]) for c in left])
      while left and not useless:
        count = len(left[0])
        with self._changed:
          self._workers[worker] = left[0]
          if any(answer.future.done() for answer in left[0]):
            worker.stop()  # nobody waits for that any more
        scores, useless = worker.receive(self._deadline_s * count, count)
        for answer, score in zip(left.popleft(), scores, strict=True):
          if isinstance(score, str):
            failed.append((answer, 'error', score))
          else:
            with _UNLESS_SETTLED:
              answer.future.set_result(score)
    except (TimeoutError, ChildProcessError) as error:
      useless = True
      if not worker.stopped:  # else we ended it, and nobody is to blame
        how = 'timeout' if isinstance(error, TimeoutError) else 'error'
        failed += [(answer, how, str(error)) for answer in left.popleft()]
    with self._changed:
      self._workers[worker] = []
      self._waiting.extendleft(reversed([*itertools.chain(*left)]))
      self._changed.notify_all()
    for failure in failed:  # they come first, and so in a new process
      self._failed(*failure)
    return not useless

  def _failed(self, answer: _Answer, failure: str, reason: str) -> None:
    """Has an answer tried once more, by itself, or gives it up."""
    answer.tries += answer.alone  # else another may be at fault
    answer.alone, again = True, answer.tries < _TRIES
    with self._changed:
      if self._logged < _LOGGED and not self._closed:
        self._logged += 1
        what = 'trying once more' if again else 'unscorable'
        _log.warning('reward of %s: %s; %s', answer.label, reason, what)
      if again:
        self._waiting.appendleft(answer)
        self._changed.notify()
      else:
        with _UNLESS_SETTLED:
          answer.future.set_result(Score(None, failure))

  def _start(self) -> RewardProcess:
    """A new process that is ready; RuntimeError where none can be had."""
    for _ in range(_STARTS):
      worker = None
      try:
        worker = RewardProcess(self._memory_limit_mb)
        with self._changed:
          self._workers[worker] = []
          if self._closed:
            worker.stop()
        worker.send(self._tasks)
        (reason,), _ = worker.receive(_START_DEADLINE_S)
        if not isinstance(reason, str):
          return worker
      except OSError as error:
        reason = str(error)
      if worker:
        self._discard(worker)
      if self._closed:
        raise RuntimeError('the scorers were closed')
      _log.warning('a reward process did not start: %s', reason)
    raise RuntimeError(f'reward processes do not start: {reason}')

  def _discard(self, worker: RewardProcess) -> None:
    with self._changed:
      self._workers.pop(worker)
    if not worker.kill():
      _log.warning('processes that a reward started do not end')
