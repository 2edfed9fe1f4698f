"""Countdown: reach a target with given numbers and + − × ÷.

As in Pan et al., TinyZero, https://github.com/Jiayi-Pan/TinyZero, 2025, whose
verifier evaluates the answer with Python's `eval`; this one never does.
"""

from __future__ import annotations

import collections
import dataclasses
import operator
import re
from fractions import Fraction

from jax_rlvr.records import Completion, Prompt
from jax_rlvr.tasks.graders import answer_text

_LONGEST = 256
_TOKEN = re.compile(r'\s*([0-9]+|[-+*/()])')
_OPERATIONS = {
  '+': (1, operator.add),
  '-': (1, operator.sub),
  '*': (2, operator.mul),
  '/': (2, operator.truediv),
}
_WRITTEN = (
  ('×', '*'),
  ('·', '*'),
  ('÷', '/'),
  ('−', '-'),
  (r'\times', '*'),
  (r'\cdot', '*'),
  (r'\div', '/'),
  (r'\left', ''),
  (r'\right', ''),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Countdown:
  r"""1 for an expression that makes the target of all numbers, else 0.

  The prompt's extra has 'target', an integer, and 'numbers', a list of them,
  each to be used exactly once. The last <answer>, else the last \boxed, else
  the last line must be an expression of integers, + − * / and parentheses, and
  may end with '= target'. Division is exact; signs are not operators of one
  operand.
  """

  def __call__(self, prompt: Prompt, completion: Completion) -> float:
    """Raises ValueError where the prompt's extra is not as above."""
    try:
      target = int(prompt.extra['target'])
      given = collections.Counter(map(int, prompt.extra['numbers']))
    except (KeyError, TypeError, ValueError) as error:
      raise ValueError(
        f"prompt {prompt.id!r}: extra has no integer 'target' with a list of "
        f"'numbers' ({type(error).__name__}: {error})"
      ) from error
    expression, equals, result = _written(completion).partition('=')
    if equals and result.strip() != str(target):
      return 0.0
    value = _evaluate(expression)
    if value is None:
      return 0.0
    return float(value[0] == target and collections.Counter(value[1]) == given)

  def extract(self, completion: Completion) -> str | None:
    """The expression without white space; None where it is none."""
    expression = _written(completion).partition('=')[0]
    return ''.join(expression.split()) if _evaluate(expression) else None


def _written(completion: Completion) -> str:
  text = answer_text.final(answer_text.visible(completion.text))
  if len(text) > _LONGEST:
    return ''
  for written, meant in _WRITTEN:
    text = text.replace(written, meant)
  return text.strip(' `$.')


def _evaluate(expression: str) -> tuple[Fraction, list[int]] | None:
  """Its value and the numbers in it, by Dijkstra's shunting yard."""
  values: list[Fraction] = []
  numbers: list[int] = []
  operators: list[str] = []
  operand_due = True

  def reduce_to(rank: int) -> None:
    while operators and operators[-1] != '(':
      if _OPERATIONS[operators[-1]][0] < rank:
        return
      right, left = values.pop(), values.pop()
      values.append(_OPERATIONS[operators.pop()][1](left, right))

  expression = expression.strip()
  position = 0
  try:
    while position < len(expression):
      found = _TOKEN.match(expression, position)
      if found is None:
        return None
      position = found.end()
      token = found[1]
      # A number or '(' where an operator is due, or the other way round.
      if (token[0] in '(0123456789') != operand_due:
        return None
      if token == '(':
        operators.append(token)
      elif token == ')':
        reduce_to(0)
        if not operators:
          return None
        operators.pop()
      elif token in _OPERATIONS:
        reduce_to(_OPERATIONS[token][0])
        operators.append(token)
        operand_due = True
      else:
        numbers.append(int(token))
        values.append(Fraction(numbers[-1]))
        operand_due = False
    if operand_due:
      return None
    reduce_to(0)
  except ZeroDivisionError:
    return None
  return None if operators else (values[0], numbers)
