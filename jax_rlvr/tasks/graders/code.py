"""Programs that must pass tests."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jax_rlvr.records import Completion, Prompt
from jax_rlvr.tasks import sandbox

_LANGUAGES = ('python', 'python3', 'py')
_LONGEST = 100_000
_FLOAT = re.compile(r'[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Code:
  """1 for a Python program that passes the prompt's tests, else 0.

  The last closed ```python block of the completion is run once for each test
  of the prompt's extra, {'tests': [{'input': …, 'output': …}, …]}, with 'input'
  as standard input; what it prints must be 'output', up to white space at line
  ends and between words. Only the standard library is there.

  Programs run isolated; see `jax_rlvr.tasks.sandbox`.

  Attributes:
    timeout_s: seconds for each test.
    budget_s: seconds for all tests of a completion; when they are over, it has
      not passed. Less than the deadline for rewards, beyond which it would be
      unscorable instead.
    memory_mb: address space of each process, in MiB.
    output_bytes: a program that prints more is wrong.
    float_tolerance: where a number with a decimal point or exponent is
      expected, it may be off by so much, absolutely or relatively. None
      compares numbers as text.
    partial: the reward is the share of tests passed, and the outcome whether
      all are; otherwise the first failure ends it.
    allow_unsandboxed_code: where programs cannot be isolated, they run with
      limits only: they can read, write and send what you can.
  """

  timeout_s: float = 4.0
  budget_s: float = 8.0
  memory_mb: int = 1024
  output_bytes: int = 4 << 20
  float_tolerance: float | None = None
  partial: bool = False
  allow_unsandboxed_code: bool = False

  def __post_init__(self):
    for name in ('timeout_s', 'budget_s', 'memory_mb', 'output_bytes'):
      if not 0 < getattr(self, name) < math.inf:
        raise ValueError(
          f'Code: {name}={getattr(self, name)!r}; give a number above 0'
        )
    if self.float_tolerance is not None and not self.float_tolerance >= 0:
      raise ValueError(
        f'Code: float_tolerance={self.float_tolerance!r}; give None, or a '
        'number that is 0 or more'
      )

  def __call__(
    self, prompt: Prompt, completion: Completion
  ) -> float | dict[str, float]:
    """Raises ValueError without tests, or as `require` does."""
    self.require()
    tests = _tests(prompt)
    program = last_block(completion.text)
    passed = 0
    if program is not None and len(program) <= _LONGEST:
      passed = self._passed(program, tests)
    right = float(passed == len(tests))
    if not self.partial:
      return right
    return {'reward': passed / len(tests), 'outcome': right}

  def require(self) -> None:
    """Raises ValueError where programs would run without being isolated."""
    if not self.allow_unsandboxed_code:
      sandbox.require_isolation()

  def _passed(self, program: str, tests: Sequence[Mapping[str, str]]) -> int:
    isolated = not sandbox.isolation()
    end = time.monotonic() + self.budget_s
    passed = 0
    for test in tests:
      left = min(self.timeout_s, end - time.monotonic())
      if left <= 0:
        break
      result = sandbox.run(
        program,
        test['input'],
        timeout_s=left,
        memory_mb=self.memory_mb,
        output_bytes=self.output_bytes,
        isolated=isolated,
      )
      right = result.code == 0 and same_output(
        result.output, test['output'], self.float_tolerance
      )
      if not right and not self.partial:
        break
      passed += right
    return passed


def last_block(text: str) -> str | None:
  """The last ```python block that is closed."""
  last, block, language = None, None, ''
  for line in text.split('\n'):
    mark = line.strip()
    if block is None:
      if mark.startswith('```'):
        block, language = [], mark[3:].strip().lower()
    elif mark == '```':
      if language in _LANGUAGES:
        last = '\n'.join(block) + '\n'
      block = None
    else:
      block.append(line)
  return last


def same_output(
  found: str, expected: str, float_tolerance: float | None = None
) -> bool:
  """Whether two outputs have the same words on the same lines."""
  lines, wanted = (
    [line.split() for line in text.strip().split('\n')]
    for text in (found, expected)
  )
  if lines == wanted or float_tolerance is None:
    return lines == wanted
  return [*map(len, lines)] == [*map(len, wanted)] and all(
    _close(word, other, float_tolerance)
    for line, other_line in zip(lines, wanted, strict=True)
    for word, other in zip(line, other_line, strict=True)
  )


def _close(word: str, expected: str, tolerance: float) -> bool:
  if word == expected:
    return True
  # Integers are counted, not measured.
  if not _FLOAT.fullmatch(word) or not _FLOAT.fullmatch(expected):
    return False
  if expected.lstrip('+-').isdigit():
    return False
  values = float(word), float(expected)
  return math.isclose(*values, rel_tol=tolerance, abs_tol=tolerance)


def _tests(prompt: Prompt) -> Sequence[Mapping[str, Any]]:
  tests = prompt.extra.get('tests')
  if not tests or not all(
    isinstance(test, Mapping)
    and isinstance(test.get('input'), str)
    and isinstance(test.get('output'), str)
    for test in tests
  ):
    raise ValueError(
      f"prompt {prompt.id!r}: extra has no 'tests', a list of "
      "{'input': text, 'output': text}"
    )
  return tests
