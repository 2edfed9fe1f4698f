"""Answers that come close, and answers that mean harm."""

import collections
import json
import pathlib
import random
import time

import pytest

from jax_rlvr.records import Completion, Prompt, user
from jax_rlvr.tasks import graders

NEAR_MISSES = [
  json.loads(line)
  for line in pathlib.Path(__file__)
  .with_name('near_misses.jsonl')
  .read_text()
  .splitlines()
]


def prompt(answer='', question='', **extra) -> Prompt:
  return Prompt(messages=user(question), answer=answer, extra=extra)


def grade(grader, answer, text, question='', truncated=False, extra=None):
  asked = prompt(answer, question, **(extra or {}))
  return grader(asked, Completion(text=text, truncated=truncated))


def needs_math_verify(row) -> bool:
  plain = ('7', '1024', r'\frac{3}{2}', r'50\%', '(3,4)', '[0,1)', '1, 2')
  return row['grader'] == 'Boxed' and row['answer'] not in (
    *plain,
    r'\text{even}',
    '52_8',
    '1:4',
    r'15\mbox{ cm}^2',
  )


@pytest.mark.parametrize('name', ['Number', 'Boxed', 'Choice', 'Exact'])
def test_near_misses_are_many(name):
  assert len(NEAR_MISSES) >= 200
  assert collections.Counter(r['grader'] for r in NEAR_MISSES)[name] >= 20


@pytest.mark.parametrize('symbolic', [False, True])
def test_no_near_miss_is_accepted(symbolic):
  rows = [row for row in NEAR_MISSES if needs_math_verify(row) == symbolic]
  if symbolic:
    pytest.importorskip('math_verify', reason='for answers that are no numbers')
  accepted = []
  for row in rows:
    row = dict(row)
    grader = getattr(graders, row.pop('grader'))(**row.pop('arguments', {}))
    if grade(grader, **row) != 0:
      accepted.append(row)
  assert not accepted


# No fragment holds the answer, and none can make one of two others.
ANSWER = '918273645'
JUNK = (
  'so the answer is',
  ' ',
  '\n',
  '9' * 20,
  '1e999999999',
  '1e-999999999',
  '9**9**9',
  '9^9^9^9',
  '99999!',
  '\\frac{',
  '\\sqrt{' * 30,
  '\\boxed{',
  '\\boxed{}',
  '\\fbox{\\boxed{',
  '}' * 9,
  '{' * 9,
  '(' * 99,
  ')' * 99,
  '$',
  '$$',
  '\\',
  '\0',
  '\ud800',
  '\u202e',
  '\u200f',
  '٣',
  '²',
  '½',
  '-',
  '−',
  '####',
  '<answer>',
  '</answer>',
  '```python\n',
  '```',
  'answer is (',
  'answer is B',
  'A or B',
  '=',
  '/0',
  '%',
  '1,',
  ',234',
  '.',
  'Answer:',
  '\u0301' * 9,
  '\U0001f600',
)
HUGE = (
  '9' * 100_000,
  '{' * 5000,
  '\\boxed{' * 15_000,
  '\\frac{' * 5000 + '1' + '}{2}' * 5000,
  '<answer>' * 10_000,
  '(' * 100_000,
  '-' * 100_000,
  '1,' * 50_000,
  '\u200b' * 100_000,
  'answer is ' * 10_000,
  '```python\n' * 10_000,
  ' ' * 100_000,
  '\n' * 100_000,
  '**' * 50_000,
)
WRONG = (
  ANSWER + '0',
  '1' + ANSWER,
  ANSWER + '²',
  ANSWER + '½',
  '٣' + ANSWER,
  ANSWER[:4] + '\u200b0' + ANSWER[4:],
  ANSWER + '.5',
  '-' + ANSWER,
  ANSWER[::-1],
  f'\\boxed{{{ANSWER}+0}}',
  f'\\boxed{{{ANSWER}1}}}}{{',
  f'<answer>{ANSWER}0-0',
  '',
)


def test_no_grader_crashes_or_errs_on_10_000_hostile_answers():
  draw = random.Random(7)

  def some(choices):
    return choices[int(draw.random() * len(choices))]

  numeric = (
    graders.Number(),
    graders.Boxed(),
    graders.Exact(),
    graders.Exact(after='Answer:', ignore_case=True, ignore_space=False),
  )
  extra = {'target': int(ANSWER), 'numbers': [int(ANSWER[:5]), 7]}
  seconds = []
  for i in range(10_000):
    parts = [some(JUNK) for _ in range(int(draw.random() * 12))]
    if i % 100 == 0:
      parts.insert(int(draw.random() * len(parts)), some(HUGE))
    # What follows a wrong answer may not touch it: '1' + '2' is another.
    text = ''.join(parts) + some((' ', '\n', '. ')) + some(WRONG)
    completion = Completion(text=text, truncated=i % 2 == 0, length=i)
    start = time.process_time()
    for grader in numeric:
      assert grader(prompt(ANSWER), completion) == 0, (grader, text[:500])
      grader.extract(completion)
    assert graders.Countdown()(prompt(**extra), completion) == 0, text[:500]
    graders.Countdown().extract(completion)
    # 'answer is B' is among the junk, '(E)' and 'E' are not.
    assert graders.Choice()(prompt('E'), completion) == 0, text[:500]
    graders.Overlong(max_tokens=100, buffer=50)(prompt(), completion)
    seconds.append(time.process_time() - start)
  assert sorted(seconds)[9_900] < 1
