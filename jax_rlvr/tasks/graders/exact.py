"""The answer itself, character by character."""

from __future__ import annotations

import dataclasses
import unicodedata

from jax_rlvr.records import Completion, Prompt
from jax_rlvr.tasks.graders import answer_text

# Compatibility forms that mean something else than what they decompose into:
# 10² is not 102, ½ is not 1⁄2 after a digit, ① is not always 1.
_OTHER_MEANING = ('<super>', '<sub>', '<fraction>', '<circle>')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact:
  """1 for a completion that is the prompt's answer, else 0.

  Both are compared in Unicode's NFKC form, so that full-width and mathematical
  letters and digits are the plain ones; except superscripts, subscripts,
  fractions and circled digits, which NFKC would make other numbers of. Digits
  of other scripts stay different from ours. Characters that are not seen do not
  count.

  Attributes:
    ignore_case: upper case is lower case.
    ignore_space: white space around the answer does not count, and within it
      any is one space.
    after: only what follows the last occurrence of this is the answer, as
      'Answer:' or '####'; a completion without it earns nothing. '' for the
      whole completion.
  """

  ignore_case: bool = False
  ignore_space: bool = True
  after: str = ''

  def __call__(self, prompt: Prompt, completion: Completion) -> float:
    return float(self.extract(completion) == self._normal(prompt.answer))

  def extract(self, completion: Completion) -> str | None:
    """The answer, normalised; None where `after` is not there."""
    before, mark, text = completion.text.rpartition(self.after or '\0')
    if self.after:
      return self._normal(text) if mark else None
    return self._normal(completion.text)

  def _normal(self, text: str) -> str:
    text = answer_text.visible(text)
    if not text.isascii():
      text = unicodedata.normalize('NFC', ''.join(map(_plain, text)))
    if self.ignore_case:
      text = text.casefold()
    return ' '.join(text.split()) if self.ignore_space else text


def _plain(character: str) -> str:
  if unicodedata.decomposition(character).startswith(_OTHER_MEANING):
    return character
  return unicodedata.normalize('NFKC', character)
