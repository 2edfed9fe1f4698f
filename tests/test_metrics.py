"""Rows on disk, and one number from several inner steps."""

import jax.numpy as jnp
import pytest

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
