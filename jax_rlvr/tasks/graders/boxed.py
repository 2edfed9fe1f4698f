r"""Answers in \boxed{}, as the MATH data set has them.

Hendrycks et al., Measuring Mathematical Problem Solving With the MATH Dataset,
https://arxiv.org/abs/2103.03874, 2021. Expressions are compared by math-verify,
https://github.com/huggingface/Math-Verify.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from typing import Any

from jax_rlvr.records import Completion, Prompt
from jax_rlvr.tasks.graders import answer_text, numeral

# What math-verify may take long over, or for ever. No answer of MATH is such.
_LONGEST = 200
_DEEPEST = 20
_HEAVY = re.compile(
  r"""
  (?:\^\s*[({\[]*\s*[0-9.]+\s*){2}    # 9^9^9
  | \^\s*[({\[]*\s*-?[0-9]{4,}        # 9^9999
  | [0-9]{5,}[)}\]]*\s*!              # 99999!
  | !\s*! | ![)}\]]*\s*\^ | \^\s*[({\[]+[^)}\]]*!
  """,
  re.VERBOSE,
)
_SECONDS = 2

# Where math-verify rounds before it compares: 3.1416 is not π.
_DECIMALS = 12

_NAMED = re.compile(
  r'(?:[A-Za-z]|\([A-Za-z](?:,\s*[A-Za-z])*\))\s*(?:=|\\in\b)\s*'
)
_LISTED = re.compile(r'(\(|\[|\\\{)?(.*?)(\)|\]|\\\})?', re.DOTALL)
# Numbers in a base, of which math-verify reads no base, and ratios.
_LITERAL = re.compile(r'[0-9A-Za-z.]+_\{?[0-9]+\}?|[0-9]+(?: ?: ?[0-9]+)+')
# Words, not a product of variables: math-verify takes 'even' for 'neve'.
_WORDS = re.compile(r"[A-Za-z ,()'-]*[A-Za-z]{3}[A-Za-z ,()'-]*")
_UNITS_OF_ANY = frozenset('unit units square sq cubic 2 3'.split())
# Not units: these are factors.
_SCALES = frozenset(
  'percent half hundred hundreds thousand thousands million millions billion '
  'billions trillion trillions dozen dozens k pi'.split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boxed:
  r"""1 for a completion whose last \boxed{…} or \fbox{…} is the answer, else 0.

  Where the prompt's answer is a plain number, or a tuple, interval, set or list
  of some, so must be what is boxed, and both are compared as exact rationals:
  an expression that evaluates to it, as \boxed{3+4}, and a fraction that is not
  in lowest terms are no answers. A percent sign counts only if the answer has
  one, a unit only if the question has its words.

  Anything else is right where it is the same LaTeX up to spacing, or where
  math-verify finds it equal; but not where it was copied from the question.

  Attributes:
    symbolic: asks math-verify. False needs no installation.
  """

  symbolic: bool = True

  def __call__(self, prompt: Prompt, completion: Completion) -> float:
    """Raises ImportError as `require` does, where it comes to math-verify."""
    found = _boxed(completion)
    if not found or len(found) > _LONGEST:
      return 0.0
    gold = prompt.answer
    listed = _listed(gold)
    if listed is not None:
      return float(_same_list(listed, _listed(found), prompt))
    if numeral.normal(found) == numeral.normal(gold):
      return 1.0
    if _LITERAL.fullmatch(gold):
      return float(_bare(found) == _bare(gold))
    if _WORDS.fullmatch(numeral.worded(gold)):
      return float(_folded(found) == _folded(gold))
    if not self.symbolic or _echoes(found, prompt):
      return 0.0
    if not _harmless(gold) or not _harmless(found):
      return 0.0
    return float(_verified(gold, found))

  def extract(self, completion: Completion) -> str | None:
    """What is boxed: numbers in lowest terms, other LaTeX without spacing."""
    found = _boxed(completion)
    if not found:
      return None
    number = numeral.read(found) if len(found) <= _LONGEST else None
    if number is None:
      return numeral.normal(found)
    return f'{number.value}%' if number.percent else str(number.value)

  def require(self) -> None:
    """Raises ImportError where math-verify is needed and missing."""
    if self.symbolic:
      _math_verify()


def _boxed(completion: Completion) -> str | None:
  found = answer_text.boxed(answer_text.visible(completion.text), _alike)
  return ' '.join(found.split()) if found else None


def _alike(latex: str, other: str) -> bool:
  """Whether they are the same number, or otherwise the same."""
  return _listed(latex) == _listed(other) is not None or latex == other


def _listed(latex: str) -> tuple[str, list[numeral.Numeral]] | None:
  """Brackets and plain numbers in them; None where there is anything else."""
  if len(latex) > _LONGEST:
    return None
  number = numeral.read(latex)
  if number is not None:
    return '', [number]
  latex = numeral.tidy(latex)
  named = _NAMED.match(latex)  # 'x =', '(x, y) =', 'x ∈'
  if named:
    latex = latex[named.end() :]
  found = _LISTED.fullmatch(latex)
  if found is None or (found[1] is None) != (found[3] is None):
    return None
  numbers = []
  for part in found[2].split(','):
    number = numeral.read(part)
    if number is None:
      return None
    numbers.append(number)
  if found[1] and len(numbers) == 1:
    return None
  return (found[1] or '') + (found[3] or ''), numbers


def _same_list(
  gold: tuple[str, list[numeral.Numeral]],
  found: tuple[str, list[numeral.Numeral]] | None,
  prompt: Prompt,
) -> bool:
  if found is None or found[0] != gold[0] or len(found[1]) != len(gold[1]):
    return False
  pairs = zip(gold[1], found[1], strict=True)
  if gold[0] in ('', '\\{\\}'):  # the order in a set says nothing
    pairs = zip(sorted(gold[1]), sorted(found[1]), strict=True)
  asked = _UNITS_OF_ANY.union(re.findall('[a-z]+', prompt.text.lower()))
  return all(
    theirs.value == ours.value
    and (theirs.lowest or not ours.lowest)
    and (ours.percent or not theirs.percent)
    and theirs.unit <= (ours.unit or asked - _SCALES)
    for ours, theirs in pairs
  )


def _harmless(latex: str) -> bool:
  """Whether math-verify will be done with it soon."""
  if len(latex) > _LONGEST:
    return False
  depth = deepest = 0
  for character in latex:
    depth += {'{': 1, '}': -1}.get(character, 0)
    deepest = max(deepest, depth)
  return (
    deepest <= _DEEPEST
    and not depth
    and latex.isprintable()
    and not _HEAVY.search(latex)
  )


def _bare(latex: str) -> str:
  return re.sub('[{} ]', '', numeral.normal(latex))


def _folded(words: str) -> str:
  return numeral.normal(words).casefold()


def _echoes(latex: str, prompt: Prompt) -> bool:
  found = numeral.normal(latex)
  return len(found) > 1 and found in numeral.normal(prompt.text)


def _verified(gold: str, found: str) -> bool:
  parse, verify = _math_verify()
  sides = [
    # Without its dollars most LaTeX is not read as such.
    parse(f'${latex.strip("$")}$', parsing_timeout=_SECONDS)
    for latex in (gold, found)
  ]
  return all(sides) and verify(
    *sides, float_rounding=_DECIMALS, timeout_seconds=_SECONDS
  )


@functools.cache
def _math_verify() -> tuple[Any, Any]:
  try:
    module = importlib.import_module('math_verify')
  except ImportError as error:
    raise ImportError(
      'Boxed compares expressions with math-verify; pip install '
      'jax-rlvr[math], or give symbolic=False'
    ) from error
  return module.parse, module.verify
