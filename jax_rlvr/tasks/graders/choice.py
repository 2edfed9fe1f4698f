"""The letter of a multiple-choice answer."""

from __future__ import annotations

import dataclasses
import re

from jax_rlvr.records import Completion, Prompt
from jax_rlvr.tasks.graders import answer_text

# An answer stands near the end; what precedes would only cost time.
_TAIL = 2000
_DENIAL = re.compile(
  r"\b(?:not|never|neither|whether|if|unless|wrong|incorrect)\b|n['’]t\b",
  re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
  r"""1 for a completion that chooses the prompt's answer, a letter, else 0.

  The last of 'answer is (B)', 'Answer: B', '\boxed{B}' and a line that is only
  the letter counts. It is no answer where its clause denies or doubts it, or
  where another letter of the choice follows: 'A or B' is neither.

  Attributes:
    letters: that can be chosen.
  """

  letters: str = 'ABCDE'

  def __post_init__(self):
    if not re.fullmatch('[A-Z]{2,26}', self.letters):
      raise ValueError(
        f"Choice: letters={self.letters!r}; give two or more of A to Z, as 'AB'"
      )

  def __call__(self, prompt: Prompt, completion: Completion) -> float:
    """Raises ValueError where the prompt's answer is not one of the letters."""
    answer = prompt.answer.strip().strip('()')
    if len(answer) != 1 or answer not in self.letters:
      raise ValueError(
        f'prompt {prompt.id!r}: answer {prompt.answer!r:.80} is not one of '
        f'{self.letters!r}; give Choice its letters'
      )
    return float(self.extract(completion) == answer)

  def extract(self, completion: Completion) -> str | None:
    """The letter chosen."""
    text = answer_text.visible(completion.text)[-_TAIL:]
    lower = self.letters.lower()
    either = f'[{self.letters}{lower}]'
    # 'a' is an article: a small letter needs brackets, a bare one an end.
    letter = (
      rf'(?:\(\s*(?P<round>{either})\s*\)|\*\*\(?(?P<bold>{either})\)?\.?\*\*'
      rf'|(?P<bare>[{self.letters}])'
      r'(?=\s*(?:$|[.,;:)\]*$\n]|because\b|since\b)))'
    )
    box = (
      r'\\(?:boxed|fbox)\s*\{\s*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?'
      rf'\s*\(?\s*(?P<boxed>{either})\s*\)?\s*\}}'
    )
    said = re.compile(
      r'\b[Aa]nswer\s*(?:\*\*)?\s*(?:is|:|=)\s*(?:\*\*)?\s*:?\s*'
      rf'(?:[Oo]ption\s+|[Cc]hoice\s+)?\$?(?:{box}|{letter})'
    )
    line = rf'^\W{{0,8}}(?P<line>[{self.letters}])\W{{0,8}}$'
    own = re.compile(rf'{box}|{line}', re.MULTILINE)
    matches = [*said.finditer(text), *own.finditer(text)]
    if not matches:
      return None
    last = max(matches, key=lambda match: match.end())
    chosen = next(filter(None, last.groups())).upper()
    clause = re.split(r'[.,;:!?\n]', text[: last.start()])[-1]
    if _DENIAL.search(clause):
      return None
    later = re.findall(
      rf'\(({either})\)|(?<![\w\'’])([{self.letters}])(?![\w\'’])',
      text[last.end() :],
    )
    others = {(first or second).upper() for first, second in later}
    return None if others - {chosen} else chosen
