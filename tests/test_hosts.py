"""What processes agree on, and what becomes of them when one is missing.

It also runs as a script: one of the processes.
"""

import argparse
import os
import re
import signal
import sys
import time

import numpy as np
import pytest

from jax_rlvr import hosts
from jax_rlvr.config import ConfigError
from tests import processes


def printed(tmp_path, part, count=2):
  """What each process printed while playing a part, and its exit code."""
  command = [__file__, '--part', part]
  with processes.begun(tmp_path, count, 1, command) as running:
    codes = processes.ended(running, 120)
  texts = [(tmp_path / f'{i}.txt').read_text() for i in range(count)]
  return texts, codes


def test_one_process_agrees_with_itself():
  assert hosts.is_leader() and not hosts.several()
  assert hosts.agree('x', [3, 4]).tolist() == [[3, 4]]
  assert hosts.most('x', 3, 4) == [3, 4]
  assert hosts.any_of('x', [True, False]).tolist() == [True, False]
  assert hosts.any_of('x', []).shape == (0,)
  assert hosts.exchange('x', b'abc') == [b'abc']


def test_refusal_of_one_process_is_raised_as_it_is():
  with pytest.raises(FileNotFoundError, match='no such thing'):
    with hosts.all_or_none('x'):
      raise FileNotFoundError('no such thing')


@pytest.mark.parametrize('given', [('h:1', None, None), (None, 2, 0)])
def test_place_that_is_told_in_part_is_refused(given):
  with pytest.raises(ValueError, match='all of --coordinator, --processes'):
    hosts.start(*given)


def test_hosts_see_the_numbers_of_all(tmp_path):
  texts, codes = printed(tmp_path, 'agree', 3)
  assert codes == [0, 0, 0], texts
  for text in texts:
    assert 'numbers [[0, 5], [1, 5], [2, 5]]' in text
    assert 'most [2, 5]' in text
    assert f'any {[i in (1, 2) for i in range(70)]}' in text
    assert "bytes [b'', b'xyz', b'xyzxyz']" in text
    assert 'big True' in text


def test_what_one_refuses_all_refuse(tmp_path):
  texts, codes = printed(tmp_path, 'refuse')
  assert codes == [0, 0], texts
  assert 'refused: host 1: no folder x' in texts[0]
  assert 'refused: no folder x' in texts[1]


def test_host_that_was_killed_is_named_and_the_other_leaves(tmp_path):
  texts, codes = printed(tmp_path, 'die')
  assert codes == [hosts.AGAIN, -signal.SIGKILL]
  assert 'error: host 1 is gone: silent for' in texts[0]
  assert 'run again' in texts[0]


def test_others_leave_when_the_coordinator_was_killed(tmp_path):
  texts, codes = printed(tmp_path, 'die first')
  # XLA itself ends them, as soon as the connection breaks.
  assert codes[0] == -signal.SIGKILL and codes[1] != 0
  assert re.search('leader task was preempted|host 0', texts[1])


def test_host_that_lags_is_named_in_the_log(tmp_path):
  texts, codes = printed(tmp_path, 'lag')
  assert codes == [0, 0], texts
  assert re.search(
    r"waiting for \d+ s in 'supper' for host 1, last at 'dinner'", texts[0]
  )
  assert 'waiting' not in texts[1]


def test_host_that_does_not_come_in_time_is_left(tmp_path):
  texts, codes = printed(tmp_path, 'deadline')
  assert codes[0] == hosts.AGAIN
  assert re.search(r"error: waited \d+ s in 'supper'", texts[0])


# Below is the script.


def play(part, me):
  """One process of those that play a part."""
  if part == 'agree':
    print('numbers', hosts.agree('x', [me, 5]).tolist())
    print('most', hosts.most('x', me, 5))
    flags = np.arange(70) == me
    print('any', hosts.any_of('x', flags & (me > 0)).tolist())
    print('bytes', hosts.exchange('x', b'xyz' * me))
    # In pieces, of which the last host has the most.
    hosts.CHUNK = 2**16
    big = [np.arange(70_000 * i, dtype=np.uint16).tobytes() for i in range(3)]
    print('big', hosts.exchange('x', big[me]) == big)
  elif part == 'refuse':
    try:
      with hosts.all_or_none('x'):
        if me == 1:
          raise ConfigError('no folder x')
    except ConfigError as error:
      print('refused:', error)
  elif part in ('die', 'die first'):
    hosts.agree('x', [1])
    if me == (part == 'die'):
      os.kill(os.getpid(), signal.SIGKILL)
    try:
      hosts.agree('y', [1])
    except Exception as error:
      hosts.abandon(error)
  elif part in ('lag', 'deadline'):
    hosts.agree('dinner', [1])
    if me == 1:
      time.sleep(9 if part == 'lag' else 60)
    hosts.agree('supper', [1])
  hosts.leave()


if __name__ == '__main__':
  parser = argparse.ArgumentParser()
  parser.add_argument('--part')
  parser.add_argument('--coordinator')
  parser.add_argument('--processes', type=int)
  parser.add_argument('--process', type=int)
  given = parser.parse_args()
  if given.part in ('lag', 'deadline'):
    hosts._WAIT_LOG_S = 3.0
  hosts.start(
    given.coordinator, given.processes, given.process,
    deadline_s=8.0 if given.part == 'deadline' else hosts.DEADLINE_S,
  )  # fmt: skip
  play(given.part, given.process)
  sys.exit(0)
