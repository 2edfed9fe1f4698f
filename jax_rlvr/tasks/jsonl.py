"""Objects of a JSON file and their places in it."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any


def rows(path: pathlib.Path) -> list[tuple[str, Mapping[str, Any]]]:
  """Reads one object a line, or one list of objects; the text tells which.

  Returns:
    (place, object) each; the place is the file and line, or row of the list.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it holds something else, or nothing.
  """
  if not path.is_file():
    raise FileNotFoundError(f'no file {path}; give another path')
  try:
    text = path.read_text(encoding='utf-8-sig')
  except UnicodeDecodeError as error:
    raise ValueError(f'{path}: no UTF-8 text, byte {error.start}') from None
  if text.lstrip().startswith('['):
    listed = _parsed(text, path, 1)
    found = [(f'{path}, row {i}', row) for i, row in enumerate(listed)]
  else:
    # Not splitlines(): that also breaks at what a JSON string may contain.
    found = [
      (f'{path}:{number}', _parsed(line, path, number))
      for number, line in enumerate(text.split('\n'), 1)
      if line.strip()
    ]
  for place, row in found:
    if not isinstance(row, dict):
      raise ValueError(f'{place}: not a JSON object')
  if not found:
    raise ValueError(f'{path} has no rows; give another path')
  return found


def _parsed(text: str, path: pathlib.Path, first: int) -> Any:
  try:
    return json.loads(text)
  except json.JSONDecodeError as error:
    line = first + error.lineno - 1
    raise ValueError(
      f'{path}:{line}: {error.msg} at column {error.colno}'
    ) from None
