"""Splits, rewards and noisy traces of the quickstart's task."""

import pytest

from jax_rlvr.records import Completion
from jax_rlvr.tasks import Addition


def test_splits_share_no_pair_and_miss_none():
  task = Addition(digits=2, held_out=500)
  train = [prompt.id for prompt in task.prompts('train')]
  test = [prompt.id for prompt in task.prompts('test')]
  assert len(train) == 9500 and len(test) == 500
  assert len(set(train) | set(test)) == 10_000


def test_held_out_pairs_never_change():
  # A change of these makes every published number of the task wrong.
  texts = [prompt.text for prompt in Addition().prompts('test')[:3]]
  assert texts == ['17+19=', '72+12=', '21+98=']


def test_prompt_asks_for_the_sum_of_its_pair():
  prompt = next(p for p in Addition().prompts('train') if p.id == '7+95')
  assert (prompt.text, prompt.answer, prompt.task) == (
    '7+95=',
    '102',
    'addition',
  )


def test_prompts_index_as_a_list_does():
  prompts = Addition(digits=1, held_out=10).prompts('train')
  everything = list(prompts)
  assert len(everything) == len(prompts) == 90
  assert prompts[-1] == everything[89]
  assert prompts[5:20:3] == everything[5:20:3]
  with pytest.raises(IndexError):
    prompts[90]


@pytest.mark.parametrize(
  'text, truncated, reward',
  [
    ('102', False, 1.0),
    ('102', True, 0.0),
    ('103', False, 0.0),
    ('0102', False, 0.0),
    (' 102', False, 0.0),
    ('102 ', False, 0.0),
    ('102.0', False, 0.0),
    ('1０2', False, 0.0),
    ('7+95=102', False, 0.0),
    ('', False, 0.0),
  ],
)
def test_reward_is_for_the_exact_digits(text, truncated, reward):
  task = Addition()
  prompt = next(p for p in task.prompts('train') if p.id == '7+95')
  completion = Completion(text=text, truncated=truncated)
  assert task.reward(prompt, completion) == reward


@pytest.mark.parametrize('wrong', [0.0, 0.3, 1.0])
def test_traces_are_wrong_as_often_as_asked(wrong):
  task = Addition(wrong=wrong)
  traces = task.traces('train')[:5000]
  labels = [int(trace.completion) for trace in traces]
  misses = sum(
    label != int(trace.prompt.answer)
    for trace, label in zip(traces, labels, strict=True)
  )
  # Three standard deviations of a share of 5000 are at most 0.021.
  assert misses / 5000 == pytest.approx(wrong, abs=0.021)
  assert all(0 <= label <= 198 for label in labels)


def test_wrong_labels_are_spread_over_all_sums():
  task = Addition(digits=1, held_out=10, wrong=1.0, traces_per_prompt=200)
  traces = [t for t in task.traces('train') if t.prompt.answer == '9']
  # Ten pairs less the held-out ones, 200 draws each, over 18 wrong sums.
  counts = [sum(t.completion == str(s) for t in traces) for s in range(19)]
  expected = len(traces) / 18
  assert counts.pop(9) == 0
  assert all(0.5 * expected < count < 1.5 * expected for count in counts)


def test_traces_pass_over_the_train_prompts_with_new_labels():
  task = Addition()
  prompts, traces = task.prompts('train'), task.traces('train')
  assert len(traces) == 20 * len(prompts)
  passes = [traces[17 + len(prompts) * i] for i in range(20)]
  assert all(trace.prompt == prompts[17] for trace in passes)
  assert len({trace.completion for trace in passes}) > 5


def test_traces_are_a_function_of_the_index():
  once, again = Addition().traces('train'), Addition().traces('train')
  assert [once[i] for i in (5, 0, 5)] == [again[i] for i in (5, 0, 5)]


@pytest.mark.parametrize(
  'arguments',
  [
    {'digits': 0},
    {'digits': 4},
    {'held_out': 0},
    {'held_out': 10_000},
    {'wrong': 1.5},
    {'traces_per_prompt': 0},
  ],
)
def test_bad_argument_is_named(arguments):
  (name,) = arguments
  with pytest.raises(ValueError, match=f'addition: {name}='):
    Addition(**arguments)


def test_unknown_split_is_named():
  with pytest.raises(ValueError, match="split='valid'"):
    Addition().prompts('valid')
