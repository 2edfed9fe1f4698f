"""Tasks whose rewards go wrong in the ways that rewards do.

In a module of its own, without jax: reward processes import it.
"""

import ctypes
import dataclasses
import os
import stat
import subprocess
import sys
import time
from collections.abc import Sequence

from jax_rlvr.records import Completion, Prompt


def _hang_in_c():
  # PyDLL keeps the interpreter's lock: no signal handler, no thread can run.
  ctypes.PyDLL(None).sleep(1000)


def _leave_the_pipe():
  os.closerange(3, 100)
  time.sleep(1000)


def _sockets():
  """Descriptors of the sockets: the way to the trainer is among them."""
  for fd in range(3, 100):
    try:
      if stat.S_ISSOCK(os.fstat(fd).st_mode):
        yield fd
    except OSError:
      continue


def _write_to_the_pipe(data):
  for fd in _sockets():
    os.write(fd, data)
  return 1.0


def _stuff_the_pipe():
  # No end of line: who reads waits for the rest.
  _write_to_the_pipe(b'[1, [')
  time.sleep(1000)


def _close_everything():
  os.closerange(0, 100)
  return 1.0


def _fork(session=False):
  """A chain without end: each forks the next, and sleeps."""
  while os.fork() == 0:
    if session:
      os.setsid()
    # Slower than one that means it, for the sake of others on the machine.
    time.sleep(0.02)
  time.sleep(1000)


def _die_before_a_child():
  if os.fork() == 0:
    time.sleep(1000)
  os._exit(7)


def _both_return():
  os.fork()
  return 1.0


def _print():
  for _ in range(100):
    print('x' * 2**20)
    os.write(2, b'x' * 2**20)
  return 1.0


def _allocate():
  return float(len(bytearray(4 << 30)))


_leaked = []


def _leak():
  _leaked.append(bytearray(300 << 20))
  return 1.0


def _daemon():
  return float(subprocess.Popen(['sleep', '1000'], start_new_session=True).pid)


def _orphan():
  """A daemon by the book, whose parents are dead."""
  reader, writer = os.pipe()
  if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
      os.write(writer, str(os.getpid()).encode())
      time.sleep(1000)
    os._exit(0)
  os.wait()
  return float(os.read(reader, 100))


class _Unprintable(Exception):
  def __init__(self, needed, too):
    super().__init__(needed, too)

  def __str__(self):
    raise RuntimeError('no text')


def _raise_unprintable():
  raise _Unprintable(1, 2)


_DEEDS = {
  'hang': lambda: time.sleep(1000),
  'hang in c': _hang_in_c,
  'write to the pipe': lambda: _write_to_the_pipe(b'jam'),
  'write lines to the pipe': lambda: _write_to_the_pipe(b'[1, [], 0]\n' * 9),
  'stuff the pipe': _stuff_the_pipe,
  'close everything': _close_everything,
  'fork': _fork,
  'fork sessions': lambda: _fork(session=True),
  'die before a child': _die_before_a_child,
  'both return': _both_return,
  'print': _print,
  'allocate': _allocate,
  'leak': _leak,
  'daemon': _daemon,
  'orphan': _orphan,
  'segfault': lambda: ctypes.string_at(0),
  'exit': lambda: os._exit(7),
  'sys.exit': lambda: sys.exit(7),
  'leave the pipe': _leave_the_pipe,
  'raise': lambda: 1 / 0,
  'raise unprintable': _raise_unprintable,
  'recurse': lambda: _DEEDS['recurse'](),
  'nan': lambda: float('nan'),
  'infinity': lambda: float('inf'),
  'too large': lambda: 10**400,
  'text': lambda: '1.0',
  'array': lambda: [1.0],
  'none': lambda: None,
  'parts': lambda: {'reward': 0.5, 'outcome': 1, 'format': -0.5, 'fast': True},
  'only a reward': lambda: {'reward': 0.25},
  'parts but none': lambda: {'reward': None, 'outcome': 1.0, 'format': 0.5},
  'no reward': lambda: {'outcome': 1.0},
  'part nan': lambda: {'reward': 1.0, 'format': float('nan')},
  'part none': lambda: {'reward': 1.0, 'format': None},
  'part text': lambda: {'reward': 1.0, 'format': 'good'},
  'part of no name': lambda: {'reward': 1.0, 1: 1.0},
  'true': lambda: True,
  'process': os.getpid,
  'jax': lambda: 'jax' in sys.modules,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Misbehaving:
  """Does what the completion's text names; else scores the text as a number.

  Attributes:
    diary: a file that gets a line with the process's id for each reward.
    name: of the task.
  """

  diary: str = ''
  name: str = 'misbehaving'

  def reward(self, prompt: Prompt, completion: Completion):
    if self.diary:
      with open(self.diary, 'a') as file:
        file.write(f'{os.getpid()} {completion.text}\n')
    if completion.text == 'hang once':
      with open(self.diary) as file:
        if file.read().count('hang once') == 1:
          time.sleep(1000)
      return 1.0
    if completion.text == 'nameless child':
      child = subprocess.Popen(
        ['sleep', '1000'], env={}, start_new_session=True
      )
      with open(self.diary, 'a') as file:
        file.write(f'{child.pid} child\n')
      time.sleep(1000)
    if completion.text in _DEEDS:
      return _DEEDS[completion.text]()
    return float(completion.text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batched(Misbehaving):
  """Judges many at one time; its diary has a line for each call.

  With 'short' among them it returns one reward less, and waits with 'gate'
  until there is a file named like the diary and '.open'.
  """

  name: str = 'batched'

  def rewards(
    self, prompts: Sequence[Prompt], completions: Sequence[Completion]
  ):
    texts = [completion.text for completion in completions]
    with open(self.diary, 'a') as file:
      file.write(f'{os.getpid()} {",".join(texts)}\n')
    while 'gate' in texts and not os.path.exists(f'{self.diary}.open'):
      time.sleep(0.01)
    judge = Misbehaving()
    return [
      0.0 if completion.text == 'gate' else judge.reward(prompt, completion)
      for prompt, completion in zip(prompts, completions, strict=True)
      if completion.text != 'short'
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unloadable:
  """A task that no process but this one can load."""

  name: str = 'unloadable'
  home: int = dataclasses.field(default_factory=os.getpid)

  def __setstate__(self, state):
    if os.getpid() != state['home']:
      raise RuntimeError('not at home')
    self.__dict__.update(state)
