"""The number a text ends with: what numeric rewards compare.

Differs from verl's and TRL's GSM8K graders: compared as exact rationals, not as
strings, so that '72.', '72.0', '$72' and '**72**' are all 72; and never
evaluated, so that '8 * 9' is no answer.
"""

from __future__ import annotations

import collections
import re
from fractions import Fraction

# Nothing that a person would write as an answer is longer; what is longer would
# only cost time.
_MAX_CHARACTERS = 64
_MAX_EXPONENT = 99

_NUMBER = re.compile(
  r"""
  (?P<sign>(?<![\w)\]}])[-−])?       # after a digit or a bracket: an operator
  \$?
  (?P<whole>
    [0-9]{1,3}(?:,[0-9]{3})+(?![0-9])  # 1,234,567
    | [0-9]+
    | (?<![\w.])(?=\.[0-9])            # the nothing before .5
  )
  (?P<decimals>\.[0-9]+)?
  (?P<exponent>[eE][-+]?[0-9]+)?
  """,
  re.VERBOSE,
)


def last_number(text: str) -> Fraction | None:
  """The last number written in decimal digits, as an exact rational.

  Reads thousands separators, decimals, exponents, '$' and both minus signs. A
  minus is a sign only where it touches the number and follows no letter, digit
  or closing bracket: '7-4' ends with 4, '= -4' with -4. Fractions and LaTeX are
  not read: '1/2' ends with 2.

  Returns None where there is no number, or where the last one is absurd: over
  64 characters or beyond 1e±99. Long texts cost microseconds.

  Example:
    >>> last_number('So 3 * 4 = **12.0**.')
    Fraction(12, 1)
  """
  end = max(map(text.rfind, '0123456789')) + 1
  # Of a number that begins before the tail, enough is left to be too long.
  tail = text[max(0, end - 2 * _MAX_CHARACTERS) : end]
  found = collections.deque(_NUMBER.finditer(tail), maxlen=1)
  if not found or len(found[0].group()) > _MAX_CHARACTERS:
    return None
  match = found[0]
  exponent = match['exponent'] or 'e0'
  if abs(int(exponent[1:])) > _MAX_EXPONENT:
    return None
  digits = match['whole'].replace(',', '') + (match['decimals'] or '')
  number = Fraction(digits + exponent)
  return -number if match['sign'] else number
