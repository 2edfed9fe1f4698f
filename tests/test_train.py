"""The command, whole: it learns, it resumes, it refuses."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jax_rlvr import metrics, samples
from tests.chaos.harness import ENVIRONMENT, ROOT

# A quickstart shrunk to one-digit sums: a minute on two cores.
SMALL = (
  'configs/quickstart.py:digits=1,held_out=20,warm_up_steps=100,'
  'warm_up_lr=5e-3,lr=3e-3,steps=30,prompts_per_step=32,eval_every=10,'
  'eval_prompts=20,checkpoint_every=5'
)


def run(*arguments, module='train', check=None):
  """Runs a command in a process of its own, on one CPU device."""
  done = subprocess.run(
    [sys.executable, '-m', f'jax_rlvr.{module}', *map(str, arguments)],
    cwd=ROOT,
    env=ENVIRONMENT,
    capture_output=True,
    text=True,
  )
  if check is not None:
    assert done.returncode == check, done.stdout + done.stderr
  return done


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
  """A small run that nothing disturbs."""
  workdir = tmp_path_factory.mktemp('runs') / 'straight'
  done = run('--config', SMALL, '--workdir', workdir, check=0)
  return workdir, done.stdout


def test_small_quickstart_learns(straight):
  workdir, _ = straight
  before, *_, after = (
    row['eval/addition/avg@8'] for row in metrics.read(workdir / 'eval.jsonl')
  )
  # Eighty pairs teach little of the twenty others, but something.
  assert after >= before + 0.05
  rows = metrics.read(workdir / 'metrics.jsonl')
  rewards = [row['reward/mean'] for row in rows]
  assert np.mean(rewards[-5:]) >= np.mean(rewards[:5]) + 0.2


def test_run_directory_holds_what_practitioners_expect(straight):
  workdir, shown = straight
  rows = metrics.read(workdir / 'metrics.jsonl')
  assert [row['step'] for row in rows] == list(range(1, 31))
  wanted = (
    'step reward/mean reward/std entropy/token_mean entropy/sequence_mean '
    'length/mean length/clipped_share ratio/max kl/old grad_norm '
    'filters/clip_cov/kept groups/zero_variance_share time/rollout_s '
    'time/update_s time/rollout_tokens_per_s covariance/prompts'
  )
  assert set(wanted.split()) <= set(rows[0])
  evaluations = metrics.read(workdir / 'eval.jsonl')
  assert [row['step'] for row in evaluations] == [0, 10, 20, 30]
  for measure in ('avg@8', 'pass@1', 'pass@8', 'maj@8'):
    assert f'eval/addition/{measure}' in evaluations[0]
  assert samples.steps(workdir) == list(range(1, 31))
  for row in samples.read(workdir, 30):
    assert row['question'] == f'{row["prompt"]}='
    # One update a step: the weights are those that sampled.
    assert row['current_logprob'] == row['logprob']
    assert list(row['filters']) == ['clip_ratio', 'clip_cov']
    clipped = {t for t, *_ in row['filters']['clip_cov']}
    for t, gradient in enumerate(row['gradient']):
      assert (gradient == 0) == (t in clipped or row['advantage'] == 0)
  assert 'prompts per step' in shown and 'held out, after 0 steps' in shown
  assert f'next: python -m jax_rlvr.evaluate --workdir {workdir}' in shown


def test_law_is_of_scores_and_entropies_of_the_same_weights(straight):
  workdir, _ = straight
  rows = metrics.read(workdir / 'metrics.jsonl')
  *earlier, last = metrics.read(workdir / 'eval.jsonl')
  assert not any(name.startswith('law/') for row in earlier for name in row)
  # Rollouts of row i + 1, which is rows[i], are of the weights after i steps.
  x = [np.exp(rows[i]['entropy/sequence_mean']) for i in (0, 10, 20)]
  slope, b = np.polyfit(x, [row['eval/addition/avg@8'] for row in earlier], 1)
  assert last['law/a'] == pytest.approx(-slope)
  assert last['law/b'] == pytest.approx(b)
  assert last['law/ceiling'] == pytest.approx(b + slope)
  edges = sorted((last['law/ceiling'], b + slope * x[-1]))
  assert edges[0] - 0.05 < last['law/predicted_final'] < edges[1] + 0.05


def test_watch_shows_the_run(straight):
  workdir, _ = straight
  done = run('--once', workdir, module='watch', check=0)
  assert 'step 30 of 30' in done.stdout and 'entropy law: R = ' in done.stdout
  # It has ended: nothing to wait for.
  assert 'held out, after 30 steps' in run(workdir, module='watch').stdout
  missing = run(workdir / 'no', module='watch', check=2)
  assert missing.stderr.count('\n') == 1


def test_report_shows_the_run(straight, tmp_path):
  workdir, _ = straight
  out = tmp_path / 'report.html'
  done = run(workdir, '--out', out, module='report', check=0)
  assert done.stdout.startswith(f'{out}: 0.') and out.stat().st_size > 50_000


def test_evaluate_restores_the_run_by_its_manifest(straight, tmp_path):
  workdir, _ = straight
  out = tmp_path / 'out.json'
  arguments = ('--workdir', workdir, '--samples', 4, '--json', out)
  run(*arguments, module='evaluate', check=0)
  scores = json.loads(out.read_text())
  trained = metrics.read(workdir / 'eval.jsonl')[-1]
  assert scores['step'] == 30
  assert 'eval/addition/pass@4' in scores and 'eval/addition/maj@4' in scores
  # 20 prompts × 4 samples against 20 × 8: noise of about 0.05.
  difference = scores['eval/addition/avg@4'] - trained['eval/addition/avg@8']
  assert abs(difference) < 0.25
  run('--workdir', workdir, '--step', 25, module='evaluate', check=0)
  # Told nothing else, it does what the run did.
  run('--workdir', workdir, '--json', out, module='evaluate', check=0)
  scores = json.loads(out.read_text())
  assert scores == {
    k: x for k, x in trained.items() if not k.startswith(('time/', 'law/'))
  }
  missing = run('--workdir', workdir, '--step', 7, module='evaluate', check=2)
  assert 'no checkpoint of step 7' in missing.stderr


def test_sigterm_saves_and_leaves_with_75(tmp_path):
  process = subprocess.Popen(
    [sys.executable, '-m', 'jax_rlvr.train', '--config', SMALL,
     '--workdir', str(tmp_path)],
    cwd=ROOT, env=ENVIRONMENT,
    stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  rows = tmp_path / 'metrics.jsonl'
  while process.poll() is None and not (
    rows.exists() and len(metrics.read(rows)) >= 2
  ):
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  shown, _ = process.communicate()
  assert process.returncode == 75
  steps = [row['step'] for row in metrics.read(rows)]
  assert f'stopped and saved at step {steps[-1]}' in shown
  assert (tmp_path / 'checkpoints' / str(steps[-1])).is_dir()


@pytest.mark.parametrize(
  'config, words',
  [
    ('configs/quickstrat.py', 'did you mean configs/quickstart.py'),
    ('configs/quickstart.py:lrr=1', 'did you mean lr'),
    ('configs/quickstart.py:temperature=-1', 'temperature=-1 must be'),
    ('configs/quickstart.py:max_prompt_tokens=5', 'has 6 tokens, more than'),
    ("configs/quickstart.py:policy='no.gguf'", 'no model file no.gguf'),
    ('configs/quickstart.py:held_out=10000', 'leaves a split empty'),
    ('configs/quickstart.py:max_prompt_tokens=20', 'was made for 16'),
    ('configs/quickstart.py:fsdp=3', 'is not the 1 devices here'),
  ],
)
def test_bad_input_is_refused_in_one_line(config, words, tmp_path):
  done = run('--config', config, '--workdir', tmp_path / 'run', check=2)
  assert words in done.stderr
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
  assert not (tmp_path / 'run').exists()


def test_work_directory_that_cannot_be_made_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  workdir = tmp_path / 'file' / 'run'
  done = run('--config', SMALL, '--workdir', workdir, check=2)
  assert done.stderr.startswith('error: ') and str(workdir) in done.stderr
  assert done.stderr.count('\n') == 1


def test_dry_run_needs_no_work_directory_and_a_run_does():
  done = run('--config', SMALL, '--dry_run', check=0)
  assert 'parameters' in done.stdout and 'GiB a device' in done.stdout
  done = run('--config', SMALL, check=2)
  assert '--workdir is required' in done.stderr


def test_work_directory_of_another_run_is_refused(straight):
  workdir, _ = straight
  before = sorted(p.stat().st_mtime_ns for p in workdir.rglob('*'))
  done = run('--config', SMALL + ',seed=5', '--workdir', workdir, check=2)
  assert 'holds a run of quickstart.py' in done.stderr
  assert 'another --workdir' in done.stderr
  assert sorted(p.stat().st_mtime_ns for p in workdir.rglob('*')) == before


def test_evaluate_of_no_run_is_refused(tmp_path):
  done = run('--workdir', tmp_path, module='evaluate', check=2)
  assert 'holds no run' in done.stderr and done.stderr.count('\n') == 1
