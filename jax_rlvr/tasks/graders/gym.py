"""Scores of reasoning-gym's data sets, all or nothing.

Stojanovski et al., Reasoning Gym: Reasoning Environments for Reinforcement
Learning with Verifiable Rewards, https://arxiv.org/abs/2505.24760, 2025.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from jax_rlvr.records import Completion, Prompt
from jax_rlvr.tasks.graders import answer_text

_LONGEST = 20_000

# These scorers run an answer through Python's eval(), some by way of SymPy's
# parse_expr(), which knows all of Python's functions. So an answer may hold
# only what a right one can: none of it a call, or one of these functions.
_WORDS = re.compile(r'[\w\s]*', re.ASCII)
_ARITHMETIC = re.compile(r'(?!.*(\*\s*\*|/\s*/))[0-9\s+\-*/()]*', re.DOTALL)
_ALGEBRA = re.compile(
  r"""
  (?!.*\*\*\s*\(*-?(?:[0-9]{4}|[0-9.]+\s*\*\*))   # x**1000, 9**9**9
  (?:
    (?:a?(?:sin|cos|tan|sec|csc|cot)h?|exp|log|ln|sqrt|pi|Abs|[A-Za-z])(?!\w)
    | [0-9]+(?:\.[0-9]+)?(?!\w) | [\s+\-*/()]
  )*
  """,
  re.VERBOSE | re.DOTALL | re.ASCII,
)
EVALUATED = {
  'binary_matrix': _WORDS,
  'n_queens': _WORDS,
  'spiral_matrix': _WORDS,
  'string_insertion': _WORDS,
  'countdown': _ARITHMETIC,
  'puzzle24': _ARITHMETIC,
  'intermediate_integration': _ALGEBRA,
  'polynomial_multiplication': _ALGEBRA,
  'simple_integration': _ALGEBRA,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gym:
  r"""1 for an answer that reasoning-gym scores 1.0, else 0.

  The prompt's extra has the data set's entry under 'entry': 'question',
  'answer' and 'metadata'. The last <answer>, else the last \boxed, else the
  last line is scored. Anything below 1.0 is wrong: scores between reward
  answers that merely contain the right one, as 2560 contains 256.

  Attributes:
    dataset: its name there, as 'chain_sum'.
  """

  dataset: str

  def __call__(self, prompt: Prompt, completion: Completion) -> float:
    """Raises ImportError or ValueError as `require` does, or without entry."""
    entry = prompt.extra.get('entry')
    if not isinstance(entry, Mapping) or not isinstance(
      entry.get('metadata'), Mapping
    ):
      raise ValueError(
        f"prompt {prompt.id!r}: extra has no 'entry' of {self.dataset} with "
        "'question', 'answer' and 'metadata'"
      )
    score = _scorer(self.dataset)
    answer = self.extract(completion)
    # The members of a composite have their own scorers.
    source = entry['metadata'].get('source_dataset', self.dataset)
    allowed = EVALUATED.get(source)
    if answer is None or (allowed and not allowed.fullmatch(answer)):
      return 0.0
    try:
      return float(score(answer, dict(entry)) == 1.0)
    except Exception:  # scorers parse answers in a hundred ways
      return 0.0

  def extract(self, completion: Completion) -> str | None:
    """The answer as it is scored."""
    answer = answer_text.final(answer_text.visible(completion.text))
    return answer if 0 < len(answer) <= _LONGEST else None

  def require(self) -> None:
    """Raises ImportError without reasoning-gym, ValueError without its set."""
    _scorer(self.dataset)


@functools.cache
def _scorer(dataset: str) -> Callable[[str, dict[str, Any]], float]:
  try:
    module = importlib.import_module('reasoning_gym')
  except ImportError as error:
    raise ImportError(
      f'{dataset} is scored by reasoning-gym; pip install jax-rlvr[gym]'
    ) from error
  return module.get_score_answer_fn(dataset)
