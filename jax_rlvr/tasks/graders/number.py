"""The last number of a completion, compared exactly."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

from jax_rlvr.records import Completion, Prompt
from jax_rlvr.tasks.graders import answer_text
from jax_rlvr.tasks.numbers import last_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Number:
  r"""1 for a completion whose last number is the prompt's answer, else 0.

  The number may stand in \boxed{}, after '####' or in a sentence; see
  `numbers.last_number`. Expressions are not evaluated, digits of other scripts
  are not read, and a number that touches one, as in '3½', is none.

  Attributes:
    require_end: a completion cut off at the token limit earns nothing.
  """

  require_end: bool = False

  def __call__(self, prompt: Prompt, completion: Completion) -> float:
    """Raises ValueError where the prompt's answer is no number."""
    try:
      answer = Fraction(prompt.answer.replace(',', ''))
    except (ValueError, ZeroDivisionError):
      raise ValueError(
        f'prompt {prompt.id!r}: answer {prompt.answer!r:.80} is no number; '
        'grade it with Exact or Boxed'
      ) from None
    if self.require_end and completion.truncated:
      return 0.0
    return float(_last(completion.text) == answer)

  def extract(self, completion: Completion) -> str | None:
    """The last number, as an integer or a fraction in lowest terms."""
    number = _last(completion.text)
    return None if number is None else str(number)


def _last(text: str) -> Fraction | None:
  text = answer_text.visible(text)
  end = max(map(text.rfind, '0123456789')) + 1
  start = len(text[:end].rstrip('0123456789.,'))
  # '5²', '3½', '5万' and '٣5' are not 5. ASCII digits do not stand there.
  beside = text[max(0, start - 1) : start] + text[end : end + 1]
  if any(character.isnumeric() for character in beside):
    return None
  return last_number(text)
