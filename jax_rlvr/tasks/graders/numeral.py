r"""Plain numbers as one writes answers: '1,234', '\frac{3}{4}', '5\%'.

Only what needs no arithmetic to know: '3+4', '2^{10}', '14/2' and '\frac{6}{4}'
are expressions, so that copying a question is not answering it.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

_NOTHING = re.compile(r'\\left\b|\\right\b|\\(?:big|Big|bigg|Bigg)[lr]?\b|\\!')
_SPACE = re.compile(r'\\[,;: ]|\\q?quad\b|\\displaystyle\b|~')
_THIN = re.compile(r'(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))')
# Between two digits it says something: '1 2' is not 12.
_IDLE_SPACE = re.compile(r'(?<![0-9])\s+|\s+(?![0-9])')
_TEXT = re.compile(
  r'\\(?:text|textrm|textbf|mbox|mathrm|mathbf)\s*\{([^{}]*)\}'
)
_ALIASES = (('−', '-'), ('\\dfrac', '\\frac'), ('\\tfrac', '\\frac'))
_WORDS = re.compile('[A-Za-z]+')
_ASSIGNED = re.compile(r'[A-Za-z](?:_\{?\w+\}?)?=(?!=)')
_NUMERAL = re.compile(
  r"""
  (?P<sign>[-+]?)(?:\\?\$)?
  (?:
    (?P<digits>
      (?:[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+|[0-9]+)(?:\.[0-9]*)? | \.[0-9]+
    )
    |
    (?P<whole>[0-9]+(?=\\))?
    (?:
      \\frac(?:
        \{(?P<top>[-+]?[0-9]+)\}\{(?P<bottom>[0-9]+)\}
        | (?P<top1>[0-9])(?P<bottom1>[0-9])
      )
      | (?P<top2>[0-9]+)/(?P<bottom2>[0-9]+)
    )
  )
  (?P<percent>\\?%)?
  (?P<degrees>\^\{?\\circ\}?|\\degree|°)?
  (?P<unit>\\(?:text|textrm|mbox|mathrm)\{[A-Za-z.\s/]+\}
    (?:\^\{?(?P<power>[23])\}?)?
  )?
  """,
  re.VERBOSE,
)


class Numeral(NamedTuple):
  """A plain number.

  Attributes:
    value: without its percent sign.
    percent: it has one.
    unit: words of its unit, in small letters, and '2' or '3' for its power.
    lowest: it is no fraction that could be reduced.
  """

  value: Fraction
  percent: bool
  unit: frozenset[str]
  lowest: bool


def tidy(latex: str) -> str:
  """LaTeX without what only changes its looks."""
  for written, meant in _ALIASES:
    latex = latex.replace(written, meant)
  latex = _NOTHING.sub('', _THIN.sub('', latex))
  latex = _SPACE.sub(' ', latex).strip()
  if len(latex) > 1 and latex[0] == latex[-1] == '$':
    latex = latex[1:-1].strip()
  return latex.rstrip('.').strip()


def worded(latex: str) -> str:
  """Tidy, and words without the commands around them."""
  return _TEXT.sub(r'\1', tidy(latex))


def normal(latex: str) -> str:
  """Tidy, worded, and without white space that says nothing."""
  return ' '.join(_IDLE_SPACE.sub('', worded(latex)).split())


def read(latex: str) -> Numeral | None:
  r"""The plain number that some LaTeX is; None for anything else.

  A mixed number is one, '1\frac{1}{2}'; so is what is assigned in 'x=5'.
  """
  words = frozenset(
    word.lower()
    for text in _TEXT.findall(latex)
    for word in _WORDS.findall(text)
  )
  latex = _IDLE_SPACE.sub('', tidy(latex))
  assigned = _ASSIGNED.match(latex)
  if assigned:
    latex = latex[assigned.end() :]
  found = _NUMERAL.fullmatch(latex)
  if found is None:
    return None
  lowest = True
  if found['digits']:
    value = Fraction(re.sub('[{},]', '', found['digits']))
  else:
    top, bottom = (
      int(next(filter(None, (found[name + i] for i in ('', '1', '2')))))
      for name in ('top', 'bottom')
    )
    if not bottom or (found['whole'] and not 0 < top < bottom):
      return None
    if found['sign'] and top < 0:
      return None
    value = Fraction(top, bottom)
    lowest = bottom > 1 and value.denominator == bottom
    value += int(found['whole'] or 0)
  return Numeral(
    value=-value if found['sign'] == '-' else value,
    percent=bool(found['percent']),
    unit=words.union(found['power'] or ()) if found['unit'] else frozenset(),
    lowest=lowest,
  )
