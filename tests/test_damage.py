"""What a disk can do to checkpoints, and what is left of a run then."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jax_rlvr import checkpoint, policy
from jax_rlvr import mesh as layouts
from jax_rlvr.checkpoint import Checkpoints, abstract_like
from jax_rlvr.config import ConfigError
from tests.chaos.harness import flip_a_bit
from tests.test_checkpoint import equal, made

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def workdir(tmp_path):
  """A run with checkpoints of steps 3, 5 and 8."""
  with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
    for step in (3, 5, 8):
      checkpoints.save(made(step))
  return tmp_path


def test_flipped_bit_is_noticed_and_the_one_before_taken(workdir, caplog):
  flip_a_bit(workdir)
  with Checkpoints(workdir / 'checkpoints', keep=9) as checkpoints:
    restored = checkpoints.restore(abstract_like(made()))
    equal(jax.device_get(restored), jax.device_get(made(5)))
    (message,) = [record.getMessage() for record in caplog.records]
    assert 'checkpoints/8 is damaged' in message
    assert 'the one of step 5 is taken' in message
    # What was damaged is kept, out of the way of a new step 8.
    assert len(list((workdir / 'checkpoints_damaged').iterdir())) == 1
    assert checkpoints.steps() == [3, 5]
    checkpoints.save(made(8))
    checkpoints.wait()
    assert checkpoints.steps() == [3, 5, 8]
    equal(
      jax.device_get(checkpoints.restore(abstract_like(made()))),
      jax.device_get(made(8)),
    )


def test_damaged_params_are_refused_and_left_where_they_are(workdir):
  flip_a_bit(workdir)
  with Checkpoints(workdir / 'checkpoints') as checkpoints:
    abstract = abstract_like(made().params)
    with pytest.raises(ConfigError, match='8 is damaged .*take another step'):
      checkpoints.restore_params(abstract)
    restored = checkpoints.restore_params(abstract, 5)
    equal(jax.device_get(restored), jax.device_get(made(5).params))
    assert checkpoints.steps() == [3, 5, 8]


def test_run_whose_checkpoints_are_all_damaged_is_refused(workdir):
  for step in (8, 5, 3):
    folder = workdir / 'checkpoints' / str(step) / 'params'
    for file in folder.rglob('*'):
      if file.is_file():
        file.write_bytes(b'')
  with Checkpoints(workdir / 'checkpoints', keep=9) as checkpoints:
    with pytest.raises(ConfigError, match='3 is damaged'):
      checkpoints.restore(abstract_like(made()))


def test_newest_best_and_every_so_many_are_kept(tmp_path):
  scores = {10: 0.5, 15: 0.9, 20: 0.7, 25: None, 30: 0.8, 35: 0.1}
  with Checkpoints(tmp_path, 2, keep_every=20, keep_best='x') as checkpoints:
    for step, x in scores.items():
      checkpoints.save(made(step), None if x is None else {'x': x})
    checkpoints.wait()
    assert checkpoints.steps() == [15, 20, 30, 35]


def test_state_moves_from_mesh_to_mesh(tmp_path):
  saved = made(mesh=layouts.make())
  path = tmp_path
  for devices in (8, 1, 4):
    mesh = Mesh(
      np.array(jax.devices()[:devices]).reshape(1, -1, 1),
      ('slice', 'fsdp', 'tensor'),
    )
    with Checkpoints(path) as checkpoints:
      checkpoints.save(saved)
      checkpoints.wait()
      like = abstract_like(made(mesh=mesh))
      restored = checkpoints.restore(like)
    equal(jax.device_get(restored), jax.device_get(made()))
    for x, want in zip(
      jax.tree.leaves(restored.params), jax.tree.leaves(like.params),
      strict=True,
    ):  # fmt: skip
      assert x.sharding == want.sharding
    saved, path = restored, tmp_path / str(devices)


_FULL = """
import resource, signal, sys
import jax
from jax_rlvr.checkpoint import Checkpoints
from jax_rlvr.config import ConfigError
from tests.test_checkpoint import made

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
  with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(made(3))
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
    checkpoints.save(made(5))
    checkpoints.wait()
except ConfigError as error:
  print(error)
"""


def test_full_disk_is_an_error_that_says_what_is_left(tmp_path):
  # No file may grow beyond 512 bytes from the second save on.
  done = subprocess.run(
    [sys.executable, '-c', _FULL, str(tmp_path / 'run')],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    cwd=ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert 'cannot be written' in done.stdout, done.stderr
  assert 'whole ones there: 3; make room and run again' in done.stdout
  assert done.stdout.count('\n') == 1 and done.returncode == 0
  with Checkpoints(tmp_path / 'run') as checkpoints:
    assert checkpoints.steps() == [3]
    restored = checkpoints.restore(abstract_like(made()))
  equal(jax.device_get(restored), jax.device_get(made(3)))


def test_reference_of_a_step_is_the_newest_until_then(tmp_path):
  def params(step):
    return policy.cast(made(step).params, 'float32')

  for step in (0, 4, 8):
    checkpoint.save_reference(tmp_path, step, params(step), oldest=0)
  abstract = abstract_like(params(0))
  for step, expected in ((0, 0), (3, 0), (4, 4), (7, 4), (9, 8)):
    found = checkpoint.read_reference(tmp_path, step, abstract)
    equal(jax.device_get(found), jax.device_get(params(expected)))
  # The oldest checkpoint, of step 5, goes on with the reference of step 4.
  checkpoint.save_reference(tmp_path, 12, params(12), oldest=5)
  with pytest.raises(ConfigError, match='no reference policy for step 3'):
    checkpoint.read_reference(tmp_path, 3, abstract)
  found = checkpoint.read_reference(tmp_path, 5, abstract)
  equal(jax.device_get(found), jax.device_get(params(4)))


def test_reference_is_overwritten_by_a_run_that_comes_by_again(tmp_path):
  first, again = made(1).params, made(2).params
  checkpoint.save_reference(tmp_path, 4, first)
  checkpoint.save_reference(tmp_path, 4, again)
  found = checkpoint.read_reference(tmp_path, 4, abstract_like(first))
  equal(jax.device_get(found), jax.device_get(again))
  assert np.any(first['blocks']['query'] != again['blocks']['query'])
