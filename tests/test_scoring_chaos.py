"""Rewards that do their worst: the others are scored, and nothing is left."""

import os
import pathlib
import sys

import pytest

from jax_rlvr.reward_process import TOKEN
from jax_rlvr.scoring import Score, Scorers
from tests.misbehaving import Misbehaving
from tests.test_scoring import entries, gone, submit, wait_until

pytestmark = pytest.mark.skipif(
  sys.platform != 'linux', reason='looks for processes in /proc'
)

_GOOD = [str(i) for i in range(40)]
_SOON = {'hang in c', 'stuff the pipe', 'fork', 'fork sessions'}


def _left_behind():
  """Processes that rewards of this very process started."""
  token = f'{TOKEN}={os.getpid()}-'.encode()
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      if token in (path / 'environ').read_bytes():
        found.append(int(path.name))
    except OSError:
      continue
  return found


@pytest.mark.parametrize(
  'deed, failure',
  [
    ('hang in c', 'timeout'),
    ('stuff the pipe', 'timeout'),
    ('fork', 'timeout'),
    ('fork sessions', 'timeout'),
    ('segfault', 'error'),
    ('raise', 'error'),
    ('nan', 'error'),
    ('allocate', 'error'),
    ('write to the pipe', 'error'),
    ('write lines to the pipe', 'error'),
    ('close everything', 'error'),
    ('die before a child', 'error'),
    ('both return', None),
    ('print', None),
  ],
)
def test_bad_answers_cost_the_good_ones_nothing(deed, failure, capfd, caplog):
  places = [7] if deed in _SOON else [7, 8, 31]
  texts = list(_GOOD)
  for place in places:
    texts.insert(place, deed)
  with Scorers(
    [Misbehaving()],
    workers=2,
    deadline_s=1 if deed in _SOON else 60,
    memory_limit_mb=1024,
  ) as scorers:
    scores, counts = scorers.gather(submit(scorers, texts))
    # A control, for which a process must be there: it does see what there is.
    assert scorers.gather(submit(scorers, ['1']))[0] == [Score(1.0)]
    assert _left_behind()
  assert not _left_behind()
  assert capfd.readouterr() == ('', '')
  assert bool(caplog.records) == (failure is not None)
  bad = [scores.pop(place) for place in reversed(places)]
  assert scores == [Score(float(text)) for text in _GOOD]
  expected = Score(1.0) if failure is None else Score(None, failure)
  assert bad == [expected] * len(places)
  assert counts == {
    'reward/timeouts': len(places) if failure == 'timeout' else 0,
    'reward/errors': len(places) if failure == 'error' else 0,
    'reward/unscorable': 0 if failure is None else len(places),
  }


def test_batch_deadline_ends_what_is_left_and_nothing_else(tmp_path):
  diary = tmp_path / 'diary'
  task = Misbehaving(diary=str(diary))
  with Scorers(
    [task], workers=2, deadline_s=1000, batch_deadline_s=0.01
  ) as scorers:
    good = submit(scorers, _GOOD)
    wait_until(lambda: all(future.done() for future in good))
    # Two that hang, one in C, and some that never get their turn.
    late = submit(scorers, ['hang', 'hang in c'])
    wait_until(lambda: sum('hang' in text for _, text in entries(diary)) == 2)
    hanging = {process for process, text in entries(diary) if 'hang' in text}
    late += submit(scorers, ['hang'] * 3)
    other = submit(scorers, ['41', '42'])
    scores, counts = scorers.gather([*good, *late])
    assert scores[:40] == [Score(float(text)) for text in _GOOD]
    assert scores[40:] == [Score(None, 'timeout')] * 5
    assert counts == {
      'reward/timeouts': 5,
      'reward/errors': 0,
      'reward/unscorable': 5,
    }
    # Others wait for new processes, not for the old ones.
    assert [f.result(timeout=60).reward for f in other] == [41.0, 42.0]
    wait_until(lambda: all(map(gone, hanging)))
    assert sum('hang' in text for _, text in entries(diary)) == 2
  assert not _left_behind()


def test_batch_deadline_spares_an_answer_that_somebody_else_waits_for(tmp_path):
  diary = tmp_path / 'diary'
  task = Misbehaving(diary=str(diary))
  with Scorers(
    [task], workers=2, deadline_s=1000, batch_deadline_s=0.01
  ) as scorers:
    (slow,) = submit(scorers, ['hang once'])
    wait_until(lambda: len(entries(diary)) == 1)
    late = submit(scorers, ['hang'])
    wait_until(lambda: len(entries(diary)) == 2)
    assert scorers.gather(late)[0] == [Score(None, 'timeout')]
    # By the time of the next, the process of the first would be gone too.
    (after,) = submit(scorers, ['1'])
    assert after.result(timeout=60) == Score(1.0)
    (first, _), (second, _), _ = entries(diary)
    assert not gone(first) and gone(second) and not slow.done()


def test_process_that_is_out_of_memory_is_replaced():
  # Three leaks fit; the fourth fails, and is fine in a new process.
  texts = ['leak'] * 6 + _GOOD
  with Scorers([Misbehaving()], memory_limit_mb=1024) as scorers:
    scores, counts = scorers.gather(submit(scorers, texts))
  assert scores == [Score(1.0)] * 6 + [Score(float(text)) for text in _GOOD]
  assert not any(counts.values())


@pytest.mark.parametrize('deed', ['daemon', 'orphan'])
def test_what_a_reward_started_ends_with_its_process(deed):
  with Scorers([Misbehaving()]) as scorers:
    (score,), _ = scorers.gather(submit(scorers, [deed]))
    # It may outlive its answer: a task may keep a helper.
    assert not gone(int(score.reward))
  assert gone(int(score.reward))


def test_child_without_session_and_environment_ends_with_its_parent(tmp_path):
  diary = tmp_path / 'diary'
  with Scorers([Misbehaving(diary=str(diary))]) as scorers:
    submit(scorers, ['nameless child'])
    wait_until(lambda: len(entries(diary)) == 2)
    child, _ = entries(diary)[1]
    assert not gone(child)
  assert gone(child)
