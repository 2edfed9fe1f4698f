"""What graders accept, what they extract and refuse."""

import pickle
import subprocess
import sys

import pytest

from jax_rlvr.records import Completion, Prompt, user
from jax_rlvr.tasks import graders


def prompt(answer='', question='', **extra) -> Prompt:
  return Prompt(messages=user(question), answer=answer, extra=extra)


def grade(grader, answer, text, question='', truncated=False, extra=None):
  asked = prompt(answer, question, **(extra or {}))
  return grader(asked, Completion(text=text, truncated=truncated))


@pytest.mark.parametrize(
  'answer, text',
  [
    ('72', 'So it is 72.'),
    ('72', r'\boxed{72}'),
    ('72', '#### 72'),
    ('72', 'The answer is **72.0** apples'),
    ('1,234', '1234'),
    ('1234', '1,234'),
    ('-3', '= −3'),
    ('0.5', 'half, .50'),
    ('1/2', '0.5'),
    ('12', '\u200b12\u200b'),
  ],
)
def test_number_accepts(answer, text):
  assert grade(graders.Number(), answer, text) == 1


def test_number_wants_an_end_where_told():
  assert grade(graders.Number(), '7', '7', truncated=True) == 1
  strict = graders.Number(require_end=True)
  assert grade(strict, '7', '7', truncated=True) == 0
  assert grade(strict, '7', '7') == 1


def test_number_extracts_one_text_for_one_number():
  votes = [
    graders.Number().extract(Completion(text=text))
    for text in ('1,000', '1e3', 'is 1000.00', '0.50', 'none')
  ]
  assert votes == ['1000', '1000', '1000', '1/2', None]


def test_number_refuses_an_answer_that_is_none():
  with pytest.raises(ValueError, match="answer 'Paris' is no number"):
    grade(graders.Number(), 'Paris', '7')


@pytest.mark.parametrize(
  'text',
  [
    'The answer is (B).',
    'the answer is B',
    'The answer is B because it is.',
    'Answer: B',
    '**Answer:** B',
    'Answer: **B**',
    'The final answer is: $\\boxed{B}$',
    r'\boxed{\text{(B)}}',
    r'\boxed{b}',
    'The answer is (b).',
    'A is too small.\n\nB',
    'A is too small.\n\n(B)',
    'It is not A, so the answer is option B.',
    'The answer is A? Wait. The answer is B.',
  ],
)
def test_choice_accepts(text):
  assert grade(graders.Choice(), 'B', text) == 1
  assert grade(graders.Choice(), '(B)', text) == 1


def test_choice_checks_its_letters():
  with pytest.raises(ValueError, match='letters='):
    graders.Choice(letters='abc')
  with pytest.raises(ValueError, match="'F' is not one of 'ABCDE'"):
    grade(graders.Choice(), 'F', 'F')


@pytest.mark.parametrize(
  'arguments, answer, text',
  [
    ({}, 'Paris', ' Paris\n'),
    ({}, 'a b', 'a \n b'),
    ({}, '72', '\uff17\uff12'),  # full width
    ({}, 'é', 'e\u0301'),
    ({}, '10²', '10²'),
    ({'ignore_case': True}, 'Straße', 'STRASSE'),
    ({'after': '####'}, '42', '7 #### 8 #### 42'),
    ({'ignore_space': False}, 'a  b', 'a  b'),
  ],
)
def test_exact_accepts(arguments, answer, text):
  assert grade(graders.Exact(**arguments), answer, text) == 1


@pytest.mark.parametrize(
  'text',
  [
    '<answer>1*2*3*4</answer>',
    '<answer> (1 + 3) * 2 * (4 - 1) </answer> <answer>4*3*2/1=24</answer>',
    'First I try.\n4 × 3 × 2 ÷ 1',
    r'$\boxed{\left(1 + 3\right) \times 4 \cdot 2}$ <answer>2*3*4*1</answer>',
    r'\boxed{4 \times 3 \times 2 \div 1 = 24}',
    '<answer>((((1*2))*3)*4)</answer>',
    '<answer>4/(1/(2*3))</answer>',
  ],
)
def test_countdown_accepts(text):
  extra = {'target': 24, 'numbers': [4, 3, 2, 1]}
  assert grade(graders.Countdown(), '', text, extra=extra) == 1


def test_countdown_divides_exactly_and_from_the_left():
  def right(expression, target, *numbers):
    extra = {'target': target, 'numbers': numbers}
    text = f'<answer>{expression}</answer>'
    return grade(graders.Countdown(), '', text, extra=extra)

  assert right('1/3*3', 1, 1, 3, 3) == 1
  assert right('8/4/2', 1, 8, 4, 2) == 1  # (8/4)/2, not 8/(4/2) = 4
  assert right('9-4-3', 2, 9, 4, 3) == 1
  assert right('2+3*4', 14, 2, 3, 4) == 1
  assert right('2*3+4', 10, 2, 3, 4) == 1
  assert right('7/2', 3, 7, 2) == 0


def test_countdown_extracts_expressions():
  extract = graders.Countdown().extract
  assert extract(Completion(text='<answer>1 + 2 = 3</answer>')) == '1+2'
  assert extract(Completion(text='<answer>none</answer>')) is None


def test_countdown_needs_its_extra():
  with pytest.raises(ValueError, match="no integer 'target'"):
    grade(graders.Countdown(), '', '1', extra={'target': 1})


def test_graders_are_values_and_can_be_sent():
  for grader in (
    graders.Number(),
    graders.Boxed(),
    graders.Choice(letters='AB'),
    graders.Exact(after='x'),
    graders.Countdown(),
    graders.Gym(dataset='gcd'),
    graders.Code(timeout_s=1.0),
    graders.Overlong(max_tokens=9, buffer=3),
    graders.Function(path='a:b'),
    graders.Finished(grader=graders.Number()),
  ):
    assert pickle.loads(pickle.dumps(grader)) == grader


def test_import_is_light():
  code = (
    'import jax_rlvr.tasks.graders, sys; '
    "print({'jax', 'sympy', 'numpy'} & set(sys.modules))"
  )
  out = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert out.stdout.strip() == 'set()'
