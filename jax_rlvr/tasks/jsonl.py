"""Rows of a JSON Lines file, with errors that say what to do."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any


def rows(
  path: str | os.PathLike[str], fields: Sequence[str], where: str
) -> list[dict[str, Any]]:
  """Reads one JSON object a line; blank lines are skipped.

  Args:
    path: the file.
    fields: what every row must have.
    where: task and split, for error messages.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a row is no JSON object or lacks a field, or there is no row.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(
      f'{where}: no file {path}; give the folder that holds {path.name} as path'
    )
  found = []
  with path.open(encoding='utf-8') as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      here = f'{where}: {path}:{number}'
      try:
        row = json.loads(line)
      except json.JSONDecodeError as error:
        raise ValueError(f'{here}: {error}') from None
      if not isinstance(row, dict) or not row.keys() >= set(fields):
        raise ValueError(
          f'{here}: not an object with the fields {", ".join(fields)}'
        )
      found.append(row)
  if not found:
    raise ValueError(f'{where}: {path} has no rows; give another path')
  return found
