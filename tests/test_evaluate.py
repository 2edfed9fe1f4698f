"""The measures of an evaluation, by hand and by enumeration."""

import io
import itertools

import numpy as np
import pytest
import rich.console

from jax_rlvr import evaluate
from jax_rlvr.records import Completion, Prompt, Rollout, user

NONE = np.zeros(1, np.float32)


def made(text, reward, entropy=0.0, length=1) -> Rollout:
  return Rollout(
    prompt=Prompt(messages=user('?'), answer=''),
    prompt_ids=NONE,
    ids=NONE,
    logprob=NONE,
    sampled_logprob=NONE,
    entropy=NONE + entropy,
    versions=NONE,
    completion=Completion(text=text, length=length),
    reward=reward,
  )


def extract(completion):
  return completion.text or None


@pytest.mark.parametrize('n', [1, 2, 5, 8])
def test_pass_at_equals_the_share_of_all_subsets(n):
  for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
    subsets = list(itertools.combinations(range(n), k))
    # The first `correct` samples are right.
    hits = sum(any(i < correct for i in subset) for subset in subsets)
    share = evaluate.pass_at(n, correct, k)
    assert share == pytest.approx(hits / len(subsets))


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
    ([('', 0), ('', 0), ('4', 1)], 1),
    ([('', 0), ('', 0)], 0),
    ([('4', None), ('4', None), ('5', 1)], 0),
  ],
)
def test_majority_divides_ties_and_skips_missing_answers(votes, chance):
  group = [made(*vote) for vote in votes]
  assert evaluate.majority(group, extract) == pytest.approx(chance)


def test_metrics_of_eight_samples_have_names_and_values():
  # Right 2 of 8, all on '4', against 6 on '5'; then 8 of 8; entropy 1 and 3,
  # lengths 2 and 4.
  first = [made('4', 1.0, 1.0, 2)] * 2 + [made('5', 0.5, 1.0, 2)] * 6
  second = [made('7', 1.0, 3.0, 4)] * 8
  measured = evaluate.metrics(first + second, 8, extract)
  assert list(measured) == [
    'avg@8', 'pass@1', 'pass@2', 'pass@4', 'pass@8', 'maj@8', 'entropy',
    'length',
  ]  # fmt: skip
  assert measured == pytest.approx(
    {
      'avg@8': (2 / 8 + 1) / 2,
      'pass@1': (2 / 8 + 1) / 2,
      # 1 − C(6, 2) / C(8, 2) = 1 − 15/28; 1 − C(6, 4) / C(8, 4) = 1 − 15/70.
      'pass@2': (13 / 28 + 1) / 2,
      'pass@4': (55 / 70 + 1) / 2,
      'pass@8': 1,
      'maj@8': 1 / 2,
      'entropy': 2,
      'length': 3,
    }
  )


def test_powers_stop_at_the_number_of_samples():
  names = list(evaluate.metrics([made('4', 1.0)] * 6, 6, extract))
  assert names[:5] == ['avg@6', 'pass@1', 'pass@2', 'pass@4', 'maj@6']


def test_only_a_full_reward_is_right():
  rewards = {1.0: True, 1.5: True, 0.99: False, 0.0: False, None: False}
  for reward, right in rewards.items():
    assert evaluate.is_right(made('', reward)) is right


def test_table_has_a_row_a_task_and_a_column_a_measure():
  table = evaluate.table(
    {
      'eval/one/avg@8': 0.125,
      'eval/one/maj@8': 1.0,
      'eval/two/avg@8': 0.5,
      'time/eval_s': 3.0,
    }
  )
  assert [c.header for c in table.columns] == ['task', 'avg@8', 'maj@8']
  file = io.StringIO()
  rich.console.Console(file=file, width=80).print(table)
  lines = file.getvalue().splitlines()
  cells = [line.replace('│', ' ').split() for line in lines]
  assert ['one', '0.125', '1.000'] in cells and ['two', '0.500'] in cells
  assert 'eval_s' not in file.getvalue()


def test_completion_without_an_extractor_votes_by_its_text():
  assert evaluate._text(Completion(text=' 4\n')) == '4'
  assert evaluate._text(Completion(text='  ')) is None
