"""Evaluations of a small run: what they draw, leave and refuse."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jax_rlvr import evaluate, export, manifest, metrics, policy
from jax_rlvr import mesh as layouts
from jax_rlvr.actor import Actor
from jax_rlvr.checkpoint import Checkpoints
from jax_rlvr.config import Recipe
from jax_rlvr.evaluation import Evaluation, resolved, tasks_of
from jax_rlvr.records import TrainState
from jax_rlvr.sampling import top_k
from jax_rlvr.scoring import Scorers
from jax_rlvr.tasks import Addition
from tests.test_config import small

SUMS = Addition(digits=1, held_out=6, name='sums')
OTHER = Addition(digits=1, held_out=20, name='other')
CONFIG = small(
  eval_tasks=(SUMS, OTHER), eval_samples=4, eval_prompts=5, slots=16
)
RECIPE = """
from tests.test_evaluate import CONFIG

def get_config():
  return CONFIG
"""


def weights(step):
  return policy.init(CONFIG.policy, jax.random.key(step))


@pytest.fixture(scope='module')
def actor():
  return Actor(
    policy=CONFIG.policy,
    tokenizer=CONFIG.tokenizer,
    mesh=layouts.make(),
    slots=CONFIG.slots,
  )


@pytest.fixture(scope='module')
def asked(actor):
  """Runs evaluations; gives the scores, and the questions of each by name."""
  with Scorers([SUMS, OTHER]) as scorers:

    def run(*evaluations):
      measured, questions = evaluate.run(
        actor, weights(0), evaluations, scorers,
        key=jax.random.key(7), max_completion_tokens=3,
      )  # fmt: skip
      by_name = {each.name: [] for each in evaluations}
      for question in questions:
        by_name[question.name].append(question.as_json())
      return measured, by_name

    yield run


def texts(questions):
  return [[s['completion'] for s in q['samples']] for q in questions]


def test_evaluations_do_not_depend_on_their_order_or_company(asked):
  first = Evaluation(task=SUMS, samples=4, temperature=1.0)
  second = Evaluation(task=OTHER, samples=2, temperature=0.5, prompts=3)
  measured, questions = asked(first, second)
  assert asked(second, first) == (measured, questions)
  alone, _ = asked(second)
  assert alone == {k: measured[k] for k in alone}
  assert {k.split('/')[1] for k in measured} == {'sums', 'other'}
  # Not all samples are the same: there is something to tell apart.
  assert len({text for row in texts(questions['sums']) for text in row}) > 5


def test_more_prompts_and_samples_keep_the_first_ones(asked):
  few = Evaluation(task=OTHER, samples=2, temperature=1.0, prompts=3)
  many = dataclasses.replace(few, samples=4, prompts=None)
  (_, some), (_, more) = asked(few), asked(many)
  rows = texts(more['other'])
  assert len(rows) == 20
  assert texts(some['other']) == [row[:2] for row in rows[:3]]


def test_each_evaluation_has_its_own_settings(asked):
  base = Evaluation(task=SUMS, samples=3, temperature=1.0)
  greedy = dataclasses.replace(base, temperature=0, name='greedy')
  cut = dataclasses.replace(base, transform=top_k(1), name='cut')
  short = dataclasses.replace(base, max_completion_tokens=1, name='short')
  train = dataclasses.replace(base, split='train', prompts=2, name='train')
  stop = dataclasses.replace(base, stop=['1', '2', '3'], name='stop')
  measured, found = asked(base, greedy, cut, short, train, stop)
  assert any(len(set(row)) > 1 for row in texts(found['sums']))
  assert all(len(set(row)) == 1 for row in texts(found['greedy']))
  assert texts(found['cut']) == texts(found['greedy'])
  assert measured['eval/short/length'] == 1 < measured['eval/sums/length']
  ids = [q['prompt'] for q in found['train']]
  assert ids == [p.id for p in SUMS.prompts('train')[:2]]
  written = [text for row in texts(found['stop']) for text in row]
  assert not any(set('123') & set(text) for text in written)
  assert any(
    set('123') & set(text) for row in texts(found['sums']) for text in row
  )


def test_tasks_take_the_settings_they_share():
  own = Evaluation(task=OTHER, samples=1, temperature=0)
  knobs = vars(CONFIG) | {'stop': ['='], 'eval_transform': top_k(1)}
  evaluations = resolved([SUMS, own], knobs)
  shared = Evaluation(
    task=SUMS, samples=4, temperature=1.0, prompts=5, transform=top_k(1),
    stop=('=',),
  )  # fmt: skip
  assert evaluations == (shared, own)
  assert [each.name for each in evaluations] == ['sums', 'other']
  assert tasks_of([*evaluations, shared]) == [SUMS, OTHER]


def test_one_name_for_two_evaluations_is_refused():
  own = Evaluation(task=SUMS, samples=1, temperature=0)
  with pytest.raises(ValueError, match="two evaluations are called 'sums'"):
    resolved([SUMS, own], vars(CONFIG))
  named = dataclasses.replace(own, name='greedy')
  assert len(resolved([SUMS, named], vars(CONFIG))) == 2


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'samples': 0}, 'samples=0 must be an integer, 1 or more'),
    ({'samples': True}, 'samples=True must be'),
    ({'prompts': 0}, 'prompts=0 must be'),
    ({'max_completion_tokens': 1.5}, 'max_completion_tokens=1.5 must be'),
    ({'temperature': -1}, 'temperature=-1 must be a number, 0 or more'),
    ({'temperature': float('nan')}, 'temperature=nan must be'),
    ({'temperature': 'hot'}, "temperature='hot' must be"),
    ({'stop': '='}, "stop='=' must be a sequence of texts"),
  ],
)
def test_bad_settings_are_named(changes, words):
  settings = dict(task=SUMS, samples=1, temperature=1.0) | changes
  with pytest.raises(ValueError, match=f"evaluation 'sums': {words}"):
    Evaluation(**settings)


def test_evaluation_of_an_empty_split_is_refused(actor):
  class Empty:
    name = 'empty'

    def prompts(self, split):
      return []

  each = Evaluation(task=Empty(), samples=1, temperature=1.0)
  with pytest.raises(ValueError, match="'empty' has no test prompts"):
    evaluate.check(actor, [each], 3)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A run directory with the checkpoints of steps 0 and 1."""
  folder = tmp_path_factory.mktemp('run')
  recipe = Recipe(config=CONFIG, name='a.py', source='', overrides={})
  manifest.write(folder, recipe, CONFIG.policy, CONFIG.tokenizer)
  with Checkpoints(folder / 'checkpoints') as checkpoints:
    for step in (0, 1):
      number = np.int32(step)
      state = TrainState(number, number, weights(step), (), ())
      checkpoints.save(state)
      checkpoints.wait()
  return folder


@pytest.fixture(scope='module')
def exported(workdir, tmp_path_factory):
  """A Hugging Face folder of step 0, and a recipe."""
  folder = tmp_path_factory.mktemp('exported')
  export.export(workdir, folder / 'policy', step=0, dtype='float32')
  (folder / 'recipe.py').write_text(RECIPE)
  return folder


@pytest.fixture
def command(tmp_path):
  """Runs the command; gives scores and questions."""

  def run(*arguments):
    scores, questions = tmp_path / 'new' / 'out.json', tmp_path / 'out.jsonl'
    given = [*arguments, '--json', scores, '--out', questions]
    assert evaluate.main(list(map(str, given))) == 0
    return json.loads(scores.read_text()), metrics.read(questions)

  return run


def test_folder_is_evaluated_as_the_run_it_was_exported_from(
  workdir, exported, command, capsys
):
  of_run, asked = command('--workdir', workdir, '--step', 0)
  assert of_run.pop('step') == 0
  assert [q['task'] for q in asked] == ['sums'] * 5 + ['other'] * 5
  assert all(len(q['samples']) == 4 for q in asked)
  assert 'avg@4' in capsys.readouterr().out
  recipe = exported / 'recipe.py'
  for source in (('--config', recipe), ('--workdir', workdir)):
    scores, questions = command('--policy', exported / 'policy', *source)
    assert scores.pop('policy') == str(exported / 'policy')
    assert questions == asked
    assert scores == of_run
  # The latest checkpoint has other weights, and another seed draws otherwise.
  later, others = command('--workdir', workdir)
  assert later['step'] == 1 and texts(others) != texts(asked)
  _, others = command('--workdir', workdir, '--step', 0, '--seed', 5)
  assert texts(others) != texts(asked)


def test_options_go_before_the_settings_of_the_run(workdir, command):
  scores, asked = command(
    '--workdir', workdir, '--samples', 3, '--prompts', 50, '--temperature', 2,
    '--top_k', 1, '--max_completion_tokens', 2,
  )  # fmt: skip
  assert [q['task'] for q in asked] == ['sums'] * 6 + ['other'] * 20
  assert all(len(row) == 3 and len(set(row)) == 1 for row in texts(asked))
  assert max(s['length'] for q in asked for s in q['samples']) == 2
  assert 'eval/sums/pass@2' in scores and 'eval/other/maj@3/low' in scores


def test_forking_tokens_have_a_temperature_of_their_own(workdir, command):
  asked = {}
  for name, arguments in {
    'plain': (),
    'same': ('--entropy_temperature', 1, 1, 0.5),
    'frozen': ('--entropy_temperature', 0, 0, 0.5),
    # The weights are random: all entropies are above 0.5 nats.
    'frozen at forks': ('--entropy_temperature', 1, 0, 0.5),
    'frozen elsewhere': ('--entropy_temperature', 0, 1, 0.5),
  }.items():
    scores, questions = command('--workdir', workdir, *arguments)
    asked[name] = texts(questions)
    # The policy's own, whatever is drawn.
    assert 0.5 < scores['eval/sums/entropy'] < np.log(14)
  assert asked['same'] == asked['plain'] == asked['frozen elsewhere']
  assert all(len(set(row)) == 1 for row in asked['frozen'])
  assert asked['frozen at forks'] == asked['frozen'] != asked['plain']


def test_folder_without_tokenizer_takes_the_one_of_the_recipe(
  exported, command, tmp_path
):
  bare = tmp_path / 'bare'
  bare.mkdir()
  for name in ('config.json', 'model.safetensors'):
    (bare / name).write_bytes((exported / 'policy' / name).read_bytes())
  recipe = exported / 'recipe.py'
  _, expected = command('--policy', exported / 'policy', '--config', recipe)
  _, asked = command('--policy', bare, '--config', recipe)
  assert asked == expected


LONG = """
import dataclasses
from tests.test_evaluate import CONFIG

def get_config(**changes):
  return dataclasses.replace(CONFIG, **changes)
"""


@pytest.mark.parametrize(
  'arguments, words',
  [
    (['--workdir', '{tmp}/none'], 'holds no run'),
    (['--workdir', '{run}', '--step', '7'], 'no checkpoint of step 7'),
    (['--workdir', '{run}', '--samples', '0'], "'sums': samples=0 must be"),
    (['--workdir', '{run}', '--temperature', '-1'], 'temperature=-1.0 must'),
    (['--workdir', '{run}', '--top_p', '1.5'], 'p=1.5'),
    (
      ['--workdir', '{run}', '--entropy_temperature', '-1', '1', '0.5'],
      'low=-1.0; give a number ≥ 0',
    ),
    (['--workdir', '{run}', '--tensor', '3'], 'is not the 8 devices here'),
    (['--workdir', '{run}', '--out', '{tmp}'], 'is a folder; give a file'),
    (
      ['--workdir', '{run}', '--max_completion_tokens', '9000'],
      "'sums' has a prompt of 4 tokens, which with max_completion_tokens=9000",
    ),
    (['--config', '{recipe}'], 'brings no weights; give --policy'),
    (['--config', 'none.py', '--policy', '{hf}'], "no config file 'none.py'"),
    (['--config', '{recipe}', '--policy', '{tmp}'], 'config.json'),
    (['--config', '{recipe}', '--policy', 'none.gguf'], 'no model file'),
    (['--workdir', '{run}', '--policy', '{hf}', '--step', '1'], 'leave one'),
    (['--config', "{long}:stop=('é',)", '--policy', '{hf}'], 'can never match'),
  ],
)
def test_bad_input_is_refused_in_one_line(
  workdir, exported, tmp_path, arguments, words, capsys
):
  (tmp_path / 'long.py').write_text(LONG)
  places = {
    'run': workdir,
    'tmp': tmp_path,
    'hf': exported / 'policy',
    'recipe': exported / 'recipe.py',
    'long': tmp_path / 'long.py',
  }
  before = sorted(tmp_path.iterdir())
  given = [argument.format(**places) for argument in arguments]
  given += [] if '--out' in given else ['--out', str(tmp_path / 'out.jsonl')]
  assert evaluate.main(given) == 2
  error = capsys.readouterr().err
  assert words in error
  assert error.startswith('error: ') and error.count('\n') == 1
  assert sorted(tmp_path.iterdir()) == before


def test_folder_whose_tokenizer_is_missing_and_not_the_runs_is_refused(
  exported, tmp_path, capsys
):
  bare = tmp_path / 'bare'
  bare.mkdir()
  for name in ('config.json', 'model.safetensors'):
    (bare / name).write_bytes((exported / 'policy' / name).read_bytes())
  recipe = tmp_path / 'recipe.py'
  recipe.write_text(
    LONG.replace('**changes):', '):').replace('**changes', 'tokenizer=None')
  )
  arguments = ['--policy', str(bare), '--config', str(recipe)]
  assert evaluate.main(arguments) == 2
  assert 'brings no tokenizer' in capsys.readouterr().err
