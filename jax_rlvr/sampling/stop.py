"""Texts that end a completion."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

from jax_rlvr.sampling.requests import Completed
from jax_rlvr.tokenizer import Tokenizer


def written(
  tokenizer: Tokenizer,
  completed: Completed,
  end_ids: Sequence[int],
  strings: Sequence[str],
) -> str:
  """The text of a completion, without what ended it."""
  ids = completed.ids
  if completed.ended and ids[-1] in end_ids:
    ids = ids[:-1]
  text = tokenizer.decode(ids)
  for string in strings:
    text = text.partition(string)[0]
  return text


def stops(
  tokenizer: Tokenizer, strings: Sequence[str]
) -> Callable[[Completed], int | None]:
  """How many tokens of a completion it takes until one of the strings is there.

  Raises:
    ValueError: a string is empty, or nothing that the tokenizer writes has it.
  """
  for string in strings:
    if not string or not _can_write(tokenizer, string):
      raise ValueError(
        f'stop text {string!r} can never match: the tokenizer does not write '
        'it; give another, or an end token'
      )

  def there(ids):
    text = tokenizer.decode(ids)
    return any(string in text for string in strings)

  def stop(completed):
    ids = completed.ids
    if not strings or not there(ids):
      return None
    return bisect.bisect_left(
      range(len(ids)), True, key=lambda n: there(ids[:n])
    )

  return stop


def _can_write(tokenizer: Tokenizer, string: str) -> bool:
  try:
    return tokenizer.decode(tokenizer.encode(string)) == string
  except ValueError:  # It has no such character.
    return False
