"""Several processes train as one does, and stop and go on together."""

import json
import signal
import time

import numpy as np
import pytest

from jax_rlvr import hosts, metrics
from tests import order, processes

RECIPE = 'configs/quickstart.py'
SMALL = 'slots=64'
SHORT = 'steps=5,warm_up_steps=20,eval_prompts=24'


def begun(workdir, count, devices, overrides, more_flags=''):
  command = [
    '-m', 'jax_rlvr.train', '--config', f'{RECIPE}:{SMALL},{overrides}',
    '--workdir', str(workdir),
  ]  # fmt: skip
  return processes.begun(
    workdir.with_suffix('.logs'), count, devices, command, more_flags
  )


def printed(workdir, process=0):
  return (workdir.with_suffix('.logs') / f'{process}.txt').read_text()


def finish(workdir, count, devices, overrides, more_flags=''):
  with begun(workdir, count, devices, overrides, more_flags) as running:
    codes = processes.ended(running, 600)
  assert codes == [0] * count, printed(workdir)[-3000:]
  return workdir


def rows(workdir):
  """What a run measured, by the clock aside."""
  return [
    {k: x for k, x in row.items() if not k.startswith('time/')}
    for name in ('metrics.jsonl', 'eval.jsonl')
    for row in metrics.read(workdir / name)
  ]


def until(workdir, steps, running):
  """Waits for a run to have logged so many steps."""
  file = workdir / 'metrics.jsonl'
  while not file.exists() or len(metrics.read(file)) < steps:
    assert all(p.poll() is None for p in running), printed(workdir)[-3000:]
    time.sleep(0.05)


@pytest.fixture(scope='module')
def one(tmp_path_factory):
  """The run as one process with four devices makes it, and its programs."""
  folder = tmp_path_factory.mktemp('pods')
  return finish(folder / 'one', 1, 4, SHORT, order.dumped_to(folder / 'dump'))


def test_no_collective_overtakes_a_loop(one):
  assert order.loose_of(one.parent / 'dump') == {}


@pytest.mark.parametrize(
  'count, more',
  # In the last two both processes have a part of all rows; or sample them
  # together, while each trains on its own.
  [(2, ''), (4, ''), (2, ',tensor=4'), (2, ',sampling_tensor=4')],
)
def test_processes_measure_what_one_does(count, more, one, tmp_path):
  many = finish(tmp_path / 'many', count, 2, SHORT + more)
  assert len(rows(many)) == len(rows(one)) == 7
  for found, wanted in zip(rows(many), rows(one), strict=True):
    assert found.keys() == wanted.keys()
    for name in wanted:
      np.testing.assert_allclose(
        found[name], wanted[name], rtol=1e-5, atol=1e-5, err_msg=name
      )
  # The first alone prints and writes.
  assert 'held out' in printed(many) and 'held out' not in printed(many, 1)
  for file in (one / 'rollouts').iterdir():
    assert (many / 'rollouts' / file.name).read_text().count('\n') == 16


def test_evaluation_on_processes_is_that_on_one(one, tmp_path):
  def scores(count, devices):
    file = tmp_path / f'{count}.json'
    command = [
      '-m', 'jax_rlvr.evaluate', '--workdir', str(one), '--json', str(file),
      '--samples', '2', '--prompts', '16',
    ]  # fmt: skip
    logs = tmp_path / f'{count}.logs'
    with processes.begun(logs, count, devices, command) as running:
      codes = processes.ended(running, 600)
    assert codes == [0] * count, (logs / '0.txt').read_text()[-3000:]
    return json.loads(file.read_text())

  assert scores(2, 2) == scores(1, 4)


def test_run_that_loses_hosts_ends_as_one_left_alone(tmp_path):
  # Carried completions too: they lie on one host and go on on another.
  long = (
    'steps=30,checkpoint_every=4,oversample=1.5,dynamic_sampling=True,'
    'digits=1,held_out=20,warm_up_steps=80,eval_prompts=20,prompts_per_step=16'
  )
  straight = finish(tmp_path / 'straight', 2, 2, long)
  workdir = tmp_path / 'disturbed'
  with begun(workdir, 2, 2, long) as running:
    until(workdir, 3, running)
    running[1].send_signal(signal.SIGTERM)
    codes = processes.ended(running, 120)
  assert codes == [hosts.AGAIN] * 2, printed(workdir)[-3000:]
  assert 'stopped and saved at step' in printed(workdir)
  with begun(workdir, 2, 2, long) as running:
    until(workdir, 9, running)
    running[1].kill()
    killed = time.monotonic()
    codes = processes.ended(running, 120)
    took = time.monotonic() - killed
  assert codes == [hosts.AGAIN, -signal.SIGKILL], printed(workdir)[-3000:]
  assert took < 60
  assert 'error: host 1 is gone' in printed(workdir)
  finish(workdir, 2, 2, long)
  assert 'going on from the checkpoint of step' in printed(workdir)
  assert any(row['rollout/carried'] for row in rows(straight)[:30])
  assert any(row['groups/dropped'] for row in rows(straight)[:30])
  assert rows(workdir) == rows(straight)
  assert checksums(workdir) == checksums(straight)


def checksums(workdir):
  """Of the params, the optimizer and all else in the last checkpoint."""
  file = workdir / 'checkpoints' / '30' / 'checksums' / 'metadata'
  return json.loads(file.read_text())


def test_what_one_host_cannot_do_all_refuse(tmp_path):
  # A second workdir that looks like the first host's.
  workdir = tmp_path / 'run'
  command = [
    '-m', 'jax_rlvr.train', '--config', f'{RECIPE}:{SMALL},tensor=3',
    '--workdir', str(workdir),
  ]  # fmt: skip
  with processes.begun(tmp_path / 'logs', 2, 2, command) as running:
    codes = processes.ended(running, 120)
  assert codes == [2, 2]
  for i in range(2):
    assert 'error: mesh' in (tmp_path / 'logs' / f'{i}.txt').read_text()
