"""Rewards in processes that hang, die, lie and are left behind."""

import concurrent.futures
import contextlib
import logging
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from jax_rlvr.records import Completion, Prompt
from jax_rlvr.scoring import Score, Scorers
from jax_rlvr.tasks import Addition
from tests.misbehaving import Batched, Misbehaving, Unloadable

_REPO = pathlib.Path(__file__).parents[1]
_NONE = {'reward/timeouts': 0, 'reward/errors': 0, 'reward/unscorable': 0}


def prompt(task='misbehaving', answer=''):
  return Prompt(messages=(), answer=answer, task=task, id='p7')


def submit(scorers, texts, task='misbehaving'):
  return [scorers.submit(prompt(task), Completion(text=text)) for text in texts]


def _rewards(scorers, futures):
  scores, counts = scorers.gather(futures)
  return [score.reward for score in scores], counts


def _score(scorers, texts):
  return _rewards(scorers, submit(scorers, texts))


def gone(process):
  """Whether it is gone, or waits only for someone to take note."""
  try:
    state = pathlib.Path(f'/proc/{process}/stat').read_text()
  except FileNotFoundError:
    return True
  return state.rpartition(')')[2].split()[0] == 'Z'


def entries(diary):
  """What it says was done, as (process, text)."""
  lines = diary.read_text().splitlines() if diary.exists() else []
  pairs = [line.split(' ', 1) for line in lines]
  return [(int(process), text) for process, text in pairs]


def wait_until(condition, seconds=60.0):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, 'waited in vain'
    time.sleep(0.02)


def test_rewards_come_in_the_order_asked_for():
  texts = [str(i) for i in range(500)]
  with Scorers([Misbehaving()], workers=2) as scorers:
    rewards, counts = _score(scorers, texts)
  assert rewards == list(range(500))
  assert all(isinstance(reward, float) for reward in rewards)
  assert counts == _NONE


def test_prompts_go_to_the_task_they_name():
  with Scorers([Misbehaving(), Addition()]) as scorers:
    futures = [
      scorers.submit(prompt('addition', '12'), Completion(text='12')),
      scorers.submit(prompt('misbehaving', '12'), Completion(text='0.25')),
    ]
    assert _rewards(scorers, futures)[0] == [1.0, 0.25]


def test_one_answer_is_scored_while_others_are_still_to_come():
  with Scorers([Misbehaving()]) as scorers:
    first = scorers.submit(prompt(), Completion(text='1'))
    assert first.result(timeout=10) == Score(1.0)
    second = scorers.submit(prompt(), Completion(text='2'))
    assert scorers.gather([second, first])[0] == [Score(2.0), Score(1.0)]


def test_nothing_to_gather_is_fine():
  with Scorers([]) as scorers:
    assert scorers.gather([]) == ([], _NONE)


@pytest.mark.parametrize('deed', ['hang', 'hang in c', 'leave the pipe'])
def test_hanging_reward_is_killed_and_the_others_scored(deed, tmp_path):
  diary = tmp_path / 'diary'
  texts = [str(i) for i in range(20)]
  texts[5] = deed
  # Not much shorter: a busy machine keeps a good answer waiting too.
  with Scorers([Misbehaving(diary=str(diary))], deadline_s=1) as scorers:
    rewards, counts = _score(scorers, texts)
  assert rewards == [None if i == 5 else i for i in range(20)]
  failure = 'errors' if deed == 'leave the pipe' else 'timeouts'
  assert counts == _NONE | {f'reward/{failure}': 1, 'reward/unscorable': 1}
  # Tried twice; the others once.
  tried = [text for _, text in entries(diary)]
  assert sorted(tried) == sorted([*texts, deed])


@pytest.mark.parametrize('deed', ['segfault', 'exit'])
def test_dying_reward_is_replaced_and_the_others_scored(deed):
  texts = [str(i) for i in range(20)]
  texts[5] = texts[11] = deed
  with Scorers([Misbehaving()], workers=2) as scorers:
    rewards, counts = _score(scorers, texts)
  assert rewards == [None if i in (5, 11) else i for i in range(20)]
  assert counts == _NONE | {'reward/errors': 2, 'reward/unscorable': 2}


@pytest.mark.parametrize(
  'deed',
  [
    'raise',
    'raise unprintable',
    'recurse',
    'sys.exit',
    'nan',
    'infinity',
    'too large',
    'text',
    'array',
    'no reward',
    'part nan',
    'part none',
    'part text',
    'part of no name',
  ],
)
def test_reward_that_is_no_number_is_an_error(deed):
  with Scorers([Misbehaving()]) as scorers:
    rewards, counts = _score(scorers, ['1', deed, '2', 'process'])
    process = rewards.pop()
    # The process survives it.
    assert _score(scorers, ['process'])[0] == [process]
  assert rewards == [1.0, None, 2.0]
  assert counts == _NONE | {'reward/errors': 1, 'reward/unscorable': 1}


def test_none_is_unscorable_but_no_error():
  with Scorers([Misbehaving()]) as scorers:
    rewards, counts = _score(scorers, ['none', 'true'])
  assert rewards == [None, 1.0]
  assert counts == _NONE | {'reward/unscorable': 1}


@pytest.mark.parametrize(
  'text, score',
  [
    (
      'parts',
      Score(0.5, outcome=1.0, parts={'format': -0.5, 'fast': 1.0}),
    ),
    ('only a reward', Score(0.25, outcome=0.25)),
    ('0.25', Score(0.25, outcome=0.25)),
    # Without a reward there is no outcome to tell groups apart by.
    ('parts but none', Score(None, outcome=None, parts={'format': 0.5})),
  ],
)
def test_rewards_may_have_parts(text, score):
  with Scorers([Misbehaving()]) as scorers:
    assert scorers.gather(submit(scorers, [text]))[0] == [score]


def _batch(scorers, diary, texts):
  """What becomes of answers that are judged together."""
  # They come while another is judged, so that they all are of the next chunk.
  first = submit(scorers, ['gate'], 'batched')
  wait_until(lambda: entries(diary))
  futures = submit(scorers, texts, 'batched')
  pathlib.Path(f'{diary}.open').touch()
  assert _rewards(scorers, first) == ([0.0], _NONE)
  return _rewards(scorers, futures)


def test_task_judges_in_batches(tmp_path):
  diary = tmp_path / 'diary'
  task = Batched(diary=str(diary))
  with Scorers([task], deadline_s=60) as scorers:
    rewards, counts = _batch(scorers, diary, ['1', '2', '3', '4'])
  assert rewards == [1.0, 2.0, 3.0, 4.0]
  assert counts == _NONE
  assert [text for _, text in entries(diary)] == ['gate', '1,2,3,4']


@pytest.mark.parametrize('deed', ['raise', 'segfault', 'short', 'hang', 'nan'])
def test_culprit_of_a_batch_is_found_and_the_others_scored(deed, tmp_path):
  diary = tmp_path / 'diary'
  task = Batched(diary=str(diary))
  deadline_s = 1 if deed == 'hang' else 60
  with Scorers([task], deadline_s=deadline_s) as scorers:
    rewards, counts = _batch(scorers, diary, ['1', deed, '3'])
  assert rewards == [1.0, None, 3.0]
  failure = 'timeouts' if deed == 'hang' else 'errors'
  assert counts == _NONE | {f'reward/{failure}': 1, 'reward/unscorable': 1}
  # Those whose rewards were fine in themselves are not tried again.
  alone = [deed, deed] if deed == 'nan' else ['1', deed, deed, '3']
  tried = [text for _, text in entries(diary) if text != 'gate']
  assert tried[0] == f'1,{deed},3'
  assert sorted(tried[1:]) == sorted(alone)


def test_tasks_share_a_chunk(tmp_path):
  diary = tmp_path / 'diary'
  tasks = [Batched(diary=str(diary)), Misbehaving()]
  with Scorers(tasks) as scorers:
    names = ['batched', 'misbehaving'] * 10
    futures = [
      scorers.submit(prompt(name), Completion(text=str(i)))
      for i, name in enumerate(names)
    ]
    assert _rewards(scorers, futures) == (list(range(20)), _NONE)


def test_second_try_counts_when_it_succeeds(tmp_path):
  task = Misbehaving(diary=str(tmp_path / 'diary'))
  with Scorers([task], deadline_s=1) as scorers:
    assert _score(scorers, ['hang once']) == ([1.0], _NONE)


def test_process_that_dies_between_answers_costs_no_try(caplog):
  with Scorers([Misbehaving()]) as scorers:
    (process,), _ = _score(scorers, ['process'])
    os.kill(int(process), signal.SIGKILL)
    wait_until(lambda: gone(int(process)))
    assert _score(scorers, ['3']) == ([3.0], _NONE)
  assert not caplog.records


def test_failures_are_logged_with_task_prompt_and_error(caplog):
  with Scorers([Misbehaving()]) as scorers:
    with caplog.at_level(logging.WARNING):
      _score(scorers, ['raise'])
      assert [record.getMessage() for record in caplog.records] == [
        "reward of misbehaving, prompt 'p7': "
        f'ZeroDivisionError: division by zero; {what}'
        for what in ('trying once more', 'unscorable')
      ]
      caplog.clear()
      _score(scorers, ['raise'] * 50)
      assert len(caplog.records) == 5


def test_unknown_task_is_refused_at_once():
  with Scorers([Addition()]) as scorers:
    with pytest.raises(ValueError, match="called 'other'.*there are addition"):
      scorers.submit(prompt('other'), Completion(text=''))


@pytest.mark.parametrize(
  'arguments, match',
  [
    ({'tasks': [Addition(), Addition()]}, "two tasks are called 'addition'"),
    ({'tasks': [], 'workers': 0}, 'workers=0'),
    ({'tasks': [], 'deadline_s': 0}, 'deadline_s=0'),
    ({'tasks': [], 'batch_deadline_s': 0}, 'batch_deadline_s=0'),
    ({'tasks': [], 'memory_limit_mb': -1}, 'memory_limit_mb=-1'),
    ({'tasks': [], 'deadline_s': float('nan')}, 'deadline_s=nan'),
  ],
)
def test_bad_argument_is_named(arguments, match):
  with pytest.raises(ValueError, match=match):
    Scorers(**arguments)


_RECIPE = """
import dataclasses
@dataclasses.dataclass
class Mine:
  name: str = 'mine'
  def reward(self, prompt, completion):
    return 1.0
"""


@pytest.mark.parametrize('run_name', ['recipe', '__main__'])
def test_task_of_a_recipe_is_refused(run_name, tmp_path, monkeypatch):
  path = tmp_path / 'recipe.py'
  path.write_text(_RECIPE)
  recipe = runpy.run_path(str(path), run_name=run_name)
  # Even where this process could load it.
  module = type(sys)(run_name)
  module.Mine = recipe['Mine']
  monkeypatch.setitem(sys.modules, run_name, module)
  with pytest.raises(
    ValueError, match=f"task 'mine' cannot .*{run_name}.* define it in a module"
  ):
    Scorers([recipe['Mine']()])


def test_task_with_a_field_that_cannot_be_sent_is_refused():
  task = Misbehaving(diary=lambda: None)
  with pytest.raises(ValueError, match="task 'misbehaving' cannot be sent"):
    Scorers([task])


def test_task_that_does_not_load_is_an_error_not_a_hang():
  with Scorers([Unloadable()]) as scorers:
    future = scorers.submit(prompt('unloadable'), Completion(text=''))
    with pytest.raises(RuntimeError, match="'unloadable'.*not at home"):
      scorers.gather([future])


def test_close_kills_even_a_hanging_process_and_settles_its_answer(tmp_path):
  diary = tmp_path / 'diary'
  scorers = Scorers([Misbehaving(diary=str(diary))], workers=2)
  futures = submit(scorers, ['hang in c', 'hang', '3', '4', '5'])

  def processes():
    return {process for process, _ in entries(diary)}

  # One may score '4' and '5' before the other has started to hang.
  wait_until(lambda: len(processes()) == 2)
  scorers.close()
  assert len(processes()) == 2 and all(map(gone, processes()))
  with pytest.raises(RuntimeError, match='closed'):
    scorers.gather(futures)
  with pytest.raises(RuntimeError, match='closed'):
    scorers.submit(prompt(), Completion(text='1'))


def test_cancelled_answer_is_not_scored(tmp_path):
  diary = tmp_path / 'diary'
  with Scorers([Misbehaving(diary=str(diary))]) as scorers:
    (slow,) = submit(scorers, ['hang'])
    wait_until(lambda: len(entries(diary)) == 1)
    one, two = submit(scorers, ['1', '2'])
    assert one.cancel()
    os.kill(entries(diary)[0][0], signal.SIGKILL)
    # The hanging answer is tried once more, with '2' waiting behind it.
    wait_until(lambda: len(entries(diary)) == 2)
    os.kill(entries(diary)[1][0], signal.SIGKILL)
    assert _rewards(scorers, [slow, two])[0] == [None, 2.0]
    with pytest.raises(concurrent.futures.CancelledError):
      scorers.gather([one])


def test_processes_ignore_ctrl_c():
  with Scorers([Misbehaving()]) as scorers:
    (process,), _ = _score(scorers, ['process'])
    os.kill(int(process), signal.SIGINT)
    assert _score(scorers, ['process', '1'])[0] == [process, 1.0]


# No `if __name__ == '__main__'`: the processes must not run it again.
_PARENT = """
import sys, time
import jax
from jax_rlvr.records import Completion, Prompt
from jax_rlvr.scoring import Scorers
from tests.misbehaving import Misbehaving

assert 'jax' in sys.modules
scorers = Scorers([Misbehaving(diary=sys.argv[1])], workers=2)
prompt = Prompt(messages=(), answer='', task='misbehaving')
future = scorers.submit(prompt, Completion(text='jax'))
print(*scorers.gather([future]), flush=True)
for deed in sys.argv[2:]:
  scorers.submit(prompt, Completion(text=deed))
if sys.argv[2:]:
  time.sleep(1000)
"""


@pytest.fixture
def parent(tmp_path):
  """Starts a trainer of sorts, `python -m trainer DIARY DEEDS…`."""
  (tmp_path / 'trainer.py').write_text(textwrap.dedent(_PARENT))
  environment = os.environ | {'PYTHONPATH': str(_REPO), 'JAX_PLATFORMS': 'cpu'}
  started = []

  def start(*deeds):
    process = subprocess.Popen(
      [sys.executable, '-m', 'trainer', str(tmp_path / 'diary'), *deeds],
      cwd=tmp_path,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    started.append(process)
    return process

  yield start
  for process in started:
    # Its workers may hold the other ends: nothing is read to the end.
    process.kill()
    process.wait()
    process.stdout.close()
    process.stderr.close()


def test_processes_import_neither_jax_nor_main(parent):
  output, errors = parent().communicate(timeout=60)
  assert output.splitlines() == [f'{[Score(0.0)]} {_NONE}'], errors


@pytest.mark.skipif(sys.platform != 'linux', reason='asks the Linux kernel')
def test_processes_die_with_a_killed_parent(parent, tmp_path):
  trainer = parent('hang in c', 'hang')
  diary = tmp_path / 'diary'

  def processes():
    return {process for process, _ in entries(diary)}

  wait_until(lambda: sum('hang' in text for _, text in entries(diary)) == 2)
  try:
    assert len(processes()) == 2 and not any(map(gone, processes()))
    trainer.kill()
    wait_until(lambda: all(map(gone, processes())))
  finally:
    for process in processes():
      with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
