"""The measures of an evaluation: by hand, and by enumeration."""

import io
import itertools
import logging
import math

import numpy as np
import pytest
import rich.console

from jax_rlvr import metrics, scores
from jax_rlvr.records import Completion, Prompt, Rollout, user
from jax_rlvr.scores import Question
from jax_rlvr.tasks import Addition

NONE = np.zeros(1, np.float32)


def made(text, reward, *, entropy=0.0, length=1, **fields) -> Rollout:
  prompt = Prompt(messages=user('1+1='), answer='2', task='sums', id='1+1')
  return Rollout(
    prompt=prompt,
    prompt_ids=NONE,
    ids=NONE,
    logprob=NONE,
    sampled_logprob=NONE,
    versions=NONE,
    reward=reward,
    **{
      'entropy': NONE + entropy,
      'completion': Completion(text=text, length=length),
    }
    | fields,
  )


def question(votes, name='sums') -> Question:
  """Of (answer, reward) pairs."""
  return Question(
    name=name,
    rollouts=tuple(made(str(answer), reward) for answer, reward in votes),
    answers=tuple(answer for answer, _ in votes),
  )


@pytest.mark.parametrize('n', [1, 2, 5, 8])
def test_pass_at_equals_the_share_of_all_subsets(n):
  for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
    subsets = list(itertools.combinations(range(n), k))
    # The first `correct` samples are right.
    hits = sum(any(i < correct for i in subset) for subset in subsets)
    share = scores.pass_at(n, correct, k)
    assert share == pytest.approx(hits / len(subsets))


@pytest.mark.parametrize('p', [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize('k', [1, 2, 4, 6])
def test_pass_at_is_unbiased(p, k):
  expected = 0
  for rights in itertools.product([0, 1], repeat=6):
    c = sum(rights)
    expected += p**c * (1 - p) ** (6 - c) * scores.pass_at(6, c, k)
  assert expected == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize('n', [1, 2, 3, 4, 5])
def test_majority_equals_enumeration_over_all_breaks_of_ties(n):
  for answers in itertools.product(['right', 'a', 'b', None], repeat=n):
    wins = []
    # Of answers with as many votes, the one that a random order has first wins.
    for order in itertools.permutations(['right', 'a', 'b']):
      count, _, winner = max(
        (answers.count(answer), -place, answer)
        for place, answer in enumerate(order)
      )
      wins.append(count > 0 and winner == 'right')
    rights = [answer == 'right' for answer in answers]
    chance = scores.majority(answers, rights)
    assert chance == pytest.approx(np.mean(wins)), answers


@pytest.mark.parametrize(
  'votes, chance',
  [
    # (answers with rewards) → chance that the winner is right.
    ([('4', 1), ('4', 1), ('5', 0)], 1),
    ([('4', 1), ('5', 0), ('5', 0)], 0),
    # A tie of a right and a wrong answer, then of one in three.
    ([('4', 1), ('5', 0)], 1 / 2),
    ([('4', 1), ('5', 0), ('6', 0)], 1 / 3),
    ([('4', 1), ('4', 1), ('5', 0), ('5', 0), ('6', 1)], 1 / 2),
    # What has no answer does not vote, even where it is most.
    ([(None, 0), (None, 0), ('4', 1)], 1),
    ([(None, 0), (None, 0)], 0),
    ([('4', None), ('4', None), ('5', 1)], 0),
    # An answer that is right but not always: truncated, say.
    ([('4', 1), ('4', 0), ('5', 0)], 0),
  ],
)
def test_majority_of_a_question_by_hand(votes, chance):
  assert question(votes).majority == pytest.approx(chance)


def test_only_a_full_reward_is_right():
  rewards = {1.0: True, 1.5: True, 0.99: False, 0.0: False, None: False}
  for reward, right in rewards.items():
    assert scores.is_right(made('', reward)) is right


def test_outcome_goes_before_the_reward():
  # A penalty for length took something; a bonus for format gave something.
  assert scores.is_right(made('', 0.7, outcome=1.0))
  assert not scores.is_right(made('', 1.2, outcome=0.0))
  assert not scores.is_right(made('', None, outcome=1.0))


def test_bootstrap_equals_the_enumeration_of_all_resamples():
  values = np.array([0.0, 0.25, 0.5, 1.0, 1.0])
  means = [
    np.mean(resample) for resample in itertools.product(values, repeat=5)
  ]
  low, high = scores.bootstrap(values, draws=20_000, level=0.9)
  # Means are multiples of 0.05, and both quantiles are inside of their steps.
  assert low == pytest.approx(np.quantile(means, 0.05))
  assert high == pytest.approx(np.quantile(means, 0.95))
  assert np.quantile(means, 0.04) == np.quantile(means, 0.06)


def test_bootstrap_covers_a_known_mean_as_often_as_it_says():
  random = np.random.default_rng(1)

  def covered(level):
    hits = 0
    for _ in range(200):
      sample = random.random(100) < 0.3
      low, high = scores.bootstrap(sample, draws=300, level=level)
      hits += low <= 0.3 <= high
    return hits / 200

  # Three standard deviations of 200 trials; a share of 100 is a bit coarse.
  assert covered(0.95) == pytest.approx(0.95, abs=0.05)
  assert covered(0.5) == pytest.approx(0.5, abs=0.13)


def test_bootstrap_is_as_wide_as_the_normal_interval():
  sample = np.arange(400) % 4 == 0
  low, high = scores.bootstrap(sample)
  wide = 2 * 1.96 * math.sqrt(0.25 * 0.75 / 400)
  assert high - low == pytest.approx(wide, rel=0.1)
  assert (low + high) / 2 == pytest.approx(0.25, abs=0.1 * wide)


def test_bootstrap_is_the_same_each_time_and_other_by_seed():
  values = np.random.default_rng(0).random(50)
  first = scores.bootstrap(values)
  assert scores.bootstrap(values) == first
  assert scores.bootstrap(values, seed=1) != first


def test_bootstrap_resamples_columns_together():
  values = np.random.default_rng(0).random(50)
  low, high = scores.bootstrap(values)
  lows, highs = scores.bootstrap(np.stack([values, 1 - values], axis=1))
  assert lows == pytest.approx([low, 1 - high])
  assert highs == pytest.approx([high, 1 - low])


def test_bootstrap_of_one_value_has_no_width():
  assert scores.bootstrap([0.25] * 3) == (0.25, 0.25)


def test_measures_of_eight_samples_have_names_and_values():
  # Right 2 of 8, all on '4', against 6 on '5'; then 8 of 8; entropy 1 and 3,
  # lengths 2 and 4.
  first = [made('4', 1.0, entropy=1.0, length=2)] * 2 + [
    made('5', 0.5, entropy=1.0, length=2)
  ] * 6
  second = [made('7', 1.0, entropy=3.0, length=4)] * 8
  questions = scores.grouped('sums', Addition(), first + second, 8)
  measured = scores.measures(questions)
  values = {
    'avg@8': (2 / 8 + 1) / 2,
    'pass@1': (2 / 8 + 1) / 2,
    # 1 − C(6, 2) / C(8, 2) = 1 − 15/28; 1 − C(6, 4) / C(8, 4) = 1 − 15/70.
    'pass@2': (13 / 28 + 1) / 2,
    'pass@4': (55 / 70 + 1) / 2,
    'pass@8': 1,
    'maj@8': 1 / 2,
  }
  others = {'entropy': 2, 'length': 3, 'truncated': 0, 'unscorable': 0}
  edges = {}
  for name in values:
    # Of two questions: each alone, in a quarter of the draws.
    worst = {'pass@2': 13 / 28, 'pass@4': 55 / 70, 'pass@8': 1, 'maj@8': 0}
    edges[f'{name}/low'] = worst.get(name, 2 / 8)
    edges[f'{name}/high'] = 1
  assert measured == pytest.approx(values | edges | others)
  names = [name for name in measured if name not in edges]
  assert names == [*values, *others]


def test_powers_stop_at_the_number_of_samples():
  names = scores.measures([question([('4', 1.0)] * 6)])
  means = [name for name in names if '@' in name and '/' not in name]
  assert means == ['avg@6', 'pass@1', 'pass@2', 'pass@4', 'maj@6']


def test_unscorable_and_truncated_are_counted_and_wrong():
  cut = Completion(text='4', length=3, truncated=True)
  rollouts = [made('4', None), made('4', 1.0), made('', 0.0, completion=cut)]
  asked = Question(
    name='sums', rollouts=tuple(rollouts), answers=(None, '4', None)
  )
  measured = scores.measures([asked])
  assert measured['unscorable'] == 1
  assert measured['truncated'] == pytest.approx(1 / 3)
  assert measured['avg@3'] == pytest.approx(1 / 3)


def test_completion_without_tokens_has_no_entropy():
  empty = made('', None, entropy=NONE[:0], length=0, failed=True)
  asked = Question(
    name='sums', rollouts=(empty, made('4', 1.0, entropy=2.0)), answers=('', '')
  )
  assert scores.measures([asked])['entropy'] == 2.0
  assert asked.as_json()['samples'][0]['entropy'] is None


class Extracts:
  name = 'extracts'

  def __init__(self, extract):
    self.extract = extract


def test_answers_that_cannot_be_told_do_not_vote(caplog):
  odd = {'raise': lambda: 1 / 0, 'list': lambda: ['4'], 'none': lambda: None}
  task = Extracts(lambda completion: odd.get(completion.text, lambda: '4')())
  rollouts = [made(text, 0.0) for text in ('4', 'raise', 'list', 'none')]
  with caplog.at_level(logging.WARNING):
    first, second = scores.grouped('e', task, rollouts, 2)
  assert first.answers == ('4', None) and second.answers == (None, None)
  (record,) = caplog.records
  assert 'failed on 2 of 4 completions' in record.getMessage()
  assert 'ZeroDivisionError' in record.getMessage()


def test_completion_without_an_extractor_votes_by_its_text():
  rollouts = [made(text, 0.0) for text in (' 4\n', '  ')]
  (asked,) = scores.grouped('sums', Addition(), rollouts, 2)
  assert asked.answers == ('4', None)


def test_questions_come_back_from_their_file(tmp_path):
  cut = Completion(text='so\n4 \u2028"', length=7, truncated=True)
  asked = Question(
    name='sums',
    rollouts=(
      made('2', 0.8, entropy=0.5, outcome=1.0, parts={'format': -0.2}),
      made('', None, completion=cut),
    ),
    answers=(2, None),
  )
  file = tmp_path / 'eval' / '000010.jsonl'
  scores.write(file, [asked, asked])
  assert metrics.read(file) == [asked.as_json()] * 2
  assert metrics.read(file)[0] == {
    'task': 'sums',
    'prompt': '1+1',
    'question': '1+1=',
    'answer': '2',
    'right': 1,
    'majority': 1.0,
    'samples': [
      {
        'completion': '2',
        'reward': 0.8,
        'parts': {'format': -0.2},
        'extracted': '2',
        'length': 1,
        'truncated': False,
        'entropy': 0.5,
      },
      {
        'completion': 'so\n4 \u2028"',
        'reward': None,
        'parts': {},
        'extracted': None,
        'length': 7,
        'truncated': True,
        'entropy': 0.0,
      },
    ],
  }
  assert list(file.parent.iterdir()) == [file]


def shown(measured, width=80):
  """Lines as cells."""
  file = io.StringIO()
  console = rich.console.Console(file=file, width=width)
  console.print(scores.tables(measured))
  return [line.split() for line in file.getvalue().splitlines()]


def test_tables_have_a_row_a_task_and_a_column_a_measure():
  measured = {
    'eval/one/avg@8': 0.125,
    'eval/one/avg@8/low': 0.0,
    'eval/one/avg@8/high': 0.254,
    'eval/one/maj@8': 1.0,
    'eval/one/unscorable': 0,
    'eval/suite/two/avg@8': 0.5,
    'eval/suite/two/avg@8/low': 0.35,
    'eval/suite/two/avg@8/high': 1.0,
    'eval/suite/two/maj@8': 0.25,
    'time/eval_s': 3.0,
  }
  header, _, *rows = shown(measured)
  assert header == ['task', 'avg@8', 'maj@8']
  assert rows == [
    ['one', '0.125', '1.000'],
    ['.00–.25'],
    ['suite/two', '0.500', '0.250'],
    ['.35–1.0'],
  ]


def test_tasks_of_other_samples_have_a_table_of_their_own():
  measured = {'eval/a/avg@8': 0.5, 'eval/b/avg@4': 0.25, 'eval/c/avg@8': 1.0}
  rows = [row for row in shown(measured) if len(row) == 2]
  assert rows == [
    ['task', 'avg@8'],
    ['a', '0.500'],
    ['c', '1.000'],
    ['task', 'avg@4'],
    ['b', '0.250'],
  ]


def test_tables_show_what_is_rare_where_it_occurs():
  measured = {'eval/a/unscorable': 0, 'eval/a/truncated': 0.0}
  assert shown(measured)[0] == ['task']
  other = measured | {'eval/b/unscorable': 3, 'eval/b/truncated': 0.25}
  header, _, *rows = shown(other)
  assert header == ['task', 'unscorable', 'truncated']
  assert rows == [['a', '0', '0.000'], ['b', '3', '0.250']]


def test_table_of_sixteen_samples_fits_eighty_columns():
  votes = [('4', 1.0)] * 5 + [('5', 0.0)] * 11
  measured = scores.measures([question(votes), question([('4', 1.0)] * 16)])
  named = {f'eval/addition/{name}': x for name, x in measured.items()}
  assert len(shown(named)[0]) == 10
  assert shown(named) == shown(named, 200)
