r"""Where in a completion its final answer stands.

All of these are linear in the length of the text, whatever is in it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

# Controls but white space; soft hyphen, marks of direction, joiners, tags.
_INVISIBLE = re.compile(
  r'[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b-\u200f'
  r'\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]'
)
_BRACES = re.compile(r'\\.|[{}]', re.DOTALL)
_JOINT = re.compile(r'[\W_]*(?:(?:text|quad|qquad|or|and)\b[\W_]*)*')
_LONGEST_JOINT = 40


def visible(text: str) -> str:
  """The text without characters that are not seen: '1', U+200B, '2' is 12."""
  return _INVISIBLE.sub('', text)


def tagged(text: str) -> str | None:
  """What the last <answer>…</answer> holds; None where it is not closed."""
  start = text.rfind('<answer>')
  end = text.find('</answer>', start)
  if start < 0 or end < 0:
    return None
  return text[start + len('<answer>') : end].strip()


def boxed(
  text: str, same: Callable[[str, str], bool] = operator.eq
) -> str | None:
  r"""What the last \boxed{…} or \fbox{…} holds.

  None where its braces are not balanced, and where nothing but 'or', 'and' or
  punctuation parts it from a box before it that does not hold the `same`: two
  answers are none.
  """
  start = _last_box(text, len(text))
  found = _braced(text, start)
  if found is None:
    return None
  content = found[0].strip()
  before = _last_box(text, start)
  other = _braced(text, before)
  if other is not None and other[1] <= start <= other[1] + _LONGEST_JOINT:
    joint = text[other[1] : start]
    if _JOINT.fullmatch(joint) and not same(other[0].strip(), content):
      return None
  return content


def last_line(text: str) -> str:
  """The last line that is not blank."""
  return text.rstrip().rpartition('\n')[2].strip()


def final(text: str) -> str:
  r"""The last <answer>, else the last \boxed, else the last line."""
  for found in (tagged(text), boxed(text)):
    if found is not None:
      return found
  return last_line(text)


def _last_box(text: str, end: int) -> int:
  if end < 0:
    return -1
  return max(text.rfind('\\boxed', 0, end), text.rfind('\\fbox', 0, end))


def _braced(text: str, start: int) -> tuple[str, int] | None:
  """What the braces after a command at `start` hold, and where they end."""
  if start < 0:
    return None
  command = re.compile(r'\\(?:boxed|fbox)\s*\{').match(text, start)
  if command is None:
    return None
  depth = 1
  for brace in _BRACES.finditer(text, command.end()):
    depth += {'{': 1, '}': -1}.get(brace.group(), 0)
    if not depth:
      return text[command.end() : brace.start()], brace.end()
  return None
