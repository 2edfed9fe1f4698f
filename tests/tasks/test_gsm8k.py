"""GSM8K from files and from TFDS."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from jax_rlvr.records import Completion, Prompt
from jax_rlvr.tasks import Gsm8k

_REPO = pathlib.Path(__file__).parents[2]
_FILES = _REPO.parent / 'shared/data/gsm8k'

_ROWS = [
  {'question': 'One and two?', 'answer': '1 + 2 = <<1+2=3>>3\n#### 3'},
  {'question': 'A lot?', 'answer': 'So much.\n#### 1,234'},
  {'question': 'A loss?', 'answer': 'Lost.\n#### -5'},
]


def _write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


@pytest.fixture
def folder(tmp_path):
  _write(tmp_path / 'train.jsonl', _ROWS)
  _write(tmp_path / 'test.jsonl', _ROWS[:1])
  return tmp_path


def test_prompts_hold_question_suffix_and_gold(folder):
  prompts = Gsm8k(path=str(folder), suffix=' Go.').prompts('train')
  assert [prompt.text for prompt in prompts] == [
    'One and two? Go.',
    'A lot? Go.',
    'A loss? Go.',
  ]
  assert [prompt.answer for prompt in prompts] == ['3', '1234', '-5']
  assert [prompt.id for prompt in prompts] == ['train/0', 'train/1', 'train/2']
  assert {prompt.task for prompt in prompts} == {'gsm8k'}
  assert len(Gsm8k(path=str(folder)).prompts('test')) == 1


@pytest.mark.parametrize(
  'text, reward',
  [
    ('#### 1234', 1.0),
    ('#### 1,234', 1.0),
    ('#### 1234.', 1.0),
    ('#### 1234.0', 1.0),
    ('#### $1,234', 1.0),
    ('####1234', 1.0),
    ('It is **1234** dollars.', 1.0),
    ('#### 1234 or 1235', 0.0),
    ('#### 12340', 0.0),
    ('#### -1234', 0.0),
    ('#### 1,23', 0.0),
    ('#### 1234.5', 0.0),
    ('I do not know.', 0.0),
  ],
)
def test_reward_is_for_the_last_number(text, reward):
  prompt = Prompt(messages=(), answer='1234', task='gsm8k')
  assert Gsm8k().reward(prompt, Completion(text=text)) == reward


def test_truncated_completion_earns_nothing_only_where_the_end_is_required():
  prompt = Prompt(messages=(), answer='3', task='gsm8k')
  cut = Completion(text='#### 3', truncated=True)
  assert Gsm8k().reward(prompt, cut) == 1.0
  assert Gsm8k(require_end=True).reward(prompt, cut) == 0.0
  whole = Completion(text='#### 3')
  assert Gsm8k(require_end=True).reward(prompt, whole) == 1.0


def test_missing_file_is_named(tmp_path):
  with pytest.raises(
    FileNotFoundError,
    match=rf'gsm8k, train: no file {tmp_path}/train.jsonl; give another path',
  ):
    Gsm8k(path=str(tmp_path)).prompts('train')


@pytest.mark.parametrize(
  'content, match',
  [
    ('', 'train.jsonl has no rows'),
    ('\n\n', 'train.jsonl has no rows'),
    (
      '{"question": "Why?"}\n',
      "train.jsonl:1: no column 'answer'; there: question",
    ),
    ('\n{"question": \n', 'train.jsonl:2: Expecting value'),
    (
      '{"question": "Why?", "answer": 3}\n',
      "train.jsonl:1: column 'answer' is 3, no text",
    ),
    ('7\n', 'train.jsonl:1: not a JSON object'),
    ('"question answer"\n', 'train.jsonl:1: not a JSON object'),
    ('{"question": "Why?", "answer": "3"}\n', "jsonl:1: .*'#### <number>'"),
    (
      '{"question": "Why?", "answer": "3 ####"}\n',
      "jsonl:1: .*'#### <number>'",
    ),
  ],
)
def test_bad_file_is_named_with_its_line(tmp_path, content, match):
  (tmp_path / 'train.jsonl').write_text(content)
  with pytest.raises(ValueError, match=f'^gsm8k, train.*{match}'):
    Gsm8k(path=str(tmp_path)).prompts('train')


def test_unknown_split_is_named(folder):
  with pytest.raises(ValueError, match="split='valid'"):
    Gsm8k(path=str(folder)).prompts('valid')


@pytest.mark.skipif(not _FILES.is_dir(), reason=f'no GSM8K files in {_FILES}')
def test_published_files_are_read_and_their_solutions_right():
  task = Gsm8k(path=str(_FILES))
  for split, count in (('train', 7473), ('test', 1319)):
    prompts = task.prompts(split)
    assert len(prompts) == count
    lines = (_FILES / f'{split}.jsonl').read_text().splitlines()
    for prompt, line in zip(prompts, lines, strict=True):
      solution = Completion(text=json.loads(line)['answer'])
      assert task.reward(prompt, solution) == 1.0
      assert prompt.answer.lstrip('-').isdigit()


# Prepares the data set as a user does where it cannot be downloaded.
_PREPARE = """
import sys
import tensorflow_datasets as tfds
from tensorflow_datasets.text.gsm8k import gsm8k as published

rows = {rows!r}
with tfds.core.registered.skip_registration():
  class Gsm8k(published.Gsm8k):
    def _split_generators(self, download):
      return {{'train': self._examples(), 'test': self._examples()}}
    def _examples(self):
      for i, row in enumerate(rows):
        yield i, {{**row, 'annotation': '', 'short_answer': ''}}

Gsm8k(file_format='array_record').download_and_prepare(
  download_config=tfds.download.DownloadConfig(compute_stats='skip'))
"""

_READ = """
import sys
from jax_rlvr.tasks import Gsm8k
prompts = Gsm8k(suffix='').prompts('train')
print(sorted((prompt.text, prompt.answer) for prompt in prompts))
assert not {'jax', 'tensorflow'} & set(sys.modules)
"""

_ABSENT = """
from urllib3.util.retry import Retry
# TFDS tries for minutes to download.
Retry.sleep = lambda *_: None
from jax_rlvr.tasks import Gsm8k
try:
  Gsm8k().prompts('train')
except FileNotFoundError as error:
  print(error)
"""


def _python(code, data):
  environment = {
    **os.environ,
    'TFDS_DATA_DIR': str(data),
    'PYTHONPATH': str(_REPO),
    # Whatever a test machine can reach: no download.
    'https_proxy': 'http://127.0.0.1:9',
    'http_proxy': 'http://127.0.0.1:9',
  }
  done = subprocess.run(
    [sys.executable, '-c', code],
    env=environment,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_tfds_is_read_without_tensorflow(tmp_path):
  pytest.importorskip('tensorflow_datasets')
  _python(_PREPARE.format(rows=_ROWS), tmp_path)
  expected = [('A loss?', '-5'), ('A lot?', '1234'), ('One and two?', '3')]
  assert _python(_READ, tmp_path).strip() == str(expected)


def test_absent_tfds_data_says_what_to_do(tmp_path):
  # TFDS announces its download on the lines before.
  message = _python(_ABSENT, tmp_path).splitlines()[-1]
  assert message.startswith('gsm8k, train: TFDS has no gsm8k, train (')
  assert 'give path=' in message and 'TFDS_DATA_DIR' in message
