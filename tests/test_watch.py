"""The command that looks at a run, on runs made by hand."""

import math
import threading

import pytest

from jax_rlvr import watch
from tests.runs import log


@pytest.fixture
def shown(capsys, monkeypatch):
  """Runs the command; gives what it printed, in lines of words."""
  monkeypatch.setenv('COLUMNS', '100')

  def run(*arguments, code=0):
    assert watch.main([str(a) for a in arguments]) == code
    captured = capsys.readouterr()
    return captured.err if code else ' '.join(captured.out.split())

  return run


def test_frame_has_the_numbers_of_the_run(tmp_path, shown):
  run = log(tmp_path / 'run', 100, (0, 20, 40, 60, 80, 100))
  text = shown(run, '--once')
  assert f'{run} step 100 of 200, 3 s a step, 5 min to go' in text
  assert 'reward/mean 0.5 0.5' in text
  # What is not there at first is a dash, and a gap in its curve.
  assert 'kl/old – 0.25' in text
  assert 'filters/clip_cov/kept 0.999 0.9 █' in text
  assert 'of/no/interest' not in text and 'kl/reference' not in text
  assert 'held out, after 100 steps:' in text and 'sums 0.' in text
  # Step 101 was not run: the last evaluation has no entropy yet.
  assert 'R = -0.200 · e^H + 0.600, R² 1.000 of 5 evaluations' in text
  assert 'ceiling 0.400 (95 %: 0.400 to 0.400)' in text
  entropy = 2.0 * 201**-0.7
  final = 0.6 - 0.2 * math.exp(entropy)
  expected = f'predicted after 200 steps {final:.3f} at {entropy:.3f} nats'
  assert expected in text


def test_collapse_is_warned_of_as_soon_as_it_is_near(tmp_path, shown):
  run = log(tmp_path / 'run', 100, (0, 20, 40, 60, 80))
  # 2 s^−0.7 = ln 1.05 at step 201.4: in 102 steps, rounded up.
  left = math.ceil((2.0 / math.log(1.05)) ** (1 / 0.7) - 100)
  assert 'warning' not in shown(run, '--once', '--within', left - 1)
  text = shown(run, '--once', '--within', left)
  assert 'warning: entropy is collapsing: from 0.080 nats' in text
  assert f'predicted ceiling of 0.400 in about {left} steps' in text


def test_entropy_that_is_gone_is_warned_of(tmp_path, shown):
  run = log(tmp_path / 'run', 60, (0, 10, 20, 30), scale=0.3)
  text = shown(run, '--once')
  assert 'warning: entropy is used up: at 0.017 nats' in text


def test_law_is_waited_for(tmp_path, shown):
  text = shown(log(tmp_path / 'run', 30, (0, 20, 30)), '--once')
  assert 'entropy law: not before 3 evaluations have a next step' in text
  assert 'warning' not in text


def test_run_without_evaluations_or_manifest_is_shown(tmp_path, shown):
  run = log(tmp_path / 'run', 1, ())
  (run / 'manifest.json').unlink()
  (run / 'eval.jsonl').unlink()
  text = shown(run, '--once')
  assert 'step 1, 3 s a step' in text and 'held out' not in text


def test_line_that_is_being_written_is_left_out(tmp_path, shown):
  run = log(tmp_path / 'run', 3, ())
  with (run / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 4, "rew')
  assert 'step 3 of 200' in shown(run, '--once')


@pytest.mark.parametrize('once', [('--once',), ()])
def test_run_that_is_not_there_is_one_line(tmp_path, shown, once):
  said = shown(tmp_path / 'no', *once, code=2)
  assert said == (
    f'error: nothing to watch in {tmp_path / "no"}: no such folder\n'
  )
  said = shown(tmp_path, *once, code=2)
  assert said == f'error: nothing to watch in {tmp_path}: ' + (
    'no step is logged yet\n'
  )
  (tmp_path / 'metrics.jsonl').write_text('')
  assert 'no step is logged yet' in shown(tmp_path, *once, code=2)


def test_watching_ends_with_the_run(tmp_path, shown):
  run = log(tmp_path / 'run', 40, (0, 20), planned=60)
  # Steps alone do not end it: their evaluation is yet to come.
  assert not watch.read(run).done

  def goes_on():
    log(run, 60, (0, 20, 60), planned=60)

  timer = threading.Timer(0.2, goes_on)
  timer.start()
  text = shown(run, '--every', '0.05')
  timer.join()
  assert 'step 60 of 60' in text
  assert 'held out, after 60 steps:' in text


def test_sparkline_has_means_of_equal_stretches():
  assert watch.sparkline([0, 7]) == '▁█'
  assert watch.sparkline(range(8)) == '▁▂▃▄▅▆▇█'
  # 0.5, 2.5, 4.5, 6.5 of 0.5 to 6.5: sevenths 0, 2.3, 4.7, 7.
  assert watch.sparkline(range(8), width=4) == '▁▃▆█'
  assert watch.sparkline([3, 3, 3]) == '▁▁▁'
  assert watch.sparkline([math.nan, 1, math.inf, 2]) == ' ▁ █'
  assert watch.sparkline([math.nan]) == ' '
  assert watch.sparkline([]) == ' '
