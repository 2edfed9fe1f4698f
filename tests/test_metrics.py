"""Rows on disk, and one number from several inner steps."""

import struct
import sys
import types

import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from jax_rlvr import metrics


def test_rows_after_a_resume_are_cut_and_written_again(tmp_path):
  file = tmp_path / 'metrics.jsonl'
  rows = metrics.Rows(file, keep_to=0)
  for step in (1, 2, 3):
    rows.write({'step': step, 'run': 'first'})
  rows.close()
  rows = metrics.Rows(file, keep_to=2)
  rows.write({'step': 3, 'run': 'second'})
  rows.close()
  kept = [(row['step'], row['run']) for row in metrics.read(file)]
  assert kept == [(1, 'first'), (2, 'first'), (3, 'second')]


def test_line_cut_off_by_a_kill_is_left_out(tmp_path):
  file = tmp_path / 'metrics.jsonl'
  file.write_text('{"step": 1}\n{"step": 2, "rew')
  assert metrics.read(file) == [{'step': 1}]
  metrics.Rows(file, keep_to=5).close()
  assert file.read_text() == '{"step": 1}\n'


def test_reduce_takes_means_maxima_and_sums():
  inner = [
    {'a': jnp.float32(1), 'ratio/max': 2.0, 'update/skipped': 1},
    {'a': jnp.float32(4), 'ratio/max': 1.5, 'update/skipped': 1},
  ]
  assert metrics.reduce(inner) == pytest.approx(
    {'a': 2.5, 'ratio/max': 2.0, 'update/skipped': 2}
  )
  assert metrics.reduce([]) == {}


def shown(folder):
  """(step, name) → value of what TensorBoard shows; purged ones left out."""
  found = {}
  for file in sorted(folder.iterdir(), key=lambda f: f.stat().st_mtime_ns):
    data, at = file.read_bytes(), 0
    while at < len(data):
      # A record: its length, a checksum of that, the event, its checksum.
      (size,) = struct.unpack_from('<Q', data, at)
      event = Event.FromString(data[at + 12 : at + 12 + size])
      at += size + 16
      if event.session_log.status == 1:
        found = {k: x for k, x in found.items() if k[0] < event.step}
      for value in event.summary.value:
        found[event.step, value.tag] = value.simple_value
  return found


def test_log_goes_to_files_and_tensorboard(tmp_path):
  with metrics.Log(tmp_path, step=0, evaluated=False) as log:
    log.evaluation(0, {'eval/a/avg@8': 0.5})
    for step in (1, 2, 3):
      log.step(step, {'reward/mean': step / 4})
    log.evaluation(3, {'eval/a/avg@8': 0.75})
  # The checkpoint of step 2 is gone on from: what came after is no more.
  with metrics.Log(tmp_path, step=2, evaluated=True) as log:
    assert log.rows.steps == {1, 2} and log.scores.steps == {0}
    log.step(3, {'reward/mean': 1.0})
  rows = metrics.read(tmp_path / 'metrics.jsonl')
  assert [row['reward/mean'] for row in rows] == [0.25, 0.5, 1.0]
  assert shown(tmp_path / 'tensorboard') == {
    (0, 'eval/a/avg_8'): 0.5,
    (1, 'reward/mean'): 0.25,
    (2, 'reward/mean'): 0.5,
    (3, 'reward/mean'): 1.0,
  }
  assert 'tensorflow' not in sys.modules


def test_evaluation_of_a_step_without_a_checkpoint_is_made_again(tmp_path):
  with metrics.Log(tmp_path, step=0, evaluated=False) as log:
    log.evaluation(0, {'x': 1.0})
  with metrics.Log(tmp_path, step=0, evaluated=False) as log:
    assert not log.scores.steps


def test_log_goes_to_wandb_where_asked(tmp_path, monkeypatch):
  told = []
  module = types.ModuleType('wandb')
  run = types.SimpleNamespace(
    log=lambda scalars, step: told.append((step, scalars)),
    finish=lambda: told.append('finish'),
  )
  module.init = lambda **settings: told.append(settings) or run
  monkeypatch.setitem(sys.modules, 'wandb', module)
  with metrics.Log(
    tmp_path / 'a_run', step=0, evaluated=False, wandb='papers'
  ) as log:
    log.step(1, {'x': 2.0})
  settings, *rest = told
  assert settings['project'] == 'papers' and settings['resume'] == 'allow'
  assert settings['id'] == settings['name'] == 'a_run'
  assert rest == [(1, {'x': 2.0}), 'finish']


def test_a_log_that_is_not_there_yet_has_no_rows(tmp_path):
  assert metrics.logged(tmp_path / 'no') == ([], [])
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n')
  assert metrics.logged(tmp_path) == ([{'step': 1}], [])
