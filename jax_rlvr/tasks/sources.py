"""Where rows come from: files, Parquet folders, TensorFlow Datasets.

A source is a frozen dataclass of JSON values, so that a manifest can rebuild
it. It has

* `rows() -> Sequence[Mapping[str, Any]]`: by index, in the same order every
  time, never empty;
* `where(i) -> str`: names row i to somebody who has to mend it.

What reads a format is imported when rows are asked for, not before: reward
workers import tasks.
"""

from __future__ import annotations

import bisect
import dataclasses
import importlib
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from jax_rlvr.tasks import jsonl

Row = Mapping[str, Any]
Path = str | os.PathLike[str]


class Source(Protocol):
  """Rows by index; see above."""

  def rows(self) -> Sequence[Row]: ...

  def where(self, i: int) -> str: ...


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows written down in the recipe.

  Attributes:
    values: the rows, of JSON values.
  """

  values: Sequence[Row] = dataclasses.field(hash=False)

  def __post_init__(self):
    object.__setattr__(self, 'values', tuple(self.values))

  def rows(self) -> Sequence[Row]:
    """The rows; ValueError where there are none."""
    if not self.values:
      raise ValueError('Rows() has no rows; give some')
    return self.values

  def where(self, i: int) -> str:
    """Which of them."""
    return f'row {i}'


@dataclasses.dataclass(frozen=True)
class Json:
  """A file of one JSON object a line, or of one list of objects.

  Its text tells which, not its name: data sets of lines are published as .json.

  Attributes:
    path: the file.
  """

  path: Path

  def __post_init__(self):
    object.__setattr__(self, 'path', os.fspath(self.path))

  def rows(self) -> Sequence[Row]:
    """The objects.

    Raises:
      FileNotFoundError, ValueError: as `jsonl.rows`.
    """
    return [row for _, row in jsonl.rows(_path(self.path))]

  def where(self, i: int) -> str:
    """File and line; of a list, file and row."""
    return jsonl.rows(_path(self.path))[i][0]


@dataclasses.dataclass(frozen=True)
class Parquet:
  """A Parquet file, or a folder of them as the Hugging Face hub keeps it.

  Nested columns are dicts and lists. One row group at a time is in memory.

  Attributes:
    path: the file; or a folder that has, itself or in its folder `data`,
      `<split>.parquet` or `<split>-00000-of-00002.parquet` and so on.
    split: which files of a folder; '*' for all. Needed where it has several.
  """

  path: Path
  _: dataclasses.KW_ONLY
  split: str = ''

  def __post_init__(self):
    object.__setattr__(self, 'path', os.fspath(self.path))

  def rows(self) -> ParquetRows:
    """The rows, read when they are asked for.

    Raises:
      FileNotFoundError, ValueError, ImportError: they cannot be.
    """
    rows = ParquetRows(_shards(_path(self.path), self.split))
    if not len(rows):
      raise ValueError(f'{self.path} has no rows; give another path')
    return rows

  def where(self, i: int) -> str:
    """The file, and the row within it."""
    return self.rows().where(i)


@dataclasses.dataclass(frozen=True)
class Tfds:
  """A data set of TensorFlow Datasets, read without TensorFlow.

  What TFDS has not prepared in its folder, it downloads.

  Attributes:
    name: as TFDS has it, config and version included: 'glue/mrpc:2.0.0'.
    split: 'train', 'test[:10%]' and so on.
    data_dir: where TFDS keeps data; its own folder (`TFDS_DATA_DIR`) if None.
    module: to import the builder from; `tensorflow_datasets.text.<name>` if
      None. What is prepared already needs no builder.
  """

  name: str
  _: dataclasses.KW_ONLY
  split: str
  data_dir: Path | None = None
  module: str | None = None

  def __post_init__(self):
    if self.data_dir is not None:
      object.__setattr__(self, 'data_dir', os.fspath(self.data_dir))

  def rows(self) -> Sequence[Row]:
    """The rows, with bytes as text and arrays as lists.

    Raises:
      FileNotFoundError, ValueError: there are none, for whatever reason.
    """
    try:
      tfds = importlib.import_module('tensorflow_datasets')
      _import_builder(self)
      found = tfds.data_source(
        self.name,
        split=self.split,
        data_dir=self.data_dir,
        # The one format that is read without TensorFlow.
        builder_kwargs={'file_format': 'array_record'},
      )
    except Exception as error:
      # It fails in many ways: not installed, not prepared, no network, disk …
      reason = str(error).strip().partition('\n')[0] or type(error).__name__
      raise FileNotFoundError(
        f'TFDS has no {self.name}, {self.split} ({reason}); set data_dir or '
        'TFDS_DATA_DIR to where it has been prepared with '
        "file_format='array_record'"
      ) from error
    if not len(found):
      raise ValueError(f'TFDS {self.name}, {self.split} has no rows')
    # All at once: that takes half the time of one by one.
    return [_plain(row) for row in found.__getitems__(range(len(found)))]

  def where(self, i: int) -> str:
    """Name, split and row."""
    return f'TFDS {self.name}, {self.split}, row {i}'


def _import_builder(source: Tfds) -> None:
  """Without TensorFlow a builder is known once its module is imported."""
  base = re.split('[/:]', source.name)[0]
  try:
    importlib.import_module(source.module or f'tensorflow_datasets.text.{base}')
  except ImportError:
    if source.module:
      raise
    # What is prepared says itself how it is read.


def _path(path: Path) -> pathlib.Path:
  return pathlib.Path(path).expanduser()


# As the hub names files; some of its older ones end with a hash.
_SHARD = re.compile(r'(?P<split>.+)-\d{5}-of-(?P<count>\d{5})(-[0-9a-f]+)?')


def _shards(path: pathlib.Path, split: str) -> list[pathlib.Path]:
  """The files of a split, in their order."""
  if path.is_file():
    if split:
      raise ValueError(f'{path} is one file, split={split!r}; leave that out')
    return [path]
  files = sorted(path.glob('*.parquet')) or sorted(path.glob('data/*.parquet'))
  if not files:
    raise FileNotFoundError(
      f'no file {path}, and no *.parquet or data/*.parquet in such a folder; '
      'give another path'
    )
  splits, counts = {}, {}
  for file in files:
    shard = _SHARD.fullmatch(file.stem)
    name = shard['split'] if shard else file.stem
    splits.setdefault(name, []).append(file)
    counts[name] = int(shard['count']) if shard else 1
  there = ', '.join(splits)
  if not split and len(splits) > 1:
    raise ValueError(f"{path} has {there}; give one as split, or '*' for all")
  if split not in ('', '*', *splits):
    raise FileNotFoundError(f'{path} has no split {split!r}; there: {there}')
  wanted = [split] if split in splits else list(splits)
  for name in wanted:
    if len(splits[name]) != counts[name]:
      raise FileNotFoundError(
        f'{path} has {len(splits[name])} of {counts[name]} files of {name!r}; '
        'fetch them all'
      )
  return [file for name in wanted for file in splits[name]]


def _plain(value: Any) -> Any:
  """Bytes as text, arrays as lists."""
  if isinstance(value, bytes):
    return value.decode(errors='replace')
  if isinstance(value, Mapping):
    return {key: _plain(x) for key, x in value.items()}
  if isinstance(value, list):
    return [_plain(x) for x in value]
  return _plain(value.tolist()) if hasattr(value, 'tolist') else value


class ParquetRows(Sequence):
  """Rows of some Parquet files, of which one row group is in memory."""

  def __init__(self, files: Sequence[pathlib.Path]):
    try:
      self._parquet = importlib.import_module('pyarrow.parquet')
    except ImportError as error:
      raise ImportError(
        f'Parquet is read with pyarrow ({error}); pip install pyarrow'
      ) from error
    self._groups, self._ends, self._cached = [], [0], (-1, None)
    for file in files:
      metadata = self._checked(file, self._parquet.read_metadata)
      for group in range(metadata.num_row_groups):
        self._groups.append((file, group))
        rows = metadata.row_group(group).num_rows
        self._ends.append(self._ends[-1] + rows)

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self[i] for i in range(len(self))[index]]
    i = range(len(self))[index]
    number = bisect.bisect_right(self._ends, i) - 1
    table = self._table(number)
    return table.slice(i - self._ends[number], 1).to_pylist()[0]

  def __iter__(self) -> Iterator[Row]:
    for number in range(len(self._groups)):
      for batch in self._table(number).to_batches(max_chunksize=1024):
        yield from batch.to_pylist()

  def where(self, i: int) -> str:
    file, _ = self._groups[bisect.bisect_right(self._ends, i) - 1]
    before = self._ends[[f for f, _ in self._groups].index(file)]
    return f'{file}, row {i - before}'

  def _table(self, number: int) -> Any:
    if self._cached[0] != number:
      file, group = self._groups[number]

      def table(path):
        with self._parquet.ParquetFile(path) as opened:
          return opened.read_row_group(group)

      self._cached = (number, self._checked(file, table))
    return self._cached[1]

  def _checked(self, file: pathlib.Path, read: Any) -> Any:
    try:
      return read(file)
    except (OSError, ValueError, NotImplementedError) as error:
      reason = str(error).strip().partition('\n')[0]
      raise ValueError(f'{file} cannot be read as Parquet: {reason}') from error
