"""Rows of files, Parquet folders and TensorFlow Datasets."""

import json
import os
import pathlib
import pickle
import subprocess
import sys

import pytest

from jax_rlvr.tasks.sources import Json, Parquet, Rows, Tfds

_REPO = pathlib.Path(__file__).parents[2]

_ROWS = [
  {'question': 'One?', 'answer': 1, 'meta': {'tags': ['a', 'b'], 'n': None}},
  {'question': 'Zwei, ½\u2028und mehr?', 'answer': 2, 'meta': {'tags': []}},
  {'question': 'Three?', 'answer': 3, 'meta': {'tags': ['c'], 'n': 7}},
]


def _lines(path, rows, between='\n'):
  lines = (json.dumps(row, ensure_ascii=False) for row in rows)
  path.write_text(between.join(lines) + between, encoding='utf-8')
  return path


def test_json_lines_are_read_in_order(tmp_path):
  source = Json(_lines(tmp_path / 'a.jsonl', _ROWS))
  # A line separator within a text ends no line.
  assert list(source.rows()) == _ROWS
  assert source.rows()[1] == _ROWS[1] and len(source.rows()) == 3


@pytest.mark.parametrize('between', ['\r\n', '\n\n', '\n \n'])
def test_line_ends_and_blank_lines_do_not_matter(tmp_path, between):
  path = _lines(tmp_path / 'a.jsonl', _ROWS, between)
  assert list(Json(path).rows()) == _ROWS


def test_text_and_not_the_name_tells_a_list_from_lines(tmp_path):
  listed, lines = tmp_path / 'list.jsonl', tmp_path / 'lines.json'
  listed.write_text('\ufeff ' + json.dumps(_ROWS, indent=2), encoding='utf-8')
  _lines(lines, _ROWS)
  assert list(Json(listed).rows()) == list(Json(lines).rows()) == _ROWS


def test_place_of_a_row_is_its_line_or_its_number(tmp_path):
  listed = tmp_path / 'a.json'
  listed.write_text(json.dumps(_ROWS))
  assert Json(listed).where(2) == f'{listed}, row 2'
  lines = _lines(tmp_path / 'a.jsonl', _ROWS, '\n\n')
  assert Json(lines).where(2) == f'{lines}:5'


@pytest.mark.parametrize(
  'content, message',
  [
    ('', ' has no rows; give another path'),
    ('\n \n', ' has no rows; give another path'),
    ('[]', ' has no rows; give another path'),
    ('{"a": 1}\n\n{"a": \n', ':3: Expecting value at column 7'),
    ('{"a": 1} 2\n', ':1: Extra data at column 10'),
    ('{"a": 1}\n7\n', ':2: not a JSON object'),
    ('"a"\n', ':1: not a JSON object'),
    ('[{"a": 1},\n 7]', ', row 1: not a JSON object'),
    ('[{"a": 1},\n {]', ':2: Expecting property name enclosed in double'),
    (b'{"a": "\xff"}\n', ': no UTF-8 text, byte 7'),
  ],
)
def test_bad_json_is_named_with_its_line(tmp_path, content, message):
  path = tmp_path / 'a.json'
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(ValueError) as caught:
    Json(path).rows()
  assert str(caught.value).startswith(f'{path}{message}')
  assert '\n' not in str(caught.value)


def test_missing_json_file_is_named(tmp_path):
  for path in (tmp_path, tmp_path / 'a.json'):
    with pytest.raises(FileNotFoundError, match=f'^no file {path}; give'):
      Json(path).rows()


def test_home_folder_is_known(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  _lines(tmp_path / 'a.json', _ROWS)
  assert list(Json('~/a.json').rows()) == _ROWS


@pytest.fixture
def parquet(tmp_path):
  """Writes rows as a Parquet file below a folder, two to a row group."""
  pa = pytest.importorskip('pyarrow')
  pq = pytest.importorskip('pyarrow.parquet')

  def write(name, rows):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path

  return write


def _numbered(*numbers):
  return [{'n': n, 'nested': {'list': [{'role': str(n)}]}} for n in numbers]


def test_parquet_rows_are_nested_and_come_by_index(parquet):
  rows = Parquet(parquet('a.parquet', _numbered(*range(7)))).rows()
  assert len(rows) == 7
  assert list(rows) == _numbered(*range(7))
  # Across row groups, backwards.
  assert [rows[i] for i in (6, 0, 3, 2, -1)] == _numbered(6, 0, 3, 2, 6)
  assert rows[1:6:2] == _numbered(1, 3, 5)
  with pytest.raises(IndexError):
    rows[7]


def test_parquet_reads_one_row_group_at_a_time(parquet, monkeypatch):
  rows = Parquet(parquet('a.parquet', _numbered(*range(6)))).rows()
  import pyarrow.parquet

  read = []
  original = pyarrow.parquet.ParquetFile.read_row_group

  def counted(self, group):
    read.append(group)
    return original(self, group)

  monkeypatch.setattr(pyarrow.parquet.ParquetFile, 'read_row_group', counted)
  iterator = iter(rows)
  next(iterator), next(iterator)
  assert read == [0]
  next(iterator)
  assert read == [0, 1]
  rows[2], rows[3], rows[5]
  assert read == [0, 1, 2]


@pytest.mark.parametrize('folder', ['', 'data/'])
def test_split_of_a_folder_is_its_shards_in_order(parquet, tmp_path, folder):
  parquet(f'{folder}train-00001-of-00002.parquet', _numbered(2, 3, 4))
  parquet(f'{folder}train-00000-of-00002.parquet', _numbered(0, 1))
  parquet(f'{folder}test-00000-of-00001-0a1b2c.parquet', _numbered(9))
  parquet(f'{folder}odd.parquet', _numbered(7))
  train = Parquet(tmp_path, split='train')
  assert list(train.rows()) == _numbered(0, 1, 2, 3, 4)
  assert list(Parquet(tmp_path, split='test').rows()) == _numbered(9)
  assert list(Parquet(tmp_path, split='odd').rows()) == _numbered(7)
  assert len(Parquet(tmp_path, split='*').rows()) == 7
  shard = tmp_path / folder / 'train-00001-of-00002.parquet'
  assert train.where(4) == f'{shard}, row 2'


def test_only_split_of_a_folder_need_not_be_said(parquet, tmp_path):
  parquet('data/test-00000-of-00001.parquet', _numbered(1, 2))
  assert list(Parquet(tmp_path).rows()) == _numbered(1, 2)


def test_split_that_is_not_said_unknown_or_incomplete_is_refused(
  parquet, tmp_path
):
  parquet('train-00000-of-00003.parquet', _numbered(0))
  parquet('train-00002-of-00003.parquet', _numbered(0))
  file = parquet('test.parquet', _numbered(0))
  with pytest.raises(ValueError, match='has test, train; give one as split'):
    Parquet(tmp_path).rows()
  with pytest.raises(FileNotFoundError, match="no split 'val'; there: test, t"):
    Parquet(tmp_path, split='val').rows()
  for split in ('train', '*'):
    with pytest.raises(FileNotFoundError, match="2 of 3 files of 'train'"):
      Parquet(tmp_path, split=split).rows()
  with pytest.raises(ValueError, match="one file, split='test'; leave that"):
    Parquet(file, split='test').rows()


def test_bad_parquet_is_named(parquet, tmp_path):
  with pytest.raises(FileNotFoundError, match=f'no file {tmp_path}/none, and'):
    Parquet(tmp_path / 'none').rows()
  bad = tmp_path / 'bad.parquet'
  bad.write_text('question,answer\n')
  with pytest.raises(ValueError, match=f'^{bad} cannot be read as Parquet: '):
    Parquet(bad).rows()
  empty = parquet('empty.parquet', _numbered(0)[:0])
  with pytest.raises(ValueError, match=f'^{empty} has no rows'):
    Parquet(empty).rows()
  whole = parquet('cut.parquet', _numbered(*range(6))).read_bytes()
  damaged = tmp_path / 'cut.parquet'
  damaged.write_bytes(b'PAR1' + b'\xff' * 200 + whole[204:])
  with pytest.raises(ValueError, match=f'^{damaged} cannot be read as Parquet'):
    list(Parquet(damaged).rows())


def test_missing_pyarrow_is_named_with_a_remedy(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
  (tmp_path / 'a.parquet').touch()
  with pytest.raises(ImportError, match='pip install pyarrow'):
    Parquet(tmp_path / 'a.parquet').rows()


def test_published_parquet_is_read(data):
  pytest.importorskip('pyarrow')
  rows = Parquet(data / 'dapo_eval' / 'aime-2024.parquet').rows()
  assert len(rows) == 960
  assert rows[0]['reward_model']['ground_truth'] == '540'
  assert rows[0]['prompt'][0]['role'] == 'user'
  assert list(rows)[-1] == rows[959]


@pytest.mark.parametrize(
  'path, count, columns',
  [
    ('gsm8k/test.jsonl', 1319, 'question answer'),
    ('math/train_7474_rllm.json', 7474, 'problem answer difficulty type'),
    (
      'math500/test.jsonl',
      500,
      'problem solution answer subject level unique_id',
    ),
    ('svamp_orig/SVAMP.json', 1000, 'ID Body Question Equation Answer Type'),
    (
      'aime25/aime25_30_verl.json',
      30,
      'data_source prompt ability reward_model __index_level_0__',
    ),
  ],
)
def test_published_json_is_read(data, path, count, columns):
  rows = Json(data / path).rows()
  assert len(rows) == count
  assert set(rows[-1]) == set(columns.split())


def test_literal_rows_are_kept():
  source = Rows(_ROWS)
  assert list(source.rows()) == _ROWS
  assert source.where(1) == 'row 1'
  with pytest.raises(ValueError, match='has no rows'):
    Rows([]).rows()


@pytest.mark.parametrize(
  'source',
  [
    Json(pathlib.Path('a')),
    Parquet(pathlib.Path('a'), split='b'),
    Tfds('a', split='b', data_dir='c'),
    Rows([{'a': {'b': [1]}}]),
  ],
)
def test_sources_are_plain_values(source):
  assert pickle.loads(pickle.dumps(source)) == source
  assert isinstance(hash(source), int)
  assert all(
    isinstance(value, str | tuple | None) for value in vars(source).values()
  )


# A data set that TFDS has never heard of, made of lines of JSON.
_PREPARE = """
import json
import numpy as np
import tensorflow_datasets as tfds

class LocalProblems(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('1.0.0')
  def _info(self):
    features = tfds.features
    return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict({{
      'question': features.Text(),
      'answer': np.int64,
      'meta': {{'tags': features.Sequence(features.Text())}},
    }}))
  def _split_generators(self, download):
    return {{'train': self._generate_examples()}}
  def _generate_examples(self):
    with open({path!r}) as file:
      for i, line in enumerate(file):
        yield i, json.loads(line)

LocalProblems(data_dir={data_dir!r}, file_format='array_record'
  ).download_and_prepare(
    download_config=tfds.download.DownloadConfig(compute_stats='skip'))
"""

_READ = """
import json, sys
from jax_rlvr.tasks.sources import Tfds
assert not {{'tensorflow_datasets', 'pyarrow'}} & set(sys.modules)
for split in ('train', 'train[:50%]'):
  rows = Tfds('local_problems', split=split, data_dir={data_dir!r}).rows()
  print(json.dumps(list(rows)))
assert not {{'jax', 'tensorflow'}} & set(sys.modules)
for name, split in (('local_problems', 'test'), ('absent', 'train')):
  try:
    Tfds(name, split=split, data_dir={data_dir!r}).rows()
  except FileNotFoundError as error:
    print(error)
"""


def _python(code):
  # Whatever a test machine can reach: no download.
  proxies = dict.fromkeys(('https_proxy', 'http_proxy'), 'http://127.0.0.1:9')
  done = subprocess.run(
    [sys.executable, '-c', code],
    env={**os.environ, **proxies, 'PYTHONPATH': str(_REPO)},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.splitlines()


def test_tfds_prepared_from_json_lines_is_read_by_name(tmp_path):
  pytest.importorskip('tensorflow_datasets')
  rows = [
    {'question': f'{i} + ½?', 'answer': i, 'meta': {'tags': ['a'] * i}}
    for i in range(10)
  ]
  path = _lines(tmp_path / 'rows.jsonl', rows)
  names = {'path': str(path), 'data_dir': str(tmp_path / 'tfds')}
  _python(_PREPARE.format(**names))
  train, half, no_split, no_set = _python(_READ.format(**names))
  read = json.loads(train)
  assert sorted(read, key=lambda row: row['answer']) == rows
  assert json.loads(half) == read[:5]
  assert no_split.startswith('TFDS has no local_problems, test (')
  assert no_set.startswith('TFDS has no absent, train (')
  assert 'TFDS_DATA_DIR' in no_set and "file_format='array_record'" in no_set
