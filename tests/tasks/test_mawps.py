"""MAWPS from files, for evaluation only."""

import json
import pathlib

import pytest

from jax_rlvr.records import Completion, Prompt
from jax_rlvr.tasks import Mawps

_FILES = pathlib.Path(__file__).parents[3] / 'shared/data/mawps'


def _write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def test_prompts_come_in_the_order_of_the_files(tmp_path):
  _write(tmp_path / 'addsub.jsonl', [{'input': 'A?', 'target': 43.0}])
  _write(
    tmp_path / 'singleop.jsonl',
    [{'input': 'B?', 'target': 9}, {'input': 'C?', 'target': 0.5}],
  )
  prompts = Mawps(path=str(tmp_path), suffix=' Go.').prompts('test')
  assert [(prompt.id, prompt.text, prompt.answer) for prompt in prompts] == [
    ('addsub/0', 'A? Go.', '43.0'),
    ('singleop/0', 'B? Go.', '9'),
    ('singleop/1', 'C? Go.', '0.5'),
  ]


@pytest.mark.parametrize(
  'answer, text, truncated, reward',
  [
    ('43.0', '43', False, 1.0),
    ('43.0', 'She gave 43 seashells.', False, 1.0),
    ('43.0', '43', True, 0.0),
    ('43.0', '43.1', False, 0.0),
    ('43.0', '-43', False, 0.0),
    ('43.0', 'none', False, 0.0),
    ('0.0', '0', False, 1.0),
    ('0.0', '0.00001', False, 0.0),
    ('158.35', '$158.35', False, 1.0),
    ('158.35', '$158.36', False, 0.0),
    ('0.6666666667', '0.66667', False, 1.0),
    ('0.6666666667', '0.67', False, 0.0),
    ('3.33333', '3.3333333333', False, 1.0),
  ],
)
def test_reward_is_for_the_last_number_of_an_ended_text(
  answer, text, truncated, reward
):
  prompt = Prompt(messages=(), answer=answer, task='mawps')
  completion = Completion(text=text, truncated=truncated)
  assert Mawps(path='').reward(prompt, completion) == reward


def test_train_split_is_refused(tmp_path):
  with pytest.raises(ValueError, match="split='train'.*only 'test'"):
    Mawps(path=str(tmp_path)).prompts('train')


def test_missing_file_is_named(tmp_path):
  with pytest.raises(
    FileNotFoundError, match=rf'mawps, test: no file {tmp_path}/addsub.jsonl'
  ):
    Mawps(path=str(tmp_path)).prompts('test')


def test_empty_file_is_named(tmp_path):
  (tmp_path / 'addsub.jsonl').touch()
  with pytest.raises(
    ValueError, match='mawps, test: .*addsub.jsonl has no row'
  ):
    Mawps(path=str(tmp_path)).prompts('test')


def test_row_without_a_column_is_named(tmp_path):
  _write(
    tmp_path / 'addsub.jsonl', [{'input': 'A?', 'target': 1}, {'input': 'B?'}]
  )
  with pytest.raises(
    ValueError, match=r"mawps, test: .*addsub.jsonl:2: no column 'target'"
  ):
    Mawps(path=str(tmp_path)).prompts('test')


def test_no_files_are_refused():
  with pytest.raises(ValueError, match='mawps: files is empty'):
    Mawps(path='', files=[])


@pytest.mark.skipif(not _FILES.is_dir(), reason=f'no MAWPS files in {_FILES}')
def test_published_files_are_read_and_their_targets_right():
  task = Mawps(path=str(_FILES))
  prompts = task.prompts('test')
  assert len(prompts) == 395 + 562
  for prompt in prompts:
    right = Completion(text=f'The answer is {prompt.answer}.')
    assert task.reward(prompt, right) == 1.0
