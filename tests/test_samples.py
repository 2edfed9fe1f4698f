"""Samples of completions: which, and what their files say."""

import json

import numpy as np
import pytest

from jax_rlvr import samples
from jax_rlvr.records import Completion, Prompt, Rollout, Shown, user


def rollout(number, ids):
  n = len(ids)
  return Rollout(
    prompt=Prompt(
      messages=user(f'{number}?'), answer='', task='sums', id=f'id {number}'
    ),
    prompt_ids=np.zeros(2, np.int32),
    ids=np.array(ids, np.int32),
    logprob=np.full(n, -0.25, np.float32),
    sampled_logprob=np.zeros(n, np.float32),
    entropy=np.full(n, 0.5, np.float32),
    versions=np.zeros(n, np.int32),
    completion=Completion(text='ab', length=n, truncated=True),
    reward=float(number),
    parts={'correct': float(number)},
  )


@pytest.mark.parametrize(
  'sequences, inner_steps, expected',
  [
    (512, 1, list(range(0, 512, 32))),
    (512, 4, [0, 32, 64, 96]),
    (24, 1, [0, 1, 3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 18, 19, 21, 22]),
    (12, 4, [0, 1, 2]),
    (64, 32, [0]),
  ],
)
def test_rows_are_spread_evenly(sequences, inner_steps, expected):
  assert samples.rows(sequences, inner_steps) == expected


def test_chosen_are_the_rows_of_every_inner_step():
  rollouts = [rollout(number, [1]) for number in range(40)]
  found = samples.chosen(rollouts, np.arange(40.0).reshape(5, 8), 64, 2)
  # Rows 0, 4, … of 32 each; the rollouts end within the second inner step.
  assert [int(s.rollout.reward) for s in found] == list(range(0, 40, 4))
  assert [s.advantage for s in found] == list(range(0, 40, 4))
  assert [s.inner_step for s in found] == [0] * 8 + [1] * 2
  assert [s.place for s in found] == [*range(8), 0, 1]


def test_file_has_the_numbers_of_the_completions_own_tokens(tmp_path):
  def at(*numbers):
    # Two sequences; the second has a prompt of 2 and two tokens.
    return np.array([[9.0] * 5, [0.0, 0.0, *numbers, 0.0]], np.float32)

  seen = Shown(
    logprob=at(-1.0, -2.0),
    entropy=at(0.25, 0.75),
    covariance=at(0.5, -1.23456789),
    gradient=at(-1.23456e-6, 0.0),
    filters=((at(-2.0, 3.0), at(-2.0, 0.0)), (at(-2.0, 0.0), at(-4.0, 0.5))),
  )
  sample = samples.Sample(rollout(1, [7, 8]), -0.5, inner_step=1, place=1)
  samples.write(tmp_path, 3, [sample], [seen, seen], ['clip', 'other'])
  assert samples.steps(tmp_path) == [3]
  (row,) = samples.read(tmp_path, 3)
  assert row == {
    'task': 'sums',
    'prompt': 'id 1',
    'question': '1?',
    'completion': 'ab',
    'truncated': True,
    'reward': 1.0,
    'parts': {'correct': 1.0},
    'advantage': -0.5,
    'ids': [7, 8],
    'logprob': [-0.25, -0.25],
    'entropy': [0.5, 0.5],
    'inner_step': 1,
    'current_logprob': [-1.0, -2.0],
    'current_entropy': [0.25, 0.75],
    'covariance': [0.5, -1.235],
    'gradient': [-1.235e-06, 0.0],
    'filters': {
      'clip': [[1, 3.0, 0.0]],
      'other': [[0, -2.0, -4.0], [1, 0.0, 0.5]],
    },
  }


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
  assert samples.steps(tmp_path) == []
  (tmp_path / 'rollouts').mkdir()
  file = tmp_path / 'rollouts' / '000012.jsonl'
  file.write_text(json.dumps({'reward': 1}) + '\n{"rew')
  assert samples.steps(tmp_path) == [12]
  assert list(samples.read(tmp_path, 12)) == [{'reward': 1}]
