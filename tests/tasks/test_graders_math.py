"""Expressions compared by math-verify, which may not be installed."""

import json
import pathlib

import pytest

from jax_rlvr.records import Completion, Prompt, user
from jax_rlvr.tasks import graders

MATH_500 = (
  pathlib.Path(__file__).parents[2].parent / 'shared/data/math500/test.jsonl'
)


@pytest.fixture(autouse=True)
def math_verify():
  pytest.importorskip('math_verify', reason='extra math is not installed')


def grade(answer: str, text: str, question: str = '') -> float:
  prompt = Prompt(messages=user(question), answer=answer)
  return graders.Boxed()(prompt, Completion(text=text))


@pytest.mark.parametrize(
  'answer, content',
  [
    (r'\frac{\pi}{2}', r'\pi/2'),
    (r'2\sqrt{3}', r'\sqrt{12}'),
    (r'x^2+2x+1', r'1 + 2x + x^2'),
    (r'\left( 3, \frac{\pi}{2} \right)', r'(3, \frac{1}{2}\pi)'),
    (r'\frac{1}{x+1}', r'(1+x)^{-1}'),
    (r'(-\infty, 2)', r'(-\infty,2)'),
    (r'3+4i', '4i+3'),
    (
      r'\begin{pmatrix} 1 \\ 2 \end{pmatrix}',
      '\\begin{pmatrix}1\\\\\n2\\end{pmatrix}',
    ),
  ],
)
def test_boxed_accepts_equal_expressions(answer, content):
  assert grade(answer, rf'so $\boxed{{{content}}}$') == 1


def test_boxed_does_not_accept_the_question():
  question = r'Simplify $\sqrt{12}$.'
  assert grade(r'2\sqrt{3}', r'\boxed{\sqrt{12}}', question) == 0
  assert grade(r'2\sqrt{3}', r'\boxed{\sqrt3 \cdot 2}', question) == 1


@pytest.mark.parametrize(
  'content',
  [
    '9^9^9^9',
    '9^{9^{9^{9}}}',
    '99999!',
    '5!!!!!!',
    '(9!)^{9!}',
    '10^{100000}',
    r'\frac{' * 19 + '1' + '}{2}' * 19,
    r'\sqrt{' * 300 + '2' + '}' * 300,
    '{' * 5000,
    '7' * 20_000,
    '\ud800',
    '\0',
    '٣' * 50,
    r'\int_0^1 x',
    r'\begin{pmatrix}',
    r'\text{' * 10,
    '}{',
    '$$$',
    '\\',
  ],
)
def test_boxed_survives(content):
  assert grade(r'\sqrt{2}', rf'\boxed{{{content}}}') == 0


@pytest.fixture(scope='module')
def problems():
  if not MATH_500.is_file():
    pytest.skip(f'no MATH-500 in {MATH_500}')
  return [json.loads(line) for line in MATH_500.read_text().splitlines()]


def test_boxed_accepts_the_solutions_of_math_500(problems):
  wrong = [
    row['answer']
    for row in problems
    if not grade(row['answer'], row['solution'], row['problem'])
  ]
  print(f'{len(wrong)} of {len(problems)} not accepted: {wrong}')
  assert len(wrong) <= 0.01 * len(problems)


def test_boxed_accepts_no_solution_of_another_problem(problems):
  others = problems[1:] + problems[:1]
  wrong = [
    (row['answer'], other['answer'])
    for row, other in zip(problems, others, strict=True)
    if row['answer'] != other['answer']
    and grade(row['answer'], other['solution'], row['problem'])
  ]
  print(f'{len(wrong)} of {len(problems)} wrongly accepted: {wrong}')
  assert len(wrong) <= 1
