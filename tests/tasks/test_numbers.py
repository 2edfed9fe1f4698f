"""What the last number of a text is, and how fast it is found."""

import time
from fractions import Fraction

import pytest

from jax_rlvr.tasks.numbers import last_number


@pytest.mark.parametrize(
  'text, expected',
  [
    ('72', '72'),
    ('72.', '72'),
    ('72.0', '72'),
    ('$72', '72'),
    ('**72**', '72'),
    ('####72', '72'),
    (r'\boxed{72}', '72'),
    ('72 apples, in all.', '72'),
    ('72%', '72'),
    ('007', '7'),
    ('first 12, then 13', '13'),
    ('12 or 1.25', '5/4'),
    ('3.14.', '157/50'),
    ('it is .5', '1/2'),
    ('it is -.5', '-1/2'),
    ('No.5', '5'),
    ('...5', '5'),
    ('1.2.3', '3'),
    ('1,234', '1234'),
    ('$1,234,567.50', '2469135/2'),
    ('1,23', '23'),
    ('1,2345', '2345'),
    ('1234,567', '567'),
    ('1, 234', '234'),
    ('-3', '-3'),
    ('−3', '-3'),
    ('= -3', '-3'),
    ('-$3', '-3'),
    ('$-3', '-3'),
    ('**-3**', '-3'),
    ('(-3)', '-3'),
    ('2*-3', '-3'),
    ('7-3', '3'),
    ('7 - 3', '3'),
    ('(7)-3', '3'),
    ('x-3', '3'),
    ('- 3', '3'),
    ('-1,000', '-1000'),
    ('1e3', '1000'),
    ('2.5E-1', '1/4'),
    ('3 eggs', '3'),
    ('1/2', '2'),
    ('8 * 9', '9'),
    ('10:30', '30'),
    ('a1b', '1'),
  ],
)
def test_last_number_reads(text, expected):
  assert last_number(text) == Fraction(expected)


@pytest.mark.parametrize(
  'text', ['', 'none', '-', '$', '.', ',', 'e5', '--', '٣', '²', 'Ⅷ', '½']
)
def test_last_number_is_none_without_ascii_digits(text):
  expected = Fraction(5) if '5' in text else None
  assert last_number(text) == expected


@pytest.mark.parametrize(
  'text',
  [
    '1e999999999',
    '1e-999999999',
    '1e100',
    '7' * 65,
    '7' * 10**6,
    '0.' + '7' * 10**6,
    '1e' + '0' * 10**6 + '5',
    '1' + ',234' * 10**6,
  ],
)
def test_last_number_is_none_where_absurd(text):
  assert last_number('12 ' + text) is None


def test_last_number_keeps_the_largest_it_reads():
  assert last_number('7' * 64) == int('7' * 64)
  assert last_number('1e99') == 10**99


@pytest.mark.parametrize(
  'text',
  ['1' * 10**6, '1,' * 10**6, '-' * 10**6, '$' * 10**6 + '1', '1.' * 10**6],
)
def test_last_number_of_a_hostile_text_is_quick(text):
  # A linear search takes milliseconds, a quadratic one minutes.
  start = time.process_time()
  last_number(text)
  assert time.process_time() - start < 5


def test_last_number_ignores_what_precedes_a_long_text():
  assert last_number('-12 ' + 'so ' * 10**5 + '-13 ' + 'yes ' * 10**5) == -13
