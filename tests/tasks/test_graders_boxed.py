"""Boxed answers that need no math-verify."""

import pytest

from jax_rlvr.records import Completion, Prompt, user
from jax_rlvr.tasks import graders


def grade(answer, text, question='') -> float:
  prompt = Prompt(messages=user(question), answer=answer)
  return graders.Boxed(symbolic=False)(prompt, Completion(text=text))


@pytest.mark.parametrize(
  'answer, content',
  [
    ('7', '7'),
    ('7', '7.0'),
    ('7', ' 7. '),
    ('7', '+7'),
    ('7', 'x = 7'),
    ('7', 'x_{1}=7'),
    ('7', r'\$7'),
    ('7', '$7$'),
    ('7', r'7\text{ meters}'),
    ('7', r'7\mathrm{~m}^2'),
    ('7', r'7^\circ'),
    ('7', r'7\text{ units}'),
    (r'7\text{ cm}', '7'),
    (r'7\text{ cm}', r'7 \text{ cm}'),
    ('-7', '−7'),
    ('10,000', r'10{,}000'),
    ('10000', r'10,\!000'),
    ('10000', r'10\,000'),
    ('10{,}000', '10000'),
    ('0.5', r'\frac{1}{2}'),
    (r'\frac{1}{2}', '0.5'),
    (r'\frac{1}{2}', r'\dfrac{1}{2}'),
    (r'\frac12', '1/2'),
    (r'-\frac{1}{2}', r'\frac{-1}{2}'),
    (r'\frac{6}{4}', r'\frac{3}{2}'),
    (r'\frac{6}{4}', r'\frac{6}{4}'),
    (r'1\frac{1}{2}', r'\frac{3}{2}'),
    ('1.5', r'1\tfrac{1}{2}'),
    (r'50\%', '50'),
    (r'50\%', '50%'),
    (r'(3,4)', r'\left( 3, 4 \right)'),
    (r'(3,4)', '(x, y) = (3, 4.0)'),
    (r'\left[0, 1\right)', '[0,1)'),
    ('[0,1)', r'x \in [0,1)'),
    ('1, 2', '2,1'),
    (r'\{1, 2\}', r'\{2, 1\}'),
    (r'\text{even}', 'even'),
    (r'\text{Evelyn}', r'\text{ evelyn }'),
    ('2x+1', '2x + 1'),
    (r'\sqrt{2}', r'\sqrt{ 2 }'),
    ('52_8', '52_{8}'),
    ('1:4', '1 : 4'),
    (r'15\mbox{ cm}^2', r'15\text{ cm}^{2}'),
    (r'15\mbox{ cm}^2', '15'),
    ('(3,4]', 'x = (3,4]'),
    ('2^{4950}', '2^{4950}'),
  ],
)
def test_boxed_accepts_without_math_verify(answer, content):
  question = 'How many meters, as m?'
  for command in ('boxed', 'fbox'):
    text = f'So $\\{command}{{{content}}}$.'
    assert grade(answer, text, question) == 1, text


def test_boxed_takes_the_last_box():
  text = r'First \boxed{1}, but then we see that it is \boxed{\frac{2}{3}}.'
  assert grade('2/3', text) == 1
  assert grade('1', text) == 0
  assert grade('5', r'\boxed{5} \boxed{5}') == 1
  assert grade('5', r'\boxed{\boxed{5}}') == 1
  both = r'\boxed{1\frac{1}{2}}, or $\boxed{\frac{3}{2}}$'
  assert grade('3/2', both) == 1


def test_boxed_extracts_one_text_for_one_answer():
  votes = [
    graders.Boxed().extract(Completion(text=text))
    for text in (
      r'\boxed{\frac{1}{2}}',
      r'\boxed{0.50}',
      r'\boxed{50\%}',
      r'\boxed{ 2 \sqrt{3} }',
      'none',
    )
  ]
  assert votes == ['1/2', '1/2', '50%', r'2\sqrt{3}', None]
