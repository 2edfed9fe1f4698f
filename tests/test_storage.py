"""Folders in buckets are written and read as those on this machine."""

import json
import pathlib

import fsspec
import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem

from jax_rlvr import manifest, metrics, policy, scores, storage
from jax_rlvr.records import Completion, Prompt, Rollout
from tests import runs


class Bucket(DirFileSystem):
  """A folder that is spoken to as gs://, and where nothing can be appended."""

  def _join(self, path):
    return super()._join(_without_protocol(path))

  def open(self, path, mode='rb', **kwargs):
    assert 'a' not in mode, 'buckets cannot append'
    return super().open(path, mode, **kwargs)


def _without_protocol(path):
  if isinstance(path, list):
    return [_without_protocol(x) for x in path]
  return path.removeprefix('gs://')


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """gs://bucket/run, which lies in a folder."""
  (tmp_path / 'bucket').mkdir()
  there = Bucket(str(tmp_path), fsspec.filesystem('file', auto_mkdir=True))
  monkeypatch.setattr(
    backend.fsspec_backend, '_get_filesystem', lambda name: there
  )
  return storage.path('gs://bucket/run')


def test_path_is_whole_here_and_kept_in_a_bucket(bucket):
  assert storage.path('runs/x') == pathlib.Path.cwd() / 'runs' / 'x'
  assert str(bucket) == 'gs://bucket/run'
  assert str(bucket / 'eval.jsonl') == 'gs://bucket/run/eval.jsonl'
  assert storage.is_remote(bucket) and not storage.is_remote('/tmp/x')


def test_rows_are_written_and_cut_in_a_bucket(bucket, tmp_path):
  file = bucket / 'metrics.jsonl'
  rows = metrics.Rows(file, 0)
  for step in (1, 2, 3):
    rows.write({'step': step})
    # There at once.
    assert metrics.read(file)[-1] == {'step': step}
  rows.close()
  resumed = metrics.Rows(file, 2)
  assert resumed.steps == {1, 2}
  resumed.write({'step': 3, 'again': 1})
  resumed.close()
  lines = (tmp_path / 'bucket/run/metrics.jsonl').read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    {'step': 1}, {'step': 2}, {'step': 3, 'again': 1},
  ]  # fmt: skip


def test_tokenizer_goes_into_a_bucket_and_comes_back(bucket, tmp_path):
  local = tmp_path / 'tokenizer'
  runs.TOKENIZER.save(local)
  storage.copy(local, bucket / 'tokenizer')
  text = json.dumps({'policy': vars(runs.POLICY)})
  (bucket / 'manifest.json').write_text(text)
  shape, tokenizer = manifest.read_policy(bucket)
  assert shape == policy.PolicyConfig(**vars(runs.POLICY))
  assert tokenizer == runs.TOKENIZER


def test_questions_are_written_into_a_bucket(bucket):
  messages = ({'role': 'user', 'content': '1+1='},)
  prompt = Prompt(messages=messages, answer='2', task='sums', id='0')
  empty = np.zeros(0, np.float32)
  completion = Completion(text='2', length=1)
  rollout = Rollout(
    prompt=prompt,
    prompt_ids=empty,
    ids=empty,
    logprob=empty,
    sampled_logprob=empty,
    entropy=empty,
    versions=empty,
    completion=completion,
  )
  question = scores.Question(name='sums', rollouts=(rollout,), answers=('2',))
  file = bucket / 'eval' / '000001.jsonl'
  scores.write(file, [question])
  assert metrics.read(file) == [question.as_json()]
  assert [f.name for f in (bucket / 'eval').iterdir()] == ['000001.jsonl']
