"""Tasks whose rewards go wrong in the ways that rewards do.

In a module of its own, without jax: reward processes import it.
"""

import ctypes
import dataclasses
import os
import sys
import time

from jax_rlvr.records import Completion, Prompt


def _hang_in_c():
  # PyDLL keeps the interpreter's lock: no signal handler, no thread can run.
  ctypes.PyDLL(None).sleep(1000)


def _leave_the_pipe():
  os.closerange(3, 100)
  time.sleep(1000)


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
    if completion.text in _DEEDS:
      return _DEEDS[completion.text]()
    return float(completion.text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unloadable:
  """A task that no process but this one can load."""

  name: str = 'unloadable'
  home: int = dataclasses.field(default_factory=os.getpid)

  def __setstate__(self, state):
    if os.getpid() != state['home']:
      raise RuntimeError('not at home')
    self.__dict__.update(state)
