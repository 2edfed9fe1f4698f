"""A run's policy, out to a folder and back in."""

import json

import jax
import numpy as np
import pytest

from jax_rlvr import export, manifest, policy
from jax_rlvr import mesh as layouts
from jax_rlvr.checkpoint import Checkpoints
from jax_rlvr.config import Recipe
from jax_rlvr.records import TrainState
from tests.test_config import small

CONFIG = small()


def weights(step):
  return policy.init(CONFIG.policy, jax.random.key(step))


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A run directory with the checkpoints of steps 1 and 2."""
  folder = tmp_path_factory.mktemp('run')
  recipe = Recipe(config=CONFIG, name='a.py', source='', overrides={})
  manifest.write(folder, recipe, CONFIG.policy, CONFIG.tokenizer)
  # The tasks of a run may be gone.
  file = folder / 'manifest.json'
  written = json.loads(file.read_text())
  written['tasks'] = [{'task': 'gone:Gone', 'arguments': {}}]
  file.write_text(json.dumps(written))
  with Checkpoints(folder / 'checkpoints') as checkpoints:
    for step in (1, 2):
      number = np.int32(step)
      state = TrainState(number, number, weights(step), (), ())
      checkpoints.save(state)
      checkpoints.wait()
  return folder


def read(folder):
  pretrained = policy.load(folder)
  abstract = policy.abstract_params(pretrained.config)
  mesh = layouts.make()
  placed = pretrained.read(layouts.shardings(mesh, abstract, layouts.TRAINING))
  return pretrained, jax.device_get(placed)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_exported_policy_comes_back(workdir, tmp_path, dtype, capsys):
  out = tmp_path / 'out'
  arguments = ['--workdir', str(workdir), '--out', str(out), '--dtype', dtype]
  assert export.main(arguments) == 0
  assert f'step 2 of {workdir} is in {out}' in capsys.readouterr().out
  pretrained, params = read(out)
  assert pretrained.config == CONFIG.policy
  assert pretrained.tokenizer == CONFIG.tokenizer
  expected = jax.tree.map(lambda x: x.astype(dtype).astype('f'), weights(2))
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  ends = json.loads((out / 'generation_config.json').read_text())
  assert ends == {'eos_token_id': list(CONFIG.tokenizer.end_ids)}


def test_step_can_be_chosen(workdir, tmp_path):
  assert export.export(workdir, tmp_path, step=1, dtype='float32') == 1
  _, params = read(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, params, weights(1))


@pytest.mark.parametrize(
  'arguments, words',
  [
    (['--workdir', '{tmp}/none'], 'holds no run'),
    (['--workdir', '{run}', '--step', '7'], 'no checkpoint of step 7'),
    (['--workdir', '{run}', '--out', '{run}'], 'holds something already'),
  ],
)
def test_bad_input_is_refused_in_one_line(
  workdir, tmp_path, arguments, words, capsys
):
  given = [a.format(run=workdir, tmp=tmp_path) for a in arguments]
  if '--out' not in given:
    given += ['--out', str(tmp_path / 'out')]
  assert export.main(given) == 2
  error = capsys.readouterr().err
  assert words in error
  assert error.startswith('error: ') and error.count('\n') == 1
  assert not (tmp_path / 'out').exists()
