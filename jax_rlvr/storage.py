"""Folders on this machine, and in buckets: gs://bucket/run."""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from etils import epath

# An epath.Path where it is in a bucket: it has the methods that are used here.
Path = pathlib.Path | Any


def path(where: str | os.PathLike[str]) -> Path:
  """A folder or file: with its whole path on this machine, or in a bucket.

  Raises:
    ImportError: what reads the bucket is not installed.
  """
  text = os.fspath(where)
  if not is_remote(text):
    return pathlib.Path(text).absolute()
  found = epath.Path(text)
  found.exists()
  return found


def is_remote(where: str | os.PathLike[str]) -> bool:
  """Whether it is in a bucket."""
  return '://' in os.fspath(where)


@contextlib.contextmanager
def local_copy(folder: Path) -> Iterator[pathlib.Path]:
  """The files of a folder on this machine; those of a bucket for a while."""
  if not is_remote(folder):
    yield pathlib.Path(folder)
    return
  with tempfile.TemporaryDirectory() as name:
    copy(folder, pathlib.Path(name))
    yield pathlib.Path(name)


def copy(source: Path, target: Path) -> None:
  """Copies the files of a folder into another."""
  target.mkdir(parents=True, exist_ok=True)
  for file in source.iterdir():
    (target / file.name).write_bytes(file.read_bytes())
